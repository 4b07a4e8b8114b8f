"""Bars on stderr while an engine starts; nothing where stderr is not a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Any

TITLES = {"weights": "loading weights", "kernels": "compiling kernels", "graphs": "capturing graphs"}


class StartBar:
    """Takes (stage, done, in all) as often as it likes: a bar a stage, each in the place of the one before.

    Once closed it stays away: an engine that is restarted later must not draw over a terminal that is somebody's by then.
    """

    def __init__(self) -> None:
        self._stage = ""
        self._bar: LoadingBar | None = None
        self._closed = False

    def __enter__(self) -> StartBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def update(self, stage: str, done: int, total: int) -> None:
        if self._closed:
            return
        if self._bar is None or stage != self._stage:
            self._end()
            self._stage, self._bar = stage, LoadingBar(TITLES.get(stage, stage), counted=stage != "weights")
        self._bar.update(done, total)

    def close(self) -> None:
        """Take the bar away; further calls do nothing."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class LoadingBar:
    """Takes (bytes done, bytes in all) as often as it likes, or numbers of things with `counted`. title: what is being done."""

    def __init__(self, title: str, *, counted: bool = False) -> None:
        self._title, self._counted = title, counted
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> LoadingBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def update(self, done: int, total: int) -> None:
        """Show the progress; the first call makes the bar."""
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TransferSpeedColumn

            console = Console(stderr=True)
            bytewise = (DownloadColumn(binary_units=True), TransferSpeedColumn())
            columns = (self._title, BarColumn(), *((MofNCompleteColumn(),) if self._counted else bytewise))
            self._bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
            self._task = self._bar.add_task("weights", total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total)

    def close(self) -> None:
        """Take the bar away; further calls do nothing."""
        if self._bar is not None:
            self._bar.stop()
