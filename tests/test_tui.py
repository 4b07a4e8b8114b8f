"""The dashboard's screen: every number, state, shape and size of terminal."""

from __future__ import annotations

import json

import pytest
from dashboards import (
    Machine,
    drive,
    frame_of,
    ids,
    machine_in,
    map_text,
    said,
    screen_text,
    until,
)
from textual.pilot import Pilot

from workstation.cli.dashboard import plain
from workstation.tui.app import Dashboard
from workstation.tui.drawing import Glyphs, state_of
from workstation.tui.frame import Cell, parse


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60)])
def test_the_numbers_of_a_frame_are_on_the_screen(size: tuple[int, int]) -> None:
    async def test(app: Dashboard, pilot: Pilot[None]) -> None:
        for wanted in ("demo", "READY", "02:14:07", "2 running 1 waiting", "3.0 GiB", "15 % held", "waste 2.1 %", "hits 83 %",
                       "1,589 tok/s", "84/310 ms", "aaaa1111", "agent", "waiting"):
            await until(pilot, lambda wanted=wanted: wanted in "\n".join(screen_text(app)))  # type: ignore[misc]
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
        await until(pilot, lambda: [map_text(app).count(shape) for shape in "█▓▒·"] == [20, 10, 30, 140])

    drive(machine, test, (120, 40))


def test_a_small_user_of_a_large_cell_is_seen() -> None:
    assert state_of(Cell(owned=1, shared=0, cached=0, free=30)) == ("owned", False)
    assert state_of(Cell(owned=1, shared=5, cached=2, free=4)) == ("shared", True)
    assert state_of(Cell(0, 0, 0, 9)) == ("free", True)


def test_ascii_draws_with_ascii_only() -> None:
    assert Glyphs(ascii=True).spark([0, 4, 8], 3).isascii() and Glyphs(ascii=True).bar([(1, ""), (1, "")], 3, 9).plain.isascii()


def test_an_ascii_screen_holds_no_other_character() -> None:
    async def test(app: Dashboard, pilot: Pilot[None]) -> None:
        await until(pilot, lambda: all(word in "\n".join(screen_text(app)) for word in ("aaaa1111", "READY")))
        text = "\n".join(screen_text(app))
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


def test_a_server_that_goes_away_is_called_down_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workstation.tui.app.RETRY_SECONDS", 0.05)
    machine = Machine()

    async def test(app: Dashboard, pilot: Pilot[None]) -> None:
        machine.down = True
        await until(pilot, lambda: "DOWN" in said(app, "head"))
        assert "no server answers" in said(app, "foot") and len(ids(app)) == 3
        await until(pilot, lambda: app.canvas.table.styles.text_opacity < 1)
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


@pytest.mark.parametrize("size", [(20, 5), (1, 1), (40, 16), (300, 80)])
def test_any_size_of_terminal_is_drawn(size: tuple[int, int]) -> None:
    async def test(app: Dashboard, pilot: Pilot[None]) -> None:
        for width, height in (size, (80, 24), size):
            await pilot.resize_terminal(width, height)
            await pilot.pause()
        assert app.is_running

    drive(Machine(), test, size)


def test_one_frame_as_plain_text_holds_the_numbers_and_no_escape_codes() -> None:
    text = plain(parse(json.dumps(Machine().frame()).encode()), "http://h", Glyphs(ascii=False))
    for wanted in ("READY", "15 % held", "aaaa1111", "1,589 tok/s", "one request 20", "shared 10", "cached 30", "free 140"):
        assert wanted in text
    assert "\x1b" not in text and "PCIe" not in text
    assert "PCIe ↓200M ↑95M · no throttling" in plain(frame_of(machine_in("ready")), "http://h", Glyphs())


def test_a_resize_storm_ends_in_a_drawn_screen() -> None:
    async def test(app: Dashboard, pilot: Pilot[str]) -> None:
        for number in range(40):
            await pilot.resize_terminal(20 + number * 37 % 180, 5 + number * 13 % 55)
        await pilot.resize_terminal(120, 40)
        await until(pilot, lambda: "aaaa1111" in "\n".join(screen_text(app)) and "1,589 tok/s" in "\n".join(screen_text(app)))

    drive(Machine(), test)


def test_a_frame_that_comes_while_the_dashboard_closes_is_not_drawn() -> None:
    app_after: list[Dashboard] = []

    async def keep(app: Dashboard, pilot: Pilot[str]) -> None:
        app_after.append(app)

    drive(Machine(), keep)
    assert not app_after[0].screen_stack
    app_after[0].draw_now()


def test_the_maps_box_is_whole_before_the_first_frame() -> None:
    machine = Machine()
    machine.down = True

    async def test(app: Dashboard, pilot: Pilot[str]) -> None:
        await until(pilot, lambda: f"╰{'─' * 118}╯" in screen_text(app)[screen_text(app).index(f"╭─ KV blocks {'─' * 106}╮"):])

    drive(machine, test, owns_server=True)
