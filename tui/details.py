"""What is said about one request, one cell of the map, one line of the log."""

from __future__ import annotations

import time
from typing import Any

from rich.text import Text

from workstation.tui.drawing import AMBER, DASH, RED, Glyphs, fitting, seconds
from workstation.tui.frame import Frame

STATES = ("free", "held by one", "shared", "cached")
LEVEL_STYLES = {"warning": AMBER, "error": RED, "debug": "dim"}
MAX_SHOWN = 200


def details(answer: dict[str, Any], glyphs: Glyphs, width: int = 60) -> Text:
    """A request: why it missed, sampling, where its time went, its text if the server shows it, its block tables."""
    row = answer["request"]
    text = Text(f"{row['id']}\n", style="bold")

    def say(line: str, style: str = "") -> None:
        text.append(f"{line}\n", style=f"not bold {style}")

    say(f"client {row['client'] or DASH}   route {row.get('route') or DASH}   state {row['state']}   "
        f"samples {row['samples']}   preempted {row['preemptions']} times")
    say(f"prompt {row['prompt']:,} ({row['cached']:,} from the cache)   generated {row['generated']:,} of at most "
        f"{answer['max_tokens']:,}")
    if answer.get("diverged"):
        say(missed(answer["diverged"]), AMBER)
    text.append_text(_timeline(answer["timeline"], glyphs, width))
    say("")
    say("   ".join(f"{name} {value}" for name, value in answer["sampling"].items() if value is not None))
    say("")
    if answer.get("text"):
        for name, words in (("prompt", answer["text"]["prompt"]), *(("answer", words) for words in answer["text"]["answers"])):
            say(f"{name}, its end: {words.strip() or DASH}", "dim" if name == "prompt" else "")
        say("")
    for sample in answer["samples"]:
        for group, table in enumerate(sample["tables"]):
            shown = " ".join(map(str, table[:MAX_SHOWN]))
            more = f" … {len(table) - MAX_SHOWN} more" if len(table) > MAX_SHOWN else ""
            say(f"sample {sample['index']} group {group}, {len(table)} blocks: {shown}{more}")
    return text


def missed(diverged: dict[str, Any]) -> str:
    """Why less of a prompt was cached than could have been."""
    place = "" if diverged["message"] is None else f"message {diverged['message']}, "
    tokens = f"{diverged['token']:,} token{'' if diverged['token'] == 1 else 's'}"
    return (f"shares {tokens} with an earlier prompt of {diverged['earlier_tokens']:,}, then differs: "
            f"{place}token {diverged['token']:,}")


def _timeline(spent: dict[str, float | None], glyphs: Glyphs, width: int) -> Text:
    """queue, prefill and decode as one bar, with their seconds."""
    colours = {"queue": AMBER, "prefill": "#56B4E9", "decode": "#009E73"}
    total = sum(value or 0.0 for value in spent.values())
    parts = [(spent[name] or 0.0, colour) for name, colour in colours.items()]
    text = Text().append_text(glyphs.bar(parts, total, max(10, min(60, width - 4)))).append("\n")
    for name, colour in colours.items():
        text.append(f"{name} ", style="not bold dim").append(f"{seconds(spent[name])}   ", style=f"not bold {colour}")
    return text.append("\n")


def cell_line(frame: Frame, cell: int, answer: dict[str, Any] | None, width: int) -> Text:
    """A cell of the map in one line: its blocks, their owners with token ranges, references, ages; as many as fit."""
    first, last = frame.span(cell)
    name = f"block {first:,}" if first == last else f"blocks {first:,} to {last:,}"
    if answer is None:
        return Text(f" {name}", no_wrap=True)
    rows = answer["blocks"]
    # What is left is free; it is said only of a cell that is free altogether.
    states = [f"{number} {STATES[state]}" for state in (1, 2, 3) if (number := sum(row["state"] == state for row in rows))]
    parts = [f" {name}: {', '.join(states) or STATES[0]}"]
    owners: dict[str, list[int]] = {}
    for row in rows:
        for owner in row["owners"]:
            span = owners.setdefault(owner["request_id"], [owner["begin"], owner["end"]])
            span[0], span[1] = min(span[0], owner["begin"]), max(span[1], owner["end"])
    parts += [f"{owner[-8:]} tokens {span[0]:,}-{span[1]:,}" for owner, span in list(owners.items())[:3]]
    if len(owners) > 3:
        parts.append(f"{len(owners) - 3} more")
    references = max((row["refs"] for row in rows), default=0)
    if references:
        parts.append(f"{'at most ' if len(rows) > 1 else ''}{references} reference{'' if references == 1 else 's'}")
    ages = [row["age"] for row in rows if row.get("age") is not None]
    if ages:
        youngest, oldest = seconds(min(ages)), seconds(max(ages))
        parts.append(f"age {youngest}" if youngest == oldest else f"age {youngest} to {oldest}")
    return Text(fitting(parts, " · ", width), no_wrap=True)


def log_lines(lines: list[dict[str, Any]]) -> Text:
    """The log, oldest first, in this machine's time."""
    text = Text(no_wrap=True)
    for number, line in enumerate(lines):
        when = time.strftime("%H:%M:%S", time.localtime(line["time"]))
        style = LEVEL_STYLES.get(line["level"], "")
        text.append("\n" if number else "").append(f" {when} {line['level'].upper():<7} {line['text']}", style=style)
    return text
