"""Which formats a model writes: read from its chat template, or named by the operator."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workstation.errors import ConfigError, WorkstationError
from workstation.parsers.harmony import CONTROLS as HARMONY_CONTROLS
from workstation.parsers.harmony import Harmony
from workstation.parsers.parser import OutputParser, ThinkFormat
from workstation.parsers.tool_formats import (
    ArrayFormat,
    DeepSeekFormat,
    InvokeFormat,
    LlamaJsonFormat,
    MistralFormat,
    PythonicFormat,
    TagFormat,
    ToolFormat,
)
from workstation.parsers.values import ToolSchemas

Render = Callable[[list[dict[str, Any]]], str]
HARMONY = "harmony"
_PROBE_NAME, _PROBE_KEY, _PROBE_VALUE = "wsprobefn", "wsprobekey", "wsprobeval"

TOOL_FORMATS: dict[str, ToolFormat] = {
    "hermes": TagFormat(), "qwen3_coder": TagFormat("xml"), "glm45": TagFormat("key_value"),
    "llama3_json": LlamaJsonFormat(), "pythonic": PythonicFormat(), "mistral": MistralFormat(),
    "mistral_named": MistralFormat(named=True), "deepseek_v3": DeepSeekFormat(), "deepseek_v31": DeepSeekFormat(fenced=False),
    "granite": ArrayFormat("<|tool_call|>"),
    "phi4_mini_json": ArrayFormat("<|tool_call|>", "<|/tool_call|>"), "functools": ArrayFormat("functools"),
    "minimax_m2": InvokeFormat(), "deepseek_v32": InvokeFormat("function_calls", "｜DSML｜"),
}
# vLLM's other names for the same ways of writing.
TOOL_ALIASES = {
    "qwen3_xml": "qwen3_coder", "glm47": "glm45", "llama4_json": "llama3_json", "llama4_pythonic": "pythonic",
    "openai": HARMONY, "gpt_oss": HARMONY, "granite4": "hermes", "granite-20b-fc": "granite", "minimax": "minimax_m2",
    "qwen": "hermes", "qwen3": "hermes", "seed_oss": "qwen3_coder",
}
THINK_FORMATS: dict[str, ThinkFormat] = {
    "think": ThinkFormat(), "mistral": ThinkFormat("[THINK]", "[/THINK]"),
    "seed_oss": ThinkFormat("<seed:think>", "</seed:think>"),
    "granite": ThinkFormat("Here is my thought process:", "Here is my response:"),
}
THINK_ALIASES = {
    "qwen3": "think", "deepseek_r1": "think", "deepseek_v3": "think", "glm45": "think", "minimax_m2": "think",
    "hunyuan_a13b": "think", "openai_gptoss": HARMONY, "openai": HARMONY, "gpt_oss": HARMONY,
}
TOOL_NAMES = ("auto", "none", HARMONY, *TOOL_FORMATS, *TOOL_ALIASES)
THINK_NAMES = ("auto", "none", HARMONY, *THINK_FORMATS, *THINK_ALIASES)

# First match wins: (what the template must hold, the format).
_TOOL_SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "<|message|>"), HARMONY),
    (("｜DSML｜",), "deepseek_v32"),
    (("<｜tool▁call▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁call▁begin｜>",), "deepseek_v31"),
    (("<arg_key>",), "glm45"),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("<function=", "<parameter="), "qwen3_coder"),
    (("[TOOL_CALLS]", "[ARGS]"), "mistral_named"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<|tool_call|>", "<|/tool_call|>"), "phi4_mini_json"),
    (("<|tool|>", "message['tools']"), "phi4_mini_json"),
    (("<|tool_call|>",), "granite"),
    (("functools[",), "functools"),
    (("<tool_call>",), "hermes"),
    (("[func_name1(",), "pythonic"),
    (("[func1(",), "pythonic"),
    (("<|python_tag|>",), "llama3_json"),
    (("ipython", '"parameters"'), "llama3_json"),
)
_THINK_SIGNS = (("<seed:think>", "seed_oss"), ("[THINK]", "mistral"), ("</think>", "think"), ("<think>", "think"),
                ("Here is my thought process:", "granite"))


@dataclass(frozen=True, slots=True)
class Formats:
    """What one model writes.

    Attributes:
        tools: how it writes calls, or None.  think: how it marks thoughts, or None.  harmony: both in Harmony.
        tool_name, think_name: what they are called, for people.
        text_arguments: its template wants the arguments of earlier calls as JSON text, not as an object.
        takes_tools: its template shows tools to the model.  tools_in_system: it reads them, as text, from the system message.
         short_ids: it takes ids of calls of nine characters only.
    """

    tools: ToolFormat | None = None
    think: ThinkFormat | None = None
    harmony: bool = False
    tool_name: str = "none"
    think_name: str = "none"
    text_arguments: bool = False
    takes_tools: bool = False
    short_ids: bool = False
    tools_in_system: bool = False

    @property
    def calls(self) -> bool:
        """Whether calls can be read out of an answer."""
        return self.tools is not None or self.harmony

    def controls(self) -> tuple[str, ...]:
        """Control strings a parser must see, though they are no text."""
        think = (self.think.open, self.think.close) if self.think is not None else ()
        return (*(self.tools.controls if self.tools is not None else ()), *think, *(HARMONY_CONTROLS if self.harmony else ()))

    def opening(self, name: str | None) -> str:
        """What an answer is made to begin with when it must call a tool."""
        if self.harmony:
            return Harmony(True).opening(name)
        return self.tools.opening(name) if self.tools is not None else ""

    def parser(self, *, calls: bool, schemas: ToolSchemas | None = None, inside: bool = False) -> OutputParser:
        """A parser for one answer. `calls` False leaves them in the text."""
        return OutputParser(think=self.think, tools=self.tools if calls else None, schemas=schemas, inside=inside,
                            harmony=Harmony(calls) if self.harmony else None)


def find_formats(template: str | None, render: Render | None = None, *, tools: str = "auto", think: str = "auto",
                 takes_tools: bool = False) -> Formats:
    """The formats of a model.

    Args:
        template: its chat template's text.  render: renders messages with it, for templates that no sign gives away.
        tools, think: names from the command line; "auto" decides from the template.

    Raises ConfigError for a name that is not known.
    """
    source = template or ""
    arguments = _earlier_call(render, as_text=False)
    text_arguments = arguments is None and _earlier_call(render, as_text=True) is not None
    tool_name = _named(tools, TOOL_FORMATS, TOOL_ALIASES, "tool_call_parser")
    if tool_name == "auto":
        tool_name = next((name for signs, name in _TOOL_SIGNS if all(sign in source for sign in signs)), "none")
    think_name = _named(think, THINK_FORMATS, THINK_ALIASES, "reasoning_parser")
    if think_name == "auto":
        think_name = HARMONY if tool_name == HARMONY else next((name for sign, name in _THINK_SIGNS if sign in source), "none")
    format_ = TOOL_FORMATS.get(tool_name)
    if format_ is None and tools == "auto" and tool_name == "none":
        format_ = derived_format(arguments or _earlier_call(render, as_text=True) or "")
        tool_name = "template" if format_ is not None else "none"
    in_system = not takes_tools and "message['tools']" in source
    return Formats(format_, THINK_FORMATS.get(think_name), HARMONY in (tool_name, think_name), tool_name, think_name,
                   text_arguments, takes_tools or in_system, "length 9" in source, in_system)


def _named(name: str, known: dict[str, Any], aliases: dict[str, str], param: str) -> str:
    name = aliases.get(name, name)
    if name not in known and name not in ("auto", "none", HARMONY):
        raise ConfigError(f"{param} {name!r} is not known; known are auto, none, {HARMONY}, {', '.join(known)}", param=param)
    return name


def _earlier_call(render: Render | None, *, as_text: bool) -> str | None:
    """An assistant's earlier call as the template writes it; None when it does not write it as JSON would be."""
    if render is None:
        return None
    arguments: Any = {_PROBE_KEY: _PROBE_VALUE}
    call = {"id": "wsprobe00", "type": "function",
            "function": {"name": _PROBE_NAME, "arguments": json.dumps(arguments) if as_text else arguments}}
    asked = {"role": "user", "content": "?"}
    try:
        with_call = render([asked, {"role": "assistant", "content": "", "tool_calls": [call]}])
        without = render([asked])
    except WorkstationError:
        return None
    if _PROBE_NAME not in with_call or f"'{_PROBE_KEY}'" in with_call or f'\\"{_PROBE_KEY}' in with_call:
        return None
    same = next((at for at, (one, two) in enumerate(zip(with_call, without, strict=False)) if one != two), len(without))
    return with_call[same:]


def derived_format(written: str) -> ToolFormat | None:
    """A format from one call as the template writes it: the mark before the object, the one after it, and its keys."""
    start = written.rfind("{", 0, written.find(_PROBE_NAME) + 1)
    if start < 0:
        return None
    try:
        value, end = json.JSONDecoder().raw_decode(written, start)
    except ValueError:
        return None
    name = next((key for key, item in value.items() if item == _PROBE_NAME), None)
    arguments = next((key for key, item in value.items() if isinstance(item, dict) and _PROBE_KEY in item), None)
    if name is None or arguments is None:
        return None
    before = written[:start].rstrip().removesuffix("[")
    words = before.split()
    mark = words[-1].rpartition("assistant")[2] if words else ""
    if not mark or mark.isalnum():
        return LlamaJsonFormat()
    closing = written[end:].lstrip().removeprefix("]").split()
    close = closing[0].partition("<|")[0] if closing else ""  # what follows is the end of the turn
    return ArrayFormat(mark, close, written[:start].rstrip().endswith("["), keys=(name, arguments))
