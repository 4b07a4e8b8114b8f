"""Beam search over the engine's own sequences: beams share blocks and part by copy-on-write.

A step's best 2 × width continuations of every live beam compete; those that end (EOS or a stop id) become hypotheses, the best
`width` of the others live on. Score of a hypothesis of n output tokens: sum of log-probabilities / n ** length_penalty.
The search ends at max_tokens, or as soon as no live beam can still enter the best `width` hypotheses.
"""

from __future__ import annotations

from dataclasses import dataclass

from workstation.engine.request import FinishReason, TokenEvent, TokenLogprobs
from workstation.engine.scheduler import Scheduler
from workstation.engine.sequence import RequestState, Sequence


@dataclass(slots=True)
class Hypothesis:
    """A finished beam: its output ids and the sum of their log-probabilities."""

    tokens: list[int]
    total: float
    ended: bool


class BeamGroup:
    """The beams of one request."""

    def __init__(self, request: RequestState, scheduler: Scheduler) -> None:
        if request.request.beam is None:
            raise ValueError("a BeamGroup needs a beam request")
        self._params = request.request.beam
        self._request = request
        self._scheduler = scheduler
        self._delivered: dict[Sequence, TokenLogprobs] = {}
        self._done: list[Hypothesis] = []

    def deliver(self, seq: Sequence, best: TokenLogprobs) -> list[TokenEvent]:
        """Note one beam's best continuations; when all live beams have theirs, choose. Returns the request's last events."""
        self._delivered[seq] = best
        live = self._scheduler.live(self._request)
        if len(self._delivered) < len(live):
            return []
        candidates = self._candidates()
        self._delivered.clear()
        length = len(live[0].tokens) + 1 - self._request.prompt_len
        keep = candidates[:self._params.beam_width]
        if length >= self._request.max_tokens:
            self._done += [Hypothesis(self._output(seq, token), total, False) for total, seq, token in keep]
            return self._finish(live)
        if not keep or self._decided(keep[0][0]):
            return self._finish(live)
        self._continue(live, keep)
        return []

    def _candidates(self) -> list[tuple[float, Sequence, int]]:
        """Continuations that do not end, best first; those that end are filed as hypotheses."""
        found: list[tuple[float, Sequence, int]] = []
        for seq, best in self._delivered.items():
            for token, logprob in zip(best.token_ids[1:], best.logprobs[1:], strict=True):
                total = seq.score + logprob
                if token in self._request.stop_ids:
                    self._done.append(Hypothesis(self._output(seq, token), total, True))
                else:
                    found.append((total, seq, token))
        found.sort(key=lambda item: (-item[0], item[1].index, item[2]))
        return found

    def _output(self, seq: Sequence, token: int) -> list[int]:
        return [*seq.tokens[self._request.prompt_len:], token]

    def _score(self, hypothesis: Hypothesis) -> float:
        return hypothesis.total / float(len(hypothesis.tokens) ** self._params.length_penalty)

    def _decided(self, best_live: float) -> bool:
        """No live beam can still beat the width-th best hypothesis: totals only fall, lengths grow to max_tokens."""
        if len(self._done) < self._params.beam_width:
            return False
        scores = sorted(map(self._score, self._done), reverse=True)
        length = self._request.max_tokens if self._params.length_penalty > 0 else 1
        return best_live / float(length ** self._params.length_penalty) <= scores[self._params.beam_width - 1]

    def _continue(self, live: list[Sequence], keep: list[tuple[float, Sequence, int]]) -> None:
        chosen: dict[Sequence, list[tuple[float, int]]] = {}
        for total, seq, token in keep:
            chosen.setdefault(seq, []).append((total, token))
        for seq in live:
            if seq not in chosen:
                self._scheduler.drop(seq)  # first, so that its row and blocks are free for the forks
        for seq, ways in chosen.items():
            copies = [self._scheduler.fork(seq) for _ in ways[1:]]
            for beam, (total, token) in zip([seq, *copies], ways, strict=True):
                beam.tokens.append(token)
                beam.score = total
                self._scheduler.kv.publish(beam)
        self._scheduler.stats.generated_tokens += len(keep)

    def _finish(self, live: list[Sequence]) -> list[TokenEvent]:
        best = sorted(self._done, key=self._score, reverse=True)[:self._params.beam_width]
        request = self._request
        last = False
        for seq in live:
            last = self._scheduler.drop(seq)
        if not last:
            raise RuntimeError("a beam outlived its request")
        events = []
        for index, hypothesis in enumerate(best):
            reason: FinishReason = "stop" if hypothesis.ended else "length"
            counts = self._scheduler.stats.finished
            counts[reason] = counts.get(reason, 0) + 1
            events.append(TokenEvent(
                request.request_id, index, hypothesis.tokens, finish_reason=reason,
                finished=index == len(best) - 1, num_cached_tokens=request.num_cached_tokens,
                cumulative_logprob=hypothesis.total, times=request.times, num_preemptions=request.num_preemptions))
        return events
