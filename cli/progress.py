"""A bar on stderr while weights are read; nothing where stderr is not a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class LoadingBar:
    """Takes (bytes done, bytes in all) as often as it likes. title: what is being done."""

    def __init__(self, title: str = "loading weights") -> None:
        self._title = title
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
            from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

            console = Console(stderr=True)
            columns = (self._title, BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
            self._bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
            self._task = self._bar.add_task("weights", total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total)

    def close(self) -> None:
        """Take the bar away; further calls do nothing."""
        if self._bar is not None:
            self._bar.stop()
