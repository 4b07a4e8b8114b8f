"""The door: what every HTTP request must pass before any route sees it. Raw ASGI; default deny."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from urllib.parse import SplitResult, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from workstation.errors import AuthenticationError, WorkstationError
from workstation.server.errors import HTTPRequestError, error_response
from workstation.server.ids import fresh_id
from workstation.server.options import ServerOptions, is_loopback

PUBLIC_PATHS = frozenset({"/health"})


class Guard:
    """Host and Origin (on a loopback bind), API key, content type and body size; adds x-request-id to every answer.

    A web page on another site can reach a loopback port through the visitor's browser, by name tricks (DNS rebinding) or plain
    requests; the Host list stops the first, Origin and Sec-Fetch-Site the second, and JSON-only POST keeps simple forms out.
    """

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app = app
        self._options = options
        self._digests = [hashlib.sha256(key.encode()).digest() for key in options.api_keys]
        self._hosts = {"localhost", options.host.lower().strip("[]"), *(host.lower() for host in options.allowed_hosts)}
        self._origins = {origin.rstrip("/").lower() for origin in options.allowed_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008, "reason": "no websocket routes"})
            return
        request_id = fresh_id()
        scope.setdefault("state", {})["request_id"] = request_id
        reply = _with_header(send, b"x-request-id", request_id.encode())
        try:
            self._check(scope)
        except WorkstationError as error:
            await error_response(error, scope)(scope, receive, reply)
            return
        await self._app(scope, self._capped(receive), reply)

    def _check(self, scope: Scope) -> None:
        headers = scope["headers"]
        if self._options.loopback:
            self._check_host(_values(headers, b"host"))
            self._check_origin(_values(headers, b"origin"), _values(headers, b"sec-fetch-site"))
        if self._digests and scope["path"] not in PUBLIC_PATHS:
            self._check_key(_values(headers, b"authorization"), _values(headers, b"x-api-key"))
        if sum(len(name) + len(value) for name, value in headers) > self._options.max_header_bytes:
            raise HTTPRequestError(431, "headers_too_large", f"headers exceed {self._options.max_header_bytes} bytes")
        if scope["method"] == "POST":
            self._check_content(headers)

    def _check_host(self, values: list[bytes]) -> None:
        name = _host_name(values[0]) if len(values) == 1 else None
        if name is None or not (name in self._hosts or is_loopback(name)):
            raise HTTPRequestError(403, "host_not_allowed", "this server answers to loopback names only; the Host header names "
                                   "another (start it with allowed hosts to permit more)")

    def _check_origin(self, origins: list[bytes], sites: list[bytes]) -> None:
        if not origins:
            if sites == [b"cross-site"]:
                raise HTTPRequestError(403, "origin_not_allowed", "cross-site requests from a browser are refused")
            return
        origin = origins[0].decode("latin-1").lower()
        if origin.rstrip("/") in self._origins or "*" in self._origins:
            return
        parts = _split(origin)
        if len(origins) > 1 or parts is None or parts.scheme not in ("http", "https") or not is_loopback(parts.hostname or ""):
            raise HTTPRequestError(403, "origin_not_allowed", "requests from web pages of another origin are refused")

    def _check_key(self, values: list[bytes], plain: list[bytes]) -> None:
        """The key as OpenAI's clients send it, or as Anthropic's do."""
        scheme, _, key = (values[0] if len(values) == 1 else b"").partition(b" ")
        given = [key if scheme.lower() == b"bearer" else b"", plain[0] if len(plain) == 1 else b""]
        digests = [hashlib.sha256(item.strip()).digest() for item in given]
        matches = [hmac.compare_digest(digest, known) for digest in digests for known in self._digests]
        if not any(matches):
            raise AuthenticationError("missing or wrong API key; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'")

    def _check_content(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        kinds = _values(headers, b"content-type")
        kind = kinds[0].split(b";")[0].strip().lower() if len(kinds) == 1 else b""
        if kind != b"application/json":
            raise HTTPRequestError(415, "unsupported_media_type", "POST bodies must be sent as application/json")
        lengths = _values(headers, b"content-length")
        if lengths and lengths[0].isdigit() and int(lengths[0]) > self._options.max_body_bytes:
            raise self._too_large()

    def _capped(self, receive: Receive) -> Receive:
        """`receive` that counts the body's bytes itself: Content-Length is a claim."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._options.max_body_bytes:
                    raise self._too_large()
            return message

        return counted

    def _too_large(self) -> HTTPRequestError:
        return HTTPRequestError(413, "body_too_large", f"the body exceeds {self._options.max_body_bytes} bytes")


def _values(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]


def _split(url: str) -> SplitResult | None:
    try:
        return urlsplit(url)
    except ValueError:
        return None


def _host_name(value: bytes) -> str | None:
    """The name in a Host header, lower case, without port; None when it is not a plain host[:port]."""
    text = value.decode("latin-1").lower()
    if not text or any(char in text for char in "/?#@\\ ,"):
        return None
    if text.startswith("["):
        name, closed, port = text[1:].partition("]")
        port = port.removeprefix(":")
        return name if closed and (not port or port.isdigit()) else None
    name, _, port = text.partition(":")
    return name if not port or port.isdigit() else None


def _with_header(send: Send, name: bytes, value: bytes) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), (name, value)]
        await send(message)

    return wrapped
