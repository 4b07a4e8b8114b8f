"""The dashboard's card, table and advice."""

from __future__ import annotations

import asyncio
import json

import pytest
from dashboards import (
    Machine,
    drive,
    frame_of,
    machine_in,
    row,
    screen_text,
    until,
)
from rich.text import Text
from textual.app import App, ComposeResult
from textual.pilot import Pilot

from workstation.tui import gpu_panels, panels
from workstation.tui.app import Dashboard
from workstation.tui.details import cell_line, details, missed
from workstation.tui.drawing import Glyphs, seconds
from workstation.tui.frame import parse, scrub
from workstation.tui.panel import Panel
from workstation.tui.request_table import columns

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
    text = f"{gpu_panels.readings(frame, '', 80)} {gpu_panels.bottom_line(frame, 80)} {gpu_panels.memory(frame, 80, Glyphs())}"
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


@pytest.mark.parametrize("tall", [True, False])
def test_a_machine_with_many_cards_says_how_many_are_not_shown(tall: bool) -> None:
    machine = machine_in("four-gpus")
    machine.changes["cards"] = [{**machine.changes["cards"][0], "index": index, "own": index == 1} for index in range(8)]
    frame = frame_of(machine)
    lines = gpu_panels.memory(frame, 80, Glyphs(), tall).plain.splitlines()
    assert len(lines) == gpu_panels.memory_lines(frame, tall) and lines[0].startswith(" GPU1 ")
    shown = sum("GPU" in line for line in lines)
    assert lines[-1].split()[0] == str(8 - shown)


@pytest.mark.parametrize("width", [46, 60, 80])
def test_all_readings_of_the_card_fit_their_panel(width: int) -> None:
    machine = machine_in("ready")
    machine.changes["gpu"] = {**machine.changes["gpu"], "power_watts": 1000.0, "power_limit_watts": 1000.0, "utilization": 1.0,
                              "memory_utilization": 1.0, "fan": 1.0, "temperature_celsius": 100.0, "joules_per_token": 0.123}
    frame = frame_of(machine)
    text = gpu_panels.readings(frame, "▁" * 12, width).plain
    assert max(map(len, text.splitlines())) <= width
    for wanted in ("util 100 %", "mem 100 %", "fan 100 %", "100 °C", "1,000/1,000 W", "1,755", "0.123 J/token"):
        assert wanted in text
    assert gpu_panels.bottom_line(frame, width) == "PCIe ↓200M ↑95M · no throttling"


def test_without_a_card_there_are_dashes_and_with_one_its_readings() -> None:
    machine = Machine()
    frame = parse(json.dumps(machine.frame()).encode())
    assert "no NVIDIA GPU" in str(gpu_panels.readings(frame, "", 100)) and "process 3.0 GiB" in str(
        gpu_panels.memory(frame, 100, Glyphs()))
    machine.changes = {"gpu": {"name": "H200", "total_bytes": 139 * 2**30, "used_bytes": 120 * 2**30, "utilization": 0.97,
                               "power_watts": 612.0, "power_limit_watts": 700.0, "temperature_celsius": None,
                               "joules_per_token": 0.39}}
    frame = parse(json.dumps(machine.frame()).encode())
    text = f"{gpu_panels.memory(frame, 100, Glyphs())}{gpu_panels.readings(frame, '', 100)}"
    assert "120.0/139.0 GiB" in text and "util 97 %" in text and "- °C" in text and "0.39 J/token" in text


# ── tables and sheets ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("width", range(20, 240, 7))
def test_the_tables_columns_fit_any_width(width: int) -> None:
    shown = columns(width)
    names = [name for name, _, _ in shown]
    assert sum(size for _, size, _ in shown) + 2 * (len(shown) - 1) <= width
    assert {"id", "state"} <= set(names) and (width < 77 or {"client", "prompt", "made", "tok/s", "age"} <= set(names))
    assert not ("route" in names and "TTFT" not in names) and not ("TTFT" in names and "cached" not in names)


