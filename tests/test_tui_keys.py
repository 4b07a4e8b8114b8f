"""What keys and the mouse do in the dashboard."""

from __future__ import annotations

from typing import Any

import pytest
from dashboards import (
    Machine,
    drive,
    ids,
    machine_in,
    map_text,
    row,
    said,
    screen_text,
    sheet_text,
    until,
)
from textual.geometry import Offset
from textual.pilot import Pilot
from textual.widgets import Input, Static

from workstation.tui.app import THEMES, Dashboard
from workstation.tui.drawing import Glyphs
from workstation.tui.screens import KEYS, Question, Sheet, keys


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
        for wanted in ("req-bbbb2222", "temperature 0.7   top_k 40\n", "1 2 21", "prefill 250 ms"):
            assert wanted in text
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
            await until(pilot, lambda expected=expected: machine.aborted == expected)  # type: ignore[misc]
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


def test_g_opens_the_cards_page_with_the_other_processes() -> None:
    machine = machine_in("ready")
    machine.page = {"version": 1, "cards": machine.changes["cards"], "processes": [
        {"pid": 7, "user": "me", "command": "python", "bytes": 120 << 30, "own": True},
        {"pid": 4711, "user": None, "command": None, "bytes": None, "own": False}]}

    async def test(app: Dashboard, pilot: Pilot[str]) -> None:
        await pilot.press("g")
        await until(pilot, lambda: isinstance(app.screen, Sheet))
        rows = [line.split() for line in sheet_text(app).splitlines()]
        assert ["7", "me", "python", "122,880", "this", "server"] in rows and ["4711", "-", "-", "-"] in rows

    drive(machine, test)


def test_h_asks_for_heat_and_draws_who_is_evicted_next() -> None:
    machine = Machine()

    async def test(app: Dashboard, pilot: Pilot[str]) -> None:
        await pilot.press("h")
        await until(pilot, lambda: "evicted next" in said(app, "legend"))
        await until(pilot, lambda: "╎" * 30 in map_text(app) and "█" in map_text(app) and "▁" in map_text(app))
        await pilot.press("h")
        await until(pilot, lambda: "one request" in said(app, "legend"))

    made = machine.frame

    def warm(cells: int = 400) -> dict[str, Any]:
        import base64

        frame = made(cells)
        heat = bytes([0] * 30 + [1 + 8 * number for number in range(30)] + [255] * 0 + [0] * 140)
        frame["blocks"]["cells"]["heat"] = base64.b64encode(heat).decode()
        return frame

    machine.frame = warm  # type: ignore[method-assign]
    drive(machine, test)


def test_t_goes_through_the_themes_and_comes_back() -> None:
    async def test(app: Dashboard, pilot: Pilot[str]) -> None:
        first, seen = app.theme, set()
        for _ in THEMES:
            await pilot.press("t")
            seen.add(app.theme)
        assert app.theme == first and len(seen) == len(THEMES)
        assert "aaaa1111" in "\n".join(screen_text(app))

    drive(Machine(), test)


def test_l_opens_the_log_and_the_panel_holds_its_newest_lines() -> None:
    machine = Machine()
    machine.lines = [{"number": n, "time": 0.0, "level": "info", "source": "s", "text": f"line {n} [/red]\x1b[31m"}
                     for n in range(1, 60)]

    async def test(app: Dashboard, pilot: Pilot[str]) -> None:
        await until(pilot, lambda: "line 59" in said(app, "log"))
        assert "line 59 [/red][31m" in "\n".join(screen_text(app)) and "line 50" not in said(app, "log")
        await pilot.press("l")
        await until(pilot, lambda: isinstance(app.screen, Sheet))
        await until(pilot, lambda: "line 1 " in sheet_text(app))
        assert "INFO" in sheet_text(app)

    drive(machine, test)


def test_l_in_the_log_takes_the_next_level() -> None:
    machine = Machine()
    machine.lines = [{"number": n, "time": 0.0, "level": level, "source": "s", "text": f"a {level} line"}
                     for n, level in enumerate(("debug", "info", "warning", "error"), 1)]

    async def test(app: Dashboard, pilot: Pilot[str]) -> None:
        await pilot.press("l")
        for shown in (("info", "warning", "error"), ("warning", "error"), ("error",), ("debug", "info", "warning", "error")):
            await until(pilot, lambda shown=shown: [line.split()[3] for line in sheet_text(app).splitlines()] == list(shown))
            await pilot.press("l")

    drive(machine, test)


