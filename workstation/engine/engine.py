"""Engine: schedule, launch, collect, commit, emit. One thread owns it; the server and `LLM` drive it."""

from __future__ import annotations

import logging
import time
from array import array
from bisect import bisect_left

import numpy as np
import torch

from workstation.engine.batch import Batch
from workstation.engine.commit import Committer
from workstation.engine.grammars import GrammarDesk
from workstation.engine.masks import TokenMasks, token_masks, waits_for_tokens
from workstation.engine.request import STEP_TOKEN_BOUNDS, EngineInfo, EngineRequest, EngineStats, TokenEvent
from workstation.engine.runner import ModelRunner, Step
from workstation.engine.sampling_state import check_candidates
from workstation.engine.scheduler import Scheduler
from workstation.engine.snapshot import Look, Picture, take_picture
from workstation.errors import InvalidRequestError, WorkstationError
from workstation.grammar.matcher import Matcher
from workstation.model.transformer import Decoder

log = logging.getLogger("ws.engine")
IDLE_SECONDS = 0.005  # how long a step waits for a grammar when there is nothing else to do


class Engine:
    """The loop. With `overlap`, step N+1 is planned and launched while step N is on the device.

    What a grammar allows next depends on the token before. So where such a token is still on the device, the forward pass of
    step N+1 is launched, step N is collected while it runs, and the masks follow it before the sampling. Nothing waits on the
    device as long as the host is done before the forward pass is.
    """

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, info: EngineInfo, *, overlap: bool,
                 grammars: GrammarDesk | None = None) -> None:
        self.info = info
        self._scheduler = scheduler
        self._runner = runner
        self._committer = Committer(scheduler)
        self._overlap = overlap
        self._in_flight: Step | None = None
        self.grammars = grammars if grammars is not None else GrammarDesk(info.model, info.logits_width)
        self._refused: list[tuple[str, WorkstationError]] = []

    @property
    def model(self) -> Decoder:
        """The loaded weights, for measurements beside the loop."""
        return self._runner.model

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of the KV pool's elements."""
        return self._runner.pool.dtype

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or self._in_flight is not None or len(self.grammars) > 0

    def submit(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: ids without a logit, nothing left to sample.  ContextLengthError: it can never fit.
            OverloadedError: the queue is full.

        A request with a grammar is queued once that is compiled; what is wrong with it by then, `refused` tells.
        """
        width = self.info.logits_width
        bad = _first_outside(request.prompt_token_ids, width)
        if bad is not None:
            raise InvalidRequestError(f"prompt token ids must be between 0 and {width - 1}, got {bad}", param="prompt")
        request.params.check_token_ids(width)
        if request.beam is None:
            eos = [] if request.params.ignore_eos else request.eos_token_ids
            check_candidates(request.params, [*request.params.stop_token_ids, *eos])
        if request.grammar is None:
            self._scheduler.add(request)
        else:
            self.grammars.submit(request)

    def refused(self) -> list[tuple[str, WorkstationError]]:
        """Submitted requests that could not be queued after all, since the last call; no event tells of them."""
        found, self._refused = self._refused, []
        return found

    def abort(self, request_id: str, index: int | None = None) -> list[TokenEvent]:
        """End a request, or one of its samples, now; its last events. Unknown ids give none."""
        if self.grammars.drop(request_id):
            return [TokenEvent(request_id, finish_reason="abort", finished=True)]
        return self._committer.abort(request_id, index=index)

    def step(self) -> list[TokenEvent]:
        """One turn of the loop: the tokens of the newest finished step."""
        started = time.perf_counter()
        self._queue_compiled()
        batch = self._scheduler.schedule()
        events: list[TokenEvent] = []
        launched = self._launch(batch, events) if batch else None
        done = launched
        if self._overlap:
            done, self._in_flight = self._in_flight, launched
        if batch:
            self._count(batch.num_tokens, batch.num_prompt_tokens)
        if done is not None:
            events += self._commit(done)
        self._scheduler.stats.step_seconds = time.perf_counter() - started
        return events

    def _queue_compiled(self) -> None:
        """Requests whose grammar is ready go the way of the others."""
        if not len(self.grammars):
            return
        if not self._scheduler.has_work and self._in_flight is None:
            self.grammars.wait(IDLE_SECONDS)
        for request, found in self.grammars.ready():
            try:
                if not isinstance(found, Matcher):
                    raise found
                for seq in self._scheduler.add(request).sequences:
                    seq.matcher = self.grammars.matcher(request, found)
            except WorkstationError as error:
                self._refused.append((request.request_id, error))

    def _launch(self, batch: Batch, events: list[TokenEvent]) -> Step | None:
        """Launch a step; events of what had to be committed first, or ended, are added. Without memory for it the newest of its
        requests ends with an error, and the others start anew."""
        try:
            if self.grammars.used and any(sample.seq.matcher is not None for sample in batch.samples):
                return self._runner.launch(batch, lambda: self._masks(batch, events))
            return self._runner.launch(batch)
        except torch.OutOfMemoryError as error:
            self._runner.forget(batch)
            request = self._scheduler.abandon(batch)
            message = f"the device ran out of memory in a step of {batch.num_tokens} tokens, and this request was its newest"
            log.warning("%s (%s): %s", message, request.request_id if request is not None else "ended meanwhile", error)
            if request is not None:
                events += self._committer.abort(request.request_id, "error", message)
            return None

    def _masks(self, batch: Batch, events: list[TokenEvent]) -> TokenMasks | None:
        """What the grammars allow now, once the tokens before are known."""
        done = self._in_flight
        if done is not None and waits_for_tokens(batch.samples):
            self._in_flight = None
            events += self._commit(done)
        return token_masks(batch.samples, self._runner.device, self.grammars.fill)

    def _commit(self, step: Step) -> list[TokenEvent]:
        return self._committer.commit(step.batch, self._runner.collect(step))

    def reset_prefix_cache(self) -> int:
        """Forget all cached prefixes; returns how many blocks became free."""
        return self._scheduler.pool.clear_cache()

    def stats(self) -> EngineStats:
        return self._scheduler.snapshot()

    def look(self, look: Look) -> Picture:
        """What a dashboard asked for, with what making it cost."""
        started = time.perf_counter()
        picture = take_picture(self._scheduler, look)
        picture.seconds = time.perf_counter() - started
        return picture

    def check(self) -> None:
        """Prove the books of blocks and rows. Raises AssertionError."""
        self._scheduler.check()

    def _count(self, tokens: int, prompt_tokens: int) -> None:
        stats = self._scheduler.stats
        stats.steps += 1
        stats.step_tokens, stats.step_prompt_tokens = tokens, prompt_tokens
        stats.computed_prompt_tokens += prompt_tokens
        stats.steps_by_tokens[bisect_left(STEP_TOKEN_BOUNDS, tokens)] += 1
        stats.tokens_of_steps += tokens


def _first_outside(ids: list[int], width: int) -> int | None:
    """The first id that is not in 0 … width - 1. A prompt of thousands costs microseconds unless there is one."""
    try:
        inside = not ids or int(np.frombuffer(array("I", ids), dtype=np.uint32).max()) < width
    except OverflowError:  # negative, or beyond 32 bits
        inside = False
    return None if inside else next(token for token in ids if not 0 <= token < width)
