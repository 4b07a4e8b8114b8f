"""JSON schemas: what can be enforced, checked before a grammar is made of it. A refusal names the path.

Draft 2020-12 without what a grammar cannot say (`if`, `not`, `uniqueItems`, …). Names of properties are only looked at where
the schema lists them; `$ref` stays inside the document.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from workstation.errors import InvalidRequestError
from workstation.grammar.params import shown

MAX_DEPTH = 64
MAX_NODES = 20_000
MAX_BYTES = 256 * 1024
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
TYPES = ("null", "boolean", "object", "array", "number", "integer", "string")
_ANNOTATIONS = frozenset({"$anchor", "$schema", "$id", "id", "$comment", "title", "description", "default", "readOnly",
                          "writeOnly", "examples", "contentMediaType", "contentEncoding"})
_DROPPED = frozenset({"deprecated", "discriminator"})  # annotations that the library does not know
_ONE = ("items", "additionalItems", "additionalProperties")  # keywords that hold one schema
_MANY = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def check_schema(schema: Any, where: str) -> None:
    """Raises InvalidRequestError naming the path, `response_format.json_schema.schema.properties.x.type`."""
    _Checker(schema, where).check()


class _Checker:
    """Walks a schema once, without recursion into what `$ref` names: that is walked in its own place."""

    def __init__(self, root: Any, where: str) -> None:
        self._root, self._where = root, where
        self._nodes = 0

    def check(self) -> None:
        todo = [(self._root, self._where, 0)]
        while todo:
            schema, where, depth = todo.pop()
            self._nodes += 1
            if depth > MAX_DEPTH:
                raise _error(where, f"nested more than {MAX_DEPTH} levels deep")
            if self._nodes > MAX_NODES:
                raise _error(self._where, f"the schema holds more than {MAX_NODES} parts")
            if isinstance(schema, bool):
                continue
            if not isinstance(schema, dict):
                raise _error(where, f"must be a schema: an object, true or false, got {shown(schema)}")
            self._node(schema, where)
            todo += [(sub, f"{where}{path}", depth + 1) for path, sub in subschemas(schema)]
        try:
            size = len(json.dumps(self._root))
        except RecursionError:
            raise _error(self._where, "a value in the schema is nested too deeply") from None
        if size > MAX_BYTES:
            raise _error(self._where, f"the schema is longer than {MAX_BYTES} bytes")

    def _node(self, schema: dict[str, Any], where: str) -> None:
        for key, value in schema.items():
            place = f"{where}.{key[:64]}"
            if key == "type":
                _check_type(value, place)
            elif key in _COUNTS:
                _check_count(value, place)
            elif key in _NUMBERS:
                _check_number(key, value, place)
            elif key == "enum":
                if not isinstance(value, list) or not value:
                    raise _error(place, f"must be an array that is not empty, got {shown(value)}")
            elif key == "required":
                if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                    raise _error(place, f"must be an array of strings, got {shown(value)}")
            elif key == "pattern":
                if not isinstance(value, str):
                    raise _error(place, f"must be a string, got {shown(value)}")
            elif key == "format":
                if value not in FORMATS:
                    raise _error(place, f"{shown(value)} cannot be enforced; known are {', '.join(FORMATS)}")
            elif key == "$ref":
                self._ref(value, place)
            elif key in _MANY:
                if not isinstance(value, list) or not value:
                    raise _error(place, f"must be an array of schemas that is not empty, got {shown(value)}")
            elif key in _NAMED:
                if not isinstance(value, dict):
                    raise _error(place, f"must be an object, got {shown(value)}")
            elif key not in _ONE and key not in _ANNOTATIONS | _DROPPED and key != "const":
                raise _error(place, "this keyword cannot be enforced")

    def _ref(self, value: Any, place: str) -> None:
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            raise _error(place, f"must name a place in the same schema (#/…), got {shown(value)}")
        node = self._root
        for part in value.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, list) and name.isdigit() and int(name) < len(node):
                node = node[int(name)]
            elif isinstance(node, dict) and name in node:
                node = node[name]
            else:
                raise _error(place, f"{shown(value)} is not in the schema")


def subschemas(schema: Any) -> Iterator[tuple[str, Any]]:
    """(path, schema) of all that stand directly inside a schema."""
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key in _ONE and not isinstance(value, list):
            yield f".{key}", value
        elif isinstance(value, list) and (key in _MANY or key in _ONE):
            yield from ((f".{key}[{index}]", item) for index, item in enumerate(value))
        elif key in _NAMED and isinstance(value, dict):
            yield from ((f".{key}.{name[:64]}", item) for name, item in value.items())


def prepared(schema: Any, *, close: bool = False) -> Any:
    """A checked schema as the library takes it. close: objects that say nothing of further properties have none."""
    if isinstance(schema, list):
        return [prepared(item, close=close) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED:
            out[key] = {name: prepared(item, close=close) for name, item in value.items()}
        elif key not in _DROPPED:
            out[key] = prepared(value, close=close) if key in _ONE or key in _MANY else value
    if close and ("properties" in out or out.get("type") == "object"):
        out.setdefault("additionalProperties", False)
    return out


def _check_type(value: Any, place: str) -> None:
    listed = value if isinstance(value, list) else [value]
    if not listed or not all(isinstance(item, str) and item in TYPES for item in listed):
        raise _error(place, f"must be one of {', '.join(TYPES)}, or an array of them, got {shown(value)}")


def _check_count(value: Any, place: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or value < 0 or value != int(value):
        raise _error(place, f"must be a whole number of at least 0, got {shown(value)}")


def _check_number(key: str, value: Any, place: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _error(place, f"must be a number, got {shown(value)}")
    if key == "multipleOf" and value <= 0:
        raise _error(place, f"must be above 0, got {shown(value)}")


def _error(place: str, message: str) -> InvalidRequestError:
    return InvalidRequestError(f"{place}: {message}", param=place[:512])