def test_every_key_of_the_help_does_something() -> None:
    bound = {key for binding in Dashboard.BINDINGS for key in binding.key.split(",")}  # type: ignore[union-attr]
    names = {"?": "question_mark", "/": "slash", "Esc": "escape"}
    elsewhere = {"Tab", "↑ ↓", "Enter", "Ctrl+P"}  # of Textual, the table and the map
    for key, _ in KEYS:
        assert key in elsewhere or names.get(key, key) in bound


@pytest.mark.parametrize("width", [20, 66, 68, 106])
def test_the_help_is_as_wide_as_its_sheet(width: int) -> None:
    lines = keys(Glyphs(), width).plain.splitlines()[:-1]
    assert max(map(len, lines)) <= max(width, 32) and all(f"{key:<7} {what}" in "\n".join(lines) for key, what in KEYS)


def test_the_palette_has_every_key_and_no_quit_that_asks_nothing() -> None:
    async def test(app: Dashboard, pilot: Pilot[str]) -> None:
        commands = {command.title: command.help for command in app.get_system_commands(app.screen)}
        assert "Quit" not in commands and commands["quit"] == "key q" and commands["filter"] == "key /"

    drive(Machine(), test)


def test_tab_goes_to_the_map_whose_cells_the_arrows_tell() -> None:
    async def test(app: Dashboard, pilot: Pilot[str]) -> None:
        await until(pilot, lambda: app.newest.count == 200 if app.newest else False)
        await pilot.press("shift+tab")
        assert app.focused is app.canvas.map
        await pilot.press("right", "right", "right")
        await until(pilot, lambda: "aaaa1111 tokens" in said(app, "legend"))
        assert said(app, "legend").strip() == "block 3: 1 held by one · aaaa1111 tokens 48-64 · 1 reference · age 3.0 s"
        await pilot.press("tab")
        await until(pilot, lambda: "one request" in said(app, "legend"))

    drive(Machine(), test)


def test_the_mouse_over_a_cell_tells_what_is_in_it() -> None:
    async def test(app: Dashboard, pilot: Pilot[str]) -> None:
        await until(pilot, lambda: app.newest.count == 200 if app.newest else False)
        await pilot.hover("#map", Offset(39, 0))
        await until(pilot, lambda: "block 40: 1 cached" in said(app, "legend"))

    drive(Machine(), test)


def test_a_click_chooses_a_request_and_a_second_one_opens_it() -> None:
    async def test(app: Dashboard, pilot: Pilot[str]) -> None:
        for _ in range(2):
            await pilot.click("#requests", Offset(5, 4))
            assert app.canvas.table.chosen_id == "req-cccc3333"
        await until(pilot, lambda: isinstance(app.screen, Sheet))

    drive(Machine(), test)


def test_a_long_table_scrolls_with_its_cursor() -> None:
    machine = Machine()
    machine.rows = [row(f"req-{number:08d}", 500.0 - number) for number in range(300)]

    async def test(app: Dashboard, pilot: Pilot[str]) -> None:
        await until(pilot, lambda: len(ids(app)) == 300)
        await pilot.press("end")
        await pilot.pause()
        assert app.canvas.table.chosen_id == "req-00000299" and "00000299" in "\n".join(screen_text(app))
        await pilot.press("home", "pagedown")
        await pilot.pause()
        chosen = app.canvas.table.chosen_id
        assert chosen is not None and chosen[-8:] in "\n".join(screen_text(app))

    drive(machine, test)


def test_a_table_scrolled_to_its_end_stays_filled_when_most_requests_end() -> None:
    machine = Machine()
    machine.rows = [row(f"req-{number:08d}", 500.0 - number) for number in range(300)]

    async def test(app: Dashboard, pilot: Pilot[str]) -> None:
        await until(pilot, lambda: len(ids(app)) == 300)
        await pilot.press("end")
        machine.rows = machine.rows[:40]
        await until(pilot, lambda: len(ids(app)) == 40)
        await pilot.pause()
        text = "\n".join(screen_text(app))
        assert ">00000039" in text and "00000035" in text and app.canvas.table.max_scroll_y == app.canvas.table.scroll_y

    drive(machine, test)
