"""Frames in a file, one JSON object a line: written while watching, played back for bug reports and demonstrations."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from workstation.tui.frame import BadAnswerError, Frame, clean, parse

MAX_FRAME_BYTES = 4 << 20


class FrameFile:
    """A new file that takes every frame.

    Raises:
        BadAnswerError: the file exists or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("xb")
        except FileExistsError:
            raise BadAnswerError(f"{clean(path)} exists; a recording overwrites nothing") from None
        except OSError as error:
            raise BadAnswerError(f"{clean(path)} cannot be written: {error.strerror}") from None

    def write(self, body: bytes) -> None:
        try:
            self._file.write(body.replace(b"\n", b" ") + b"\n")
        except OSError as error:
            raise BadAnswerError(f"the recording cannot go on: {error.strerror}") from None

    def __enter__(self) -> FrameFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


class Replay:
    """A Source that plays a recording at the pace it was made, then stays on its last frame.

    Raises:
        BadAnswerError: the file cannot be read, or its first line is not a frame.
    """

    def __init__(self, path: Path) -> None:
        self.url = f"replay of {clean(path.name)}"
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise BadAnswerError(f"{clean(path)} cannot be read: {error.strerror}") from None
        self._line = 0
        try:
            first, self._following = self._next(), self._next()
            if first is None:
                raise BadAnswerError(f"{clean(path)} holds no frame")
        except BadAnswerError:
            self._file.close()
            raise
        self._shown: Frame = first
        self._began: float | None = None

    async def frame(self, cells: int, heat: bool = False) -> Frame:
        """The frame of this moment of the recording."""
        now = time.monotonic()
        if self._began is None:
            self._began = now - self._shown.data["time"]
        while self._following is not None and self._following.data["time"] <= now - self._began:
            self._shown, self._following = self._following, self._next()
        return self._shown.fitted(cells)

    async def details(self, request_id: str) -> dict[str, Any]:
        self._refuse("details")

    async def blocks(self, first: int, last: int) -> dict[str, Any]:
        self._refuse("single blocks")

    async def cards(self) -> dict[str, Any]:
        return {"cards": self._shown.data.get("cards", []), "processes": None}

    async def log(self, lines: int, level: str = "info") -> list[dict[str, Any]]:
        return []

    async def abort(self, request_id: str) -> None:
        self._refuse("a server that could abort it")

    async def close(self) -> None:
        self._file.close()

    def _refuse(self, what: str) -> NoReturn:
        raise BadAnswerError(f"a recording holds frames, not {what}")

    def _next(self) -> Frame | None:
        line = self._file.readline(MAX_FRAME_BYTES)
        self._line += 1
        if not line.strip():
            return None
        try:
            frame = parse(line)
            float(frame.data["time"])
        except (BadAnswerError, TypeError, ValueError) as error:
            raise BadAnswerError(f"line {self._line} of the recording: {error}") from None
        return frame
