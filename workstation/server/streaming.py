"""Server-sent events over ASGI: headers once the first event is there, keep-alives, an error event when a stream breaks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from typing import Protocol

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


class Voice(Protocol):
    """What a dialect says beside its events."""

    def opening(self) -> bytes:
        """Sent with the headers when no event is ready yet."""
        ...

    def keep_alive(self) -> bytes:
        """Sent when nothing was for a while."""
        ...

    def last_words(self, error: WorkstationError) -> bytes:
        """The end of a stream that broke."""
        ...


class Comments:
    """OpenAI's completions: comments, which every client skips, and an `error` event before [DONE]."""

    def opening(self) -> bytes:
        return b""

    def keep_alive(self) -> bytes:
        return wire.KEEP_ALIVE

    def last_words(self, error: WorkstationError) -> bytes:
        return wire.sse(error_body(error)) + wire.DONE


class EventStream(Response):
    """Sends ready-made SSE bytes from a generator; ends it (and so the engine's work) when the client leaves.

    A failure before the first byte raises, and so becomes a plain HTTP error; a later one becomes the voice's last words.
    A stream never just stops.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], gate: Gate, options: ServerOptions,
                 voice: Voice | None = None) -> None:
        self._events = events
        self._voice: Voice = voice or Comments()
        self._gate = gate
        self._options = options
        self._send: Send | None = None
        self._started = False
        self._last_sent = time.monotonic()
        self._sending_since = 0.0  # 0.0 while nothing is on its way to the socket
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
        try:
            async for data in self._events:
                await self._write(data)
        finally:
            await self._events.aclose()
        await self._raw({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self) -> None:
        self._started = True
        await self._raw({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})

    async def _write(self, data: bytes) -> None:
        if not self._started:
            await self._start()
        await self._raw({"type": "http.response.body", "body": data, "more_body": True})

    async def _raw(self, message: dict[str, object]) -> None:
        assert self._send is not None
        self._sending_since = time.monotonic()
        await self._send(message)
        self._last_sent = time.monotonic()
        self._sending_since = 0.0

    async def _end_with(self, error: Exception) -> None:
        if not isinstance(error, WorkstationError):
            log.error("a stream failed: %s", type(error).__name__, exc_info=error)
            error = WorkstationError("internal error")
        try:
            async with asyncio.timeout(2):
                await self._write(self._voice.last_words(error))
                await self._raw({"type": "http.response.body", "body": b"", "more_body": False})
        except (TimeoutError, OSError):
            log.debug("client did not take the error event")

    async def _leaving(self, receive: Receive) -> None:
        """Return when the client is gone or stopped reading; meanwhile send headers that wait and break long silences."""
        period = min(self._options.keep_alive_seconds, self._options.write_timeout)
        patience = min(period, self._options.first_byte_seconds)
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await until_disconnect(receive)
                    return
            patience = period
            now = time.monotonic()
            if self._sending_since:
                if now - self._sending_since > self._options.write_timeout:
                    log.warning("a client read nothing for %g s; its stream is dropped", self._options.write_timeout)
                    return
            elif not self._started:
                await self._start()
                await self._raw({"type": "http.response.body", "body": self._voice.opening(), "more_body": True})
            elif now - self._last_sent >= self._options.keep_alive_seconds * 0.9:
                await self._raw({"type": "http.response.body", "body": self._voice.keep_alive(), "more_body": True})
