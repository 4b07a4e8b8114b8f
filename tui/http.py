"""As much of HTTP/1.1 as one dashboard needs, over asyncio: kept connections, bodies of a known length or in chunks.

The general client of the project takes a third of a second to import and three milliseconds a request; a dashboard that should
show its first frame within one second, and ask four times in each that follows, cannot spend that.
"""

from __future__ import annotations

import asyncio
import os
import re
from asyncio import IncompleteReadError, LimitOverrunError, StreamReader, StreamWriter
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

SECONDS = 5.0
MAX_HEADER = 64 * 1024
MAX_BODY = 16 << 20


class HTTPFault(Exception):
    """No answer, or one that is not HTTP. The message is a few words."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes


class Connections:
    """Connections to one server, kept and used again.

    Args:
        url: http:// or https://, host, and a port if need be.  headers: sent with every request.
    Raises:
        HTTPFault: the URL or a header cannot be used.
    """

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        try:
            parts = urlsplit(url)
            self._port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise HTTPFault(str(error)) from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise HTTPFault("it must begin with http:// or https:// and a host")
        self._host, self._prefix = parts.hostname, parts.path.rstrip("/")
        self._secure = parts.scheme == "https"
        lines = [f"Host: {parts.netloc.rpartition('@')[2]}", "Accept: application/json",
                 *(f"{name}: {value}" for name, value in headers.items())]
        self._head = "\r\n".join(lines)
        if not self._head.isascii() or not self._head.replace("\r\n", "").isprintable() or self._head.count("\n") >= len(lines):
            raise HTTPFault("the URL or the API key holds characters that no header may hold")
        self._idle: list[tuple[StreamReader, StreamWriter]] = []

    async def request(self, method: str, path: str, body: bytes = b"") -> Answer:
        """Raises HTTPFault, and TimeoutError after some seconds."""
        async with asyncio.timeout(SECONDS):
            while self._idle:
                kept = self._idle.pop()
                try:
                    return await self._exchange(kept, method, path, body)
                except _Stale:  # the server closed it while nobody looked
                    continue
            try:
                return await self._exchange(await self._open(), method, path, body)
            except _Stale:
                raise HTTPFault("the connection was closed without an answer") from None

    async def close(self) -> None:
        while self._idle:
            _close(self._idle.pop()[1])

    async def _open(self) -> tuple[StreamReader, StreamWriter]:
        secure: Any = None
        if self._secure:
            import ssl

            secure = await asyncio.to_thread(ssl.create_default_context)
        try:
            return await asyncio.open_connection(self._host, self._port, ssl=secure, limit=MAX_HEADER)
        except (OSError, UnicodeError) as error:
            raise HTTPFault(reason(error)) from None

    async def _exchange(self, streams: tuple[StreamReader, StreamWriter], method: str, path: str, body: bytes) -> Answer:
        reader, writer = streams
        kept = False
        try:
            about = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if method == "POST" else ""
            writer.write(f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}\r\n{about}\r\n".encode("ascii") + body)
            status, headers = await _head(reader)
            answer = Answer(status, await _body(reader, headers))
            kept = headers.get("connection", "").lower() != "close" and _ends(headers)
            return answer
        except (IncompleteReadError, LimitOverrunError, ValueError) as error:
            raise HTTPFault("the answer is not HTTP or was cut off") from error
        except OSError as error:
            raise HTTPFault(error.strerror or type(error).__name__) from None
        finally:
            if kept:
                self._idle.append(streams)
            else:
                _close(writer)


def reason(error: OSError | UnicodeError) -> str:
    """Why there is no connection, in the system's words. asyncio's name the address once more, or several at once."""
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"\[Errno (\d+)\]", str(error))):
        number = int(found[1])
    if number is not None and number > 0:
        return os.strerror(number)
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class _Stale(Exception):
    """A kept connection that had ended before its request."""


async def _head(reader: StreamReader) -> tuple[int, dict[str, str]]:
    try:
        text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except (IncompleteReadError, ConnectionResetError, BrokenPipeError) as error:
        if not getattr(error, "partial", b""):
            raise _Stale from None
        raise
    lines = text.split("\r\n")
    version, _, rest = lines[0].partition(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError("not HTTP/1")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return int(rest[:3]), headers


def _ends(headers: dict[str, str]) -> bool:
    """Whether the body's end is known without the connection's."""
    return "content-length" in headers or "chunked" in headers.get("transfer-encoding", "").lower()


async def _body(reader: StreamReader, headers: dict[str, str]) -> bytes:
    if "chunked" in headers.get("transfer-encoding", "").lower():
        return await _chunks(reader)
    if "content-length" not in headers:
        return await reader.read(MAX_BODY)
    length = int(headers["content-length"])
    if not 0 <= length <= MAX_BODY:
        raise ValueError("too large")
    return await reader.readexactly(length)


async def _chunks(reader: StreamReader) -> bytes:
    body = bytearray()
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        if size < 0 or len(body) + size > MAX_BODY:
            raise ValueError("too large")
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    while await reader.readuntil(b"\r\n") != b"\r\n":
        pass
    return bytes(body)


def _close(writer: StreamWriter) -> None:
    """Without waiting: a peer that does not answer must not hold the dashboard."""
    writer.transport.abort()
