"""How model families write tool calls. A format knows what opens a call, how to read one, and how to begin one by force."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from workstation.parsers.call_json import CallKeys, array_of_calls, object_call
from workstation.parsers.call_xml import INVOKE, QWEN_FUNCTION, NamedTags, key_value_call
from workstation.parsers.out import Out
from workstation.parsers.reader import Marks, Reader, Sink, Steps
from workstation.parsers.values import ToolSchemas, dumps, python_arguments

_DEEPSEEK_CALLS, _DEEPSEEK_CALL = "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"
_DEEPSEEK_SEP, _DEEPSEEK_END = "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


class ToolFormat(Protocol):
    """One way of writing calls.

    Attributes:
        marks: strings that open a call anywhere in the answer.  bare: characters that open one where an answer begins.
        controls: control tokens the reader must see although they are no text.
    """

    @property
    def marks(self) -> tuple[str, ...]: ...

    @property
    def bare(self) -> str: ...

    @property
    def controls(self) -> tuple[str, ...]: ...

    def read(self, mark: str, reader: Reader, out: Out, schemas: ToolSchemas) -> Steps[bool]:
        """Read what follows a mark ("" for a bare beginning, which is unread). False: it was text, and was put out."""
        ...

    def opening(self, name: str | None) -> str:
        """What an answer begins with when it must call a tool: the one named, or any."""
        ...


def _json_opening(before: str, name: str | None, arguments: str = "arguments", key: str = "name") -> str:
    head = f'{before}{{"{key}": "'
    return head if name is None else f'{head}{name}", "{arguments}":'


@dataclass(frozen=True, slots=True)
class TagFormat:
    """`<tool_call> … </tool_call>`, with JSON inside (Hermes, Qwen), XML (Qwen-coder) or key and value tags (GLM).

    Which of them stands there shows in the first characters, so one reader serves all; `inside` is the one to begin by force.
    """

    inside: str = "json"
    bare: str = ""
    marks: tuple[str, ...] = ("<tool_call>", "<function=")
    controls: tuple[str, ...] = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

    def read(self, mark: str, reader: Reader, out: Out, schemas: ToolSchemas) -> Steps[bool]:
        if mark == "<function=":
            yield from QWEN_FUNCTION.call(reader, out, schemas)
            return True
        reader.record(mark)
        yield from reader.skip()
        first = yield from reader.peek()
        if first in ("{", "["):
            return (yield from self._objects(reader, out, reader.recorded()))
        if first == "<" and (yield from reader.match("<function=")):
            reader.recorded()
            yield from QWEN_FUNCTION.call(reader, out, schemas)
        elif first and first != "<" and self.inside == "key_value":
            reader.recorded()
            yield from key_value_call(reader, out, schemas)
            return True
        else:
            out.text(reader.recorded())
            return False
        yield from _closing(reader, "</tool_call>")
        return True

    def _objects(self, reader: Reader, out: Out, begun: str) -> Steps[bool]:
        """One object as a rule; some write an array, or one object after the other."""
        if not (yield from array_of_calls(reader, out, CallKeys(), begun)):
            return False
        while not (yield from _closing(reader, "</tool_call>")) and (yield from reader.peek()) == "{":
            if not (yield from object_call(reader, out, CallKeys())):
                break
        return True

    def opening(self, name: str | None) -> str:
        if self.inside == "xml":
            return "<tool_call>\n<function=" + (f"{name}>\n" if name else "")
        if self.inside == "key_value":
            return "<tool_call>" + (f"{name}\n" if name else "")
        return _json_opening("<tool_call>\n", name)


def _closing(reader: Reader, close: str) -> Steps[bool]:
    """Read the closing mark, if it comes next."""
    yield from reader.skip()
    return (yield from reader.match(close))


@dataclass(frozen=True, slots=True)
class ArrayFormat:
    """A mark, then an array of objects: Granite, Phi, and others by their templates."""

    open: str
    close: str = ""
    bracket: bool = True
    bare: str = ""
    keys: tuple[str, str] = ("name", "arguments")

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.open,)

    @property
    def controls(self) -> tuple[str, ...]:
        return (self.open, self.close)

    def read(self, mark: str, reader: Reader, out: Out, schemas: ToolSchemas) -> Steps[bool]:
        reader.record(mark)
        yield from reader.skip()
        begun = reader.recorded()
        found = yield from array_of_calls(reader, out, self._keys(), begun)
        if found and self.close:
            yield from _closing(reader, self.close)
        return found

    def _keys(self) -> CallKeys:
        return CallKeys(name=("name", self.keys[0]), arguments=("arguments", "parameters", self.keys[1]))

    def opening(self, name: str | None) -> str:
        return _json_opening(self.open + ("[" if self.bracket else ""), name, self.keys[1], self.keys[0])


@dataclass(frozen=True, slots=True)
class MistralFormat:
    """`[TOOL_CALLS]` and an array, or (newer) a name, `[ARGS]` and the arguments."""

    named: bool = False
    bare: str = ""
    marks: tuple[str, ...] = ("[TOOL_CALLS]",)
    controls: tuple[str, ...] = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")

    def read(self, mark: str, reader: Reader, out: Out, schemas: ToolSchemas) -> Steps[bool]:
        reader.record(mark)
        yield from reader.skip()
        begun = reader.recorded()
        first = yield from reader.peek()
        if first in ("[", "{"):
            return (yield from array_of_calls(reader, out, CallKeys(), begun))
        name: list[str] = []
        found = yield from reader.until(Marks("[ARGS]", "[CALL_ID]"), name.append)
        if found is None:
            out.text(begun + "".join(name))
            return False
        if found == "[CALL_ID]":
            yield from reader.until(Marks("[ARGS]"), lambda piece: None)
        yield from reader.skip()
        out.start_call("".join(name).strip())
        yield from reader.json_value(out.arguments)
        out.end_call()
        return True

    def opening(self, name: str | None) -> str:
        if self.named:
            return "[TOOL_CALLS]" + (f"{name}[ARGS]" if name else "")
        return _json_opening("[TOOL_CALLS][", name)


@dataclass(frozen=True, slots=True)
class DeepSeekFormat:
    """Calls between DeepSeek's own marks; V3 and R1 wrap the arguments in a code fence, V3.1 and later do not."""

    fenced: bool = True
    bare: str = ""
    marks: tuple[str, ...] = (_DEEPSEEK_CALLS, _DEEPSEEK_CALL)
    controls: tuple[str, ...] = (_DEEPSEEK_CALLS, _DEEPSEEK_CALL, _DEEPSEEK_SEP, _DEEPSEEK_END, "<｜tool▁calls▁end｜>")

    def read(self, mark: str, reader: Reader, out: Out, schemas: ToolSchemas) -> Steps[bool]:
        if mark == _DEEPSEEK_CALLS:
            yield from reader.skip()
            if not (yield from reader.match(_DEEPSEEK_CALL)):
                out.text(mark)
                return False
        head: list[str] = []
        yield from reader.until(Marks(_DEEPSEEK_SEP), head.append)
        name = "".join(head).strip()
        if name == "function":
            line: list[str] = []
            yield from reader.until(Marks("\n"), line.append)
            name = "".join(line).strip()
            yield from reader.skip()
            yield from reader.match("```json")
        yield from reader.skip()
        out.start_call(name)
        yield from reader.json_value(out.arguments)
        out.end_call()
        yield from reader.until(Marks(_DEEPSEEK_END), lambda piece: None)
        yield from _closing(reader, "<｜tool▁calls▁end｜>")
        return True

    def opening(self, name: str | None) -> str:
        head = _DEEPSEEK_CALLS + _DEEPSEEK_CALL
        if self.fenced:
            return f"{head}function{_DEEPSEEK_SEP}" + (f"{name}\n```json\n" if name else "")
        return head + (f"{name}{_DEEPSEEK_SEP}" if name else "")


