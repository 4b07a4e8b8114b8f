"""Calls written as JSON objects: `{"name": …, "arguments": {…}}`, one or an array of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from workstation.parsers.out import Out
from workstation.parsers.reader import Reader, Steps

MAX_HELD_KEY = 128


@dataclass(frozen=True, slots=True)
class CallKeys:
    """What the object's keys are called. `known` says whether a name is a tool's, where nothing else marks a call."""

    name: tuple[str, ...] = ("name", "function")
    arguments: tuple[str, ...] = ("arguments", "parameters")
    known: Callable[[str], bool] | None = None


class _ObjectCall:
    """One object on its way to being a call: begun once its name is known and its arguments come."""

    def __init__(self, reader: Reader, out: Out, keys: CallKeys) -> None:
        self._reader, self._out, self._keys = reader, out, keys
        self._name: str | None = None
        self._early: str | None = None  # arguments that stood before the name
        self._begun = False

    def read(self) -> Steps[bool]:
        """Read the object; False when it is no call (then nothing was put out and the tape holds it)."""
        reader = self._reader
        if not (yield from reader.match("{")):
            return False
        while True:
            yield from reader.skip()
            if not (yield from self._pair()):
                break
            yield from reader.skip()
            if not (yield from reader.match(",")):
                break
        whole = yield from reader.match("}")
        if not self._begun and self._name is not None and (whole or self._early is not None):
            self._begin()
            self._out.arguments(self._early or "{}")
        if self._begun:
            self._out.end_call()
        return self._begun

    def _begin(self) -> None:
        self._reader.recorded()
        self._out.start_call(self._name or "")
        self._begun = True

    def _pair(self) -> Steps[bool]:
        """One key and its value; False when there is none, or when the object cannot be a call."""
        reader = self._reader
        key = yield from self._string()
        if key is None:
            return False
        yield from reader.skip()
        if not (yield from reader.match(":")):
            return False
        yield from reader.skip()
        if key in self._keys.name and self._name is None:
            self._name = yield from self._string()
            return self._name is not None and bool(self._name) and (self._keys.known is None or self._keys.known(self._name))
        if key in self._keys.arguments and not self._begun:
            return (yield from self._arguments())
        if self._begun or self._keys.known is None or key in ("type", "id"):
            return (yield from reader.json_value(_nowhere))
        return False

    def _string(self) -> Steps[str | None]:
        if (yield from self._reader.peek()) != '"':
            return None
        pieces: list[str] = []
        yield from self._reader.json_value(pieces.append)
        return _decoded("".join(pieces))

    def _arguments(self) -> Steps[bool]:
        """An object is passed on as it comes; a string that holds one is read whole first; null means none."""
        first = yield from self._reader.peek()
        if first == "{" and self._name is not None:
            self._begin()
            yield from self._reader.json_value(self._out.arguments)
            return True
        pieces: list[str] = []
        yield from self._reader.json_value(pieces.append)
        value = "".join(pieces)
        if first == '"':
            value = _decoded(value) or ""
        self._early = value if value.startswith("{") else "{}"
        return first in ("{", '"', "n")


def _nowhere(piece: str) -> None:
    """Values of keys that mean nothing here."""


def _decoded(text: str) -> str | None:
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def object_call(reader: Reader, out: Out, keys: CallKeys, *begun: str) -> Steps[bool]:
    """Read one call. When it is none, what was read (after `begun`) goes out as text."""
    reader.record(*begun)
    if (yield from _ObjectCall(reader, out, keys).read()):
        return True
    out.text(reader.recorded())
    return False


def array_of_calls(reader: Reader, out: Out, keys: CallKeys, *begun: str) -> Steps[bool]:
    """Read `[{…}, {…}]`, or one object without brackets; False when the first of them is no call."""
    reader.record(*begun)
    bracket = yield from reader.match("[")
    yield from reader.skip()
    found = 0
    while (yield from _ObjectCall(reader, out, keys).read()):
        found += 1
        yield from reader.skip()
        if not bracket or not (yield from reader.match(",")):
            break
        yield from reader.skip()
    if not found:
        out.text(reader.recorded())
        return False
    if bracket:
        yield from reader.match("]")
    return True
