"""uvicorn's fast HTTP/1.1 parser with the two limits it lacks: bytes of headers, and seconds to send them."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_TOO_LARGE = (b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-type: application/json\r\n"
              b"content-length: %d\r\n\r\n%s")
_BODY = (b'{"error":{"message":"the request headers are too large","type":"invalid_request_error","param":null,'
         b'"code":"headers_too_large"}}')


class LimitedProtocol(HttpToolsProtocol):
    """Closes connections whose headers are too many bytes or come too slowly.

    Bytes are counted per read while headers are incomplete, because the parser keeps an unfinished header to itself.
    """

    max_header_bytes = 64 * 1024
    header_timeout = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reading_headers = False
        self._header_bytes = 0
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._reading_headers:
            self._header_bytes += len(data)
            if self._header_bytes > self.max_header_bytes:
                self.transport.write(_TOO_LARGE % (len(_BODY), _BODY))
                self.transport.close()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reading_headers = True
        self._header_bytes = 0
        self._start_timer()

    def on_headers_complete(self) -> None:
        self._reading_headers = False
        self._stop_timer()
        super().on_headers_complete()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._header_timer = self.loop.call_later(self.header_timeout, self._too_slow)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _too_slow(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing():
            self.transport.close()


def limited_protocol(max_header_bytes: int, header_timeout: float) -> type[LimitedProtocol]:
    """The protocol with its limits set, for uvicorn's `http` option."""
    return type("LimitedProtocol", (LimitedProtocol,),
                {"max_header_bytes": max_header_bytes, "header_timeout": header_timeout})
