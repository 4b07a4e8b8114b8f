"""The card's panels: memory as a stacked bar, readings, other cards, and who else is on it. A failed query is a dash."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from workstation.tui.drawing import AMBER, DASH, GIB, Glyphs, count, gib, percent
from workstation.tui.frame import Frame

MIB = 1 << 20
# Purpose → the colour of its part of the bar; glyphs of the bar differ too, and none of them is a block's.
PARTS = (("weights", "#56B4E9"), ("KV", "#CC79A7"), ("graphs", "#F0E442"), ("work", "#009E73"), ("others", "#E69F00"))


def shares(frame: Frame) -> tuple[str, list[float], float, float | None]:
    """(name, bytes of each of PARTS, total, used): of the card from NVML and the plan, else of the engine's process."""
    model, gpu = frame.data["model"], frame.data["gpu"]
    plan = model["plan"]
    weights, kv = model["weight_bytes"], model["kv_bytes"]
    if gpu is None or gpu["total_bytes"] is None:
        used = frame.data["process_bytes"]
        total = max(used or 0, weights + kv)
        return "RAM", [weights, kv, 0, 0, max(0, total - weights - kv)], total, used
    graphs = plan.get("graphs", 0)
    work = sum(plan.get(name, 0) for name in ("workspace", "logits", "sampler", "context"))
    own = weights + kv + graphs + work
    used = gpu["used_bytes"] if gpu["used_bytes"] is not None else own
    measured = gpu.get("own_bytes")
    others = max(0, used - (measured if measured is not None else own))
    work = max(0, min(work, used - others - weights - kv - graphs))
    return "VRAM", [weights, kv, graphs, work, others], gpu["total_bytes"], used


def memory(frame: Frame, width: int, glyphs: Glyphs, tall: bool = True) -> Text:
    """The bar, under it (in tall panels) what its parts are, then a bar for each of the other cards."""
    name, parts, total, used = shares(frame)
    right = f"{gib(used)}/{gib(total)} GiB" if name == "VRAM" else f"process {gib(used)} GiB"
    if not tall and width >= 70:
        right += _short(frame)
    own = [card["index"] for card in frame.data.get("cards", []) if card["own"]]
    label = f"GPU{own[0]}" if own and _other_cards(frame) else name
    text = Text(f" {label} ", no_wrap=True)
    colours = [colour for _, colour in PARTS]
    bar = glyphs.bar(list(zip(parts, colours, strict=True)), total, max(8, width - len(right) - len(label) - 4))
    text.append_text(bar).append(f" {right}")
    if tall:
        text.append("\n")
        for (part, colour), size in zip(PARTS, parts, strict=True):
            if size or part in ("weights", "KV"):
                text.append(f" {part} ", style="dim").append(gib(size), style=colour)
        if used is not None:
            text.append("  free ", style="dim").append(gib(max(0, total - used)) if name == "VRAM" else DASH)
    others, room = _other_cards(frame), memory_lines(frame, tall) - (2 if tall else 1)
    for card in others[:room if len(others) <= room else room - 1]:
        text.append("\n").append_text(_card_line(card, width, glyphs))
    if len(others) > room:
        text.append(f"\n {len(others) - room + 1} more cards: g shows them", style="dim")
    return text


def memory_lines(frame: Frame, tall: bool) -> int:
    """How many lines the panel wants."""
    return (2 if tall else 1) + min(4 if tall else 3, len(_other_cards(frame)))


def _other_cards(frame: Frame) -> list[dict[str, Any]]:
    return [card for card in frame.data.get("cards", []) if not card["own"]]


def _card_line(card: dict[str, Any], width: int, glyphs: Glyphs) -> Text:
    total, used = card["total_bytes"], card["used_bytes"]
    right = f"{gib(used)}/{gib(total)} GiB  {percent(card['utilization'])}"
    text = Text(f" GPU{card['index']} ", no_wrap=True)
    bar = glyphs.bar([(used or 0, PARTS[4][1])], total or 0, max(8, width - len(right) - 8))
    return text.append_text(bar).append(f" {right}")


