"""What the scheduler may take on: its limits, and the refusal of what can never run within them."""

from __future__ import annotations

from dataclasses import dataclass

from workstation.engine.kv import KVManager
from workstation.engine.request import EngineRequest
from workstation.errors import ContextLengthError, InvalidRequestError


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """max_tokens: a step's token budget. max_rows: sequences that may run at once. max_len: tokens a sequence may hold."""

    max_tokens: int
    max_rows: int
    max_len: int
    max_queue: int = 2048
    chunked_prefill: bool = True
    priority: bool = False


def refuse_impossible(request: EngineRequest, limits: SchedulerLimits, kv: KVManager) -> None:
    """Raises ContextLengthError, InvalidRequestError: it can never fit, however empty the pool."""
    prompt_len = len(request.prompt_token_ids)
    if prompt_len == 0:
        raise InvalidRequestError("the prompt must hold at least one token", param="prompt")
    output = 0 if request.pooling else 1
    if prompt_len + output > limits.max_len:
        raise ContextLengthError(f"the prompt has {prompt_len} tokens; this model's maximum context length is "
                                 f"{limits.max_len} tokens{', output included' if output else ''}", param="prompt")
    if request.pooling and (request.beam or request.params.n != 1 or request.params.prompt_logprobs is not None):
        raise InvalidRequestError("a pooled request has one sample, no beams and no logprobs", param="n")
    width = request.beam.beam_width if request.beam else request.params.n
    name = "beam_width" if request.beam else "n"
    if width > limits.max_rows:
        raise InvalidRequestError(f"{name} must be at most {limits.max_rows} (max_num_seqs), got {width}", param=name)
    wanted = request.beam.max_tokens if request.beam else request.params.max_tokens
    total = prompt_len if request.pooling else min(prompt_len + (wanted or limits.max_len), limits.max_len)
    if not limits.chunked_prefill and prompt_len > limits.max_tokens:
        raise ContextLengthError(f"the prompt has {prompt_len} tokens; without chunked prefill a step takes at most "
                                 f"{limits.max_tokens} (max_num_batched_tokens)", param="prompt")
    needed = kv.blocks_for(total, limits.max_tokens)
    if request.beam:  # beams advance together, so all of them must fit at once
        shared = prompt_len // kv.pool.block_size if kv.shares(request) else 0
        needed = shared + width * (needed - shared + len(kv.groups))
    if needed > kv.pool.total:
        size = kv.pool.block_size
        raise ContextLengthError(f"{total} tokens need {needed} KV blocks of {size}; the pool has {kv.pool.total}; "
                                 f"shorten the prompt or max_tokens", param="max_tokens")
