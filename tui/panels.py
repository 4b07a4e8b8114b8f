"""What each panel says, as Text made from one frame. Pure: the widgets only place it, and `--once` prints it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from rich.text import Text

from workstation.tui.drawing import COLOURS, DASH, Glyphs, clock, count, gib, percent, seconds
from workstation.tui.frame import Frame

STATE_STYLES = {"ready": "bold #009E73", "dead": "bold #D55E00", "down": "bold #D55E00"}
HISTORY = 120
ORDERS = ("age", "client", "state", "prompt", "generated", "rate", "blocks")
STUCK_SECONDS = 10.0


@dataclass(slots=True)
class History:
    """The last two minutes or less, for sparklines. `feed` with every new frame."""

    decode: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    prompt: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    rows: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    step: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))

    def feed(self, frame: Frame) -> None:
        speed, batch = frame.data["speed"], frame.data["batch"]
        self.decode.append(speed["generate_rate"] or 0.0)
        self.prompt.append(speed["prompt_rate"] or 0.0)
        self.rows.append(batch["running"])
        self.step.append(batch["step_seconds"])


def head(frame: Frame | None, url: str, trouble: str, width: int, age: float) -> Text:
    """One line: model and device at the left; state, uptime and address at the right as far as there is room."""
    if frame is None:
        return Text(f" ws  {url}  {trouble or 'connecting'}", style=STATE_STYLES["down"] if trouble else "", no_wrap=True)
    model, server, batch = frame.data["model"], frame.data["server"], frame.data["batch"]
    text = Text(f" ws  {model['name']} · {model['dtype']}", style="bold", no_wrap=True)
    if width >= 100:
        text.append(f" · {model['device_name']}", style="not bold")
    state = "down" if trouble else server["state"]
    right = Text(no_wrap=True)
    right.append(f"● {state.upper()}", style=STATE_STYLES.get(state, "bold #E69F00"))
    if trouble:
        right.append(f"  last frame {seconds(age)} ago ")
    else:
        right.append(f"  {clock(server['uptime'])}  {batch['running']} running {batch['waiting']} waiting ")
    if width >= 100:
        right.append(f" {url} ")
    text.truncate(max(10, width - right.cell_len), overflow="ellipsis")
    return text.append(" " * max(0, width - text.cell_len - right.cell_len)).append_text(right)


def memory(frame: Frame, width: int, glyphs: Glyphs, lines: int) -> Text:
    """The card's memory as one bar (the process's when there is no card), and under it the names and readings."""
    model, gpu = frame.data["model"], frame.data["gpu"]
    weights, kv = model["weight_bytes"], model["kv_bytes"]
    own = weights + kv
    if gpu is None or gpu["total_bytes"] is None:
        used = frame.data["process_bytes"]
        total, right = used or own, f"process {gib(used)} GiB"
        name, other, readings = "RAM ", max(0, total - own), "no NVIDIA GPU: util -  temp -  power -"
    else:
        used, total = gpu["used_bytes"] or own, gpu["total_bytes"]
        name, other, right = "VRAM", max(0, used - own), f"{gib(used)}/{gib(total)} GiB"
        readings = (f"util {percent(gpu['utilization'])}  {count(gpu['temperature_celsius'])} °C  "
                    f"{count(gpu['power_watts'])}/{count(gpu['power_limit_watts'])} W  "
                    f"{DASH if gpu['joules_per_token'] is None else gpu['joules_per_token']} J/token")
    text = Text(f" {name} ", no_wrap=True)
    parts = [(weights, "#56B4E9"), (kv, "#CC79A7"), (other, "#E69F00")]
    text.append_text(glyphs.bar(parts, total, max(8, width - len(right) - 8))).append(f" {right}")
    if lines > 1:
        text.append("\n weights ", style="dim").append(gib(weights), style="#56B4E9").append("  KV ", style="dim")
        text.append(gib(kv), style="#CC79A7").append("  other ", style="dim").append(gib(other), style="#E69F00")
        text.append(f"   {readings}", style="dim")
    return text


def blocks_line(frame: Frame) -> str:
    """The map's bottom line."""
    blocks, speed = frame.data["blocks"], frame.data["speed"]
    total, cells = blocks["total"], max(1, len(frame.cells))
    held = blocks["held"] / total if total else 0.0
    return (f"{percent(held)} held · waste {blocks['waste'] * 100:.1f} % · hits {percent(speed['hit_rate'])} · "
            f"evicted {count(speed['eviction_rate'])}/s · {total / cells:.3g} blocks/cell")


