"""The dashboard, driven by Textual's pilot against an answering machine in place of a server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import httpx
import msgspec
import pytest
from textual.pilot import Pilot
from textual.widgets import Input, Static

from workstation.cli.main import main
from workstation.cli.top import plain
from workstation.engine.request import EngineStats
from workstation.engine.snapshot import Picture, RequestRow
from workstation.server.stats import block_stats, request_stats
from workstation.tui import gpu_panels
from workstation.tui.app import Dashboard
from workstation.tui.client import Client
from workstation.tui.drawing import Glyphs, seconds, state_of
from workstation.tui.frame import BadAnswerError, Cell, clean, parse
from workstation.tui.http import Answer, HTTPFault
from workstation.tui.screens import Question, Sheet

STATES = bytes([1] * 20 + [2] * 10 + [3] * 30 + [0] * 140)


def row(name: str, age: float = 5.0, **changes: Any) -> RequestRow:
    made = RequestRow(id=name, label="editor", state="decode", samples=1, prompt=1000, cached=500, computed=1100, generated=100,
                      blocks=69, preemptions=0, arrival=100 - age, scheduled=100 - age, first_token=100 - age + 0.25)
    return replace(made, **changes)


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
            return httpx.Response(200, json={"version": 1, "last": len(self.lines), "lines": self.lines})
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
            "timeline": {"queue": 0.0, "prefill": 0.25, "decode": 4.0}, "sampling": {"temperature": 0.7, "seed": None},
            "samples": [{"index": 0, "tokens": 1100, "computed": 1100, "tables": [[1, 2, 21]], "finished": None}]})


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
    for _ in range(400):
        if true():
            return
        await pilot.pause(0.02)
    raise AssertionError("it never came")


def said(app: Dashboard, name: str) -> str:
    """A panel's text."""
    return str(app.screen_stack[0].query_one(f"#{name}", Static).render())


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


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60)])
def test_the_numbers_of_a_frame_are_on_the_screen(size: tuple[int, int]) -> None:
    async def test(app: Dashboard, pilot: Pilot[None]) -> None:
        text = "\n".join(screen_text(app))
        for wanted in ("demo", "READY", "02:14:07", "2 running 1 waiting", "3.0 GiB", "15 % held", "waste 2.1 %", "hits 83 %",
                       "1,589 tok/s", "84/310 ms", "aaaa1111", "agent", "waiting"):
            assert wanted in text, wanted
        assert len(screen_text(app)) == size[1]

    drive(Machine(), test, size)


def test_the_server_is_asked_for_as_many_cells_as_the_map_has() -> None:
    machine = Machine()

    async def test(app: Dashboard, pilot: Pilot[None]) -> None:
        area = app.query_one("#map").content_size
        await until(pilot, lambda: machine.cells[-1] == area.width * area.height)

    drive(machine, test)


def test_the_map_shows_every_state_with_a_shape_of_its_own() -> None:
    machine = Machine()

    async def test(app: Dashboard, pilot: Pilot[None]) -> None:
        await until(pilot, lambda: app.newest.count == 200 if app.newest else False)
        await pilot.pause(0.2)
        drawn = map_text(app)
        assert (drawn.count("█"), drawn.count("▓"), drawn.count("▒"), drawn.count("·")) == (20, 10, 30, 140)

    drive(machine, test, (120, 40))


def test_a_small_user_of_a_large_cell_is_seen() -> None:
    assert state_of(Cell(owned=1, shared=0, cached=0, free=30)) == ("owned", False)
    assert state_of(Cell(owned=1, shared=5, cached=2, free=4)) == ("shared", True)
    assert state_of(Cell(0, 0, 0, 9)) == ("free", True)


def test_ascii_draws_with_ascii_only() -> None:
    assert Glyphs(ascii=True).spark([0, 4, 8], 3).isascii() and Glyphs(ascii=True).bar([(1, ""), (1, "")], 3, 9).plain.isascii()


def test_an_ascii_screen_holds_no_other_character() -> None:
    async def test(app: Dashboard, pilot: Pilot[None]) -> None:
        await pilot.pause(0.2)
        text = "\n".join(screen_text(app))
        assert "aaaa1111" in text and "READY" in text
        assert {char for char in text if not char.isascii()} == set()

    drive(Machine(), test, glyphs=Glyphs(ascii=True))


