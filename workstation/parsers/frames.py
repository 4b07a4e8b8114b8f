"""What stands around the arguments when an answer consists of calls, for each way of writing them.

An answer is `first call (between call)* last`, and a call `before(name) arguments after`. `first + before(name)` is what
`opening(name)` forces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workstation.parsers.detect import Formats
from workstation.parsers.tool_formats import (
    ArrayFormat,
    DeepSeekFormat,
    InvokeFormat,
    LlamaJsonFormat,
    MistralFormat,
    PythonicFormat,
    TagFormat,
)

Style = Literal["json", "python", "tags", "pairs"]


@dataclass(frozen=True, slots=True)
class CallFrame:
    """How calls are written.

    Attributes:
        style: arguments as a JSON object, `a=1, b="x"`, tags or key and value tags.
        several: one answer may hold more than one call.
        parameter, name_end, value_end: around a parameter of style tags, `parameter NAME name_end VALUE value_end`.
        framed: values of style tags stand between line breaks.
    """

    first: str = ""
    after: str = "}"
    between: str = ""
    last: str = ""
    style: Style = "json"
    several: bool = True
    parameter: str = ""
    name_end: str = ""
    value_end: str = ""
    framed: bool = False


_QWEN = CallFrame("", "</function>\n</tool_call>", "\n", "", "tags", True, "<parameter=", ">", "</parameter>", True)
_DEEPSEEK_END, _DEEPSEEK_LAST = "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"


def call_frame(formats: Formats) -> CallFrame | None:
    """The frame of a model's calls; None when it writes none that are known."""
    if formats.harmony:
        return CallFrame(after="", several=False)
    match formats.tools:
        case TagFormat(inside="xml"):
            return _QWEN
        case TagFormat(inside="key_value"):
            return CallFrame("", "</tool_call>", "\n", "", "pairs")
        case TagFormat():
            return CallFrame("", "}\n</tool_call>", "\n")
        case ArrayFormat(bracket=False) as found:
            return CallFrame("", "}" + found.close, "\n")
        case ArrayFormat() as found:
            return CallFrame(found.open + "[", "}", ", ", "]" + found.close)
        case MistralFormat(named=True):
            return CallFrame("", "")
        case MistralFormat():
            return CallFrame("[TOOL_CALLS][", "}", ", ", "]")
        case DeepSeekFormat(fenced=fenced):
            after = ("\n```" if fenced else "") + _DEEPSEEK_END
            return CallFrame("<｜tool▁calls▁begin｜>", after, "\n" if fenced else "", _DEEPSEEK_LAST)
        case LlamaJsonFormat():
            return CallFrame("", "}", "; ")
        case PythonicFormat():
            return CallFrame("[", ")", ", ", "]", "python")
        case InvokeFormat(wrapper=wrapper, prefix=prefix):
            return CallFrame(f"<{prefix}{wrapper}>\n", f"</{prefix}invoke>\n", "", f"</{prefix}{wrapper}>", "tags", True,
                             f'<{prefix}parameter name="', '">', f"</{prefix}parameter>")
    return None


def before(formats: Formats, frame: CallFrame, name: str) -> str:
    """What stands between two calls, or after `first`, and this call's arguments."""
    return formats.opening(name).removeprefix(frame.first)
