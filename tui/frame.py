"""A frame as the server sent it, checked and made safe to draw. The contract is docs/stats.md, version 1."""

from __future__ import annotations

import base64
import unicodedata
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from workstation.tui.shapes import FrameAnswer, Versioned, decode

VERSION = 1
MAX_TEXT = 400
BREAKS = str.maketrans("\n\t", "  ")
MAX_CELLS = 4096


class BadAnswerError(Exception):
    """What came is not a frame that this dashboard can draw; the message is one line for the user."""


def clean(text: object) -> str:
    """Text that came from elsewhere, without control and formatting characters (escape codes, bidi marks); in one line."""
    short = str(text)[:MAX_TEXT]
    if short.isprintable():
        return short
    return "".join(char for char in short.translate(BREAKS) if unicodedata.category(char)[0] != "C")


def scrub(value: Any) -> Any:
    """All strings of an answer, cleaned; the maps' base64 is long and stays."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(key): item if key == "cells" else scrub(item) for key, item in value.items()}
    if isinstance(value, list):
        return [scrub(item) for item in value]
    return value


def read(body: bytes, shape: Any) -> Any:
    """An answer of this shape (see shapes.py) with clean strings. Raises ValueError."""
    answer = decode(body, shape)
    text = body.decode()
    # A text of printable characters without a backslash can hold no string that needs cleaning: nearly every answer.
    return answer if text.isprintable() and "\\" not in text else scrub(answer)


class Cell(NamedTuple):
    """How many blocks of a cell are held by one, held by several, cached and free."""

    owned: int
    shared: int
    cached: int
    free: int


@dataclass(slots=True)
class Frame:
    """One frame.

    Attributes:
        data: the answer as in docs/stats.md, strings cleaned.
        owned, shared, cached: blocks of each cell in these states.  sizes: all blocks of each cell, the free ones as well.
        heat: 0 to 255 a cell, when it was asked for.  body: the answer as it came.
    """

    data: dict[str, Any]
    owned: Sequence[int]
    shared: Sequence[int]
    cached: Sequence[int]
    sizes: Sequence[int]
    heat: bytes | None = None
    body: bytes = b""

    @property
    def requests(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.data["requests"]
        return rows

    @property
    def count(self) -> int:
        """Cells of the map."""
        return len(self.owned)

    def cell(self, number: int) -> Cell:
        owned, shared, cached = self.owned[number], self.shared[number], self.cached[number]
        return Cell(owned, shared, cached, self.sizes[number] - owned - shared - cached)

    def span(self, cell: int) -> tuple[int, int]:
        """First and last block (1-based, both included) of a cell."""
        total, count = self.data["blocks"]["total"], self.count
        return total * cell // count + 1, total * (cell + 1) // count

    def cells_of(self, blocks: set[int]) -> set[int]:
        """The cells that hold any of these blocks (numbers from 1)."""
        total, count = self.data["blocks"]["total"], self.count
        return {(block * count - 1) // total for block in blocks if 0 < block <= total}

    def fitted(self, room: int) -> Frame:
        """This frame with at most `room` cells, neighbours added up: for a recording, or a screen that has just shrunk."""
        if self.count <= room:
            return self
        edges = [self.count * cell // room for cell in range(room + 1)]
        owned, shared, cached, sizes = ([sum(values[begin:end]) for begin, end in pairwise(edges)]
                                        for values in (self.owned, self.shared, self.cached, self.sizes))
        heat = None if self.heat is None else bytes(max(self.heat[begin:end]) for begin, end in pairwise(edges))
        return Frame(self.data, owned, shared, cached, sizes, heat, self.body)


def parse(body: bytes) -> Frame:
    """A frame from JSON. Raises BadAnswerError for anything else, and for another version."""
    try:
        data = read(body, FrameAnswer)
        if data["version"] == VERSION:
            return _frame(data, body)
    except ValueError:  # something is missing, or the map's numbers do not fit each other
        pass
    try:
        version = decode(body, Versioned)["version"]
    except ValueError:
        raise BadAnswerError("the answer is not a frame of /stats (is this a ws server?)") from None
    if version != VERSION:
        raise BadAnswerError(f"the server speaks version {clean(version)} of /stats, this dashboard version {VERSION}")
    raise BadAnswerError("the frame of /stats is damaged")


def _frame(data: dict[str, Any], body: bytes) -> Frame:
    folded, total = data["blocks"]["cells"], data["blocks"]["total"]
    count, width = folded["count"], folded["width"]
    if not (0 <= count <= min(MAX_CELLS, total) and width in (1, 2, 4)) or (total > 0) != (count > 0):
        raise ValueError("a map of this size was not asked for")
    owned, shared, cached = (_numbers(folded[name], width, count) for name in ("owned", "shared", "cached"))
    heat = None if folded.get("heat") is None else bytes(_numbers(folded["heat"], 1, count))
    return Frame(data, owned, shared, cached, _sizes(total, count), heat, body)


@lru_cache(4)
def _sizes(total: int, count: int) -> Sequence[int]:
    """Blocks of each cell: the same object for every frame of a screen."""
    return array("Q", [total * (cell + 1) // count - total * cell // count for cell in range(count)])


def _numbers(text: str, width: int, count: int) -> Sequence[int]:
    data = base64.b64decode(text, validate=True)
    if len(data) != width * count:
        raise ValueError("a list of cells has the wrong length")
    if width == 1:
        return data
    values = array("H" if width == 2 else "I")
    values.frombytes(data)
    return values
