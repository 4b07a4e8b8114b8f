"""A streaming client that costs little: raw sockets, events counted by their mark, usage read off the end of any dialect."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

EVENT, LAST_CHUNK = b"data: {", b"\r\n0\r\n\r\n"
TAIL = 4000  # bytes kept: the last events have usage and timings
TOKENS = re.compile(rb'"(?:completion|output)_tokens":\s*(\d+)')


@dataclass(slots=True)
class Seen:
    """One stream: seconds from sending it to its first and last event, and the gaps between reads that brought events."""

    first: float = 0.0
    last: float = 0.0
    events: int = 0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)


class Stream(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._tail = b""
        self._done: asyncio.Future[Seen] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(exc or ConnectionError("the server closed the connection"))

    async def ask(self, request: bytes) -> Seen:
        self._seen, self._tail, self._done = Seen(), b"", asyncio.get_running_loop().create_future()
        self._began = self._last = time.perf_counter()
        self._transport.write(request)
        return await self._done

    def data_received(self, data: bytes) -> None:
        now, seen = time.perf_counter(), self._seen
        count = data.count(EVENT)
        if count:
            if not seen.events:
                seen.first = now - self._began
            else:
                seen.gaps.append(now - self._last)
            seen.events += count
            self._last = now
        self._tail = (self._tail + data)[-TAIL:]
        if self._tail.endswith(LAST_CHUNK):
            self._finish(now)

    def _finish(self, now: float) -> None:
        assert self._done is not None
        self._seen.last = now - self._began
        counts = TOKENS.findall(self._tail)
        if not counts:
            self._done.set_exception(ValueError(f"an answer without usage: {self._tail[-300:]!r}"))
            return
        self._seen.tokens = int(counts[-1])
        self._done.set_result(self._seen)


def request(path: str, body: dict[str, object]) -> bytes:
    """One HTTP/1.1 request, whole."""
    data = json.dumps(body).encode()
    head = (f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {len(data)}\r\n\r\n")
    return head.encode() + data


async def connect(port: int, count: int) -> list[Stream]:
    loop = asyncio.get_running_loop()
    return [(await loop.create_connection(Stream, "127.0.0.1", port))[1] for _ in range(count)]


async def all_at_once(streams: Sequence[Stream], requests: Sequence[bytes]) -> list[Seen]:
    return await asyncio.gather(*(stream.ask(text) for stream, text in zip(streams, requests, strict=True)))
