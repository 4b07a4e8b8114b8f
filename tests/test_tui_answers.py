"""Answers that are no frame, damaged, or meant to harm; servers that are not there."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from dashboards import (
    Machine,
    MachineDoor,
    client,
    drive,
    ids,
    row,
    said,
    screen_text,
    until,
)
from textual.pilot import Pilot
from textual.widgets import Static

from workstation.cli.main import main
from workstation.tui.app import Dashboard
from workstation.tui.client import Client
from workstation.tui.frame import BadAnswerError, clean, parse
from workstation.tui.screens import Question, Sheet


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


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "ftp://h", "http://[::bad", "http://h:x"])
def test_a_server_that_is_not_there_is_one_line_and_an_exit_code(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["top", url])
    said_there = capsys.readouterr().err.strip()
    assert ended.value.code not in (0, None) and said_there.startswith("ws: ") and "\n" not in said_there


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


def test_clean_drops_every_control_character_and_leaves_one_line() -> None:
    assert clean("a\x00b\x1b]0;t\x07c\u202ed\te\x9bf") == "ab]0;tcd ef"


def damage(path: list[Any], value: Any) -> bytes:
    frame = Machine().frame()
    place: Any = frame
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return json.dumps(frame).encode()


@pytest.mark.parametrize(("path", "value"), [
    (["time"], "now"), (["speed"], {}), (["requests", 0, "age"], None), (["requests", 0], 5), (["blocks", "total"], -1),
    (["blocks", "cells", "count"], 10**9), (["blocks", "cells", "width"], 3),
    (["blocks", "cells", "owned"], "!!"), (["server", "uptime"], float("inf")), (["batch", "step_seconds"], float("nan")),
    (["gpu"], {"name": "x"}), (["model", "plan"], {"a": "b"}), (["requests", 0, "prompt"], 10**30), (["cards"], [1]),
])
def test_a_frame_with_one_wrong_value_is_damaged(path: list[Any], value: Any) -> None:
    with pytest.raises(BadAnswerError, match=r"damaged|not a frame"):
        parse(damage(path, value))


def test_a_frame_nested_without_end_is_refused() -> None:
    with pytest.raises(BadAnswerError):
        parse(b'{"version": 1, "time": ' + b"[" * 100_000)


def test_the_screen_of_a_server_that_sends_damage_keeps_the_last_picture() -> None:
    machine = Machine()

    async def test(app: Dashboard, pilot: Pilot[str]) -> None:
        machine.changes = {"speed": {}}
        await until(pilot, lambda: "damaged" in said(app, "foot"))
        assert len(ids(app)) == 3
        machine.changes = {}
        await until(pilot, lambda: "? help" in said(app, "foot"))

    drive(machine, test)


def test_details_blocks_and_logs_of_another_shape_are_refused() -> None:
    machine = Machine()

    async def go() -> None:
        source = client(machine)
        machine.lines = [{"time": "x"}]
        with pytest.raises(BadAnswerError, match="/stats/log"):
            await source.log(5)
        machine.page = {"cards": 3}
        with pytest.raises(BadAnswerError, match="/stats/gpu"):
            await source.cards()

    asyncio.run(go())