def legend(frame: Frame, glyphs: Glyphs) -> Text:
    blocks = frame.data["blocks"]
    own = blocks["held"] - blocks["shared"]
    text = Text(no_wrap=True)
    for name, label, number in (("owned", "one request", own), ("shared", "shared", blocks["shared"]),
                                ("cached", "cached", blocks["cached"]), ("free", "free", blocks["free"])):
        text.append(f" {glyphs.shapes[name][0]} ", style=COLOURS[name]).append(f"{label} {number:,} ")
    return text


def batch(frame: Frame, history: History, glyphs: Glyphs, width: int) -> Text:
    now = frame.data["batch"]
    room = max(4, min(24, width - 34))
    text = Text(f" rows {now['running']}/{frame.data['model']['max_num_seqs']} wait {now['waiting']} "
                f"preempted {now['preempted']}".ljust(34), no_wrap=True)
    text.append(glyphs.spark(history.rows, room), style="#56B4E9")
    text.append(f"\n step {seconds(now['step_seconds'])}  budget {now['step_tokens']}/{now['budget']}".ljust(35))
    return text.append(glyphs.spark(history.step, room), style="#E69F00")


def speed(frame: Frame, history: History, glyphs: Glyphs, width: int) -> Text:
    now = frame.data["speed"]
    room = max(4, min(20, (width - 34) // 2))
    text = Text(f" gen {count(now['generate_rate'])} tok/s ", no_wrap=True)
    text.append(glyphs.spark(history.decode, room), style="#009E73")
    text.append(f" prompt {count(now['prompt_rate'])} ").append(glyphs.spark(history.prompt, room), style="#56B4E9")
    spreads = [f"{name} {seconds(now[key]['p50'])}/{seconds(now[key]['p99'])}"
               for name, key in (("TTFT", "ttft"), ("ITL", "itl"), ("e2e", "e2e"))]
    text.append("\n " + " · ".join(spreads))
    if width >= 60:
        text.append("  p50/p99", style="dim")
    return text


def chosen(rows: list[dict[str, Any]], words: str, order: str) -> list[dict[str, Any]]:
    """The rows whose id, client or state holds `words`, largest of `order` first (names in alphabetical order)."""
    wanted = words.lower()
    found = [row for row in rows if wanted in f"{row['id']} {row['client']} {row['state']}".lower()]
    if order in ("client", "state"):
        return sorted(found, key=lambda row: (row[order], -row["age"]))
    return sorted(found, key=lambda row: -(row[order] or 0))


def columns(width: int) -> list[str]:
    """The table's columns for a screen this wide."""
    if width < 100:
        return ["id", "client", "state", "prompt", "made", "tok/s", "age"]
    return ["id", "client", "state", "prompt", "cached", "made", "tok/s", "TTFT", "blocks", "age"]


def row_cells(row: dict[str, Any], width: int) -> list[Text]:
    """One request, one Text a column; amber when it has waited for long."""
    style = "#E69F00" if row["state"] in ("waiting", "preempted") and row["age"] > STUCK_SECONDS else ""
    cached = percent(row["cached"] / row["prompt"]) if row["ttft"] is not None and row["prompt"] else DASH
    values = {
        "id": row["id"][-8:], "client": (row["client"] or DASH)[:24], "state": row["state"], "prompt": count(row["prompt"]),
        "cached": cached, "made": count(row["generated"]), "tok/s": count(row["rate"]), "TTFT": seconds(row["ttft"]),
        "blocks": count(row["blocks"]), "age": seconds(row["age"]),
    }
    return [Text(values[name], style=style, justify="left" if name in ("id", "client", "state") else "right", no_wrap=True)
            for name in columns(width)]


def details(answer: dict[str, Any]) -> Text:
    """A request's details: sampling, where its time went, its block tables."""
    row, spent = answer["request"], answer["timeline"]
    text = Text(f"{row['id']}\n", style="bold")
    text.append(f"client {row['client'] or DASH}   state {row['state']}   samples {row['samples']}   "
                f"preempted {row['preemptions']} times\n", style="not bold")
    text.append(f"prompt {row['prompt']:,} ({row['cached']:,} from the cache)   generated {row['generated']:,} of at most "
                f"{answer['max_tokens']:,}\n", style="not bold")
    text.append(f"queue {seconds(spent['queue'])}   prefill {seconds(spent['prefill'])}   "
                f"decode {seconds(spent['decode'])}\n\n", style="not bold")
    given = "   ".join(f"{name} {value}" for name, value in answer["sampling"].items() if value is not None)
    text.append(f"{given}\n\n", style="not bold")
    for sample in answer["samples"]:
        for group, table in enumerate(sample["tables"]):
            shown = " ".join(map(str, table[:200])) + (f" … {len(table) - 200} more" if len(table) > 200 else "")
            text.append(f"sample {sample['index']} group {group}, {len(table)} blocks: {shown}\n", style="not bold")
    return text
