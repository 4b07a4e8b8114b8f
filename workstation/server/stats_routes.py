"""The routes of the dashboard: `/stats` and what stands under it. Numbers in the query are checked, never clipped."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from workstation.engine.snapshot import MAX_BLOCK_ROWS
from workstation.errors import InvalidRequestError
from workstation.server import wire
from workstation.server.gate import Gate
from workstation.server.log_book import LEVELS, LogBook
from workstation.server.options import ServerOptions
from workstation.server.stats import DEFAULT_CELLS, MAX_CELLS, VERSION, LogAnswer
from workstation.server.stats_desk import StatsDesk
from workstation.server.streaming import EventStream

MAX_LINES = 200
DEFAULT_LINES = 50
MAX_RATE = 10
DEFAULT_RATE = 4
Route = tuple[str, str, Callable[[Request], Awaitable[Response]]]


def _integer(request: Request, name: str, default: int, low: int, high: int) -> int:
    """A whole number of the query. Raises InvalidRequestError naming it and its limits."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and low <= int(text) <= high):
        raise InvalidRequestError(f"{name} must be a whole number from {low} to {high}, got {text[:40]!r}", param=name)
    return int(text)


class StatsRoutes:
    """Handlers over one StatsDesk. Streams pass a gate of their own: a dashboard never keeps a server from draining."""

    def __init__(self, desk: StatsDesk, watchers: Gate, options: ServerOptions, book: LogBook) -> None:
        self._desk = desk
        self._watchers = watchers
        self._options = options
        self._book = book

    def table(self) -> list[Route]:
        return [
            ("GET", "/stats", self.snapshot), ("GET", "/stats/stream", self.stream), ("GET", "/stats/blocks", self.blocks),
            ("GET", "/stats/requests/{id}", self.request), ("POST", "/stats/requests/{id}/abort", self.abort),
            ("GET", "/stats/log", self.log), ("GET", "/stats/gpu", self.cards),
        ]

    async def snapshot(self, request: Request) -> Response:
        return _json(await self._desk.snapshot(_integer(request, "cells", DEFAULT_CELLS, 1, MAX_CELLS),
                                               _integer(request, "heat", 0, 0, 1) == 1))

    async def stream(self, request: Request) -> Response:
        cells = _integer(request, "cells", DEFAULT_CELLS, 1, MAX_CELLS)
        rate = _integer(request, "hz", DEFAULT_RATE, 1, MAX_RATE)
        heat = _integer(request, "heat", 0, 0, 1) == 1
        return EventStream(self._desk.stream(cells, rate, heat), self._watchers, self._options)

    async def blocks(self, request: Request) -> Response:
        limit = 2**31 - 1
        first = _integer(request, "from", 1, 1, limit)
        last = _integer(request, "to", first + 63, first, min(limit, first + MAX_BLOCK_ROWS - 1))
        return _json(await self._desk.blocks(first, last))

    async def request(self, request: Request) -> Response:
        return _json(await self._desk.request(request.path_params["id"]))

    async def cards(self, request: Request) -> Response:
        return _json(await self._desk.cards())

    async def log(self, request: Request) -> Response:
        level = request.query_params.get("level", "info")
        if level not in LEVELS:
            raise InvalidRequestError(f"level must be one of {', '.join(LEVELS)}, got {level[:40]!r}", param="level")
        after = _integer(request, "after", 0, 0, 10**9 - 1)
        lines = self._book.newest(level, _integer(request, "lines", DEFAULT_LINES, 1, MAX_LINES), after)
        return _json(LogAnswer(VERSION, lines[-1].number if lines else after, lines))

    async def abort(self, request: Request) -> Response:
        return _json(await self._desk.abort(request.path_params["id"]))


def _json(answer: object) -> Response:
    return Response(wire.encode(answer), media_type="application/json", headers={"cache-control": "no-store"})
