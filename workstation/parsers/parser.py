"""The parser of one answer: `feed` text as it comes, `finish` at the end."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from workstation.parsers.harmony import Harmony
from workstation.parsers.out import Out
from workstation.parsers.parts import Part
from workstation.parsers.reader import Marks, Reader, Steps
from workstation.parsers.tool_formats import ToolFormat
from workstation.parsers.values import ToolSchemas


@dataclass(frozen=True, slots=True)
class ThinkFormat:
    """A thought between two marks."""

    open: str = "<think>"
    close: str = "</think>"

_DONE = object()


class OutputParser:
    """Takes an answer apart.

    Args:
        think: how thoughts are marked; None leaves them in the text.  tools: how calls are written; None leaves them too.
        inside: the prompt has opened a thought already.
        harmony: the whole answer is in Harmony; the two formats above are not used then.
    """

    def __init__(self, *, think: ThinkFormat | None = None, tools: ToolFormat | None = None, schemas: ToolSchemas | None = None,
                 inside: bool = False, harmony: Harmony | None = None) -> None:
        self._reader = Reader()
        self._out = Out()
        self._think, self._tools = think, tools
        self._marks = Marks(*(tools.marks if tools is not None else ()))
        self._schemas = schemas or ToolSchemas()
        self._steps: Generator[None, None, None] | None = (
            harmony.run(self._reader, self._out) if harmony is not None else self._run(inside))
        self._advance()

    @property
    def calls(self) -> int:
        """Calls found so far."""
        return self._out.calls

    def feed(self, text: str) -> list[Part]:
        """Take the next text; return what is certain now."""
        if text:
            self._reader.push(text)
            self._advance()
        return self._out.take()

    def finish(self) -> list[Part]:
        """Nothing follows; return what was held back."""
        self._reader.end()
        self._advance()
        self._out.finish()
        return self._out.take()

    def _advance(self) -> None:
        if self._steps is not None and next(self._steps, _DONE) is _DONE:
            self._steps = None

    def _run(self, inside: bool) -> Steps[None]:
        if inside and self._think is not None:
            yield from self._thought(self._think)
        while (yield from self._opened()) or (yield from self._body()):
            pass

    def _opened(self) -> Steps[bool]:
        """What may stand only where an answer begins, or goes on after a thought or a call: a thought, or a bare call."""
        reader, think, tools = self._reader, self._think, self._tools
        bare = tools.bare if tools is not None else ""
        if think is None and not bare:
            return False
        self._out.text((yield from reader.skip()))
        if think is not None and (yield from reader.match(think.open)):
            yield from self._thought(think)
            return True
        if tools is None or not bare:
            return False
        if self._out.calls and (yield from reader.match(";")):
            yield from reader.skip()
        first = yield from reader.peek()
        return bool(first) and first in bare and (yield from tools.read("", reader, self._out, self._schemas))

    def _body(self) -> Steps[bool]:
        """Text up to the end of the next call; False when the answer is over."""
        while True:
            mark = yield from self._reader.until(self._marks, self._out.text)
            if mark is None or self._tools is None:
                return False
            if (yield from self._tools.read(mark, self._reader, self._out, self._schemas)):
                return True

    def _thought(self, think: ThinkFormat) -> Steps[None]:
        yield from self._reader.until(Marks(think.close), self._out.thought)
        self._out.end_thought()
