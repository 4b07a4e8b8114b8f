"""LogBook: the newest lines of the server's own loggers, for `/stats/log`. Bounded by level: talk never hides trouble."""

from __future__ import annotations

import logging
from collections import deque
from itertools import count
from types import TracebackType

from msgspec import Struct

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
LOGGERS = ("ws", "workstation")
KEPT = 256
MAX_TEXT = 400


class LogLine(Struct):
    """number: rises by one a line.  time: Unix seconds.  level: debug, info, warning or error."""

    number: int
    time: float
    level: str
    source: str
    text: str


class LogBook(logging.Handler):
    """Attached to our loggers while entered. Messages only: a traceback may hold values, and values a prompt."""

    def __init__(self, kept: int = KEPT) -> None:
        super().__init__(logging.INFO)
        self._lines: dict[str, deque[LogLine]] = {name: deque(maxlen=kept) for name in LEVELS}
        self._numbers = count(1)

    def __enter__(self) -> LogBook:
        for name in LOGGERS:
            logger = logging.getLogger(name)
            logger.addHandler(self)
            logger.setLevel(logging.INFO)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except (TypeError, ValueError):  # a message whose arguments do not fit it must not end what it reports
            text = str(record.msg)
        self.add(record.created, record.levelno, record.name.rpartition(".")[2], text)

    def add(self, when: float, level: int, source: str, text: str) -> None:
        """Write a line down. level: as in `logging`."""
        name = max((name for name in LEVELS if LEVELS[name] <= level), key=LEVELS.__getitem__, default="debug")
        self._lines[name].append(LogLine(next(self._numbers), round(when, 3), name, source, text[:MAX_TEXT]))

    def newest(self, level: str, most: int, after: int = 0) -> list[LogLine]:
        """The last `most` lines of this level or a graver one that are newer than number `after`, oldest first."""
        found = [line for name, lines in self._lines.items() if LEVELS[name] >= LEVELS[level]
                 for line in list(lines) if line.number > after]
        return sorted(found, key=lambda line: line.number)[-most:]
