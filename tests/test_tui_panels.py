"""The dashboard's card, log, heat, cells, themes and recordings; answers that are damaged or meant to harm."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from test_tui import Machine, client, drive, ids, map_text, row, said, screen_text, until
from test_tui_snapshots import machine_in
from textual.geometry import Offset
from textual.pilot import Pilot

from workstation.cli.main import main
from workstation.tui import gpu_panels, panels
from workstation.tui.app import THEMES, Dashboard
from workstation.tui.client import Client
from workstation.tui.details import details, missed
from workstation.tui.drawing import Glyphs
from workstation.tui.frame import BadAnswerError, Frame, parse
from workstation.tui.recording import FrameFile, Replay
from workstation.tui.request_table import columns
from workstation.tui.screens import KEYS, Sheet


def frame_of(machine: Machine, cells: int = 400) -> Frame:
    return parse(json.dumps(machine.frame(cells)).encode())


def sheet_text(app: Dashboard) -> str:
    return str(app.screen.query_one("#sheet-text").render())  # type: ignore[attr-defined]


# ── the card ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_bar_holds_weights_kv_graphs_work_others_and_free() -> None:
    name, parts, total, used = gpu_panels.shares(frame_of(machine_in("ready")))
    assert name == "VRAM" and sum(parts) == used == 128 << 30 and total == 140 << 30
    assert [round(part / 2**30, 1) for part in parts] == [68, 54, 1, 2.5, 2.5]


def test_what_nvml_counts_for_the_engine_decides_what_others_hold() -> None:
    machine = machine_in("ready")
    machine.changes["gpu"] = {**machine.changes["gpu"], "own_bytes": 100 << 30}
    assert gpu_panels.shares(frame_of(machine))[1][4] == 28 << 30


READINGS = ["total_bytes", "used_bytes", "utilization", "power_watts", "temperature_celsius", "throttle", "pcie_read",
            "memory_utilization", "clock_mhz", "joules_per_token", "power_limit_watts"]  # fmt: skip


@pytest.mark.parametrize("missing", READINGS)
def test_every_reading_that_failed_is_a_dash_and_nothing_breaks(missing: str) -> None:
    machine = machine_in("ready")
    machine.changes["gpu"] = {**machine.changes["gpu"], missing: None}
    frame = frame_of(machine)
    text = f"{gpu_panels.readings(frame, '', 80)} {gpu_panels.throttling(frame)} {gpu_panels.memory(frame, 80, Glyphs(), 2)}"
    assert missing in ("total_bytes", "used_bytes") or " -" in text or "-/" in text or "↓-" in text


def test_a_throttled_card_says_why() -> None:
    machine = machine_in("ready")
    machine.changes["gpu"] = {**machine.changes["gpu"], "throttle": "power cap"}
    assert gpu_panels.throttling(frame_of(machine)) == "throttled: power cap"


def test_several_cards_have_a_bar_each() -> None:
    machine = machine_in("ready")
    card = {**machine.changes["cards"][0], "own": False, "used_bytes": 3 << 30}
    machine.changes["cards"] += [{**card, "index": 1}, {**card, "index": 2, "used_bytes": None, "utilization": None}]

    async def test(app: Dashboard, pilot: Pilot[str]) -> None:
        await until(pilot, lambda: "GPU2" in "\n".join(screen_text(app)))
        text = "\n".join(screen_text(app))
        assert "GPU1" in text and "3.0/140.0 GiB  97 %" in text and "-/140.0 GiB  -" in text

    drive(machine, test)


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


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────────


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
        assert "line 1 " in sheet_text(app) and "INFO" in sheet_text(app)

    drive(machine, test)


def test_every_key_of_the_help_does_something() -> None:
    async def test(app: Dashboard, pilot: Pilot[str]) -> None:
        bound = {key for binding in app.BINDINGS for key in binding.key.split(",")}  # type: ignore[union-attr]
        names = {"?": "question_mark", "/": "slash", "Esc": "escape"}
        for key in ("?", "q", "x", "s", "/", "space", "h", "g", "l", "t", "Esc"):
            assert f" {key} " in KEYS and names.get(key, key) in bound

    drive(Machine(), test)


def test_tab_goes_to_the_map_whose_cells_the_arrows_tell() -> None:
    async def test(app: Dashboard, pilot: Pilot[str]) -> None:
        await until(pilot, lambda: app.newest.count == 200 if app.newest else False)
        await pilot.press("shift+tab")
        assert app.focused is app.canvas.map
        await pilot.press("right", "right", "right")
        await until(pilot, lambda: "aaaa1111 tokens" in said(app, "legend"))
        assert said(app, "legend").strip() == "block 3: 1 held by one · aaaa1111 tokens 48 to 64 · 1 references · age 3.0 s"
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


@pytest.mark.parametrize("width", range(20, 240, 7))
def test_the_tables_columns_fit_any_width(width: int) -> None:
    shown = columns(width)
    names = [name for name, _, _ in shown]
    assert sum(size for _, size, _ in shown) + 2 * (len(shown) - 1) <= max(width, 67)
    assert {"id", "client", "state", "prompt", "made", "tok/s", "age"} <= set(names)
    assert not ("route" in names and "TTFT" not in names) and not ("TTFT" in names and "cached" not in names)


def test_a_resize_storm_ends_in_a_drawn_screen() -> None:
    async def test(app: Dashboard, pilot: Pilot[str]) -> None:
        for number in range(40):
            await pilot.resize_terminal(20 + number * 37 % 180, 5 + number * 13 % 55)
        await pilot.resize_terminal(120, 40)
        await until(pilot, lambda: "aaaa1111" in "\n".join(screen_text(app)) and "1,589 tok/s" in "\n".join(screen_text(app)))

    drive(Machine(), test)


# ── what is stuck, why it missed ────────────────────────────────────────────────────────────────────────────────────


def test_a_pool_that_stays_full_gives_one_line_of_advice() -> None:
    machine, history = machine_in("full"), panels.History()
    for second in range(40):
        machine.changes["time"] = 1000.0 + second
        frame = frame_of(machine)
        history.feed(frame)
    assert "KV 100 % held for 39 s" in panels.advice(frame, history, set()) and "--kv-cache-dtype" in panels.advice(
        frame, history, set())


def test_a_request_without_a_token_for_long_is_stuck_and_one_that_moves_is_not() -> None:
    machine, history = Machine(), panels.History()
    for second in range(15):
        machine.changes["time"] = 1000.0 + second
        machine.rows[1].generated += 1
        frame = frame_of(machine)
        history.feed(frame)
    assert history.stuck(frame) == {"req-aaaa1111"}


def test_details_say_where_a_prompt_left_an_earlier_one() -> None:
    diverged = {"token": 412, "message": 1, "earlier_tokens": 1900}
    assert missed(diverged) == "shares 412 tokens with an earlier prompt of 1,900, then differs: message 1, token 412"
    answer = {"request": frame_of(Machine()).requests[0], "max_tokens": 5, "sampling": {}, "samples": [], "diverged": diverged,
              "timeline": {"queue": 0.1, "prefill": None, "decode": None}}
    assert "message 1, token 412" in str(details(answer, Glyphs()))


# ── recordings ──────────────────────────────────────────────────────────────────────────────────────────────────────


def record(path: Path, *times: float) -> None:
    machine = Machine()
    with FrameFile(path) as file:
        for number, when in enumerate(times):
            machine.changes = {"time": when, "requests_total": number}
            file.write(json.dumps(machine.frame()).encode())


def test_a_recording_is_played_at_its_own_pace_and_stays_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path / "frames", 100.0, 101.0, 102.0, 110.0)
    now = [50.0]
    monkeypatch.setattr("workstation.tui.recording.time.monotonic", lambda: now[0])
    replay = Replay(tmp_path / "frames")

    async def shown(moment: float) -> Any:
        now[0] = moment
        return (await replay.frame(400)).data["requests_total"]

    async def go() -> list[Any]:
        found = [await shown(moment) for moment in (50.0, 50.9, 51.1, 55.0, 60.1, 500.0)]
        await replay.close()
        return found

    assert asyncio.run(go()) == [0, 0, 1, 2, 3, 3]


def test_a_recorded_map_is_folded_into_a_smaller_screen(tmp_path: Path) -> None:
    record(tmp_path / "frames", 100.0)
    replay = Replay(tmp_path / "frames")

    async def go() -> Frame:
        try:
            return await replay.frame(7)
        finally:
            await replay.close()

    frame = asyncio.run(go())
    assert frame.count == 7 and (sum(frame.owned), sum(frame.shared), sum(frame.cached), sum(frame.free)) == (20, 10, 30, 140)


def test_watching_records_every_frame_and_the_recording_plays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FrameFile(tmp_path / "frames") as file:
        from test_tui import MachineDoor

        source = Client("http://h", recorder=file, door=MachineDoor(Machine()))
        asyncio.run(source.frame(200))
    with pytest.raises(SystemExit) as ended:
        main(["top", "--replay", str(tmp_path / "frames"), "--once"])
    assert ended.value.code == 0 and "aaaa1111" in capsys.readouterr().out


NO_RECORDINGS = [("", "holds no frame"), ("not json\n", "line 1"), ('{"version": 9}\n', "version 9")]


@pytest.mark.parametrize(("text", "says"), NO_RECORDINGS)
def test_a_file_that_is_no_recording_is_one_line(
    tmp_path: Path, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "frames").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["top", "--replay", str(tmp_path / "frames"), "--once"])
    error = capsys.readouterr().err
    assert ended.value.code == 1 and says in error and error.count("\n") == 1


def test_a_recording_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "frames").write_text("mine")
    with pytest.raises(BadAnswerError, match="overwrites nothing"):
        FrameFile(tmp_path / "frames")


def test_a_picture_is_written_as_svg(tmp_path: Path) -> None:
    record(tmp_path / "frames", 100.0)
    with pytest.raises(SystemExit) as ended:
        main(["top", "--replay", str(tmp_path / "frames"), "--svg", str(tmp_path / "a.svg"), "--size", "100x30"])
    text = (tmp_path / "a.svg").read_text()
    assert ended.value.code == 0 and text.startswith("<svg") and "aaaa1111" in text


@pytest.mark.parametrize("size", ["0x4", "x", "120", "9999x40"])
def test_a_picture_of_an_impossible_size_is_refused(size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "frames", 100.0)
    with pytest.raises(SystemExit) as ended:
        main(["top", "--replay", str(tmp_path / "frames"), "--svg", str(tmp_path / "a.svg"), "--size", size])
    assert ended.value.code == 2 and "--size" in capsys.readouterr().err


# ── answers that are damaged or meant to harm ───────────────────────────────────────────────────────────────────────


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


def test_a_frame_that_comes_while_the_dashboard_closes_is_not_drawn() -> None:
    app_after: list[Dashboard] = []

    async def keep(app: Dashboard, pilot: Pilot[str]) -> None:
        app_after.append(app)

    drive(Machine(), keep)
    assert not app_after[0].screen_stack
    app_after[0].draw_now()


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
