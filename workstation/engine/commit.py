"""Commit: a step's results on the host become tokens of sequences, ended sequences and TokenEvents."""

from __future__ import annotations

from workstation.engine.batch import Batch, Chunk, Sample, StepResult
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
        for place, sample in enumerate(batch.samples):
            seq = sample.seq
            seq.pending -= 1
            if seq.finished is not None:
                continue
            if not result.finite[place]:
                events += self._fail(seq)
            elif seq.request.request.beam is not None:
                events += self._beam(seq, result.logprobs[place])
            else:
                events.append(self._append(sample, result.tokens[place], result.logprobs[place]))
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

    def _append(self, sample: Sample, token: int, logprobs: TokenLogprobs | None) -> TokenEvent:
        seq, scheduler = sample.seq, self._scheduler
        request = seq.request
        seq.tokens.append(token)
        scheduler.stats.generated_tokens += 1
        if len(seq.tokens) >= seq.publish_at:
            scheduler.kv.publish(seq)
        if request.times.first_token == 0.0:
            request.times.first_token = scheduler.clock()
        event = TokenEvent(request.request.request_id, seq.index, [token])
        event.num_cached_tokens, event.num_preemptions = request.num_cached_tokens, request.num_preemptions
        if logprobs is not None:
            event.logprobs = [logprobs]
        if request.prompt_logprobs is not None and not request.sent_prompt_logprobs:
            event.prompt_logprobs, request.sent_prompt_logprobs = request.prompt_logprobs, True
        if token in request.stop_ids or len(seq.tokens) >= seq.limit:
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
        return "length" if outputs >= request.max_tokens else None

    def _fail(self, seq: Sequence) -> list[TokenEvent]:
        """Logits that are not finite: no token of this request can be trusted, and none of its blocks."""
        for sibling in self._scheduler.live(seq.request):
            self._scheduler.kv.withdraw(sibling)
        return self.abort(seq.request.request_id, "error",
                          "the model produced logits that are not finite (NaN or infinity); the request was ended")

    def _collect_prompt_logprobs(self, chunk: Chunk, rows: list[TokenLogprobs]) -> None:
        request = chunk.seq.request
        if request.prompt_logprobs is None:
            request.prompt_logprobs = [None]
        # Entry i belongs to prompt token i; a prompt computed again after a preemption adds nothing twice.
        request.prompt_logprobs += rows[len(request.prompt_logprobs) - (chunk.start + 1):]

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