def _short(frame: Frame) -> str:
    gpu = frame.data["gpu"]
    if gpu is None:
        return "  no NVIDIA GPU"
    return f"  {percent(gpu['utilization'])} {count(gpu['temperature_celsius'])} °C {count(gpu['power_watts'])} W"


def readings(frame: Frame, load: str, width: int) -> Text:
    """Two lines. load: a sparkline of the card's use."""
    gpu = frame.data["gpu"]
    if gpu is None:
        return Text(" no NVIDIA GPU\n util -  temp -  power -", style="dim", no_wrap=True)
    text = Text(f" util {percent(gpu['utilization'])} ", no_wrap=True)
    text.append(load, style=PARTS[0][1]).append(f" mem {percent(gpu.get('memory_utilization'))}  fan {percent(gpu.get('fan'))}")
    clocks = count(gpu.get("clock_mhz"))
    if width >= 56:
        clocks += f"/{count(gpu.get('memory_clock_mhz'))}"
    parts = [f"{count(gpu['temperature_celsius'])} °C", f"{count(gpu['power_watts'])}/{count(gpu['power_limit_watts'])} W",
             f"{clocks} MHz", f"{_joules(gpu)} J/token"]
    apart = "  ".join(parts)
    return text.append(f"\n {apart if len(apart) < width else ' '.join(parts)}")


def _joules(gpu: dict[str, Any]) -> str:
    joules = gpu["joules_per_token"]
    return DASH if joules is None else f"{joules:.3g}"


def _rate(value: float | None) -> str:
    """Bytes a second, such as 3.1G or 220M."""
    if value is None:
        return DASH
    return f"{value / GIB:.1f}G" if value >= GIB else f"{value / MIB:.0f}M"


def throttling(frame: Frame) -> str:
    """Why the card is held back."""
    gpu = frame.data["gpu"]
    if gpu is None:
        return ""
    reason = gpu.get("throttle")
    return "throttling -" if reason is None else f"throttled: {reason}" if reason else "no throttling"


def bottom_line(frame: Frame, width: int) -> str:
    """What stands in the panel's lower border: the traffic with the host, where there is room for it, and throttling."""
    gpu = frame.data["gpu"]
    if gpu is None:
        return ""
    whole = f"PCIe ↓{_rate(gpu.get('pcie_read'))} ↑{_rate(gpu.get('pcie_write'))} · {throttling(frame)}"
    return whole if len(whole) <= width - 4 else throttling(frame)


def processes(answer: dict[str, Any], frame: Frame | None) -> Text:
    """The page of the card: all readings, the machine's cards, and the card's processes."""
    text = Text()
    if frame is not None and frame.data["gpu"] is not None:
        gpu = frame.data["gpu"]
        text.append(f"{gpu['name']}  {gpu.get('uuid') or ''}\n", style="bold")
        text.append(f"PCIe {_rate(gpu.get('pcie_read'))}/s in, {_rate(gpu.get('pcie_write'))}/s out   memory clock "
                    f"{count(gpu.get('memory_clock_mhz'))} MHz   fan {percent(gpu.get('fan'))}   {throttling(frame)}\n")
    if not answer["cards"]:
        return text.append("no NVIDIA GPU is in use\n")
    text.append("\n")
    for card in answer["cards"]:
        text.append(f"{'*' if card['own'] else ' '} GPU{card['index']}  {card['name']}  {gib(card['used_bytes'])}/"
                    f"{gib(card['total_bytes'])} GiB  {percent(card['utilization'])}\n")
    text.append(f"\n{'PID':>8}  {'USER':<12}  {'COMMAND':<20}  {'MiB':>8}\n", style="bold")
    for row in answer["processes"] or []:
        size = None if row["bytes"] is None else row["bytes"] / MIB
        text.append(f"{row['pid']:>8}  {row['user'] or DASH:<12.12}  {row['command'] or DASH:<20.20}  {count(size):>8}"
                    f"{'  this server' if row['own'] else ''}\n", style="" if row["own"] else AMBER)
    if answer["processes"] is None:
        text.append("a recording holds no processes\n", style="dim")
    elif not answer["processes"]:
        text.append("none that this system shows\n", style="dim")
    return text
