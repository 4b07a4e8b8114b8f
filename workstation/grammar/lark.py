"""Grammars as text: the pieces of an answer (thought, calls, JSON, …) put together in llguidance's dialect of Lark.

Control tokens are named by id (`<[5]>`): no text grammar ever allows one, and what looks like one inside a text stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from workstation.errors import InvalidRequestError
from workstation.grammar.params import StructuredOutputsParams, shown
from workstation.grammar.schema import check_schema, prepared

TEXT = "TEXT: /(.|\\n)*/"
SPACE = "SPACE: /[ \\n\\r\\t]{1,16}/"
WHITE_SPACE = r" |\n{1,2}[ \t]{0,32}"  # where JSON allows any: a model that writes nothing else must go on some time
MAX_TAGS = 64
EBNF = "ebnf_grammar"


@dataclass(slots=True)
class Lark:
    """A grammar under construction: `rules` beside `start`, and grammars of their own (a user's, whose names may clash).

    controls: control string → token id.
    """

    controls: Mapping[str, int] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)

    def literal(self, text: str) -> str:
        """An expression for exactly this text, control strings in it as tokens."""
        if not text:
            return '""'
        marks = "|".join(re.escape(mark) for mark in sorted(self.controls, key=len, reverse=True) if mark)
        parts = re.split(f"({marks})", text) if marks else [text]
        return " ".join(f"<[{self.controls[part]}]>" if part in self.controls else quoted(part) for part in parts if part)

    def until(self, mark: str) -> str:
        """An expression for any text up to the first `mark`, and the mark."""
        self.rules["TEXT"] = TEXT
        if mark in self.controls:
            return f"TEXT <[{self.controls[mark]}]>"
        name = f"until_{len(self.rules)}"
        self.rules[f"{name}[lazy]"] = f"{name}[lazy]: TEXT {quoted(mark)}"
        return name

    def text(self) -> str:
        self.rules["TEXT"] = TEXT
        return "TEXT"

    def space(self) -> str:
        """Optional white space."""
        self.rules["SPACE"] = SPACE
        return "SPACE?"

    def schema(self, schema: Any, *, pattern: str | None = None, compact: bool = False) -> str:
        """An expression for JSON by a checked schema."""
        if schema is False:
            raise InvalidRequestError("a schema that is false allows nothing", param="json")
        options = {"whitespace_flexible": False} if compact else {"whitespace_pattern": pattern or WHITE_SPACE}
        return "%json " + json.dumps({"x-guidance": options, **({} if schema is True else schema)})

    def rule(self, expression: str) -> str:
        """The expression under a name of its own."""
        name = f"rule_{len(self.rules)}"
        self.rules[name] = f"{name}: {expression}"
        return name

    def source(self, start: str) -> str:
        """The whole grammar, as llguidance takes it once it is `translated`."""
        text = "\n".join([f"start: {start}", *self.rules.values()])
        grammars = [{"name": "answer", "lark_grammar": text}]
        for name, source in self.others.items():
            grammars.append({"name": name, EBNF if "::=" in source else "lark_grammar": source})
        return json.dumps({"grammars": grammars})


def translated(source: str) -> str:
    """The source with what is EBNF in Lark, as llguidance takes it. Slow for a hostile grammar, like compiling.

    Raises InvalidRequestError for what is no EBNF; ImportError without llguidance.
    """
    if f'"{EBNF}"' not in source:
        return source
    from llguidance.gbnf_to_lark import gbnf_to_lark

    whole = json.loads(source)
    for grammar in whole["grammars"]:
        if EBNF in grammar:
            try:
                grammar["lark_grammar"] = str(gbnf_to_lark(grammar.pop(EBNF)))
            except Exception as error:  # the translator's own, and RecursionError
                raise InvalidRequestError(str(error)[:400], param="structured_outputs") from None
    return json.dumps(whole)


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def body(lark: Lark, params: StructuredOutputsParams, where: str) -> str:
    """An expression for what a request asks for. `where` names its field in errors. Raises InvalidRequestError."""
    kind = params.kind
    if kind == "json" or kind == "json_object":
        schema = {"type": "object"} if kind == "json_object" else params.json
        check_schema(schema, where)
        schema = prepared(schema, close=params.disable_additional_properties)
        return lark.schema(schema, pattern=params.whitespace_pattern, compact=params.disable_any_whitespace)
    if kind == "regex":
        lark.rules["REGEX"] = f"REGEX: /{_slashed(params.regex or '')}/"
        return "REGEX"
    if kind == "choice":
        return "(" + " | ".join(quoted(item) for item in params.choice or []) + ")"
    if kind == "grammar":
        lark.others["user"] = params.grammar or ""
        return "@user"
    return _structural_tag(lark, params.structural_tag, where)


def _slashed(regex: str) -> str:
    """A regex between slashes: those inside are escaped, and so are line breaks."""
    out, escaped = [], False
    for char in regex:
        if char == "/" and not escaped:
            out.append("\\/")
        elif char == "\n":
            out.append("n" if escaped else "\\n")
        else:
            out.append(char)
        escaped = char == "\\" and not escaped
    return "".join(out)


def missing_library(where: str) -> InvalidRequestError:
    return InvalidRequestError("structured output needs the package llguidance on the server (pip install llguidance)",
                               param=where)


def _structural_tag(lark: Lark, tag: Any, where: str) -> str:
    """Free text, in which each `begin` is followed by JSON of its schema and its `end`; xgrammar's and vLLM's older form."""
    if unknown := tag.keys() - {"type", "structures", "triggers"}:
        raise InvalidRequestError(f"{where}: unknown field {min(unknown)[:64]!r}", param=where)
    structures, triggers = tag.get("structures"), tag.get("triggers")
    if tag.get("type", "structural_tag") != "structural_tag":
        raise InvalidRequestError(f"{where}.type must be structural_tag, got {shown(tag.get('type'))}", param=f"{where}.type")
    if not isinstance(structures, list) or not 1 <= len(structures) <= MAX_TAGS:
        raise InvalidRequestError(f"{where}.structures must be an array of 1 to {MAX_TAGS} objects, got {shown(structures)}",
                                  param=f"{where}.structures")
    if not isinstance(triggers, list) or not triggers or not all(isinstance(item, str) and item for item in triggers):
        raise InvalidRequestError(f"{where}.triggers must be an array of strings that are not empty, got {shown(triggers)}",
                                  param=f"{where}.triggers")
    branches: dict[str, list[str]] = {}
    for index, item in enumerate(structures):
        place = f"{where}.structures[{index}]"
        if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("begin", "end")):
            raise InvalidRequestError(f"{place} must be an object with begin, schema and end", param=place)
        trigger = next((mark for mark in triggers if item["begin"].startswith(mark)), None)
        if trigger is None:
            raise InvalidRequestError(f"{place}.begin must start with one of the triggers", param=f"{place}.begin")
        check_schema(item.get("schema"), f"{place}.schema")
        inner = lark.schema(prepared(item["schema"]))
        rest = f"{lark.literal(item['begin'][len(trigger):])} {inner} {lark.literal(item['end'])}"
        branches.setdefault(trigger, []).append(lark.rule(rest))
    found = [f"{lark.until(trigger)} ({' | '.join(rests)})" for trigger, rests in branches.items()]
    return f"({' | '.join(found)})* {lark.text()}"
