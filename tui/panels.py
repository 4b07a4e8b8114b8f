"""What each panel says, as Text made from one frame. Pure: the widgets only place it, and `--once` prints it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from rich.style import Style
from rich.text import Text

from workstation.tui.drawing import (
    AMBER,
    COLOURS,
    GREEN,
    HEAT_COLOURS,
    RED,
    Glyphs,
    clock,
    count,
    fitting,
    gib,
    percent,
    seconds,
)
from workstation.tui.frame import Frame
from workstation.tui.request_table import is_stuck

STATE_STYLES = {"ready": f"bold {GREEN}", "dead": f"bold {RED}", "down": f"bold {RED}"}
STATE_NAMES = {"starting": "LOADING"}
STAGES = {"weights": "reading weights", "kernels": "compiling kernels", "graphs": "capturing graphs"}
HISTORY, SECOND = 120, 0.9  # two minutes
FULL_SHARE, FULL_SECONDS = 0.9, 30.0


def _series() -> deque[float]:
    return deque(maxlen=HISTORY)


@dataclass(slots=True)
class History:
    """What one frame does not say: two minutes for sparklines, and what has not moved. `feed` each new frame."""

    generated: deque[float] = field(default_factory=_series)
    prompt: deque[float] = field(default_factory=_series)
    rows: deque[float] = field(default_factory=_series)
    step: deque[float] = field(default_factory=_series)
    load: deque[float] = field(default_factory=_series)
    tokens: deque[float] = field(default_factory=_series)
    decode: deque[float] = field(default_factory=_series)
    prefill: deque[float] = field(default_factory=_series)
    full_since: float | None = None
    _fed: float = -SECOND
    _moved: dict[str, tuple[int, float]] = field(default_factory=dict)  # id → (tokens, when they last became more)

    def feed(self, frame: Frame) -> None:
        """Take a frame; those within a second of the last one are not needed."""
        speed, batch, gpu, now = frame.data["speed"], frame.data["batch"], frame.data["gpu"], frame.data["time"]
        if 0 <= now - self._fed < SECOND:
            return
        self._fed = now
        self.generated.append(speed["generate_rate"] or 0.0)
        self.prompt.append(speed["prompt_rate"] or 0.0)
        self.rows.append(batch["running"])
        took, tokens, prefill = last_step(frame)
        self.step.append(took or 0.0)
        self.load.append((gpu or {}).get("utilization") or 0.0)
        self.tokens.append(tokens)
        self.prefill.append(prefill)
        self.decode.append(tokens - prefill)
        if held_share(frame) <= FULL_SHARE:
            self.full_since = None
        elif self.full_since is None:
            self.full_since = now
        self._follow(frame, now)

    def _follow(self, frame: Frame, now: float) -> None:
        moved = {}
        for row in frame.requests:
            made = row["computed"] + row["generated"]
            before = self._moved.get(row["id"])
            moved[row["id"]] = before if before is not None and before[0] == made else (made, now)
        self._moved = moved

    def stuck(self, frame: Frame) -> set[str]:
        """Requests that wait for long or have made no token for long."""
        now = frame.data["time"]
        return {row["id"] for row in frame.requests if is_stuck(row, now - self._moved.get(row["id"], (0, now))[1])}


def last_step(frame: Frame) -> tuple[float | None, int, int]:
    """Seconds of a step, its tokens, and those of prompts among them; nothing while the engine is idle."""
    now = frame.data["batch"]
    if not now["running"]:
        return None, 0, 0
    return now["step_seconds"], now["step_tokens"], now.get("step_prompt_tokens", 0)


def held_share(frame: Frame) -> float:
    blocks = frame.data["blocks"]
    return blocks["held"] / blocks["total"] if blocks["total"] else 0.0


def advice(frame: Frame, history: History, stuck: set[str]) -> str:
    """One line about what is stuck or full, "" when nothing is."""
    share = held_share(frame)
    if history.full_since is not None and frame.data["time"] - history.full_since >= FULL_SECONDS:
        return f"KV {percent(share)} held for {seconds(frame.data['time'] - history.full_since)}: lower --max-num-seqs or " \
               f"--max-model-len, or use --kv-cache-dtype fp8"
    waiting = sum(row["id"] in stuck and row["state"] in ("waiting", "preempted") for row in frame.requests)
    if waiting:
        batch = frame.data["batch"]
        why = "the KV pool is full" if share > FULL_SHARE else "the KV pool has no room for all that they may need"
        if batch["running"] >= frame.data["model"]["max_num_seqs"]:
            why = "all rows are taken (--max-num-seqs)"
        elif batch["step_tokens"] >= batch["budget"]:
            why = "prompts of others run first (--max-num-batched-tokens)"
        return f"{waiting} waiting for more than 10 s: {why}"
    return f"{len(stuck)} without a new token for more than 10 s" if stuck else ""


def head(frame: Frame | None, url: str, trouble: str, width: int, age: float) -> Text:
    """One line: model and device at the left; state, uptime and address at the right as far as there is room."""
    if frame is None:
        return Text(f" ws  {url}  {trouble}", style=f"bold {AMBER}", no_wrap=True, overflow="ellipsis")
    name, right = f" ws  {frame.data['model']['name']}", _state(frame, trouble, width, age)
    kinds = _kinds(frame, url, width - right.cell_len - len(name) - 1)
    if url in kinds:
        right.append(f" {url} ")
    text = Text(name, style="bold", no_wrap=True)
    text.append("".join(f" · {kind}" for kind in kinds if kind != url), style="not bold")
    text.truncate(max(0, width - right.cell_len - 1), overflow="ellipsis")
    return text.append(" " * max(0, width - text.cell_len - right.cell_len)).append_text(right)


def _kinds(frame: Frame, url: str, room: int) -> list[str]:
    """Weights, cache, card and address, those that fit; the cache's type leaves first, then the address."""
    model = frame.data["model"]
    cache = model.get("kv_cache_dtype") or ""
    shown = [model.get("quantization") or model["dtype"], f"{cache} KV" if cache not in ("", model["dtype"]) else "",
             model["device_name"].removeprefix("NVIDIA "), url]
    chosen = []
    for place in (0, 2, 3, 1):
        if shown[place] and len(shown[place]) + 3 <= room:
            room -= len(shown[place]) + 3
            chosen.append(place)
    return [shown[place] for place in sorted(chosen)]


