"""Errors on the wire: OpenAI's shape `{"error": {message, type, param, code}}`, one handler per class of error."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from workstation.errors import ContextLengthError, OverloadedError, WorkstationError

log = logging.getLogger("workstation.server")


class HTTPRequestError(WorkstationError):
    """The HTTP request itself is wrong (not a field of its body).

    Statuses used: 403 foreign host or origin, 404 path, 405 method, 408 too slow, 413 too large, 415 not JSON.
    """

    kind = "invalid_request_error"

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.http_status = status
        self.code = code


def error_body(error: WorkstationError) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


_ANTHROPIC_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
                    413: "request_too_large", 503: "overloaded_error"}


def anthropic_error(error: WorkstationError, request_id: str = "") -> dict[str, Any]:
    """Anthropic's error object; an overflow in the words on which its clients shorten a conversation."""
    message = error.message
    if isinstance(error, ContextLengthError):
        message = f"prompt is too long: {error.tokens} tokens > {error.limit} maximum"
    default = "api_error" if error.http_status >= 500 else "invalid_request_error"
    return {"type": "error", "error": {"type": _ANTHROPIC_TYPES.get(error.http_status, default), "message": message},
            "request_id": request_id}


def error_response(error: WorkstationError, scope: Scope | None = None) -> Response:
    """`scope` tells by its path in whose dialect the client is answered."""
    headers = {}
    if isinstance(error, OverloadedError):
        headers["retry-after"] = str(error.retry_after)
    if error.http_status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not worth reading
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    scope = scope or {"path": ""}
    body = error_body(error)
    if scope["path"].startswith("/v1/messages"):
        body = anthropic_error(error, scope.get("state", {}).get("request_id", ""))
    return Response(msgspec.json.encode(body), error.http_status, headers, "application/json")


def from_http_exception(error: HTTPException, method: str, path: str) -> HTTPRequestError:
    """Starlette's own refusals (unknown path, wrong method), in our words."""
    if error.status_code == 404:
        return HTTPRequestError(404, "not_found", f"unknown path: {method} {path[:200]}")
    if error.status_code == 405:
        return HTTPRequestError(405, "method_not_allowed", f"{method} is not allowed on {path[:200]}")
    return HTTPRequestError(error.status_code, "http_error", str(error.detail))


def install(app: FastAPI) -> None:
    """Register the handlers."""

    async def deliberate(request: Request, error: Exception) -> Response:
        assert isinstance(error, WorkstationError)
        return error_response(error, request.scope)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = error_response(from_http_exception(error, request.method, request.scope["path"]), request.scope)
        response.headers.update(error.headers or {})
        return response

    async def unexpected(request: Request, error: Exception) -> Response:
        """A fault of ours: the client learns an id, the log the cause; neither learns the prompt."""
        request_id = request.scope.get("state", {}).get("request_id", "")
        log.error("request %s failed: %s", request_id, type(error).__name__)
        return error_response(WorkstationError(f"internal error; the server's log names request {request_id}"), request.scope)

    app.add_exception_handler(WorkstationError, deliberate)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)
