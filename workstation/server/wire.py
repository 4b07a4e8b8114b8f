"""Answers as small typed structs: msgspec writes one in about a microsecond, which 200 streams at once need."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from workstation.server.job import Divergence

encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def sse(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(value) + b"\n\n"


class Frame:
    """The event of a chunk that differs from its siblings in one string alone: encoded once, then two copies around the string.

    Args:
        chunk: an Answer in which `field`, a key of its choice or delta, holds "".
    """

    __slots__ = ("_head", "_tail")

    def __init__(self, chunk: Answer, field: str) -> None:
        # Inside JSON strings quotes are escaped, so this can only be the key.
        head, _, tail = sse(chunk).partition(f'"{field}":""'.encode())
        self._head, self._tail = head + f'"{field}":'.encode(), tail

    def around(self, text: str) -> bytes:
        return b"".join((self._head, encode(text), self._tail))


class TokenDetails(Struct):
    """diverged: where the prompt leaves an earlier one of the same client, when that cost cached tokens (docs/stats.md)."""

    cached_tokens: int = 0
    diverged: Divergence | UnsetType = UNSET


class Usage(Struct):
    """Tokens; the stop token and the tokens of a stop string count, tokens generated after a stop string do not."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetails


class Timings(Struct):
    """llama.cpp's figures. cache_n, prompt_n: prompt tokens read from the cache, and computed.  prompt_ms: from the first
    scheduling to the first token.  predicted_n, predicted_ms: tokens generated, and the time from the first to the last.
    """

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class RequestMetrics(Struct):
    """vLLM's per-request metrics, milliseconds from the engine's clock: scheduled → first token → last token.

    tokens_per_second: over both spans.  mean_itl_ms: None for a single token.
    """

    time_to_first_token_ms: float
    generation_time_ms: float
    queue_time_ms: float
    mean_itl_ms: float | None
    tokens_per_second: float


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[ChatLogprob]
    refusal: None = None


class CompletionLogprobs(Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class FunctionCall(Struct):
    name: str
    arguments: str


class ToolCall(Struct):
    id: str
    function: FunctionCall
    type: str = "function"


class FunctionDelta(Struct):
    """The next characters of a call's arguments; the name comes once, with the first."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(Struct):
    """`id` and `type` come once, with the name."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class ChatMessage(Struct):
    """Reasoning under the two names clients look for."""

    role: str
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET


class ChatChoice(Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatDelta(Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET


class ChatChunkChoice(Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class CompletionChoice(Struct):
    """Of an answer or of a chunk; in a chunk finish_reason is null until the last."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[dict[str, Any] | None] | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Answer(Struct):
    """`chat.completion`, `chat.completion.chunk` and `text_completion` differ in `object` and in their choices."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET
    metrics: RequestMetrics | UnsetType | None = UNSET
    prompt_logprobs: list[dict[str, Any] | None] | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
