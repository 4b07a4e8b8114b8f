"""What `LLM` returns: vLLM's output objects, field for field where both have them."""

from __future__ import annotations

from dataclasses import dataclass, field

from workstation.engine.request import RequestTimes


@dataclass(slots=True)
class Logprob:
    """One candidate at one position. rank is 1-based in the whole vocabulary, None where it was not asked for."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One sample. text is "" when nothing was detokenised; logprobs: a dict from token id a token."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """All samples of one prompt. metrics: time.monotonic() seconds."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestTimes | None = None


@dataclass(slots=True)
class BeamSearchSequence:
    """One beam: `tokens` begins with the prompt, as in vLLM."""

    tokens: list[int]
    text: str | None
    cum_logprob: float
    finish_reason: str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]