def test_durations_are_short() -> None:
    assert [seconds(value) for value in (None, 0.084, 4.12, 42.0, 185.0, 7620.0)] == [
        "-", "84 ms", "4.1 s", "42 s", "3m05", "2h07"]


def test_details_say_where_a_prompt_left_an_earlier_one() -> None:
    diverged = {"token": 412, "message": 1, "earlier_tokens": 1900}
    assert missed(diverged) == "shares 412 tokens with an earlier prompt of 1,900, then differs: message 1, token 412"
    answer = {"request": frame_of(Machine()).requests[0], "max_tokens": 5, "sampling": {}, "samples": [], "diverged": diverged,
              "timeline": {"queue": 0.1, "prefill": None, "decode": None}}
    assert "message 1, token 412" in str(details(answer, Glyphs()))


def test_details_show_text_in_one_line_and_as_plain_text() -> None:
    answer = {"request": frame_of(Machine()).requests[0], "max_tokens": 5, "sampling": {}, "samples": [], "diverged": None,
              "timeline": {"queue": 0.1, "prefill": None, "decode": None},
              "text": {"prompt": "end of it\n\x1b[31m[/red]", "answers": ["first", ""]}}
    lines = str(details(scrub(answer), Glyphs())).splitlines()
    assert "prompt, its end: end of it [31m[/red]" in lines and "answer, its end: first" in lines
    assert "answer, its end: -" in lines


def test_a_cell_of_thousands_of_blocks_is_counted_in_whole_ones() -> None:
    frame = frame_of(Machine())
    frame.data["blocks"]["total"] = 59_364
    assert "a cell = 5,936 blocks" in str(panels.legend(frame, Glyphs(), 10, False, 200))


# ── what is stuck ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pool_that_stays_full_gives_one_line_of_advice() -> None:
    machine, history = machine_in("full"), panels.History()
    for second in range(40):
        machine.changes["time"] = 1000.0 + second
        frame = frame_of(machine)
        history.feed(frame)
    assert "KV 100 % held for 39 s" in panels.advice(frame, history, set()) and "--kv-cache-dtype" in panels.advice(
        frame, history, set())


@pytest.mark.parametrize(("batch", "why"), [
    ({"running": 256}, "--max-num-seqs"), ({"running": 3, "step_tokens": 2048}, "--max-num-batched-tokens"),
    ({"running": 3, "step_tokens": 3}, "the KV pool has no room")])  # fmt: skip
def test_what_waits_for_long_is_told_why(batch: dict[str, int], why: str) -> None:
    machine, history = machine_in("ready"), panels.History()
    machine.rows[2] = row("req-cccc3333", 15.0, state="waiting", scheduled=0.0, first_token=0.0, generated=0, blocks=0)
    machine.changes["batch"] = {**machine.frame()["batch"], **batch}
    frame = frame_of(machine)
    history.feed(frame)
    assert why in panels.advice(frame, history, history.stuck(frame))


def test_a_request_without_a_token_for_long_is_stuck_and_one_that_moves_is_not() -> None:
    machine, history = Machine(), panels.History()
    for second in range(15):
        machine.changes["time"] = 1000.0 + second
        machine.rows[1].generated += 1
        frame = frame_of(machine)
        history.feed(frame)
    assert history.stuck(frame) == {"req-aaaa1111"}


# ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("lines", "widths"), [(2, range(40, 80)), (3, range(58, 160))])
def test_figures_and_their_sparklines_fit_the_panel(lines: int, widths: range) -> None:
    frame, history = frame_of(machine_in("full")), panels.History()
    for second in range(100):
        frame.data["time"] = 1000.0 + second
        history.feed(frame)
    for width in widths:
        for make in (panels.batch, panels.speed):
            rows = make(frame, history, Glyphs(), width, lines).plain.splitlines()
            assert len(rows) == lines and max(map(len, rows)) <= width
            assert sum("█" in row for row in rows) >= lines - 1


def test_a_share_is_drawn_against_the_whole_and_a_rate_against_its_largest() -> None:
    assert Glyphs().spark([0.1, 0.5, 1.0], 4, 1.0) == " ▁▄█" and Glyphs().spark([10, 50], 2) == "▂█"


