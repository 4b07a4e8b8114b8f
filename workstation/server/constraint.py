"""The grammar of a request's answers, before anybody has tried to compile it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workstation.errors import InvalidRequestError
from workstation.grammar.answer import Thinking, Wanted, grammars
from workstation.parsers.detect import Formats
from workstation.server.options import ServedModel
from workstation.server.structured import Output
from workstation.server.tools import Tools


@dataclass(frozen=True, slots=True)
class Constraint:
    """Attributes:
        sources: grammars to try in this order.  where: the field an error names.  schema: what stands there, if it is one.
        matched: tokens of the prompt that the grammar has matched.
    """

    sources: tuple[str, ...]
    where: str
    schema: Any = None
    matched: int = 0


def text_constraint(output: Output | None, *, beam: bool) -> Constraint | None:
    """For an answer that is text alone. Raises InvalidRequestError."""
    if output is None:
        return None
    if beam:
        raise _no_beams(output.where)
    return Constraint(grammars(Wanted(output.params, output.where)), output.where, output.params.json)


def dialogue_constraint(model: ServedModel, output: Output | None, tools: Tools, thinking: Thinking, *, beam: bool,
                        matched: int = 0) -> Constraint | None:
    """For an answer in a conversation: thoughts and calls have their places beside what was asked for.

    Raises InvalidRequestError naming what cannot be enforced.
    """
    choice, formats = tools.choice, model.formats
    calls = tools.listed is not None and choice.mode != "none"
    listed = [{**tool, "function": {**tool["function"], "strict": rule.strict, "where": rule.place}}
              for tool, rule in zip(tools.listed or [], tools.rules, strict=True)] if calls else []
    wanted = Wanted(
        output.params if output is not None else None, output.where if output is not None else "tools", listed, choice.name,
        choice.parallel, "none" if not calls else "must" if choice.mode == "required" else "may", thinking, formats,
        model.tokenizer.control_ids)
    sources = grammars(wanted)
    if not sources:
        return None
    if beam:
        raise _no_beams(output.where if output is not None else "tools")
    where = output.where if output is not None else "tools"
    return Constraint(sources, where, output.params.json if output is not None else None, matched)


def thinking(formats: Formats, tail: str) -> Thinking:
    """Whether an answer may begin with a thought, by the prompt's last characters."""
    if formats.think is None:
        return "none"
    tail = tail.rstrip()
    if tail.endswith(formats.think.open):
        return "inside"
    return "none" if tail.endswith(formats.think.close) else "may"


def _no_beams(where: str) -> InvalidRequestError:
    return InvalidRequestError(f"{where} cannot be combined with use_beam_search", param=where)
