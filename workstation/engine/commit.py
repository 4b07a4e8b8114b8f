"""Commit: a step's results on the host become tokens of sequences, ended sequences and TokenEvents."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workstation.engine.batch import Batch, Chunk, StepResult
from workstation.engine.beam import BeamGroup
from workstation.engine.request import FinishReason, TokenEvent, TokenLogprobs
from workstation.engine.scheduler import Scheduler
from workstation.engine.sequence import RequestState, Sequence


class Committer:
    """Takes 0 … k tokens a sequence; today one."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._beams: dict[RequestState, BeamGroup] = {}

    def commit(self, batch: Batch, result: StepResult) -> list[TokenEvent]:
        """Append what was sampled, end what has ended, and say so.

        Sequences that ended while the step was under way are skipped: their extra token is thrown away.
        """
        events: list[TokenEvent] = []
        for number, rows in result.prompt_logprobs.items():
            self._collect_prompt_logprobs(batch.chunks[number], rows)
        for number, hidden in result.pooled.items():
            events += self._pool(batch.chunks[number], hidden)
        appended = 0
        for sample, token, finite, logprobs in zip(batch.samples, result.tokens, result.finite, result.logprobs, strict=True):
            seq = sample.seq
            seq.pending -= 1
            if seq.finished is not None:
                continue
            if not finite:
                events += self._fail(seq)
            elif seq.matcher is not None and seq.matcher.fault is not None:
                events += self.abort(seq.request.request_id, "error", f"the grammar cannot be followed: {seq.matcher.fault}")
            elif seq.request.request.beam is not None:
                events += self._beam(seq, logprobs)
            else:
                events.append(self._append(seq, token, logprobs))
                appended += 1
        self._scheduler.stats.generated_tokens += appended
        return events

    def abort(self, request_id: str, reason: FinishReason = "abort", error: str | None = None, *,
              index: int | None = None) -> list[TokenEvent]:
        """End all samples of a request, or the one with this index; nothing happens when it is not here."""
        request = self._scheduler.requests.get(request_id)
        if request is None:
            return []
        live = self._scheduler.live(request)
        if index is not None and request.request.beam is None:
            live = [seq for seq in live if seq.index == index and seq.born]  # an unborn one would never end otherwise
        else:
            self._beams.pop(request, None)
        if request.request.beam is not None:
            for seq in live[1:]:
                self._scheduler.drop(seq, reason)
            live = live[:1]
        return [TokenEvent(request_id, 0 if request.request.beam else seq.index, finish_reason=reason, error=error,
                           finished=self._scheduler.finish(seq, reason), num_cached_tokens=request.num_cached_tokens,
                           times=request.times) for seq in live]

    # ── one token ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _append(self, seq: Sequence, token: int, logprobs: TokenLogprobs | None) -> TokenEvent:
        request, tokens = seq.request, seq.tokens
        tokens.append(token)
        if seq.matcher is not None:
            seq.matcher.accept(token)
        length = len(tokens)
        if length >= seq.publish_at:
            self._scheduler.kv.publish(seq)
        ends = length >= seq.limit or token in request.stop_ids
        if request.started and not ends and logprobs is None:
            return TokenEvent(request.request.request_id, seq.index, [token], plain=True)
        return self._whole_event(seq, token, logprobs, ends)

    def _whole_event(self, seq: Sequence, token: int, logprobs: TokenLogprobs | None, ends: bool) -> TokenEvent:
        """An event that says more than its token: a request's first, a sample's last, one with log-probabilities."""
        request = seq.request
        event = TokenEvent(request.request.request_id, seq.index, [token], num_cached_tokens=request.num_cached_tokens,
                           num_preemptions=request.num_preemptions)
        if not request.started:
            request.started = True
            request.times.first_token = self._scheduler.clock()
            event.prompt_logprobs, event.times = request.prompt_logprobs, request.times
        if logprobs is not None:
            event.logprobs = [logprobs]
        if ends:
            self._end(seq, token, event)
        return event

    def _end(self, seq: Sequence, token: int, event: TokenEvent) -> None:
        request = seq.request
        reason = self._reason(seq, token)
        if reason is not None:
            event.finish_reason = reason
            if reason == "stop" and token not in request.request.eos_token_ids:
                event.stop_reason = token
            event.finished = self._scheduler.finish(seq, reason)
            event.times = request.times

    def _reason(self, seq: Sequence, token: int) -> FinishReason | None:
        request = seq.request
        outputs = len(seq.tokens) - request.prompt_len
        if token in request.stop_ids and outputs > request.request.params.min_tokens:
            return "stop"
        if seq.matcher is not None and token in request.request.eos_token_ids:
            return "stop"  # the end of the grammar, which allows nothing else
        return "length" if outputs >= request.max_tokens else None

    def _fail(self, seq: Sequence) -> list[TokenEvent]:
        """Logits or hidden states that are not finite: no token of this request can be trusted, and none of its blocks."""
        for sibling in self._scheduler.live(seq.request):
            self._scheduler.kv.withdraw(sibling)
        why = "the model produced values that are not finite (NaN or infinity)"
        if seq.matcher is not None:
            why += ", or the request's grammar and its bans or allow-list leave no token"
        return self.abort(seq.request.request_id, "error", f"{why}; the request was ended")

    def _collect_prompt_logprobs(self, chunk: Chunk, rows: list[TokenLogprobs]) -> None:
        request = chunk.seq.request
        if request.prompt_logprobs is None:
            request.prompt_logprobs = [None]
        # Entry i belongs to prompt token i; a prompt computed again after a preemption adds nothing twice.
        request.prompt_logprobs += rows[len(request.prompt_logprobs) - (chunk.start + 1):]

    def _pool(self, chunk: Chunk, hidden: npt.NDArray[np.float32]) -> list[TokenEvent]:
        """Take what a step gave of a request with pooling; its event when that was all."""
        seq, request = chunk.seq, chunk.seq.request
        if request.request.pooling == "mean":
            earlier = request.hidden_sum if chunk.start and request.hidden_sum is not None else 0.0
            request.hidden_sum = earlier + hidden.astype(np.float64)
            hidden = (request.hidden_sum / request.prompt_len).astype(np.float32)
        if not chunk.ends_prompt:
            return []
        seq.pending = 0
        if seq.finished is not None:
            return []
        if not np.isfinite(hidden).all():
            return self._fail(seq)
        request.times.first_token = self._scheduler.clock()
        event = TokenEvent(request.request_id, finish_reason="stop", num_cached_tokens=request.num_cached_tokens,
                           num_preemptions=request.num_preemptions, embedding=hidden.astype("<f4").tobytes())
        event.finished, event.times = self._scheduler.finish(seq, "stop"), request.times
        return [event]

    # ── beams ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _beam(self, seq: Sequence, logprobs: TokenLogprobs | None) -> list[TokenEvent]:
        group = self._beams.get(seq.request)
        if group is None:
            group = self._beams[seq.request] = BeamGroup(seq.request, self._scheduler)
        if logprobs is None:
            raise ValueError("the runner returns logprobs for every beam")
        events = group.deliver(seq, logprobs)
        if events:
            del self._beams[seq.request]
        return events
