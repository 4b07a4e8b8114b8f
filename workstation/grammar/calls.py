"""Tool calls as grammars: each call in the model's own way of writing, its arguments by the tool's schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workstation.errors import InvalidRequestError
from workstation.grammar.lark import Lark, quoted
from workstation.grammar.schema import check_schema, prepared
from workstation.parsers.detect import Formats
from workstation.parsers.frames import CallFrame, before

ANYTHING = {"type": "object"}
_IN_TEXT = ("pattern", "format", "minLength", "maxLength")  # of strings that stand without quotes


class Calls:
    """The calls one answer may hold.

    Args:
        tools: OpenAI's `tools`, checked in shape; `where` in a function names its schema's place.
        loose: arguments of tools that are not strict may be any object.
    """

    def __init__(self, lark: Lark, formats: Formats, frame: CallFrame, tools: Sequence[dict[str, Any]], *, loose: bool) -> None:
        self._lark, self._formats, self._frame = lark, formats, frame
        self._tools = [(tool["function"], tool["function"].get("where") or f"tools[{index}].function.parameters")
                       for index, tool in enumerate(tools)]
        self._loose = loose

    def only(self, name: str | None, *, several: bool) -> str:
        """An expression for an answer that is a call of the tool `name`, or of any; `several` allows more than one."""
        frame, literal = self._frame, self._lark.literal
        call = self._any(name)
        more = f"({literal(frame.between)} {call})*" if several and frame.several else ""
        return f"{literal(frame.first)} {call} {more} {literal(frame.last)}"

    def among_text(self, *, several: bool) -> str:
        """An expression for text with calls in it, wherever the model begins one."""
        frame, lark, formats = self._frame, self._lark, self._formats
        bare = formats.tools.bare if formats.tools is not None else ""
        if bare:
            lark.rules["PLAIN"] = f"PLAIN: /[^\\s\\{bare}](.|\\n)*/"
            return f"({self.only(None, several=several)} | PLAIN?)"
        assert formats.tools is not None, "Harmony has a grammar of its own"
        mark = next(mark for mark in formats.tools.marks if formats.opening(None).startswith(mark))
        call = self._any(None, cut=mark if not frame.first else "")
        if frame.first:
            more = f"({lark.literal(frame.between)} {self._any(None)})*" if several else ""
            call = f"{lark.literal(frame.first.removeprefix(mark))} {call} {more} {lark.literal(frame.last)}"
        block = lark.rule(f"{lark.until(mark)} {call}")
        return f"{block}{'*' if several else '?'} {lark.text()}"

    def _any(self, name: str | None, cut: str = "") -> str:
        """One call; `cut` is what of its beginning was read."""
        wanted = [item for item in self._tools if name is None or item[0]["name"] == name]
        calls = [self._lark.rule(f"{self._lark.literal(before(self._formats, self._frame, tool['name']).removeprefix(cut))} "
                                 f"{self._arguments(tool, where)} {self._lark.literal(self._frame.after)}")
                 for tool, where in wanted]
        return f"({' | '.join(calls)})"

    def _arguments(self, tool: dict[str, Any], where: str) -> str:
        strict = tool.get("strict") is True
        schema = tool.get("parameters") or ANYTHING
        if self._loose and not strict:
            schema = ANYTHING
        else:
            try:
                check_schema(schema, where)
                schema = prepared(schema)
            except InvalidRequestError:
                if strict:
                    raise
                schema = ANYTHING  # agents pass schemas of others on: such a call is read, not forced
        if self._frame.style == "json":
            return f"{self._lark.space()} {self._lark.schema({'type': 'object', **schema})}"
        return self._one_by_one(schema, where, strict=strict)

    def _one_by_one(self, schema: dict[str, Any], where: str, *, strict: bool) -> str:
        """Arguments that stand one after the other, in the schema's order."""
        properties = schema.get("properties")
        if not isinstance(properties, dict):
            if strict and schema != ANYTHING:
                raise InvalidRequestError(f"{where}: a strict tool of this model must list its properties", param=where)
            return self._unlisted()
        required = schema.get("required") or []
        shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        items = [(self._item(name, inner, shared, f"{where}.properties.{name}", strict=strict), name in required)
                 for name, inner in properties.items()]
        if self._frame.style == "python":
            return self._joined(items)
        return " ".join(item if must else f"({item})?" for item, must in items) or '""'

    def _item(self, name: str, schema: Any, shared: dict[str, Any], where: str, *, strict: bool) -> str:
        frame, lark = self._frame, self._lark
        if frame.style == "python":
            return lark.rule(f"{quoted(name + '=')} {self._value(schema, shared)}")
        head, tail = self._around(name)
        if strict and _is_text(schema):
            for key in _IN_TEXT:
                if key in schema:
                    raise InvalidRequestError(f"{where}.{key}: cannot be enforced: this model writes strings without quotes",
                                              param=f"{where}.{key}")
        choices = _texts(schema)
        if choices:
            return lark.rule(f"{lark.literal(head)} ({' | '.join(map(quoted, choices))}) {lark.literal(tail)}")
        if _may_be_text(schema):
            mark = tail.removesuffix("\n") if frame.framed or frame.style == "pairs" else tail
            return lark.rule(f"{lark.literal(head)} {lark.until(mark)} {lark.literal(tail.removeprefix(mark))}")
        return lark.rule(f"{lark.literal(head)} {self._value(schema, shared)} {lark.literal(tail)}")

    def _around(self, name: str) -> tuple[str, str]:
        frame = self._frame
        if frame.style == "pairs":
            return f"<arg_key>{name}</arg_key>\n<arg_value>", "</arg_value>\n"
        line = "\n" if frame.framed else ""
        return f"{frame.parameter}{name}{frame.name_end}{line}", f"{line}{frame.value_end}\n"

    def _value(self, schema: Any, shared: dict[str, Any]) -> str:
        return self._lark.schema({**shared, **schema} if isinstance(schema, dict) else schema)

    def _unlisted(self) -> str:
        """Any arguments at all."""
        lark, frame = self._lark, self._frame
        lark.rules["NAME"] = "NAME: /[A-Za-z_][A-Za-z0-9_.-]{0,63}/"
        if frame.style == "python":
            item = lark.rule(f'NAME "=" {lark.schema(True)}')
            return f'({item} (", " {item})*)?'
        head, tail = (part.split("\0") for part in self._around("\0"))
        value = lark.until(tail[0].removesuffix("\n"))
        return f"({lark.literal(head[0])} NAME {lark.literal(head[1])} {value} \"\\n\")*"

    def _joined(self, items: list[tuple[str, bool]]) -> str:
        """Items with `, ` between them, those that are not required left out at will: a rule for each place, with and without
        an item before it."""
        after = before_any = '""'
        for item, must in reversed(items):
            first = f'{item} {after}'
            follows = f'", " {item} {after}'
            if not must:
                first, follows = f"({first} | {before_any})", f"({follows} | {after})"
            after, before_any = self._lark.rule(follows), self._lark.rule(first)
        return before_any


def _texts(schema: Any) -> list[str]:
    """The strings that an enum or const of strings allows."""
    if not isinstance(schema, dict):
        return []
    listed = [schema["const"]] if "const" in schema else schema.get("enum") or []
    return listed if all(isinstance(item, str) and item for item in listed) else []


def _is_text(schema: Any) -> bool:
    return isinstance(schema, dict) and schema.get("type") == "string"


def _may_be_text(schema: Any) -> bool:
    """Whether any text is a valid value: the parser reads what is no other JSON as a string."""
    if not isinstance(schema, dict):
        return schema is True
    kind = schema.get("type")
    if kind is None:
        return not schema.keys() & {"enum", "const", "anyOf", "oneOf", "allOf", "$ref"}
    return kind == "string" or (isinstance(kind, list) and "string" in kind)
