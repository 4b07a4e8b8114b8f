"""Stop strings, found one character at a time (Knuth-Morris-Pratt), so that no chunking of the text can matter."""

from __future__ import annotations

import re
from collections.abc import Sequence


class StopMatcher:
    """Watches a growing text for any of several strings.

    `feed` returns how many characters of the *pushed piece* were read when a stop string completed, or None. `held` is how
    many characters at the text's end may still become a stop string and must not be shown yet. Cost: O(1) amortised a
    character and stop string.
    """

    __slots__ = ("_failures", "_first", "_states", "_stops", "found", "held")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = list(stops)
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._first = re.compile("[" + re.escape("".join({stop[0] for stop in stops})) + "]")
        self.found: str | None = None
        self.held = 0

    def feed(self, piece: str) -> int | None:
        if not self.held and self._first.search(piece) is None:
            return None  # nothing has begun, and nothing begins here
        for count, char in enumerate(piece, 1):
            best = ""
            held = 0
            for index, stop in enumerate(self._stops):
                state, failures = self._states[index], self._failures[index]
                while state and stop[state] != char:
                    state = failures[state - 1]
                if stop[state] == char:
                    state += 1
                if state == len(stop):
                    best = max(best, stop, key=len)
                    state = failures[state - 1]
                self._states[index] = state
                held = max(held, state)
            self.held = held
            if best:
                self.found = best
                return count
        return None


def _failure_table(pattern: str) -> list[int]:
    """For each position the length of the longest proper prefix of `pattern` that ends there."""
    table = [0] * len(pattern)
    size = 0
    for index in range(1, len(pattern)):
        while size and pattern[index] != pattern[size]:
            size = table[size - 1]
        if pattern[index] == pattern[size]:
            size += 1
        table[index] = size
    return table