@dataclass(frozen=True, slots=True)
class LlamaJsonFormat:
    """Llama 3: the whole answer is `{"name": …, "parameters": {…}}`, several with `;` between them.

    No mark tells such an answer from JSON that a person asked for, so only the names of the request's tools count.
    """

    bare: str = "{"
    marks: tuple[str, ...] = ("<|python_tag|>",)
    controls: tuple[str, ...] = ("<|python_tag|>",)

    def read(self, mark: str, reader: Reader, out: Out, schemas: ToolSchemas) -> Steps[bool]:
        names = schemas.names
        keys = CallKeys(known=lambda name: not names or name in names)
        reader.record(mark)
        yield from reader.skip()
        return (yield from object_call(reader, out, keys, reader.recorded()))

    def opening(self, name: str | None) -> str:
        return _json_opening("", name, "parameters")


@dataclass(frozen=True, slots=True)
class PythonicFormat:
    """Llama 4 and others: the whole answer is `[f(a=1), g(b="x")]`."""

    bare: str = "["
    marks: tuple[str, ...] = ("<|python_start|>",)
    controls: tuple[str, ...] = ("<|python_start|>", "<|python_end|>")

    def read(self, mark: str, reader: Reader, out: Out, schemas: ToolSchemas) -> Steps[bool]:
        reader.record(mark)
        yield from reader.skip()
        if not (yield from reader.match("[")):
            out.text(reader.recorded())
            return False
        found = False
        while (yield from self._one(reader, out, schemas)):
            found = True
            reader.record()
            yield from reader.skip()
            if not (yield from reader.match(",")):
                break
        rest = reader.recorded()
        if not found:
            out.text(rest)
            return False
        yield from _closing(reader, "]")
        yield from _closing(reader, "<|python_end|>")
        return True

    def _one(self, reader: Reader, out: Out, schemas: ToolSchemas) -> Steps[bool]:
        """One call, put out when its closing bracket was read; False when it is none."""
        yield from reader.skip()
        name: list[str] = []
        if not ((yield from reader.peek()).isalpha() or (yield from reader.peek()) == "_"):
            return False
        if (yield from reader.until(Marks("(", ",", "]", "\n", '"', "'", " "), name.append)) != "(":
            return False
        called = "".join(name)
        if schemas.names and called not in schemas.names:
            return False
        inside: list[str] = []
        if not (yield from _python_call(reader, inside.append)):
            return False
        try:
            arguments = python_arguments("".join(inside), schemas.order(called))
        except (ValueError, OverflowError):
            return False
        reader.recorded()
        out.call(called, dumps(arguments))
        return True

    def opening(self, name: str | None) -> str:
        return "[" + (f"{name}(" if name else "")


