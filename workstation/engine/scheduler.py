"""Scheduler: which tokens of which sequences a step computes. Plain integers and lists, no torch.

No phases. A sequence has known and computed tokens, and one token budget lets the second catch up with the first; chunked
prefill, prefix hits and preemption need no special case. A step serves, in this order: decodes, then chunks of prompts already
begun, then new prompts while rows, blocks and budget last. `schedule` may run while the step before is still on the device:
its sampled tokens count as known (`Sequence.pending`), their values stay there.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import replace

from workstation.architecture import KVGroup
from workstation.engine.admission import SchedulerLimits, refuse_impossible
from workstation.engine.batch import Batch, Chunk, Sample
from workstation.engine.blocks import BlockPool, root_digest
from workstation.engine.forecast import Forecast
from workstation.engine.kv import KVManager
from workstation.engine.request import EngineRequest, EngineStats, FinishReason
from workstation.engine.sequence import RequestState, Sequence
from workstation.errors import InvalidRequestError, OverloadedError


def _order(seq: Sequence) -> tuple[int, float, int]:
    return seq.order


class Scheduler:
    """Owns the queue, the running set and the block tables.

    Args:
        pool: shared by all KV groups.  groups: of the model.  seed: default sampling seeds derive from it.
    """

    def __init__(self, pool: BlockPool, groups: Items[KVGroup], limits: SchedulerLimits, *, caching: bool = True,
                 seed: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.pool = pool
        self.kv = KVManager(pool, groups, caching=caching)
        self.limits = limits
        self.clock = clock
        self.requests: dict[str, RequestState] = {}
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.stats = EngineStats(blocks_total=pool.total)
        self._forecast = Forecast(pool)
        self._left = 0  # sequences that have ended or been preempted
        self._refused: tuple[Sequence, int] | None = None  # by the forecast, when so many had left
        self._free_rows = list(range(limits.max_rows - 1, -1, -1))
        self._step = 0  # the step being planned; sequences in it carry its number
        self._count = 0
        self._seed = seed

    # ── the queue ───────────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, request: EngineRequest) -> RequestState:
        """Queue a request.

        Raises:
            ContextLengthError, InvalidRequestError: it can never fit.  OverloadedError: the queue is full.
        """
        refuse_impossible(request, self.limits, self.kv)
        if request.request_id in self.requests:
            raise InvalidRequestError(f"request id {request.request_id!r} is already in use", param="request_id")
        if len(self.waiting) >= self.limits.max_queue:
            raise OverloadedError(f"the queue is full ({self.limits.max_queue} requests)", retry_after=1)
        width = request.beam.beam_width if request.beam else request.params.n
        prompt_len = len(request.prompt_token_ids)
        room = self.limits.max_len - prompt_len
        wanted = request.beam.max_tokens if request.beam else request.params.max_tokens
        if request.pooling:
            room = wanted = 1  # in place of its token, its hidden state
        stops = set(request.params.stop_token_ids)
        ignores = request.params.ignore_eos if request.beam is None else request.params.ignore_eos or request.beam.ignore_eos
        if not ignores or request.grammar is not None:
            stops |= set(request.eos_token_ids)
        state = RequestState(
            request=request, max_tokens=room if wanted is None else min(wanted, room), stop_ids=frozenset(stops),
            needs_host_tokens=request.beam is not None or any(len(word) > 1 for word in request.params.bad_word_ids),
            root=root_digest(request.cache_salt),
        )
        state.times.arrival = request.arrival or self.clock()
        seed = request.params.seed if request.params.seed is not None else self._seed * 1_000_003 + self._count
        for index in range(1 if request.beam else width):
            order = (request.priority if self.limits.priority else 0, float(self._count), index)
            state.sequences.append(Sequence(state, index, list(request.prompt_token_ids), order, seed=seed,
                                            born=index == 0))
        self._count += 1
        state.num_live = len(state.sequences)
        self.requests[request.request_id] = state
        insort(self.waiting, state.sequences[0], key=_order)
        return state

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    # ── planning a step ─────────────────────────────────────────────────────────────────────────────────────────────

    def schedule(self) -> Batch | None:
        """Plan the next step, or None when nothing can be computed now."""
        batch = Batch()
        self._step += 1
        for seq in self._decode(batch):
            if self._has_tokens(seq):
                self._advance(seq, batch)
        self._admit(batch)
        while not batch.chunks and self.waiting and self._stuck():
            self._preempt(self.running[-1])
            self._admit(batch)
        return batch if batch.chunks else None

    def _decode(self, batch: Batch) -> list[Sequence]:
        """Plan all running sequences that are one token behind; returns those that are further behind.

        Nearly every row of nearly every step passes here, hence the short cut: an output token for which the table has room of
        its own needs nothing from the pool.
        """
        behind = []
        chunks, samples, step, budget = batch.chunks, batch.samples, self._step, self.limits.max_tokens
        short_cut = not self.kv.slides
        for seq in self.running.copy():
            request, start, pending = seq.request, seq.num_computed, seq.pending
            known = len(seq.tokens) + pending
            if known - start > 1:
                behind.append(seq)
            elif (short_cut and start >= request.prompt_len and start < known < seq.limit and known <= seq.own_until
                  and seq.row >= 0 and seq.step != step and batch.num_tokens < budget
                  and not (pending and request.needs_host_tokens)):
                seq.num_computed, seq.step, seq.pending = known, step, pending + 1
                samples.append(Sample(seq, seq.row, len(chunks), known))
                chunks.append(Chunk(seq, seq.row, start, 1, pending > 0, seq.table_updates))
                if seq.table_updates:
                    seq.table_updates = []
                batch.num_tokens += 1
                if known >= seq.publish_at:
                    self.kv.publish(seq)
            elif self._has_tokens(seq):
                self._advance(seq, batch)
        return behind

    def _stuck(self) -> bool:
        """Nothing is in flight and those who run wait for those who cannot start (beams of one request)."""
        return bool(self.running) and not any(seq.pending for seq in [*self.running, *self.waiting])

    def _has_tokens(self, seq: Sequence) -> bool:
        known = len(seq.tokens) + seq.pending
        return (seq.num_computed < known < seq.limit and seq.row >= 0 and seq.born and seq.step != self._step
                and not (seq.pending and seq.request.needs_host_tokens))

    def _advance(self, seq: Sequence, batch: Batch) -> None:
        """Put the next tokens of a running sequence into the batch, preempting younger ones for blocks if need be."""
        count = min(len(seq.tokens) + seq.pending - seq.num_computed, self.limits.max_tokens - batch.num_tokens)
        if count <= 0:
            return
        if self.kv.slides:
            self.kv.slide(seq)
        copies = self.kv.grow(seq, seq.num_computed + count)
        while copies is None:
            victim = self._victim(seq)
            if victim is None:
                return
            self._preempt(victim)
            if victim is seq:
                return
            copies = self.kv.grow(seq, seq.num_computed + count)
        self._plan(seq, count, copies, batch)

    def _victim(self, seq: Sequence) -> Sequence | None:
        """The youngest running sequence not yet in this step and not older than seq; never the oldest of all."""
        for other in reversed(self.running):
            if other is self.running[0] or other.order < seq.order:
                return None
            if other.step != self._step and other.born:
                return other
        return None

    def _preempt(self, seq: Sequence) -> None:
        """Take a sequence's blocks; it is recomputed later (its full blocks may still be in the prefix cache)."""
        self.kv.free(seq)
        self._leave(seq)
        for child in self._unborn(seq):
            self._leave(child)  # it comes back with its prompt
        seq.request.num_preemptions += 1
        self.stats.preemptions += 1
        insort(self.waiting, seq, key=_order)

    def abandon(self, batch: Batch) -> RequestState | None:
        """Take back a planned step that was not computed: its sequences start anew. Returns the newest of their requests.

        Of sequences that have ended since it was planned nothing is left to take back.
        """
        planned = [chunk.seq for chunk in batch.chunks if chunk.seq.finished is None]
        for sample in batch.samples:
            sample.seq.pending -= 1
            if sample.seq.finished is not None:
                continue
            if sample.seq is not batch.chunks[sample.chunk].seq:  # born by this step
                self.kv.free(sample.seq)
                sample.seq.born = False
        for seq in planned:
            if seq.request.request.pooling:
                seq.pending = 0
            self.kv.withdraw(seq)  # blocks are offered when they are planned
            self._preempt(seq)
        return max(planned, key=_order).request if planned else None

    def _plan(self, seq: Sequence, count: int, copies: list[tuple[int, int]], batch: Batch) -> None:
        start = seq.num_computed
        seq.num_computed += count
        seq.step = self._step
        number = len(batch.chunks)
        batch.chunks.append(Chunk(seq, seq.row, start, count, seq.pending > 0, seq.table_updates))
        if seq.table_updates:
            seq.table_updates = []
        if copies:
            batch.copies += copies
        batch.num_tokens += count
        prompt_len = seq.request.prompt_len
        if start < prompt_len:
            batch.num_prompt_tokens += min(start + count, prompt_len) - start
        self.kv.publish(seq)
        if seq.num_computed < len(seq.tokens) + seq.pending:
            return
        if seq.request.request.pooling:
            seq.pending = 1  # its answer is under way, and there is nothing left to plan
            return
        self._sample(seq, number, batch)
        if len(seq.request.sequences) > 1:
            for child in self._unborn(seq):
                self._bear(child, seq, number, batch)

    def _unborn(self, seq: Sequence) -> list[Sequence]:
        if len(seq.request.sequences) == 1:
            return []
        return [child for child in seq.request.sequences if not child.born and child.finished is None]

    def _sample(self, seq: Sequence, chunk: int, batch: Batch) -> None:
        batch.samples.append(Sample(seq, seq.row, chunk, len(seq.tokens) + seq.pending))
        seq.pending += 1

    def _bear(self, child: Sequence, parent: Sequence, chunk: int, batch: Batch) -> None:
        """A sibling starts where the prompt ends: same blocks, same logits, a sample of its own."""
        self.kv.fork(parent, child)
        child.born = True
        child.step = self._step  # its first own token is the next step's
        self._sample(child, chunk, batch)  # its table is uploaded with its first own chunk

    # ── admission ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _admit(self, batch: Batch) -> None:
        while self.waiting and batch.num_tokens < self.limits.max_tokens:
            seq = self.waiting[0]
            unborn = self._unborn(seq)
            if seq.pending or len(self._free_rows) < 1 + len(unborn):
                return
            if batch.chunks and (self.pool.available <= seq.blocked_at or self._refused == (seq, self._left)):
                return
            copies = self._claim(seq, batch)
            if copies is None:
                return
            self.waiting.pop(0)
            for member in [seq, *unborn]:
                self._enter(member)
            if seq.request.times.scheduled == 0.0:
                self._note_first_schedule(seq)
            count = min(seq.num_known - seq.num_computed, self.limits.max_tokens - batch.num_tokens)
            self._plan(seq, count, copies, batch)

    def _claim(self, seq: Sequence, batch: Batch) -> list[tuple[int, int]] | None:
        """Take a waiting sequence's prefix and its next chunk's blocks, or nothing.

        Room for its whole known length must be available, and a little more while others run, so that no prompt is begun that
        must be preempted a few steps later.
        """
        self.kv.start(seq)
        self.kv.attach_prefix(seq)
        budget = self.limits.max_tokens - batch.num_tokens
        remaining = seq.num_known - seq.num_computed
        count = min(remaining, budget)
        # A preempted sequence may have outgrown a step's budget; only then is it cut without chunked prefill.
        if count < remaining <= self.limits.max_tokens and not self.limits.chunked_prefill:
            self.kv.free(seq)
            return None
        if batch.chunks and not self.kv.slides and not self._forecast.fits(self.running, seq):
            self.kv.free(seq)
            self._refused = (seq, self._left)
            return None
        whole = self.kv.needed_whole(seq, self.limits.max_tokens)
        spare = max(len(self.running), self.pool.total // 100) if batch.chunks else 0
        copies = None
        if whole + spare <= self.pool.available:
            copies = self.kv.grow(seq, seq.num_computed + count)
        if copies is None:
            self.kv.free(seq)
            seq.blocked_at = self.pool.available
            return None
        seq.blocked_at = -1
        return copies

    def _enter(self, seq: Sequence) -> None:
        seq.row = self._free_rows.pop()
        insort(self.running, seq, key=_order)

    def _leave(self, seq: Sequence) -> None:
        self._left += 1
        self.running.remove(seq)
        self._free_rows.append(seq.row)
        seq.row = -1

    def _note_first_schedule(self, seq: Sequence) -> None:
        request = seq.request
        request.times.scheduled = self.clock()
        request.num_cached_tokens = seq.num_computed
        self.stats.prompt_tokens += request.prompt_len
        self.stats.cached_tokens += seq.num_computed
        self.stats.prefix_queries += request.prompt_len
        self.stats.prefix_hits += seq.num_computed

    # ── beams ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def fork(self, parent: Sequence) -> Sequence:
        """A copy of a beam. It shares its parent's blocks and runs on, or waits for a row when none is free."""
        parent.request.num_forks += 1
        number = parent.request.num_forks
        child = Sequence(parent.request, number, list(parent.tokens), (parent.order[0], parent.order[1], number),
                         seed=parent.seed, score=parent.score)
        self.kv.start(child)
        if parent.row >= 0 and self._free_rows:
            self.kv.fork(parent, child)
            self._enter(child)
        else:
            insort(self.waiting, child, key=_order)
        parent.request.sequences.append(child)
        parent.request.num_live += 1
        return child

    # ── ending ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def finish(self, seq: Sequence, reason: FinishReason) -> bool:
        """End a sequence and free what it holds; True when it was its request's last."""
        self.stats.finished[reason] = self.stats.finished.get(reason, 0) + 1
        if reason in ("stop", "length") and not seq.request.request.pooling:
            self._forecast.ended(len(seq.tokens) - seq.request.prompt_len)
        return self.drop(seq, reason)

    def drop(self, seq: Sequence, reason: FinishReason = "stop") -> bool:
        """`finish` without counting it (a beam that was outrun)."""
        seq.finished = reason
        if seq in self.waiting:
            self.waiting.remove(seq)
        if seq.tables:
            self.kv.free(seq)
        if seq.row >= 0:
            self._leave(seq)
        request = seq.request
        if request.request.beam is not None:
            request.sequences.remove(seq)  # a long search makes very many
        request.num_live -= 1
        if request.num_live == 0:
            request.times.finished = self.clock()
            del self.requests[request.request_id]
        return request.num_live == 0

    def live(self, request: RequestState) -> list[Sequence]:
        return [seq for seq in request.sequences if seq.finished is None]

    def snapshot(self) -> EngineStats:
        """Counters and gauges, now, in an object of their own."""
        stats = replace(self.stats, finished=dict(self.stats.finished),
                        steps_by_tokens=list(self.stats.steps_by_tokens))
        stats.time = self.clock()
        stats.running, stats.waiting = len(self.running), len(self.waiting)
        stats.blocks_free, stats.blocks_cached = self.pool.num_free, self.pool.num_cached
        stats.blocks_held, stats.evictions = self.pool.num_held, self.pool.evictions
        stats.kv_tokens_held = self.kv.tokens_held(self.running)
        return stats

    def check(self, extra: Iterable[int] = ()) -> None:
        """Prove the pool's books against every table. Raises AssertionError."""
        held = [block for request in self.requests.values() for seq in request.sequences
                for table in seq.tables for block in table if block]
        self.pool.check([*held, *extra])
        rows = [seq.row for seq in self.running]
        if sorted(rows + self._free_rows) != list(range(self.limits.max_rows)):
            raise AssertionError("rows in use and free rows do not add up")
