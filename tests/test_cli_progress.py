"""The bars of an engine's start."""

from __future__ import annotations

import pytest

from workstation.cli import progress


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to the bars, in order."""
    seen: list[str] = []

    class Bar:
        def __init__(self, title: str, *, counted: bool = False) -> None:
            self.title = title
            seen.append(f"{title}{' counted' if counted else ''}")

        def update(self, done: int, total: int) -> None:
            seen.append(f"{done}/{total}")

        def close(self) -> None:
            seen.append(f"{self.title} closed")

    monkeypatch.setattr(progress, "LoadingBar", Bar)
    return seen


def test_every_stage_has_a_bar_that_takes_the_place_of_the_one_before(bars: list[str]) -> None:
    with progress.StartBar() as bar:
        for stage, done, total in (("weights", 1, 8), ("weights", 8, 8), ("kernels", 3, 31), ("graphs", 64, 64)):
            bar.update(stage, done, total)
    assert bars == ["loading weights", "1/8", "8/8", "loading weights closed", "compiling kernels counted", "3/31",
                    "compiling kernels closed", "capturing graphs counted", "64/64", "capturing graphs closed"]


def test_once_the_server_is_ready_an_engine_that_starts_again_draws_nothing_over_its_terminal(bars: list[str]) -> None:
    bar = progress.StartBar()
    bar.update("weights", 8, 8)
    bar.close()
    bar.close()
    bar.update("weights", 1, 8)
    bar.update("kernels", 1, 31)
    assert bars == ["loading weights", "8/8", "loading weights closed"]


def test_counted_things_have_a_bar_without_bytes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    bar = progress.LoadingBar("compiling kernels", counted=True)
    bar.update(12, 31)
    bar.close()
    shown = capsys.readouterr().err
    assert "compiling kernels" in shown and "12/31" in shown and "bytes" not in shown
