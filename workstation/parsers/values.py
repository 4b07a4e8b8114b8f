"""Arguments that are not written as JSON: XML parameters and Python literals, turned into JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

MAX_DEPTH = 64
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": ""}
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"), (dict, "object"))


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class ToolSchemas:
    """Which JSON types the parameters of the request's tools may have.

    Args:
        tools: OpenAI's `tools`.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self._parameters: dict[str, Mapping[str, Any]] = {}
        for tool in tools:
            function = tool["function"]
            properties = (function.get("parameters") or {}).get("properties")
            self._parameters[function["name"]] = properties if isinstance(properties, Mapping) else {}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._parameters)

    def order(self, tool: str) -> list[str]:
        """A tool's parameters, in the schema's order."""
        return list(self._parameters.get(tool, {}))

    def types(self, tool: str, parameter: str) -> frozenset[str]:
        """Empty when the schema does not say."""
        return _types(self._parameters.get(tool, {}).get(parameter), 0)


def _types(schema: Any, depth: int) -> frozenset[str]:
    if not isinstance(schema, Mapping) or depth > 4:
        return frozenset()
    kind = schema.get("type")
    if isinstance(kind, str):
        return frozenset({kind})
    if isinstance(kind, list):
        return frozenset(item for item in kind if isinstance(item, str))
    if isinstance(schema.get("enum"), list):
        return frozenset(_kind(item) for item in schema["enum"])
    branches = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(branches, list):
        return frozenset().union(*(_types(branch, depth + 1) for branch in branches))
    return frozenset()


def _kind(value: Any) -> str:
    return next((name for kind, name in _KINDS if isinstance(value, kind)), "null")


def typed_json(raw: str, types: frozenset[str]) -> str:
    """JSON of a value written without quotes: read as the schema's types allow, else as a string."""
    if types == {"string"}:
        return dumps(raw)
    try:
        value = literal(raw.strip())
    except ValueError:
        return dumps(raw)
    kind = _kind(value)
    if types and kind not in types and not (kind == "integer" and "number" in types) and "string" in types:
        return dumps(raw)
    return dumps(value)


def literal(text: str) -> Any:
    """The value of a JSON or Python literal. Raises ValueError; nothing is ever evaluated."""
    scanner = _Literal(text)
    value = scanner.value(0)
    scanner.space()
    if scanner.at != len(text):
        raise ValueError("text after the literal")
    return value


def python_arguments(text: str, names: Sequence[str] = ()) -> dict[str, Any]:
    """`a=1, b='x'` as an object; arguments without a name take the next of `names`. Raises ValueError."""
    scanner = _Literal(text)
    out: dict[str, Any] = {}
    scanner.space()
    while scanner.at < len(text):
        name = scanner.keyword()
        if name is None:
            if len(out) >= len(names):
                raise ValueError("more arguments than parameters")
            name = names[len(out)]
        out[name] = scanner.value(0)
        scanner.space()
        if scanner.at < len(text):
            scanner.expect(",")
            scanner.space()
    return out


class _Literal:
    """A reader of strings, numbers, words, lists, tuples and objects; looks at each character once."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def expect(self, char: str) -> None:
        self.space()
        if not self.text.startswith(char, self.at):
            raise ValueError(f"no {char} where one belongs")
        self.at += len(char)

    def keyword(self) -> str | None:
        """`name=`, read; None when something else comes."""
        end = self.at
        while end < len(self.text) and (self.text[end].isalnum() or self.text[end] in "_-."):
            end += 1
        after = end
        while after < len(self.text) and self.text[after].isspace():
            after += 1
        if end == self.at or not self.text.startswith("=", after):
            return None
        name, self.at = self.text[self.at:end], after + 1
        return name

    def value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        self.space()
        char = self.text[self.at:self.at + 1]
        if char in ("'", '"') and char:
            return self._string(char)
        if char in ("[", "("):
            return self._items("]" if char == "[" else ")", depth)
        if char == "{":
            return self._object(depth)
        return self._scalar()

    def _items(self, close: str, depth: int) -> list[Any]:
        self.at += 1
        out: list[Any] = []
        while True:
            self.space()
            if self.text.startswith(close, self.at):
                self.at += 1
                return out
            if out:
                self.expect(",")
                self.space()
                if self.text.startswith(close, self.at):
                    continue
            out.append(self.value(depth + 1))

    def _object(self, depth: int) -> dict[str, Any]:
        self.at += 1
        out: dict[str, Any] = {}
        while True:
            self.space()
            if self.text.startswith("}", self.at):
                self.at += 1
                return out
            if out:
                self.expect(",")
                self.space()
                if self.text.startswith("}", self.at):
                    continue
            key = self.value(depth + 1)
            if not isinstance(key, (str, int, float, bool)) and key is not None:
                raise ValueError("a key that is no string")
            self.expect(":")
            out[key if isinstance(key, str) else dumps(key)] = self.value(depth + 1)

    def _string(self, quote: str) -> str:
        self.at += 1
        out: list[str] = []
        while True:
            end = self.at
            while end < len(self.text) and self.text[end] not in (quote, "\\"):
                end += 1
            if end >= len(self.text):
                raise ValueError("a string without an end")
            out.append(self.text[self.at:end])
            self.at = end + 1
            if self.text[end] == quote:
                return "".join(out)
            out.append(self._escape())

    def _escape(self) -> str:
        char = self.text[self.at:self.at + 1]
        if not char:
            raise ValueError("a string without an end")
        self.at += 1
        width = {"u": 4, "x": 2, "U": 8}.get(char)
        if width is None:
            return _ESCAPES.get(char, char)
        digits = self.text[self.at:self.at + width]
        self.at += width
        code = int(digits, 16) if len(digits) == width and digits.isalnum() else -1
        if 0xD800 <= code < 0xDC00 and self.text.startswith("\\u", self.at):
            low = int(self.text[self.at + 2:self.at + 6] or "x", 16)
            self.at += 6
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
        if not 0 <= code < 0x110000 or 0xD800 <= code < 0xE000:
            raise ValueError("an escape that is no character")
        return chr(code)

    def _scalar(self) -> Any:
        end = self.at
        while end < len(self.text) and (self.text[end].isalnum() or self.text[end] in "+-._"):
            end += 1
        word, self.at = self.text[self.at:end], end
        if word in _WORDS:
            return _WORDS[word]
        if not word or (not word.lstrip("+-")[:1].isdigit() and not word.lstrip("+-").startswith(".")) or "_" in word:
            raise ValueError("no literal")
        if len(word) <= 64 and word.lstrip("+-").isdigit():
            return int(word)
        number = float(word)
        if number in (float("inf"), float("-inf")):
            raise ValueError("a number without end")
        return number
