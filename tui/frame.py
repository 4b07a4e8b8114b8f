"""A frame as the server sent it, checked and made safe to draw. The contract is docs/stats.md, version 1."""

from __future__ import annotations

import base64
import json
import unicodedata
from array import array
from dataclasses import dataclass
from typing import Any, NamedTuple

VERSION = 1
MAX_TEXT = 200


class BadAnswerError(Exception):
    """What came is not a frame that this dashboard can draw; the message is one line for the user."""


def clean(text: object) -> str:
    """Text that came from elsewhere, without control and formatting characters (escape codes, bidi marks, line breaks)."""
    return "".join(char for char in str(text)[:MAX_TEXT] if unicodedata.category(char)[0] != "C")


def scrub(value: Any) -> Any:
    """All strings of an answer, cleaned; the maps' base64 is long and stays."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(key): item if key == "cells" else scrub(item) for key, item in value.items()}
    if isinstance(value, list):
        return [scrub(item) for item in value]
    return value


class Cell(NamedTuple):
    """How many blocks of a cell are held by one, held by several, cached and free."""

    owned: int
    shared: int
    cached: int
    free: int


@dataclass(slots=True)
class Frame:
    """One frame. data: the answer as in docs/stats.md, strings cleaned.  cells: the block map, unfolded."""

    data: dict[str, Any]
    cells: list[Cell]

    @property
    def requests(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.data["requests"]
        return rows

    def span(self, cell: int) -> tuple[int, int]:
        """First and last block (1-based, both included) of a cell."""
        total, count = self.data["blocks"]["total"], len(self.cells)
        return total * cell // count + 1, total * (cell + 1) // count

    def cells_of(self, blocks: set[int]) -> set[int]:
        """The cells that hold any of these blocks (numbers from 1)."""
        total, count = self.data["blocks"]["total"], len(self.cells)
        return {(block * count - 1) // total for block in blocks if 0 < block <= total}


def parse(body: bytes) -> Frame:
    """A frame from JSON. Raises BadAnswerError for anything else, and for another version."""
    try:
        raw = json.loads(body)
        version = raw["version"]
    except (ValueError, KeyError, TypeError):
        raise BadAnswerError("the answer is not a frame of /stats (is this a ws server?)") from None
    if version != VERSION:
        raise BadAnswerError(f"the server speaks version {clean(version)} of /stats, this dashboard version {VERSION}")
    try:
        data = scrub(raw)
        return Frame(data, _cells(raw["blocks"])) if _complete(data) else _broken()
    except (KeyError, TypeError, ValueError):
        return _broken()


def _broken() -> Frame:
    raise BadAnswerError("the frame of /stats is damaged")


def _complete(data: dict[str, Any]) -> bool:
    wanted = ("time", "server", "model", "gpu", "process_bytes", "blocks", "batch", "speed", "requests", "requests_total")
    return all(name in data for name in wanted) and isinstance(data["requests"], list)


def _cells(blocks: dict[str, Any]) -> list[Cell]:
    folded, total = blocks["cells"], int(blocks["total"])
    count, width = int(folded["count"]), int(folded["width"])
    owned, shared, cached = (_numbers(folded[name], width, count) for name in ("owned", "shared", "cached"))
    edges = [total * cell // count for cell in range(count + 1)] if count else []
    return [Cell(owned[i], shared[i], cached[i], edges[i + 1] - edges[i] - owned[i] - shared[i] - cached[i])
            for i in range(count)]


def _numbers(text: str, width: int, count: int) -> list[int]:
    data = base64.b64decode(text, validate=True)
    if len(data) != width * count:
        raise ValueError("a list of cells has the wrong length")
    if width == 1:
        return list(data)
    values = array("H" if width == 2 else "I")
    values.frombytes(data)
    return values.tolist()
