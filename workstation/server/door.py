"""The port's first answers: while the engine loads, its state; afterwards the application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from workstation.engine.client import EngineClient
from workstation.errors import OverloadedError, WorkstationError
from workstation.server import wire
from workstation.server.errors import error_response
from workstation.server.gate import Gate
from workstation.server.guard import Guard
from workstation.server.log_book import LogBook
from workstation.server.metrics import Metrics
from workstation.server.options import ServerOptions
from workstation.server.stats_desk import StatsDesk
from workstation.server.stats_routes import StatsRoutes

RETRY_SECONDS = 5


class Door:
    """Hands every request to the loading page first, to the application once `open` was called.

    uvicorn's lifespan ends here, because the application comes later than it begins.
    """

    def __init__(self, loading: ASGIApp, gate: Gate) -> None:
        self._inside = loading
        self._gate = gate
        self._closing: Callable[[], Awaitable[None]] | None = None

    def open(self, app: ASGIApp, closing: Callable[[], Awaitable[None]]) -> None:
        """From now on `app` answers; `closing` is awaited when the server leaves. Streams of the loading page end."""
        self._inside, self._closing = app, closing
        self._gate.drain()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await self._inside(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if self._closing is not None:
            await self._closing()
        await send({"type": "lifespan.shutdown.complete"})


def loading_door(engine: EngineClient, name: str, options: ServerOptions, book: LogBook) -> Door:
    """`/health`, `/stats` and its streams, `/stats/log`; every other path is a 503 that says why. Guarded like everything."""
    gate = Gate(engine)
    desk = StatsDesk(engine, name, Metrics(engine, name, 1), gate)
    stats = StatsRoutes(desk, Gate(engine), options, book)

    async def health(request: Request) -> Response:
        now = engine.health()
        body = {"status": now.state} | ({} if now.progress is None else {"progress": round(now.progress, 4)})
        return Response(wire.encode(body), 503, {"retry-after": str(RETRY_SECONDS)}, "application/json")

    async def others(request: Request) -> Response:
        return error_response(OverloadedError("the model is still loading", retry_after=RETRY_SECONDS))

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, WorkstationError)
        return error_response(error)

    routes = [Route("/health", health, methods=["GET"])]
    routes += [Route(path, handler, methods=[method]) for method, path, handler in stats.table()]
    routes.append(Route("/{path:path}", others, methods=["GET", "POST"]))
    return Door(Guard(Starlette(routes=routes, exception_handlers={WorkstationError: refused}), options), gate)