def test_cells_of_blocks_are_the_cells_that_hold_them() -> None:
    machine = Machine()
    frame = parse(json.dumps(machine.frame(cells=7)).encode())
    for block in range(1, 201):
        (cell,) = frame.cells_of({block})
        first, last = frame.span(cell)
        assert first <= block <= last
    assert frame.cells_of({0, 201}) == set()


def test_the_chosen_request_lights_its_blocks() -> None:
    async def test(app: Dashboard, pilot: Pilot[None]) -> None:
        await until(pilot, lambda: bool(app.canvas.lit) and app.newest.count == 200 if app.newest else False)
        await until(pilot, lambda: app.canvas.lit == {0, 1, 20})

    drive(Machine(), test)


def test_s_sorts_by_the_next_column() -> None:
    async def test(app: Dashboard, pilot: Pilot[None]) -> None:
        assert ids(app) == ["aaaa1111", "bbbb2222", "cccc3333"]
        while app.canvas.order != "generated":
            await pilot.press("s")
        assert ids(app) == ["bbbb2222", "aaaa1111", "cccc3333"]

    drive(Machine(), test)


def test_a_filter_keeps_what_it_names_and_escape_shows_all() -> None:
    async def test(app: Dashboard, pilot: Pilot[None]) -> None:
        await pilot.press("slash", *"agent", "enter")
        assert ids(app) == ["bbbb2222"]
        await pilot.press("escape")
        assert len(ids(app)) == 3 and app.query_one("#filter", Input).value == ""

    drive(Machine(), test)


def test_enter_opens_the_details_of_the_chosen_request() -> None:
    async def test(app: Dashboard, pilot: Pilot[None]) -> None:
        await pilot.press("down", "enter")
        await until(pilot, lambda: isinstance(app.screen, Sheet))
        await pilot.pause()
        text = str(app.screen.query_one("#sheet-text", Static).render())
        assert "req-bbbb2222" in text and "temperature 0.7" in text and "1 2 21" in text and "prefill 250 ms" in text
        await pilot.press("escape")
        assert not isinstance(app.screen, Sheet)

    drive(Machine(), test)


def test_x_aborts_only_after_a_yes() -> None:
    machine = Machine()

    async def test(app: Dashboard, pilot: Pilot[None]) -> None:
        for answer, expected in (("n", []), ("y", ["req-aaaa1111"])):
            await pilot.press("x")
            await until(pilot, lambda: isinstance(app.screen, Question))
            await pilot.press(answer)
            await until(pilot, lambda: not isinstance(app.screen, Question))
            await pilot.pause(0.2)
            assert machine.aborted == expected
        await until(pilot, lambda: ids(app) == ["bbbb2222", "cccc3333"])

    drive(machine, test)


def test_the_cursor_stays_on_its_request_when_others_come_and_go() -> None:
    machine = Machine()

    async def test(app: Dashboard, pilot: Pilot[None]) -> None:
        await pilot.press("down")
        assert app.canvas.table.chosen_id == "req-bbbb2222"
        machine.rows = [row("req-dddd4444", 20.0), *machine.rows[1:]]
        await until(pilot, lambda: "dddd4444" in ids(app))
        assert app.canvas.table.chosen_id == "req-bbbb2222"

    drive(machine, test)


def test_space_freezes_the_picture_and_lets_it_go_on() -> None:
    machine = Machine()

    async def test(app: Dashboard, pilot: Pilot[None]) -> None:
        await pilot.press("space")
        machine.rows = machine.rows[:1]
        asked = len(machine.cells)
        await until(pilot, lambda: len(machine.cells) > asked + 2)
        assert len(ids(app)) == 3 and "FROZEN" in said(app, "foot")
        await pilot.press("space")
        await until(pilot, lambda: len(ids(app)) == 1)

    drive(machine, test)


def test_question_mark_shows_the_keys() -> None:
    async def test(app: Dashboard, pilot: Pilot[None]) -> None:
        await pilot.press("question_mark")
        await until(pilot, lambda: isinstance(app.screen, Sheet))
        await pilot.press("q")
        assert not isinstance(app.screen, Sheet)

    drive(Machine(), test)


def test_a_server_that_goes_away_is_called_down_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workstation.tui.app.RETRY_SECONDS", 0.05)
    machine = Machine()

    async def test(app: Dashboard, pilot: Pilot[None]) -> None:
        machine.down = True
        await until(pilot, lambda: "DOWN" in said(app, "head"))
        assert "no server answers" in said(app, "foot") and len(ids(app)) == 3
        machine.down = False
        await until(pilot, lambda: "READY" in said(app, "head"))

    drive(machine, test)


