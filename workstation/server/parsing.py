"""How the answers of one request are taken apart into text, thoughts and calls."""

from __future__ import annotations

from dataclasses import dataclass

from workstation.parsers.detect import Formats
from workstation.parsers.parser import OutputParser
from workstation.parsers.values import ToolSchemas
from workstation.server.ids import fresh_id


@dataclass(frozen=True, slots=True)
class Parsing:
    """What a request's parser has to know.

    Attributes:
        calls: calls are looked for.  schemas: of the request's tools.  inside: the prompt opened a thought.
        opening: what the prompt made the answer begin with; the parser reads it first.
        max_calls: an answer ends with this many calls; 0 sets no limit.
        keep: ids of control tokens whose text the parser reads.
        show_reasoning: thoughts are part of the answer.
    """

    formats: Formats
    calls: bool = False
    schemas: ToolSchemas | None = None
    inside: bool = False
    opening: str = ""
    max_calls: int = 0
    keep: frozenset[int] = frozenset()
    show_reasoning: bool = True

    def parser(self) -> OutputParser:
        return self.formats.parser(calls=self.calls, schemas=self.schemas, inside=self.inside)

    def call_id(self) -> str:
        """A fresh id; some templates take nine characters and no others."""
        return fresh_id()[:9] if self.formats.short_ids else f"call_{fresh_id()[:24]}"
