"""Calls whose arguments stand one by one between tags, turned into JSON by the tool's schema."""

from __future__ import annotations

from dataclasses import dataclass

from workstation.parsers.out import Out
from workstation.parsers.reader import Marks, Reader, Steps
from workstation.parsers.values import ToolSchemas, dumps, typed_json


class Parameters:
    """The arguments of one call, put out as a JSON object that grows."""

    def __init__(self, out: Out, schemas: ToolSchemas, tool: str) -> None:
        self._out, self._schemas, self._tool = out, schemas, tool
        self._seen: set[str] = set()
        out.start_call(tool)

    def read(self, reader: Reader, name: str, end: Marks, *, framed: bool) -> Steps[str | None]:
        """Read one value up to a mark; `framed` values have a line break before and after them that is not theirs.

        Text of a parameter that can only be a string goes out as it comes.
        """
        types = self._schemas.types(self._tool, name)
        if name in self._seen:
            return (yield from reader.until(end, lambda piece: None))
        self._out.arguments(("{" if not self._seen else ", ") + dumps(name) + ": ")
        self._seen.add(name)
        value = _Growing(self._out, framed) if types == {"string"} else _Whole(self._out, framed, types)
        mark = yield from reader.until(end, value.add)
        value.end()
        return mark

    def end(self) -> None:
        self._out.arguments("{}" if not self._seen else "}")
        self._out.end_call()


class _Growing:
    """A string that goes out piece by piece; a line break at the end is held back, for it may belong to the frame."""

    def __init__(self, out: Out, framed: bool) -> None:
        self._out, self._framed, self._first, self._held = out, framed, True, ""
        out.arguments('"')

    def add(self, piece: str) -> None:
        if self._framed and self._first:
            piece = piece[1:] if piece.startswith("\n") else piece
        self._first = False
        piece = self._held + piece
        keep = 1 if self._framed and piece.endswith("\n") else 0
        self._held = piece[len(piece) - keep:]
        self._out.arguments(dumps(piece[:len(piece) - keep])[1:-1])

    def end(self) -> None:
        self._out.arguments('"')


class _Whole:
    """A value that is put out when it is known whole."""

    def __init__(self, out: Out, framed: bool, types: frozenset[str]) -> None:
        self._out, self._framed, self._types, self._pieces = out, framed, types, [""]

    def add(self, piece: str) -> None:
        self._pieces.append(piece)

    def end(self) -> None:
        text = "".join(self._pieces)
        if self._framed:
            text = text.removeprefix("\n").removesuffix("\n")
        self._out.arguments(typed_json(text, self._types))


@dataclass(frozen=True, slots=True)
class NamedTags:
    """`<function=NAME> <parameter=KEY> value </parameter> </function>` and its relatives.

    Attributes:
        parameter: what opens a parameter, up to its name; `parameter_name_end` closes the name.
        close: what ends the call.  framed: values stand on lines of their own.
    """

    name_end: str
    parameter: str
    parameter_name_end: str
    parameter_close: str
    close: str
    framed: bool = True

    def call(self, reader: Reader, out: Out, schemas: ToolSchemas) -> Steps[None]:
        """The rest of a call whose opening, up to the name, was read."""
        pieces: list[str] = []
        yield from reader.until(Marks(self.name_end, "\n"), pieces.append)
        parameters = Parameters(out, schemas, _name(pieces))
        inside = Marks(self.parameter, self.close, "</tool_call>")
        mark = yield from reader.until(inside, lambda piece: None)
        while mark == self.parameter:
            name: list[str] = []
            yield from reader.until(Marks(self.parameter_name_end, "\n"), name.append)
            ends = Marks(self.parameter_close, self.parameter, self.close)
            mark = yield from parameters.read(reader, _name(name), ends, framed=self.framed)
            if mark == self.parameter_close:
                mark = yield from reader.until(inside, lambda piece: None)
        parameters.end()


def _name(pieces: list[str]) -> str:
    return "".join(pieces).strip().split('"')[0].strip()


QWEN_FUNCTION = NamedTags(">", "<parameter=", ">", "</parameter>", "</function>")
INVOKE = NamedTags(">", '<parameter name="', ">", "</parameter>", "</invoke>", framed=False)
_KEY, _KEY_END, _VALUE, _VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"


def key_value_call(reader: Reader, out: Out, schemas: ToolSchemas) -> Steps[None]:
    """GLM: the name, then `<arg_key>…</arg_key><arg_value>…</arg_value>` pairs, up to `</tool_call>`."""
    inside = Marks(_KEY, "</tool_call>")
    name: list[str] = []
    mark = yield from reader.until(inside, name.append)
    parameters = Parameters(out, schemas, "".join(name).strip())
    while mark == _KEY:
        key: list[str] = []
        yield from reader.until(Marks(_KEY_END), key.append)
        yield from reader.until(Marks(_VALUE), lambda piece: None)
        yield from parameters.read(reader, "".join(key).strip(), Marks(_VALUE_END), framed=False)
        mark = yield from reader.until(inside, lambda piece: None)
    parameters.end()
