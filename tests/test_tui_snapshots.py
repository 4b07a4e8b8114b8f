"""Rows of the screen as text, at three sizes and in every state; colours as SVG in a few, with the Textual that drew them.

`python tests/test_tui_snapshots.py` draws them anew.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import textual
from dashboards import NOW, client, machine_in, said, screen_text
from textual.pilot import Pilot

from workstation.cli.dashboard import picture
from workstation.tui.app import Dashboard

FOLDER = Path(__file__).parent / "snapshots"
SIZES = [(80, 24), (120, 40), (200, 60)]
PICTURES = {("ready", (120, 40)), ("down", (120, 40))}  # healthy, and greyed
TEXTUAL = "8.2.8"
STATES = ["loading", "ready", "full", "down", "no-gpu", "four-gpus"]


@contextmanager
def stopped_clock() -> Iterator[None]:
    """Ages and the log's times are the same in every run and every zone."""
    with patch("workstation.tui.panels.time.time", lambda: NOW), patch.dict(os.environ, {"TZ": "UTC"}):
        time.tzset()
        yield
    time.tzset()


def drawn(state: str, size: tuple[int, int]) -> tuple[str, str]:
    """The screen once nothing on it moves any more: its rows, and as SVG."""
    machine = machine_in(state)
    seen: list[str] = []
    pictures: list[str] = []

    async def settled(app: Dashboard, pilot: Pilot[str]) -> None:
        while len(seen) < 3 or len(set(seen[-3:])) > 1:
            await pilot.pause(0.4)
            seen.append("\n".join(line.rstrip() for line in screen_text(app)) + "\n")

    async def go() -> None:
        app = Dashboard(client(machine), rate=10)
        async with app.run_test(size=size) as pilot:
            while app.newest is None or "watch out" not in said(app, "log"):
                await pilot.pause(0.05)
            machine.down = state == "down"
            await settled(app, pilot)
            pictures.append(picture(app))

    with stopped_clock():
        asyncio.run(asyncio.wait_for(go(), 60))
    return seen[-1], pictures[-1]


def path_of(state: str, size: tuple[int, int], kind: str = "txt") -> Path:
    return FOLDER / f"dashboard-{state}-{size[0]}x{size[1]}.{kind}"


# Whether a request's details were there before the server went is a matter of chance, and only the widest screen shows them.
SHOWN = [(state, size) for state in STATES for size in SIZES if (state, size[0]) != ("down", 200)]


@pytest.mark.parametrize(("state", "size"), SHOWN, ids=lambda item: item if isinstance(item, str) else f"{item[0]}x{item[1]}")
def test_the_screen_looks_as_it_did(state: str, size: tuple[int, int]) -> None:
    rows, svg = drawn(state, size)
    assert rows == path_of(state, size).read_text(encoding="utf-8")
    if (state, size) in PICTURES and textual.__version__ == TEXTUAL:
        assert svg == path_of(state, size, "svg").read_text(encoding="utf-8")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for state, size in SHOWN:
        rows, svg = drawn(state, size)
        path_of(state, size).write_text(rows, encoding="utf-8")
        if (state, size) in PICTURES:
            assert textual.__version__ == TEXTUAL, f"Textual {TEXTUAL} draws the pictures"
            path_of(state, size, "svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
