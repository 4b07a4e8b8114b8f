"""Request bodies: bytes → JSON → a validated pydantic model, with errors that name the field."""

from __future__ import annotations

import asyncio
import re
from difflib import get_close_matches
from typing import Any, TypeVar

import msgspec
import pydantic
from starlette.requests import ClientDisconnect, Request

from workstation.errors import InvalidRequestError
from workstation.server.errors import HTTPRequestError
from workstation.server.options import ServerOptions

Model = TypeVar("Model", bound=pydantic.BaseModel)
# Possessive, and a missing end is allowed, so that no body makes it look twice at a byte.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


async def read_body(request: Request, options: ServerOptions) -> bytes:
    """The raw body. Raises HTTPRequestError: 408 when it comes too slowly, 413 when it is too large."""
    try:
        async with asyncio.timeout(options.body_timeout):
            return await request.body()
    except TimeoutError:
        raise HTTPRequestError(408, "body_timeout", f"the body took longer than {options.body_timeout:g} seconds") from None
    except ClientDisconnect:
        raise HTTPRequestError(408, "client_disconnected", "the client left before its body was complete") from None


def parse_json(body: bytes, max_depth: int) -> dict[str, Any]:
    """A JSON object of bounded depth; NaN and Infinity are not JSON. Raises InvalidRequestError."""
    if body.count(b"[") + body.count(b"{") > max_depth and _depth(body, max_depth) > max_depth:
        raise InvalidRequestError(f"the JSON body is nested deeper than {max_depth} levels")
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not valid JSON (NaN and Infinity are not JSON): {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"the body must be a JSON object, not {_kind(value)}")
    return value


def _depth(body: bytes, enough: int) -> int:
    """How deep brackets nest outside strings, counted up to `enough` + 1: each pass takes the innermost pairs away."""
    brackets = _STRING.sub(b"", body).translate(_BRACKETS, delete=_NO_BRACKETS)
    for passes in range(enough + 1):
        inner = brackets.replace(b"[]", b"")
        if inner == brackets:
            return passes + brackets.count(b"[")  # what is left does not match: no JSON, or nothing
        brackets = inner
    return enough + 1


def _kind(value: Any) -> str:
    return {bool: "true or false", list: "an array", str: "a string", type(None): "null"}.get(type(value), "a number")


def validate(payload: dict[str, Any], schema: type[Model], *, harmless: frozenset[str] = frozenset(),
             refused: dict[str, tuple[tuple[Any, ...], str]] | None = None) -> Model:
    """Check an object against a schema.

    Args:
        harmless: fields clients send that change nothing here; dropped.
        refused: name → (values that mean "not used", sentence); any other value is refused with the sentence.

    Raises InvalidRequestError naming the field; an unknown field's error names the nearest known one.
    """
    known = {}
    for name, value in payload.items():
        if name in schema.model_fields:
            known[name] = value
        elif refused is not None and name in refused:
            allowed, sentence = refused[name]
            if value is not None and not any(value == item and type(value) is type(item) for item in allowed):
                raise InvalidRequestError(f"{name}={show(value)} is not supported: {sentence}", param=name)
        elif name not in harmless:
            raise _unknown(name, [*schema.model_fields, *(refused or {})])
    try:
        return schema.model_validate(known)
    except pydantic.ValidationError as error:
        raise _first_error(error, known) from None


def _unknown(name: str, names: list[str]) -> InvalidRequestError:
    near = get_close_matches(name[:64], names, 1, 0.75)
    hint = f"; did you mean {near[0]}?" if near else ""
    return InvalidRequestError(f"unknown field {show(name)}{hint}", param=name[:64])


def _first_error(error: pydantic.ValidationError, payload: dict[str, Any]) -> InvalidRequestError:
    first = error.errors(include_url=False, include_context=False)[0]
    param = _written_path(first["loc"], payload)
    text = first["msg"].removeprefix("Value error, ")
    message = f"{param}: {text[:1].lower()}{text[1:]}"
    if first["type"] != "missing":
        message += f", got {show(first['input'])}"
    return InvalidRequestError(message, param=param)


def _written_path(loc: tuple[int | str, ...], payload: Any) -> str:
    """The place as a client would write it; names that pydantic adds for branches of a union are left out."""
    path = ""
    for position, part in enumerate(loc):
        inside = part in payload if isinstance(payload, dict) else isinstance(part, int) and isinstance(payload, list)
        if inside:
            payload = payload[part]
        elif position:
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part[:64]}"
    return path.removeprefix(".")


def show(value: Any) -> str:
    """A value for an error message: short whatever was sent."""
    if isinstance(value, (list, dict)):
        return f"{_kind(value) if isinstance(value, list) else 'an object'} of {len(value)}"
    text = repr(value[:80]) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
