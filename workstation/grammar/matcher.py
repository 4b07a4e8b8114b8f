"""Matcher: follows one answer through its grammar, and says which tokens may come next."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.int32]
MAX_MESSAGE = 400
_PLACE = re.compile(r"^at \d+\(\d+\): failed to compile JSON schema: ")  # a line of a grammar that the client never saw


class Matcher:
    """Where one answer stands in its grammar. For the library, which knows one end, it is an id of its own (`end`).

    Args:
        inner: llguidance's matcher.  end: the id of its end.  words: int32 of a mask.  ends: tokens that end this answer.
    Attributes:
        fault: why it can say no more: a limit of the library, or a token that the grammar does not allow.
    """

    __slots__ = ("_end", "_end_bits", "_ends", "_inner", "fault", "words")

    def __init__(self, inner: Any, end: int, words: int, ends: Iterable[int] = ()) -> None:
        self._inner, self._end, self._ends, self.words = inner, end, frozenset(ends), words
        self._end_bits = np.zeros(words, dtype=np.int32)
        for token in self._ends:
            self._end_bits[token // 32] |= _bit(token)
        self.fault: str | None = None
        self._look()

    def fork(self, ends: Iterable[int], tokens: Sequence[int] = ()) -> Matcher:
        """A matcher of its own in the same state, further on by these tokens; any of `ends` ends its answer."""
        other = Matcher(self._inner.deep_copy(), self._end, self.words, ends)
        if tokens:
            other._inner.consume_tokens(list(tokens))
            other._look()
        return other

    @property
    def complete(self) -> bool:
        """Nothing but the end may follow."""
        return bool(self._inner.is_stopped())

    @property
    def accepting(self) -> bool:
        """The end may follow."""
        return bool(self._inner.is_accepting())

    def accept(self, token: int) -> None:
        """Go on by a token. One that is not allowed is a fault."""
        if self.fault is None and not self._inner.consume_token(self._end if token in self._ends else token):
            self._look()

    def fill(self, bits: Bits, *, hold_end: bool = False) -> None:
        """Write which tokens may follow: [words] int32, bit i % 32 of word i // 32 for token i.

        hold_end: the end is left out, unless nothing else may follow. After a fault nothing but the end is allowed.
        """
        self._inner.unsafe_compute_mask_ptr(bits.ctypes.data, 4 * self.words)
        self._finish(bits, hold_end)

    @staticmethod
    def fill_all(executor: Any, matchers: Sequence[Matcher], bits: Bits, hold_ends: Sequence[bool]) -> None:
        """`fill` of many, each into its row of bits [M, words], on the threads of an LLExecutor."""
        work = [(matcher._inner, row) for row, matcher in enumerate(matchers)]
        executor.unsafe_compute_mask_ptr(work, bits.ctypes.data, 4 * bits.shape[1], len(bits))
        for row, (matcher, hold_end) in enumerate(zip(matchers, hold_ends, strict=True)):
            matcher._finish(bits[row], hold_end)

    def _finish(self, bits: Bits, hold_end: bool) -> None:
        """Put the answer's own ends in the place of the library's."""
        if self._inner.is_stopped():
            self._look()
        last, end = self._end // 32, _bit(self._end)
        ends = bool(bits[last] & end)
        bits[last] &= ~end
        if ends and not (hold_end and bits.any()):
            bits |= self._end_bits

    def _look(self) -> None:
        if self._inner.is_error():
            self.fault = readable(str(self._inner.get_error()))


def _bit(token: int) -> np.int32:
    return np.int32(np.uint32(1 << token % 32).astype(np.int32))


def readable(message: str) -> str:
    """The library's message without the grammar that it quotes below it."""
    kept = [line.strip() for line in message.splitlines() if not line.lstrip().startswith(("<", "|", "^"))
            and (not line.lstrip()[:1].isdigit() or "|" not in line)]
    text = _PLACE.sub("", " ".join(line for line in kept if line) or message.strip())
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "…"
