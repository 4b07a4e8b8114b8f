"""Server-sent events over ASGI: headers once the first event is there, keep-alives, an error event when a stream breaks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from workstation.errors import WorkstationError
from workstation.server import wire
from workstation.server.errors import error_body
from workstation.server.gate import ClientGone, Gate, until_disconnect
from workstation.server.options import ServerOptions

log = logging.getLogger("workstation.server")
HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
           (b"x-accel-buffering", b"no")]


class EventStream(Response):
    """Sends ready-made SSE bytes from a generator; ends it (and so the engine's work) when the client leaves.

    A failure before the first byte raises, and so becomes a plain HTTP error; a later one becomes an `error` event followed by
    [DONE]. A stream never just stops.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], gate: Gate, options: ServerOptions) -> None:
        self._events = events
        self._gate = gate
        self._options = options
        self._send: Send | None = None
        self._started = False
        self._sending_since: float | None = None
        self._last_sent = 0.0
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        try:
            await self._gate.run(self._pump(), self._leaving(receive))
        except ClientGone:
            log.debug("client left its stream")
        except Exception as error:
            if not self._started:
                raise
            await self._end_with(error)

    async def _pump(self) -> None:
        first = asyncio.ensure_future(anext(self._events))
        try:
            done, _ = await asyncio.wait({first}, timeout=self._options.first_byte_seconds)
            if not done:
                await self._start()
            await self._write(await first)
            async for data in self._events:
                await self._write(data)
        finally:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            await self._events.aclose()
        await self._raw({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self) -> None:
        if not self._started:
            self._started = True
            self._last_sent = asyncio.get_running_loop().time()
            await self._raw({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
            await self._raw({"type": "http.response.body", "body": b"", "more_body": True})

    async def _write(self, data: bytes) -> None:
        await self._start()
        await self._raw({"type": "http.response.body", "body": data, "more_body": True})

    async def _raw(self, message: dict[str, object]) -> None:
        assert self._send is not None
        loop = asyncio.get_running_loop()
        self._sending_since = loop.time()
        await self._send(message)
        self._last_sent = loop.time()
        self._sending_since = None

    async def _end_with(self, error: Exception) -> None:
        if not isinstance(error, WorkstationError):
            log.error("a stream failed: %s", type(error).__name__, exc_info=error)
            error = WorkstationError("internal error")
        try:
            async with asyncio.timeout(2):
                await self._write(wire.sse(error_body(error)) + wire.DONE)
                await self._raw({"type": "http.response.body", "body": b"", "more_body": False})
        except (TimeoutError, OSError):
            log.debug("client did not take the error event")

    async def _leaving(self, receive: Receive) -> None:
        """Return when the client is gone or stopped reading; meanwhile break long silences with comments."""
        loop = asyncio.get_running_loop()
        period = min(self._options.keep_alive_seconds, self._options.write_timeout)
        closed = asyncio.ensure_future(until_disconnect(receive))
        try:
            while True:
                done, _ = await asyncio.wait({closed}, timeout=period)
                if done:
                    return
                now = loop.time()
                if self._sending_since is not None:
                    if now - self._sending_since > self._options.write_timeout:
                        log.warning("a client read nothing for %g s; its stream is dropped", self._options.write_timeout)
                        return
                elif self._started and now - self._last_sent >= self._options.keep_alive_seconds * 0.9:
                    await self._raw({"type": "http.response.body", "body": wire.KEEP_ALIVE, "more_body": True})
        finally:
            closed.cancel()
            await asyncio.gather(closed, return_exceptions=True)
