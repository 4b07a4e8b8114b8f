"""A dashboard driven by Textual's pilot against an answering machine in place of a server, and what is on its screen."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import httpx
import msgspec
from textual.pilot import Pilot

from workstation.engine.request import EngineStats
from workstation.engine.snapshot import Picture, RequestRow
from workstation.server.stats import block_stats, request_stats
from workstation.tui.app import Dashboard
from workstation.tui.client import Client
from workstation.tui.frame import Frame, parse
from workstation.tui.http import Answer, HTTPFault
from workstation.tui.panel import Panel

STATES = bytes([1] * 20 + [2] * 10 + [3] * 30 + [0] * 140)
NOW = 1_000_000_000.0
GPU = {"name": "NVIDIA H200", "total_bytes": 140 << 30, "used_bytes": 128 << 30, "utilization": 0.97, "power_watts": 612.0,
       "power_limit_watts": 700.0, "temperature_celsius": 64.0, "joules_per_token": 0.39, "memory_utilization": 0.81,
       "fan": None, "clock_mhz": 1755, "memory_clock_mhz": 3201, "throttle": "", "pcie_read": 2.1e8, "pcie_write": 1.0e8,
       "own_bytes": None, "uuid": "GPU-1"}  # fmt: skip


def row(name: str, age: float = 5.0, **changes: Any) -> RequestRow:
    made = RequestRow(id=name, label="editor", state="decode", samples=1, prompt=1000, cached=500, computed=1100, generated=100,
                      blocks=69, preemptions=0, arrival=100 - age, scheduled=100 - age, first_token=100 - age + 0.25)
    return replace(made, **changes)


LEVELS = ["debug", "info", "warning", "error"]


class Machine:
    """Answers as a server does (the block map and rows are made by the server's own code); counts and remembers."""

    def __init__(self) -> None:
        self.rows = [row("req-aaaa1111", 9.0), row("req-bbbb2222", 6.0, label="agent", generated=400),
                     row("req-cccc3333", 3.0, state="waiting", scheduled=0.0, first_token=0.0, generated=0, blocks=0)]
        self.states = STATES
        self.changes: dict[str, Any] = {}
        self.held: dict[str, Any] = {}
        self.down = False
        self.aborted: list[str] = []
        self.cells: list[int] = []
        self.lines: list[dict[str, Any]] = [
            {"number": 1, "time": 0.0, "level": "warning", "source": "engine", "text": "watch out"}]
        self.page: dict[str, Any] = {"version": 1, "cards": [], "processes": []}

    def block(self, number: int) -> dict[str, Any]:
        owners = [{"request_id": "req-aaaa1111", "index": 0, "group": 0, "begin": number * 16, "end": number * 16 + 16}]
        state = self.states[number - 1]
        return {"block": number, "state": state, "refs": state % 3, "published": False, "age": 3.0 if state else None,
                "owners": owners if state in (1, 2) else []}

    def frame(self, cells: int = 400) -> dict[str, Any]:
        stats = replace(EngineStats(100.0, 2, 1, 140, 30, 30, 200, kv_tokens_held=470), **self.held)
        blocks = block_stats(Picture(0, stats, self.states, [], 0), 16, cells)
        spread = {"p50": 0.084, "p99": 0.31}
        made: dict[str, Any] = {
            "version": 1, "time": time.time(), "gpu": None, "process_bytes": 3 * 2**30, "look_seconds": 1e-4,
            "server": {"state": "ready", "uptime": 8047.0, "version": "0", "restarts": 0, "heartbeat_age": 0.1, "cause": ""},
            "model": {"name": "demo", "architecture": "qwen3", "dtype": "float32", "device": "cpu", "device_name": "CPU",
                      "max_model_len": 8192, "max_num_seqs": 256, "max_num_batched_tokens": 2048, "weight_bytes": 2**30,
                      "kv_bytes": 2**30, "plan": {}},
            "blocks": msgspec.to_builtins(blocks),
            "batch": {"running": 2, "waiting": 1, "preempted": 0, "steps": 9, "step_seconds": 0.0214, "step_tokens": 34,
                      "budget": 2048},
            "speed": {"prompt_tokens": 9, "generated_tokens": 9, "cached_tokens": 4, "prompt_rate": 6120.0,
                      "generate_rate": 1589.0, "eviction_rate": 12.0, "preemption_rate": 0.0, "hit_rate": 0.83,
                      "ttft": spread, "itl": spread, "e2e": spread},
            "requests": [msgspec.to_builtins(request_stats(item, 100.0)) for item in self.rows],
            "requests_total": len(self.rows),
        }
        return {**made, **self.changes}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.down:
            raise httpx.ConnectError("connection refused")
        path = request.url.path
        if path == "/stats":
            self.cells.append(int(request.url.params["cells"]))
            return httpx.Response(200, json=self.frame(self.cells[-1]))
        if path == "/stats/log":
            graver = LEVELS[LEVELS.index(request.url.params.get("level", "info")):]
            lines = [line for line in self.lines if line.get("level", "error") in graver]
            return httpx.Response(200, json={"version": 1, "last": len(self.lines), "lines": lines})
        if path == "/stats/blocks":
            first, last = int(request.url.params["from"]), int(request.url.params["to"])
            blocks = [self.block(number) for number in range(first, last + 1)]
            return httpx.Response(200, json={"version": 1, "total": 200, "blocks": blocks})
        if path == "/stats/gpu":
            return httpx.Response(200, json=self.page)
        name = path.split("/")[3]
        found = [item for item in self.rows if item.id == name]
        if not found:
            return httpx.Response(404, json={"error": {"message": f"no live request has the id {name!r}"}})
        if path.endswith("/abort"):
            self.aborted.append(name)
            self.rows.remove(found[0])
            return httpx.Response(200, json={"id": name, "aborted": True})
        return httpx.Response(200, json={
            "version": 1, "request": msgspec.to_builtins(request_stats(found[0], 100.0)), "max_tokens": 512,
            "timeline": {"queue": 0.0, "prefill": 0.25, "decode": 4.0},
            "sampling": {"temperature": 0.7, "top_k": 40, "seed": None},
            "samples": [{"index": 0, "tokens": 1100, "computed": 1100, "tables": [[1, 2, 21]], "finished": None}]})


def machine_in(state: str) -> Machine:
    """A server in a state, at a moment that never passes."""
    machine = Machine()
    machine.changes = {"time": NOW - 3}
    made = machine.frame()
    if state == "loading":
        machine.states, machine.rows = b"", []
        loading = {"stage": "weights", "done": 41 << 30, "total": 68 << 30, "seconds_left": 12.4}
        server = {**made["server"], "state": "starting", "uptime": 19.0, "loading": loading}
        machine.changes |= {"server": server, "requests": [],
                            "blocks": {**made["blocks"], "total": 0, "free": 0, "held": 0, "shared": 0, "cached": 0,
                                       "cells": {"count": 0, "width": 1, "owned": "", "shared": "", "cached": ""}}}
    if state in ("ready", "full", "down", "four-gpus"):
        plan = {"graphs": 1 << 30, "workspace": 2 << 30, "logits": 1 << 29}
        model = {**made["model"], "name": "llama-70b-fp8", "dtype": "bfloat16", "kv_cache_dtype": "fp8", "plan": plan,
                 "quantization": "fp8",
                 "device_name": "NVIDIA H200", "weight_bytes": 68 << 30, "kv_bytes": 54 << 30}
        cards = [{"index": 0, "name": "NVIDIA H200", "total_bytes": 140 << 30, "used_bytes": 128 << 30, "utilization": 0.97,
                  "own": True}]
        machine.changes |= {"gpu": GPU, "model": model, "cards": cards}
    if state == "four-gpus":
        machine.changes["gpu"] = {**GPU, "fan": 0.4, "throttle": "power cap, thermal", "own_bytes": 120 << 30}
        machine.changes["cards"] = [{**card, "index": number, "own": number == 1} for number in range(4) for card in cards]
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


class MachineDoor:
    """Carries a client's requests to the machine without a socket."""

    def __init__(self, machine: Callable[[httpx.Request], httpx.Response]) -> None:
        self._machine = machine

    async def request(self, method: str, path: str, body: bytes = b"") -> Answer:
        try:
            answer = self._machine(httpx.Request(method, f"http://127.0.0.1:8000{path}", content=body))
        except httpx.ConnectError as error:
            raise HTTPFault(str(error)) from None
        return Answer(answer.status_code, answer.content)

    async def close(self) -> None:
        pass


def client(machine: Machine) -> Client:
    return Client("http://127.0.0.1:8000", door=MachineDoor(machine))


def drive(machine: Machine, test: Callable[[Dashboard, Pilot[None]], Awaitable[None]], size: tuple[int, int] = (120, 40),
          **options: Any) -> None:
    async def main() -> None:
        door = client(machine)
        app = Dashboard(door, rate=10, **options)
        try:
            async with app.run_test(size=size) as pilot:
                await until(pilot, lambda: app.newest is not None or machine.down)
                await pilot.pause()
                await test(app, pilot)
        finally:
            await door.close()

    asyncio.run(asyncio.wait_for(main(), 60))


async def until(pilot: Pilot[None], true: Callable[[], bool]) -> None:
    """Wait for something that the next frames bring."""
    for _ in range(1500):
        if true():
            return
        await pilot.pause(0.02)
    raise AssertionError("it never came")


def said(app: Dashboard, name: str) -> str:
    """A panel's text."""
    return app.screen_stack[0].query_one(f"#{name}", Panel).text


def ids(app: Dashboard) -> list[str]:
    return [name[-8:] for name in app.canvas.table.ids]


def map_text(app: Dashboard) -> str:
    """The map's cells."""
    view = app.canvas.map
    return "".join(view.render_line(line).text for line in range(view.size.height)).replace(" ", "")


def screen_text(app: Dashboard) -> list[str]:
    """The screen as lines of characters."""
    strips = app.screen._compositor.render_strips()
    return ["".join(segment.text for segment in strip) for strip in strips]


def sheet_text(app: Dashboard) -> str:
    return str(app.screen.query_one("#sheet-text").render())  # type: ignore[attr-defined]


def frame_of(machine: Machine, cells: int = 400) -> Frame:
    return parse(json.dumps(machine.frame(cells)).encode())
