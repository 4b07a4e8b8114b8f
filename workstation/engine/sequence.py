"""Sequence (one sample of a request) and RequestState (the samples of one request), as the scheduler keeps them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from workstation.engine.request import EngineRequest, FinishReason, RequestTimes, TokenLogprobs
from workstation.grammar.matcher import Matcher


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
        limit: tokens at which it ends for its length; one token fewer is the most that is ever computed.
        own_until: tokens that can be written before the pool is asked again: the table covers them and nobody shares its tail.
        publish_at: known and computed tokens from which there is a new full block to publish.
        step: number of the last step it was planned into.
        matcher: where its output stands in the request's grammar; None without one.
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
    limit: int = field(init=False)
    own_until: int = 0
    publish_at: int = 0
    step: int = 0
    matcher: Matcher | None = None

    @property
    def num_known(self) -> int:
        return len(self.tokens) + self.pending

    def __post_init__(self) -> None:
        self.limit = self.request.prompt_len + self.request.max_tokens


@dataclass(slots=True, eq=False)
class RequestState:
    """A request inside the engine.

    Attributes:
        max_tokens: output limit a sample, resolved against the window.
        sequences: all samples ever made (beams replace theirs).  num_live: samples that have not finished.
        needs_host_tokens: beam search and multi-token bad words look at tokens before the next step.
        prompt_logprobs: collected chunk by chunk; entry 0 is None.  started: its first token has been told.
        hidden_sum: [H] float64, of a mean's tokens so far.  reads_hidden: somebody wants more of its steps than logits.
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
    started: bool = False
    times: RequestTimes = field(default_factory=RequestTimes)
    num_preemptions: int = 0
    num_forks: int = 0
    hidden_sum: npt.NDArray[np.float64] | None = None
    prompt_len: int = field(init=False)
    reads_hidden: bool = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_len = len(self.request.prompt_token_ids)
        self.reads_hidden = self.request.pooling is not None or self.request.params.prompt_logprobs is not None

    @property
    def request_id(self) -> str:
        return self.request.request_id