_BRACKETS = Marks("(", ")", "[", "]", "{", "}", '"', "'")
_ENDS = {quote: Marks(quote, "\\") for quote in "\"'"}


def _python_call(reader: Reader, keep: Sink) -> Steps[bool]:
    """Everything up to the bracket that closes a call; False when the text ended first."""
    depth = 1
    while True:
        mark = yield from reader.until(_BRACKETS, keep)
        if mark is None:
            return False
        if mark in _ENDS:
            keep(mark)
            if not (yield from _python_string(reader, mark, keep)):
                return False
            continue
        depth += 1 if mark in "([{" else -1
        if depth == 0:
            return True
        keep(mark)


def _python_string(reader: Reader, quote: str, keep: Sink) -> Steps[bool]:
    while True:
        mark = yield from reader.until(_ENDS[quote], keep)
        if mark is None:
            return False
        keep(mark)
        if mark == quote:
            return True
        escaped = yield from reader.peek()
        yield from reader.match(escaped)
        keep(escaped)


@dataclass(frozen=True, slots=True)
class InvokeFormat:
    """`<invoke name="…"><parameter name="…">…</parameter></invoke>` inside a wrapper of the family's own."""

    wrapper: str = "minimax:tool_call"
    prefix: str = ""
    bare: str = ""

    @property
    def _tags(self) -> NamedTags:
        end = "</" + self.prefix
        return replace(INVOKE, parameter=f'<{self.prefix}parameter name="', parameter_close=end + "parameter>",
                       close=end + "invoke>")

    @property
    def marks(self) -> tuple[str, ...]:
        return (f"<{self.prefix}{self.wrapper}>", f'<{self.prefix}invoke name="')

    @property
    def controls(self) -> tuple[str, ...]:
        return (f"<{self.prefix}{self.wrapper}>", f"</{self.prefix}{self.wrapper}>")

    def read(self, mark: str, reader: Reader, out: Out, schemas: ToolSchemas) -> Steps[bool]:
        if mark == self.marks[0]:
            yield from reader.skip()
            if not (yield from reader.match(self.marks[1])):
                out.text(mark)
                return False
        yield from self._tags.call(reader, out, schemas)
        yield from _closing(reader, f"</{self.prefix}{self.wrapper}>")
        return True

    def opening(self, name: str | None) -> str:
        return f'{self.marks[0]}\n{self.marks[1]}' + (f'{name}">\n' if name else "")