class Painted(App[None]):
    """Counts the lines that a panel is asked for."""

    def compose(self) -> ComposeResult:
        self.panel = Panel("panel")
        self.asked: list[int] = []
        drawn = self.panel.render_line
        self.panel.render_line = lambda y: (self.asked.append(y), drawn(y))[1]  # type: ignore[method-assign,func-returns-value]
        yield self.panel


def test_a_panel_draws_only_the_lines_that_say_something_new() -> None:
    async def go() -> None:
        app = Painted()
        async with app.run_test(size=(20, 4)) as pilot:
            app.panel.show(Text("one\ntwo\nthree", no_wrap=True))
            await pilot.pause()
            app.asked.clear()
            app.panel.show(Text("one\nother\nthree", no_wrap=True))
            await pilot.pause()
            assert app.asked == [1]
            assert app.panel.render_line(1).text == "other".ljust(20)

    asyncio.run(go())


@pytest.mark.parametrize("width", range(20, 40))
def test_figures_leave_from_the_right_where_a_panel_is_narrow(width: int) -> None:
    frame, history = frame_of(machine_in("full")), panels.History()
    for make in (panels.batch, panels.speed):
        assert max(map(len, make(frame, history, Glyphs(), width, 2).plain.splitlines())) <= width
    assert panels.legend(frame, Glyphs(), 200, False, width * 2).cell_len <= max(width * 2, 44)


def test_an_idle_engine_has_no_step() -> None:
    machine = machine_in("ready")
    machine.changes["batch"] = {**machine.frame()["batch"], "running": 0}
    said = panels.batch(frame_of(machine), panels.History(), Glyphs(), 60).plain
    assert "34" not in said and "21 ms" not in said and "0/2048" in said


@pytest.mark.parametrize(("width", "wanted", "unwanted"), [
    (24, ["● READY"], ["llama-70b-fp8"]), (40, ["llama-70b", "2 run 1 wait"], ["·"]),
    (80, ["fp8 · fp8 KV · H200", "02:14:07  2 running 1 waiting"], ["http"]),
    (120, ["fp8 · fp8 KV · H200", "02:14:07  2 running 1 waiting", "http://h:1"], ["NVIDIA"])])  # fmt: skip
def test_the_head_says_as_much_as_fits(width: int, wanted: list[str], unwanted: list[str]) -> None:
    line = panels.head(frame_of(machine_in("ready")), "http://h:1", "", width, 0.0).plain
    assert len(line) <= width and all(word in line for word in wanted) and not any(word in line for word in unwanted)


def test_a_cells_line_names_its_owner_at_eighty_columns() -> None:
    machine = Machine()
    machine.states = bytes([1, 3, 0, 1] * 50)
    frame = frame_of(machine, 4)
    answer = {"blocks": [machine.block(number) for number in range(51, 101)]}
    line = cell_line(frame, 1, answer, 78).plain
    assert line == " blocks 51 to 100: 25 held by one, 12 cached · aaaa1111 tokens 832-1,616"
    assert cell_line(frame, 1, answer, 120).plain.endswith("at most 1 reference · age 3.0 s")


def test_each_stage_of_loading_is_named_and_counted() -> None:
    machine = machine_in("loading")
    loading = machine.changes["server"]["loading"]
    assert "reading weights: 60 %" in str(panels.loading_bar(frame_of(machine), 80, Glyphs()))
    loading |= {"done": loading["total"], "seconds_left": None}
    assert str(panels.loading_bar(frame_of(machine), 80, Glyphs())).endswith("\n weights read")
    loading |= {"stage": "kernels", "done": 12, "total": 31}
    assert str(panels.loading_bar(frame_of(machine), 80, Glyphs())).endswith("\n compiling kernels: 12 of 31")
    assert panels.progress(frame_of(machine)) == "compiling kernels: 12 of 31"
    loading |= {"stage": "graphs", "done": 3, "total": 64}
    assert panels.progress(frame_of(machine)) == "capturing graphs: 3 of 64"
