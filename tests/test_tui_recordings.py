"""Recordings of a dashboard: played, folded, drawn as a picture, refused."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from dashboards import (
    Machine,
    MachineDoor,
)

from workstation.cli.main import main
from workstation.tui.client import Client
from workstation.tui.frame import BadAnswerError, Frame
from workstation.tui.recording import FrameFile, Replay


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
    assert frame.count == 7 and [sum(cells) for cells in zip(*map(frame.cell, range(7)), strict=True)] == [20, 10, 30, 140]


def test_watching_records_every_frame_and_the_recording_plays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FrameFile(tmp_path / "frames") as file:
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


@pytest.mark.parametrize("options", [("--once", "--json"), ("--json", "--svg", "x.svg"), ("--once", "--size", "80x24")])
def test_ways_to_show_one_frame_are_refused_together(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["top", "http://127.0.0.1:9", *options])
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1