@pytest.mark.parametrize("state", ["restarting", "draining", "dead"])
def test_the_head_names_the_servers_state(state: str) -> None:
    machine = Machine()
    machine.changes = {"server": {**machine.frame()["server"], "state": state}}

    async def test(app: Dashboard, pilot: Pilot[None]) -> None:
        assert state.upper() in said(app, "head")

    drive(machine, test)


def test_markup_and_escape_codes_of_a_client_are_drawn_as_plain_text() -> None:
    machine = Machine()
    machine.rows = [row("req-[b]evil[/]", label="[/red]x\x1b[31m\u202e\n")]

    async def test(app: Dashboard, pilot: Pilot[None]) -> None:
        text = "\n".join(screen_text(app))
        assert "[/red]x[31m" in text and "\x1b" not in text and "\u202e" not in text
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, Sheet))
        await pilot.press("escape", "x")
        await until(pilot, lambda: isinstance(app.screen, Question))
        assert "[b]evil[/]" in str(app.screen.query_one("#question", Static).render())

    drive(machine, test)


def test_clean_drops_every_control_character() -> None:
    assert clean("a\x00b\x1b]0;t\x07c\u202ed\te\x9bf") == "ab]0;tcdef"


@pytest.mark.parametrize("size", [(20, 5), (1, 1), (40, 16), (300, 80)])
def test_any_size_of_terminal_is_drawn(size: tuple[int, int]) -> None:
    async def test(app: Dashboard, pilot: Pilot[None]) -> None:
        for width, height in (size, (80, 24), size):
            await pilot.resize_terminal(width, height)
            await pilot.pause()
        assert app.is_running

    drive(Machine(), test, size)


def test_without_a_card_there_are_dashes_and_with_one_its_readings() -> None:
    machine = Machine()
    frame = parse(json.dumps(machine.frame()).encode())
    assert "no NVIDIA GPU" in str(gpu_panels.readings(frame, "", 100)) and "process 3.0 GiB" in str(
        gpu_panels.memory(frame, 100, Glyphs(), 2))
    machine.changes = {"gpu": {"name": "H200", "total_bytes": 139 * 2**30, "used_bytes": 120 * 2**30, "utilization": 0.97,
                               "power_watts": 612.0, "power_limit_watts": 700.0, "temperature_celsius": None,
                               "joules_per_token": 0.39}}
    frame = parse(json.dumps(machine.frame()).encode())
    text = f"{gpu_panels.memory(frame, 100, Glyphs(), 2)}{gpu_panels.readings(frame, '', 100)}"
    assert "120.0/139.0 GiB" in text and "util 97 %" in text and "- °C" in text and "0.39 J/token" in text


@pytest.mark.parametrize(("body", "says"), [
    (b"<html>", "not a frame"), (b"[]", "not a frame"), (b'{"version": 2}', "version 2"), (b'{"version": 1}', "damaged"),
])
def test_what_is_not_a_frame_is_refused_in_one_line(body: bytes, says: str) -> None:
    with pytest.raises(BadAnswerError, match=says):
        parse(body)


def test_a_wrong_key_is_named() -> None:
    async def main() -> None:
        door = Client("http://h", "k", door=MachineDoor(lambda request: httpx.Response(401, json={})))
        with pytest.raises(BadAnswerError, match="API key"):
            await door.frame(4)
        await door.close()

    asyncio.run(main())


def test_one_frame_as_plain_text_holds_the_numbers_and_no_escape_codes() -> None:
    text = plain(parse(json.dumps(Machine().frame()).encode()), "http://h", Glyphs(ascii=False))
    for wanted in ("READY", "15 % held", "aaaa1111", "1,589 tok/s", "one request 20", "shared 10", "cached 30", "free 140"):
        assert wanted in text
    assert "\x1b" not in text


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "ftp://h", "http://[::bad", "http://h:x"])
def test_a_server_that_is_not_there_is_one_line_and_an_exit_code(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["top", url])
    said_there = capsys.readouterr().err.strip()
    assert ended.value.code not in (0, None) and said_there.startswith("ws: ") and "\n" not in said_there


def test_durations_are_short() -> None:
    assert [seconds(value) for value in (None, 0.084, 4.12, 42.0, 185.0, 7620.0)] == [
        "-", "84 ms", "4.1 s", "42 s", "3m05", "2h07"]
