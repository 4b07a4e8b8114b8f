"""Log-probabilities in the two OpenAI shapes and in vLLM's prompt_logprobs shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workstation.engine.request import TokenLogprobs
from workstation.server.wire import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob
from workstation.text.tokenizer import Tokenizer

# JSON has no -Infinity; OpenAI writes this figure for "impossible".
IMPOSSIBLE = -9999.0


def _finite(value: float) -> float:
    return value if value > IMPOSSIBLE else IMPOSSIBLE


class LogprobWriter:
    """Turns engine entries into answer fields; `as_ids` writes `token_id:N` instead of text (exact for partial characters)."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def text(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def chat(self, entries: Sequence[TokenLogprobs]) -> ChatLogprobs:
        """The chosen token, and the k most likely ones (which may hold it again)."""
        return ChatLogprobs([self._chat_entry(entry) for entry in entries])

    def _chat_entry(self, entry: TokenLogprobs) -> ChatLogprob:
        tops = [TopLogprob(self.text(token), _finite(value), list(self._tokenizer.token_bytes(token)))
                for token, value in zip(entry.token_ids[1:], entry.logprobs[1:], strict=True)]
        token = entry.token_ids[0]
        return ChatLogprob(self.text(token), _finite(entry.logprobs[0]), list(self._tokenizer.token_bytes(token)), tops)

    def completion(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None],
                   offsets: Sequence[int]) -> CompletionLogprobs:
        """Parallel lists; entry None (a prompt's first token) has no figures. Equal lengths."""
        tops: list[dict[str, float] | None] = []
        for entry in entries:
            tops.append(None if entry is None else self._top_dict(entry))
        return CompletionLogprobs(
            tokens=[self.text(token) for token in token_ids],
            token_logprobs=[None if entry is None else _finite(entry.logprobs[0]) for entry in entries],
            top_logprobs=tops, text_offset=list(offsets))

    def _top_dict(self, entry: TokenLogprobs) -> dict[str, float]:
        """Most likely first, the chosen token always in it; of tokens with the same text the likelier stays."""
        out: dict[str, float] = {}
        order = [*range(1, len(entry.token_ids)), 0]
        for position in order:
            out.setdefault(self.text(entry.token_ids[position]), _finite(entry.logprobs[position]))
        return out

    def prompt(self, entries: Sequence[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
        """vLLM's prompt_logprobs: per position {token id: {logprob, rank, decoded_token}}, null at the first."""
        return [None if entry is None else self._prompt_entry(entry) for entry in entries]

    def _prompt_entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for position, (token, value) in enumerate(zip(entry.token_ids, entry.logprobs, strict=True)):
            rank = entry.rank if position == 0 else position
            out.setdefault(str(token), {"logprob": _finite(value), "rank": rank, "decoded_token": self.text(token)})
        return out