def _state(frame: Frame, trouble: str, width: int, age: float) -> Text:
    """What the server does and for how long, in the most words that leave room for the model's name."""
    server, batch = frame.data["server"], frame.data["batch"]
    state = "down" if trouble else server["state"]
    text = Text(style=STATE_STYLES["down"] if trouble else "", no_wrap=True)
    text.append(f"● {STATE_NAMES.get(state, state.upper())}", style=STATE_STYLES.get(state, f"bold {AMBER}"))
    if trouble:
        return text.append(f"  last frame {seconds(age)} ago " if width >= 40 else " ")
    if server.get("loading"):
        loading = server["loading"]
        words = [f"  {progress(frame)} ", f"  {percent(loading['done'] / max(1, loading['total']))} "]
    else:
        running, waiting = batch["running"], batch["waiting"]
        words = [f"  {clock(server['uptime'])}  {running} running {waiting} waiting ", f"  {running} run {waiting} wait "]
    return text.append(next((word for word in words if text.cell_len + len(word) + 14 <= width), " "))


def progress(frame: Frame) -> str:
    """How far the stage of loading has come, in words."""
    loading = frame.data["server"]["loading"]
    done, total, left = loading["done"], loading["total"], loading["seconds_left"]
    if loading["stage"] != "weights":
        return f"{STAGES.get(loading['stage'], loading['stage'])}: {done} of {total}"
    if total and done >= total:
        return "weights read"
    return f"{percent(done / total if total else 0.0)}  {gib(done)}/{gib(total)} GiB  {seconds(left)} left"


def loading_bar(frame: Frame, width: int, glyphs: Glyphs) -> Text:
    """In the map's place while there is no pool yet."""
    loading = frame.data["server"].get("loading")
    if loading is None:
        return Text(" the engine is starting", no_wrap=True)
    bar = glyphs.bar([(loading["done"], COLOURS["owned"])], loading["total"], max(10, width - 2))
    reading = loading["stage"] == "weights" and loading["done"] < loading["total"]
    what = f"{STAGES['weights']}: " if reading else ""
    return Text(" ", no_wrap=True).append_text(bar).append(f"\n {what}{progress(frame)}")


def map_foot(frame: Frame | None, width: int, glyphs: Glyphs, border: Style) -> Text:
    """The lower border of the map's box. Not a border's subtitle, whose every change draws the whole box again.

    border: the colour of the box's other borders.
    """
    left, line, right = "+-+" if glyphs.ascii else "╰─╯"
    words = f" {blocks_line(frame, width - 6)} " if frame is not None and frame.count else ""
    text = Text(no_wrap=True).append(left + line * max(0, width - 3 - len(words)), style=border)
    return text.append(words).append(line + right, style=border)


def blocks_line(frame: Frame, width: int) -> str:
    """The pool in figures, as many of them as there is room for."""
    blocks, speed = frame.data["blocks"], frame.data["speed"]
    parts = [f"{percent(held_share(frame))} held", f"waste {blocks['waste'] * 100:.1f} %", f"hits {percent(speed['hit_rate'])}",
             f"evicted {count(speed['eviction_rate'])}/s", f"preempted {count(speed['preemption_rate'])}/s",
             f"{blocks['total']:,} × {blocks['size']} tokens"]
    return fitting(parts, " · ", width)


