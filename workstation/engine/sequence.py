"""Sequence (one sample of a request) and RequestState (the samples of one request), as the scheduler keeps them."""

from __future__ import annotations

from dataclasses import dataclass, field

from workstation.engine.request import EngineRequest, FinishReason, RequestTimes, TokenLogprobs


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample. The scheduler lets `num_computed` catch up with the known tokens.

    Attributes:
        tokens: prompt and committed output ids.  pending: sampled tokens still on the device, 0 or 1.
        num_computed: tokens whose K and V are written, or will be by a launched step.
        tables: one block table a KV group; entry i holds tokens [i*block_size, (i+1)*block_size).
        digests: chain digest of each full block seen so far.  published: full blocks offered to the cache, by group.
        freed: blocks at the front given back because they slid out of the window, by group.
        table_updates: (group, entry, block) changes the runner has not uploaded yet.
        row: place in the device's row state, -1 while not running.  score: cumulative log-probability (beams).
        blocked_at: blocks that were available when admission last failed for lack of them, -1 if it did not.
        order: scheduling key; smaller runs first.  born: False for a sample that waits for its prompt to be computed.
    """

    request: RequestState
    index: int
    tokens: list[int]
    order: tuple[int, float, int]
    seed: int = 0
    pending: int = 0
    num_computed: int = 0
    row: int = -1
    tables: list[list[int]] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    published: list[int] = field(default_factory=list)
    freed: list[int] = field(default_factory=list)
    table_updates: list[tuple[int, int, int]] = field(default_factory=list)
    born: bool = True
    finished: FinishReason | None = None
    score: float = 0.0
    blocked_at: int = -1

    @property
    def num_known(self) -> int:
        return len(self.tokens) + self.pending

    @property
    def num_output(self) -> int:
        """Output tokens known or in flight."""
        return self.num_known - self.request.prompt_len

    @property
    def waits_for_host(self) -> bool:
        """True while the next step may not be planned before the sampled token is known here."""
        return self.pending > 0 and self.request.needs_host_tokens

    @property
    def at_length_limit(self) -> bool:
        return self.num_output >= self.request.max_tokens


@dataclass(slots=True, eq=False)
class RequestState:
    """A request inside the engine.

    Attributes:
        max_tokens: output limit a sample, resolved against the window.
        sequences: all samples ever made (beams replace theirs).  num_live: samples that have not finished.
        needs_host_tokens: beam search and multi-token bad words look at tokens before the next step.
        prompt_logprobs: collected chunk by chunk; entry 0 is None.
    """

    request: EngineRequest
    max_tokens: int
    stop_ids: frozenset[int]
    needs_host_tokens: bool
    root: bytes
    sequences: list[Sequence] = field(default_factory=list)
    num_live: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    sent_prompt_logprobs: bool = False
    times: RequestTimes = field(default_factory=RequestTimes)
    num_preemptions: int = 0
    num_forks: int = 0

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)
