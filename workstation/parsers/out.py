"""Where a parser puts what it finds: white space at the seams of text, thought and calls is settled here."""

from __future__ import annotations

from workstation.parsers.parts import CallArguments, CallEnd, CallStart, Part, Reasoning, Text
from workstation.parsers.reader import WHITESPACE


class Out:
    """Parts found so far, taken by `take`.

    White space is held back until it is known whether text follows: what stands between text and a call, or around a
    thought, belongs to the format and is nobody's text.

    Attributes:
        calls: calls begun so far.
    """

    __slots__ = ("_after_thought", "_held", "_parts", "_thinking", "_thought", "calls")

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._held: list[str] = []
        self._after_thought = False
        self._thinking = False
        self._thought = False
        self.calls = 0

    def take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def text(self, piece: str) -> None:
        if self._after_thought:
            piece = piece.lstrip(WHITESPACE)
            if not piece:
                return
            self._after_thought = False
        shown = piece.rstrip(WHITESPACE)
        if shown:
            self._parts.append(Text("".join([*self._held, shown])))
            self._held = []
        self._held.append(piece[len(shown):])

    def thought(self, piece: str) -> None:
        """A piece of reasoning; white space at both its ends is left out."""
        if not self._thinking:
            self._thinking, self._held = True, []
        shown = piece.rstrip(WHITESPACE)
        if shown:
            head = "".join([*self._held, shown])
            self._parts.append(Reasoning(head if self._thought else head.lstrip(WHITESPACE)))
            self._thought, self._held = True, []
        self._held.append(piece[len(shown):])

    def end_thought(self) -> None:
        self._thinking, self._held, self._after_thought, self._thought = False, [], True, False

    def start_call(self, name: str) -> None:
        self._held = []
        self._parts.append(CallStart(self.calls, name))
        self.calls += 1

    def arguments(self, piece: str) -> None:
        if piece:
            self._parts.append(CallArguments(self.calls - 1, piece))

    def end_call(self) -> None:
        self._parts.append(CallEnd(self.calls - 1))
        self._after_thought = True

    def call(self, name: str, arguments: str) -> None:
        """A call that is known whole."""
        self.start_call(name)
        self.arguments(arguments)
        self.end_call()

    def finish(self) -> None:
        """The answer is over: white space at the end of text is text, unless thought or calls stood there."""
        space = "".join(self._held)
        if space and not self._thinking and not self._after_thought:
            self._parts.append(Text(space))
        self._held = []
