"""Chat templates: a model folder's Jinja text, rendered in jinja2's immutable sandbox with the helpers templates expect.

What is bounded, and what is not. A template comes from the model folder an operator chose, never from a request; still, a
hostile one must not take the server down. Every loop iteration asks the clock, so no template loops past its time; the
output, string repetition and `center` are capped; recursion ends in Python's own limit. A single call of a string method
(`replace`, say) is not bounded: Python offers no way short of a process that can be killed.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
from jinja2 import nodes

from workstation.errors import InvalidRequestError, ModelFolderError

MAX_RENDER_SECONDS = 2.0
MAX_OUTPUT_CHARS = 64 * 1024 * 1024
MAX_REPEATED_CHARS = 1024 * 1024
_TICK = "_ws_tick"
_WIDE_FORMAT = re.compile(r"\d{5}|%[^a-zA-Z%]*\*|\{[^{}]*\{")
RESERVED_NAMES = frozenset({
    "messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token",
    "raise_exception", "strftime_now", "namespace", "dict", "range", "lipsum", "cycler", "joiner", _TICK,
})


class TemplateRefusal(jinja2.TemplateError):
    """The template itself called raise_exception: the conversation is not one it can render."""


class _Deadline(threading.local):
    """When the render running in this thread must have ended, in time.monotonic() seconds."""

    at: float = float("inf")


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's tokens for training; rendering just shows the body."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it as an instance attribute

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, plus a clock check in every loop body and a cap on string repetition."""

    intercepted_binops = frozenset({"*", "%", "**"})

    def __init__(self, deadline: _Deadline) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True,
                         extensions=[_GenerationTag, jinja2.ext.loopcontrols])
        self._deadline = deadline
        self.filters["tojson"] = _to_json
        self.filters["center"] = _center
        self.filters["format"] = _format
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals[_TICK] = self._tick
        self.globals.pop("lipsum", None)

    def _tick(self) -> str:
        if time.monotonic() > self._deadline.at:
            raise jinja2.TemplateRuntimeError(f"rendering took longer than {MAX_RENDER_SECONDS:g} seconds")
        return ""

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.body.insert(0, nodes.ExprStmt(_tick_call(), lineno=loop.lineno))
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in {"ljust", "rjust", "center", "zfill", "expandtabs"}:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_widths(value.__self__)
        return wrapped

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise jinja2.TemplateRuntimeError("a chat template may not use **")
        if operator == "%" and isinstance(left, (str, bytes)):
            _check_widths(left)
        if operator == "*":
            _check_repetition(left, right)
        return super().call_binop(context, operator, left, right)


def _tick_call() -> nodes.Call:
    return nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)


def _check_repetition(left: Any, right: Any) -> None:
    for sequence, times in ((left, right), (right, left)):
        if (isinstance(sequence, (str, bytes, list, tuple)) and isinstance(times, int)
                and len(sequence) * times > MAX_REPEATED_CHARS):
            raise jinja2.TemplateRuntimeError(f"a repetition of more than {MAX_REPEATED_CHARS} elements")


def _check_widths(pattern: Any) -> None:
    """A format string may pad to any width; wide ones, and widths given as values, are refused."""
    if not isinstance(pattern, str) or _WIDE_FORMAT.search(pattern):
        raise jinja2.TemplateRuntimeError("a format string with a wide or computed width")


def _format(pattern: Any, *values: Any, **named: Any) -> str:
    _check_widths(str(pattern))
    return str(str(pattern) % (named or values))


def _center(value: Any, width: int = 80) -> str:
    if width > MAX_REPEATED_CHARS:
        raise jinja2.TemplateRuntimeError(f"center({width}) is wider than {MAX_REPEATED_CHARS}")
    return str(value).center(width)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
             sort_keys: bool = False) -> str:
    """Unlike Jinja's own filter this leaves `<`, `>` and `&` alone: the reader is a model, not a browser."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateRefusal(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


class ChatTemplate:
    """One compiled template.

    Attributes:
        source: the Jinja text.  names: the variables it reads (what `chat_template_kwargs` may set).
        takes_tools: it reads `tools`.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._deadline = _Deadline()
        self._environment = _Environment(self._deadline)
        try:
            self._template = self._environment.from_string(source)
            tree = self._environment.parse(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelFolderError(f"the chat template does not compile: {error}") from error
        read = frozenset(jinja2.meta.find_undeclared_variables(tree))
        self.names = read - RESERVED_NAMES
        self.takes_tools = "tools" in read

    def render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """The prompt as text. Raises InvalidRequestError (param "messages") when the template refuses or fails."""
        self._deadline.at = time.monotonic() + MAX_RENDER_SECONDS
        try:
            return "".join(self._bounded(self._template.generate(messages=messages, **variables)))
        except TemplateRefusal as error:
            raise InvalidRequestError(f"the model's chat template refuses these messages: {error}",
                                      param="messages") from error
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError,
                ZeroDivisionError, RecursionError, MemoryError) as error:
            raise InvalidRequestError(f"the model's chat template cannot render these messages: {error}",
                                      param="messages") from error
        finally:
            self._deadline.at = float("inf")

    def _bounded(self, chunks: Iterator[str]) -> Iterator[str]:
        size = 0
        for chunk in chunks:
            size += len(chunk)
            if size > MAX_OUTPUT_CHARS:
                raise jinja2.TemplateRuntimeError(f"the rendered prompt is longer than {MAX_OUTPUT_CHARS} characters")
            if time.monotonic() > self._deadline.at:
                raise jinja2.TemplateRuntimeError(f"rendering took longer than {MAX_RENDER_SECONDS:g} seconds")
            yield chunk
