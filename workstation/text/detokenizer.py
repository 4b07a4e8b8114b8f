"""Tokens in, text out: `feed(ids) -> text` while they arrive, `finish()` at the end; stop strings are cut here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from workstation.text.pieces import TokenTable
from workstation.text.stops import StopMatcher


class Detokenizer:
    """The text of one growing sample.

    Text that may be the beginning of a stop string, or that ends inside a character, is held back. The concatenation of all
    `feed` results and `finish()` equals the full decode (cut at the stop string), whatever the chunking of the ids.

    Args:
        stop: strings that end the text.  include_stop: keep the stop string itself.
        min_tokens: a stop string counts only in text made by tokens after this many.
        keep: special ids that stay although the others are skipped.

    Attributes:
        stopped: the stop string found, or None. Once set, further ids are ignored.
        num_tokens: tokens that count (usage): up to and including the one that completed the stop string.
        num_shown: tokens whose text has been handed out (logprobs may be shown for these); a token that only begins inside
            the stop string never counts.
        starts: [num_tokens] offset of each token in the text, in characters.
        text_length: characters handed out so far.
    """

    __slots__ = ("_include_stop", "_matcher", "_min_tokens", "_pending", "_pieces", "_total", "num_shown", "num_tokens",
                 "starts", "stopped", "text_length")

    def __init__(self, table: TokenTable, *, skip_special_tokens: bool = True, stop: Sequence[str] = (),
                 include_stop: bool = False, min_tokens: int = 0, keep: frozenset[int] = frozenset()) -> None:
        self._pieces = table.stream(skip_special_tokens, keep)
        self._matcher = StopMatcher(stop) if stop else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._pending = ""
        self._total = 0
        self.stopped: str | None = None
        self.num_tokens = 0
        self.num_shown = 0
        self.starts: list[int] = []
        self.text_length = 0

    def feed(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens; return the text that is now certain. Ids after a stop string are ignored."""
        if self.stopped is not None:
            return ""
        if self._matcher is None:
            return self._feed_freely(token_ids)
        for token_id in token_ids:
            self.starts.append(self._total)
            self.num_tokens += 1
            if self._push(self._pieces.step(token_id), self.num_tokens > self._min_tokens):
                break
        return self._release()

    def _feed_freely(self, token_ids: Iterable[int]) -> str:
        """Without stop strings nothing is held back but an unfinished character."""
        text = ""
        for token_id in token_ids:
            self.starts.append(self.text_length + len(text))
            text += self._pieces.step(token_id)
        self.num_tokens = self.num_shown = len(self.starts)
        self._total = self.text_length = self.text_length + len(text)
        return text

    def finish(self) -> str:
        """No more tokens: everything held back is text now."""
        if self.stopped is not None:
            return ""
        if not self._push(self._pieces.finish(), self.num_tokens > self._min_tokens):
            self.num_shown = self.num_tokens
            text, self._pending = self._pending, ""
            self.text_length += len(text)
            return text
        return self._release()

    def _push(self, piece: str, may_stop: bool) -> bool:
        """Append a piece of text; True when it completed a stop string, which is then cut away."""
        if not piece:
            return False
        read = self._matcher.feed(piece) if self._matcher is not None and may_stop else None
        if self._matcher is None or read is None:
            self._pending += piece
            self._total += len(piece)
            return False
        self.stopped = self._matcher.found or ""
        self._pending += piece[:read]
        if not self._include_stop:
            self._pending = self._pending[:-len(self.stopped)]
        self._total = self.text_length + len(self._pending)
        return True

    def _release(self) -> str:
        held = self._matcher.held if self._matcher is not None and self.stopped is None else 0
        cut = len(self._pending) - held
        text, self._pending = self._pending[:cut], self._pending[cut:]
        self.text_length += len(text)
        self._count_shown()
        return text

    def _count_shown(self) -> None:
        """A token is shown once the text has passed its end; at a stop, once any of its text is left."""
        count = self.num_shown
        if self.stopped is None:
            while count < self.num_tokens and self._end_of(count) <= self.text_length:
                count += 1
        else:
            while count < self.num_tokens and self.starts[count] < self.text_length:
                count += 1
        self.num_shown = count

    def _end_of(self, index: int) -> int:
        return self.starts[index + 1] if index + 1 < len(self.starts) else self._total
