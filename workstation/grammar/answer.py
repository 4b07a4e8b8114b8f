"""The grammar of a whole answer: a thought where the model may have one, then calls, or what the request asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from workstation.errors import InvalidRequestError
from workstation.grammar.calls import Calls
from workstation.grammar.lark import Lark, body
from workstation.grammar.params import StructuredOutputsParams
from workstation.parsers.detect import Formats
from workstation.parsers.frames import call_frame

Thinking = Literal["none", "may", "inside"]
MAX_SOURCE = 2 * 1024 * 1024
_ANALYSIS = "<|channel|>analysis<|message|>"
_FINAL = "<|channel|>final<|message|>"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an answer must be.

    Attributes:
        output: what its text must look like, None for any; where: the field that said so.
        tools, name, several: the tools it may call, the only one of them, whether more than one call.
        calls: "none", "may" or "must".  thinking: whether a thought may come first, or the prompt has begun one.
        formats, controls: the model's: how it writes, and the ids of its control strings.
    """

    output: StructuredOutputsParams | None = None
    where: str = "structured_outputs"
    tools: Sequence[dict[str, Any]] = ()
    name: str | None = None
    several: bool = True
    calls: Literal["none", "may", "must"] = "none"
    thinking: Thinking = "none"
    formats: Formats = field(default_factory=Formats)
    controls: Mapping[str, int] = field(default_factory=dict)


def grammars(wanted: Wanted) -> tuple[str, ...]:
    """Grammars to try in this order: the second takes any arguments for tools that are not strict. Empty: nothing is forced.

    Raises InvalidRequestError naming what cannot be enforced.
    """
    strict = any(tool["function"].get("strict") is True for tool in wanted.tools)
    calls = wanted.calls != "none" and call_frame(wanted.formats) is not None
    if wanted.output is None and not (calls and (wanted.calls == "must" or strict)):
        return ()
    loose = calls and any(tool["function"].get("strict") is not True for tool in wanted.tools)
    made = dict.fromkeys(_source(wanted, loose=turn) for turn in ((False, True) if loose else (False,)))
    found = tuple(source for source in made if len(source) <= MAX_SOURCE)
    if not found:
        raise InvalidRequestError(f"{wanted.where}: the grammar of this answer is longer than {MAX_SOURCE} characters",
                                  param=wanted.where)
    return found


def _source(wanted: Wanted, *, loose: bool) -> str:
    lark = Lark(wanted.controls)
    frame = call_frame(wanted.formats)
    calls = Calls(lark, wanted.formats, frame, wanted.tools, loose=loose) if frame is not None else None
    if wanted.formats.harmony:
        return lark.source(_harmony(lark, wanted, calls))
    if wanted.calls == "none" or calls is None:
        answer = _output(lark, wanted)
    elif wanted.calls == "must":
        answer = calls.only(wanted.name, several=wanted.several)
    elif wanted.output is not None:
        answer = f"({calls.only(None, several=wanted.several)} | {_output(lark, wanted)})"
    else:
        answer = calls.among_text(several=wanted.several)
    return lark.source(f"{_thought(lark, wanted)} {answer}")


def _output(lark: Lark, wanted: Wanted) -> str:
    if wanted.output is None:
        raise InvalidRequestError("calls cannot be forced: how this model writes them is not known", param="tool_choice")
    return body(lark, wanted.output, wanted.where)


def _thought(lark: Lark, wanted: Wanted) -> str:
    think = wanted.formats.think
    if think is None or wanted.thinking == "none":
        return ""
    rest = f"{lark.until(think.close)} {lark.space()}"
    return rest if wanted.thinking == "inside" else f"({lark.literal(think.open)} {rest})?"


def _harmony(lark: Lark, wanted: Wanted, calls: Calls | None) -> str:
    """Every message names its channel; the prompt ended with `<|start|>assistant`."""
    thought = f"({lark.literal(_ANALYSIS)} {lark.until('<|end|>')} {lark.literal('<|start|>assistant')})?"
    answer = _output(lark, wanted) if wanted.output is not None else lark.text()
    final = f"{lark.literal(_FINAL)} {answer}"
    if calls is None or wanted.calls == "none":
        return f"{thought} {final}"
    call = calls.only(wanted.name, several=False)
    return f"{thought} {call}" if wanted.calls == "must" else f"{thought} ({call} | {final})"

