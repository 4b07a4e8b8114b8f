"""Text that comes in pieces, read as if it were whole.

A parser is a generator: straight-line code that yields wherever it needs more text. Its steps are the methods below, and each
of them does the same whatever the pieces are. Consumed text is dropped, and no more than the length of a mark is ever kept
back, so the cost is linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

Result = TypeVar("Result")
Steps = Generator[None, None, Result]
Sink = Callable[[str], None]
WHITESPACE = " \t\r\n"
_STRUCTURE = re.compile(r'["{}\[\]]')
_IN_STRING = re.compile(r'["\\]')
_AFTER_SCALAR = re.compile(r"[,}\]\s;]")


class Marks:
    """Strings to look for. None may begin with another, so that a match never has to wait for a longer one."""

    def __init__(self, *texts: str) -> None:
        self.texts = tuple(dict.fromkeys(text for text in texts if text))
        ordered = sorted(self.texts, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        self._heads = frozenset(text[:size] for text in ordered for size in range(1, len(text)))
        firsts = "".join(sorted({text[0] for text in ordered}))
        self._first = re.compile(f"[{re.escape(firsts)}]") if firsts else None
        self._longest = len(ordered[0]) if ordered else 0

    def search(self, text: str, start: int) -> re.Match[str] | None:
        return self._pattern.search(text, start) if self._pattern is not None else None

    def held(self, text: str, start: int) -> int:
        """How many characters at the end of a text may be the beginning of a mark."""
        if self._first is None:
            return 0
        found = self._first.search(text, max(start, len(text) - self._longest + 1))
        while found is not None:
            if text[found.start():] in self._heads:
                return len(text) - found.start()
            found = self._first.search(text, found.end())
        return 0


class Reader:
    """The text of one answer. `push` adds to it, `end` says that nothing follows; parsers use the other methods."""

    __slots__ = ("_at", "_ended", "_tape", "_text")

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False
        self._tape: list[str] | None = None

    def push(self, text: str) -> None:
        self._text = self._text[self._at:] + text
        self._at = 0

    def end(self) -> None:
        self._ended = True

    # ── the tape: what was read since a call seemed to begin, to be given back as text if it was none ──────────────────

    def record(self, *begun: str) -> None:
        """Keep what is read from here on; `begun` was read already."""
        self._tape = [*begun]

    def recorded(self) -> str:
        """What was kept; ends the keeping."""
        tape, self._tape = self._tape or [], None
        return "".join(tape)

    def _consume(self, end: int) -> str:
        piece = self._text[self._at:end]
        self._at = end
        if self._tape is not None and piece:
            self._tape.append(piece)
        return piece

    # ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def until(self, marks: Marks, sink: Sink) -> Steps[str | None]:
        """Pass text on up to a mark, which is read and returned; None when the text ended first."""
        while True:
            found = marks.search(self._text, self._at)
            if found is not None:
                self._pass(found.start(), sink)
                self._consume(found.end())
                return found[0]
            self._pass(len(self._text) - (0 if self._ended else marks.held(self._text, self._at)), sink)
            if self._ended:
                return None
            yield

    def _pass(self, end: int, sink: Sink) -> None:
        if end > self._at:
            sink(self._consume(end))

    def peek(self, count: int = 1) -> Steps[str]:
        """The next characters, unread; fewer only at the end."""
        while len(self._text) - self._at < count and not self._ended:
            yield
        return self._text[self._at:self._at + count]

    def match(self, text: str) -> Steps[bool]:
        """Read `text` if it comes next."""
        for size in range(1, len(text) + 1):  # one by one: a difference must not wait for more text than it needs
            if (yield from self.peek(size)) != text[:size]:
                return False
        self._consume(self._at + len(text))
        return True

    def skip(self, characters: str = WHITESPACE) -> Steps[str]:
        """Read every next character that is among `characters`."""
        out = []
        while True:
            end = self._at
            while end < len(self._text) and self._text[end] in characters:
                end += 1
            out.append(self._consume(end))
            if end < len(self._text) or self._ended:
                return "".join(out)
            yield

    def json_value(self, sink: Sink) -> Steps[bool]:
        """Pass one JSON value on as it is written; False when the text ended inside it. Only its end is looked for."""
        first = yield from self.peek()
        if first in ("{", "["):
            return (yield from self._json_nest(sink))
        if first == '"':
            sink(self._consume(self._at + 1))
            return (yield from self._json_string(sink))
        while True:
            found = _AFTER_SCALAR.search(self._text, self._at)
            self._pass(found.start() if found is not None else len(self._text), sink)
            if found is not None or self._ended:
                return found is not None
            yield

    def _json_nest(self, sink: Sink) -> Steps[bool]:
        depth = 0
        while True:
            found = _STRUCTURE.search(self._text, self._at)
            self._pass(found.end() if found is not None else len(self._text), sink)
            if found is None:
                if self._ended:
                    return False
                yield
            elif found[0] == '"':
                if not (yield from self._json_string(sink)):
                    return False
            else:
                depth += 1 if found[0] in "{[" else -1
                if depth == 0:
                    return True

    def _json_string(self, sink: Sink) -> Steps[bool]:
        """The rest of a string whose opening quote was read."""
        while True:
            found = _IN_STRING.search(self._text, self._at)
            self._pass(found.end() if found is not None else len(self._text), sink)
            if found is None:
                if self._ended:
                    return False
                yield
            elif found[0] == '"':
                return True
            else:
                yield from self.peek()
                self._pass(min(self._at + 1, len(self._text)), sink)