def legend(frame: Frame, glyphs: Glyphs, shown: int, heat: bool, width: int) -> Text:
    """What the shapes mean. shown: cells that the map draws."""
    blocks = frame.data["blocks"]
    text = Text(no_wrap=True)
    if heat:
        text.append(f" {glyphs.bars[0]} used last ", style=HEAT_COLOURS[0])
        text.append(f" {glyphs.bars[-1]} evicted next ", style=HEAT_COLOURS[-1])
        text.append(f" {glyphs.held} held  ").append(f"{glyphs.shapes['free'][0]} free ")
    else:
        own = blocks["held"] - blocks["shared"]
        for name, label, number in (("owned", "one request", own), ("shared", "shared", blocks["shared"]),
                                    ("cached", "cached", blocks["cached"]), ("free", "free", blocks["free"])):
            shape, words = f" {glyphs.shapes[name][0]} ", f"{label} {number:,} " if width >= 66 else f"{number:,} "
            text.append(shape, style=COLOURS[name]).append(words)
    each = blocks["total"] / max(1, shown)
    scale = f"  a cell = {f'{each:.3g}' if each < 100 else f'{each:,.0f}'} block{'' if each == 1 else 's'}"
    return text.append(scale, style="dim") if text.cell_len + len(scale) <= width else text


def batch(frame: Frame, history: History, glyphs: Glyphs, width: int, lines: int = 3) -> Text:
    """Rows, the step's time and tokens. Two lines leave room for fewer sparklines."""
    now, rows = frame.data["batch"], frame.data["model"]["max_num_seqs"]
    took, tokens, prefill = last_step(frame)
    filled = f"rows {now['running']:>{len(str(rows))}}/{rows} "
    used = f"{tokens:>{len(str(now['budget']))}}/{now['budget']}"
    if lines < 3:
        first = fitting([f" {filled.strip()}", f"wait {now['waiting']}", f"preempted {now['preempted']}"], " ", width)
        second = fitting([f" step {seconds(took):>6}", f"budget {used}"], "  ", width)
        room = min(24, width - 34)
        if room < 4:
            return Text(f"{first}\n{second}", no_wrap=True)
        text = Text(f"{first:<33}", no_wrap=True).append(glyphs.spark(history.rows, room), style=COLOURS["owned"])
        return text.append(f"\n{second:<33}").append(glyphs.spark(history.step, room), style=AMBER)
    half = width // 2
    text = Text(f" {filled} wait {now['waiting']}  preempted {now['preempted']} ".ljust(max(37, half)), no_wrap=True)
    text.append(f" {glyphs.spark(history.rows, width - text.cell_len - 2)}\n", style=COLOURS["owned"])
    text.append_text(gauge("step", seconds(took), glyphs.spark(history.step, half - 19), AMBER))
    text.append_text(gauge("budget", used, glyphs.spark(history.tokens, width - half - 19, now["budget"]), AMBER)).append("\n")
    text.append_text(gauge("decode", f"{tokens - prefill:,}", glyphs.spark(history.decode, half - 19), GREEN))
    return text.append_text(gauge("prefill", f"{prefill:,}", glyphs.spark(history.prefill, width - half - 19), GREEN))


def gauge(name: str, value: str, spark: str, style: str) -> Text:
    """A name, its value at a fixed place and the last two minutes; 19 characters and the sparkline's."""
    return Text(f" {name:<7}{value:>9} ", no_wrap=True).append(spark, style=style).append(" ")


def speed(frame: Frame, history: History, glyphs: Glyphs, width: int, lines: int = 3) -> Text:
    """Tokens a second of answers and of prompts, and latencies."""
    now = frame.data["speed"]
    if lines < 3:
        room = min(20, (width - 33) // 2)
        text = Text(f" gen {count(now['generate_rate']):>6} tok/s ", no_wrap=True)
        text.append(glyphs.spark(history.generated, room if room > 2 else width - 18), style=GREEN)
        if room > 2:
            text.append(f" prompt {count(now['prompt_rate']):>6} ")
            text.append(glyphs.spark(history.prompt, room), style=COLOURS["owned"])
    else:
        text = Text(no_wrap=True)
        for name, key, past, style in (("generate", "generate_rate", history.generated, GREEN),
                                       ("prompt", "prompt_rate", history.prompt, COLOURS["owned"])):
            text.append(f"{chr(10) if text else ''} {name:<8} {count(now[key]):>9} tok/s ")
            text.append(glyphs.spark(past, width - 28), style=style)
    spreads = [f"{name} {pair(now[key]['p50'], now[key]['p99'])}"
               for name, key in (("TTFT", "ttft"), ("ITL", "itl"), ("e2e", "e2e"))]
    text.append(f"\n {fitting(spreads, ' · ', width - 1)}")
    return text.append("  p50/p99", style="dim") if width >= len(" · ".join(spreads)) + 10 else text


def pair(middle: float | None, high: float | None) -> str:
    """p50 and p99, the unit once where it is the same: 84/310 ms."""
    first, second = seconds(middle), seconds(high)
    unit = first.rpartition(" ")[2]
    return f"{first.removesuffix(f' {unit}')}/{second}" if unit and second.endswith(f" {unit}") else f"{first}/{second}"


def age_of(frame: Frame | None) -> float:
    """Seconds since the engine made the frame."""
    return max(0.0, time.time() - frame.data["time"]) if frame is not None else 0.0
