"""Rows of the screen as text, at three sizes and in every state. `python tests/test_tui_snapshots.py` draws them anew."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
from test_tui import Machine, client, row, said, screen_text
from textual.pilot import Pilot

from workstation.tui.app import Dashboard

FOLDER = Path(__file__).parent / "snapshots"
SIZES = [(80, 24), (120, 40), (200, 60)]
STATES = ["loading", "ready", "full", "down", "no-gpu"]
NOW = 1_000_000_000.0
GPU = {"name": "NVIDIA H200", "total_bytes": 140 << 30, "used_bytes": 128 << 30, "utilization": 0.97, "power_watts": 612.0,
       "power_limit_watts": 700.0, "temperature_celsius": 64.0, "joules_per_token": 0.39, "memory_utilization": 0.81,
       "fan": None, "clock_mhz": 1755, "memory_clock_mhz": 3201, "throttle": "", "pcie_read": 2.1e8, "pcie_write": 1.0e8,
       "own_bytes": None, "uuid": "GPU-1"}  # fmt: skip


def machine_in(state: str) -> Machine:
    """A server in a state, at a moment that never passes."""
    machine = Machine()
    machine.changes = {"time": NOW - 3}
    made = machine.frame()
    if state == "loading":
        machine.states, machine.rows = b"", []
        loading = {"done_bytes": 41 << 30, "total_bytes": 68 << 30, "seconds_left": 12.4}
        server = {**made["server"], "state": "starting", "uptime": 19.0, "loading": loading}
        machine.changes |= {"server": server, "requests": [],
                            "blocks": {**made["blocks"], "total": 0, "free": 0, "held": 0, "shared": 0, "cached": 0,
                                       "cells": {"count": 0, "width": 1, "owned": "", "shared": "", "cached": ""}}}
    if state in ("ready", "full", "down"):
        plan = {"graphs": 1 << 30, "workspace": 2 << 30, "logits": 1 << 29}
        model = {**made["model"], "name": "llama-70b-fp8", "dtype": "bfloat16", "kv_cache_dtype": "fp8", "plan": plan,
                 "device_name": "NVIDIA H200", "weight_bytes": 68 << 30, "kv_bytes": 54 << 30}
        cards = [{"index": 0, "name": "NVIDIA H200", "total_bytes": 140 << 30, "used_bytes": 128 << 30, "utilization": 0.97,
                  "own": True}]
        machine.changes |= {"gpu": GPU, "model": model, "cards": cards}
    if state == "full":
        machine.states = bytes([1] * 150 + [2] * 50)
        machine.rows = [row(f"req-{number:08d}", 40.0 - number, label=f"client-{number}", generated=100 * number)
                        for number in range(30)]
        machine.rows += [row(f"req-9{number:07d}", 15.0, state="waiting", scheduled=0.0, first_token=0.0, generated=0, blocks=0)
                         for number in range(4)]
        batch = {**made["batch"], "running": 30, "waiting": 4, "preempted": 2}
        machine.changes |= {"batch": batch}
        machine.held = {"blocks_free": 0, "blocks_cached": 0, "blocks_held": 200, "kv_tokens_held": 3190}
    return machine


@contextmanager
def stopped_clock() -> Iterator[None]:
    """Ages and the log's times are the same in every run and every zone."""
    with patch("workstation.tui.panels.time.time", lambda: NOW), patch.dict(os.environ, {"TZ": "UTC"}):
        time.tzset()
        yield
    time.tzset()


def drawn(state: str, size: tuple[int, int]) -> str:
    """The screen once nothing on it moves any more."""
    machine = machine_in(state)
    seen: list[str] = []

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

    with stopped_clock():
        asyncio.run(asyncio.wait_for(go(), 60))
    return seen[-1]


def path_of(state: str, size: tuple[int, int]) -> Path:
    return FOLDER / f"dashboard-{state}-{size[0]}x{size[1]}.txt"


# Whether a request's details were there before the server went is a matter of chance, and only the widest screen shows them.
SHOWN = [(state, size) for state in STATES for size in SIZES if (state, size[0]) != ("down", 200)]


@pytest.mark.parametrize(("state", "size"), SHOWN, ids=lambda item: item if isinstance(item, str) else f"{item[0]}x{item[1]}")
def test_the_screen_looks_as_it_did(state: str, size: tuple[int, int]) -> None:
    assert drawn(state, size) == path_of(state, size).read_text(encoding="utf-8")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for state, size in SHOWN:
        path_of(state, size).write_text(drawn(state, size), encoding="utf-8")


if __name__ == "__main__":
    main()
