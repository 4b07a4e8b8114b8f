"""Scheduler, committer and toy device under random operations, checked after every one."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random

from toy_device import EOS, GROUPS, VOCAB, ToyDevice, expected_beams, expected_output

from workstation.engine.admission import SchedulerLimits
from workstation.engine.batch import Batch, StepResult
from workstation.engine.blocks import BlockPool
from workstation.engine.commit import Committer
from workstation.engine.request import BeamSearchParams, EngineRequest, SamplingParams, TokenEvent
from workstation.engine.scheduler import Scheduler
from workstation.errors import InvalidRequestError, OverloadedError


@dataclass(slots=True)
class Ledger:
    """What a client of one request has seen."""

    request: EngineRequest
    outputs: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Setup:
    """One engine's shape; small enough that every limit is met all the time."""

    groups: str = "full"
    num_blocks: int = 14
    block_size: int = 3
    max_tokens: int = 7
    max_rows: int = 4
    max_len: int = 30
    chunked: bool = True
    priority: bool = False
    caching: bool = True
    overlap: bool = True

    @classmethod
    def random(cls, rng: Random) -> Setup:
        groups, size, max_len = rng.choice(["full", "full", "mixed", "sliding"]), rng.choice([2, 3, 4]), rng.randint(8, 40)
        longest = -(-max_len // size) * len(GROUPS[groups])  # blocks of one sequence that fills the window
        return cls(
            groups=groups, num_blocks=2 + int(longest * rng.uniform(0.6, 2.5)), block_size=size,
            max_tokens=rng.choice([1, 3, 7, 16, 64]), max_rows=rng.randint(1, 6), max_len=max_len,
            chunked=rng.random() < 0.8, priority=rng.random() < 0.4, caching=rng.random() < 0.8,
            overlap=rng.random() < 0.7,
        )


class Machine:
    """Scheduler, committer and toy device, driven one operation at a time and checked after each."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        groups = GROUPS[setup.groups]
        self.pool = BlockPool(setup.num_blocks, setup.block_size)
        limits = SchedulerLimits(setup.max_tokens, setup.max_rows, setup.max_len, max_queue=8,
                                 chunked_prefill=setup.chunked, priority=setup.priority)
        self.scheduler = Scheduler(self.pool, groups, limits, caching=setup.caching, clock=lambda: 1.0)
        self.committer = Committer(self.scheduler)
        self.device = ToyDevice(setup.num_blocks, setup.block_size, groups, setup.max_rows)
        self.in_flight: deque[tuple[Batch, StepResult]] = deque()
        self.ledgers: dict[str, Ledger] = {}
        self.refused = 0
        self.events = 0

    # ── operations ──────────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, request: EngineRequest) -> bool:
        """Submit a request; False when it is refused, and then nothing of it stays behind."""
        before = dict(self.scheduler.requests), len(self.scheduler.waiting)
        try:
            self.scheduler.add(request)
        except (InvalidRequestError, OverloadedError):
            assert before == (self.scheduler.requests, len(self.scheduler.waiting)), "a refused request left something"
            self.refused += 1
            return False
        self.ledgers[request.request_id] = Ledger(request)
        self.check()
        return True

    def abort(self, request_id: str) -> None:
        self._receive(self.committer.abort(request_id))
        if request_id in self.ledgers:
            assert self.ledgers[request_id].ended, "an aborted request lives on"
        self.check()

    def clear_cache(self) -> None:
        self.pool.clear_cache()
        assert self.pool.num_cached == 0
        self.check()

    def step(self, broken: float = 0.0, rng: Random | None = None) -> None:
        """One turn of the engine's loop: plan, launch, then collect the step before (or, without overlap, this one)."""
        batch = self._schedule()
        if batch is not None:
            hit = {place for place in range(len(batch.samples)) if rng is not None and rng.random() < broken}
            self.in_flight.append((batch, self.device.launch(batch, hit)))
        elif not self.in_flight:
            assert not self.scheduler.has_work, "requests wait and nothing can ever run"
        if self.in_flight and (batch is None or not self.setup.overlap or len(self.in_flight) > 1):
            self._receive(self.committer.commit(*self.in_flight.popleft()))
        self.check()

    def drain(self) -> None:
        """Run until everything has ended; then nothing may be held."""
        for _ in range(20_000):
            if not self.in_flight and not self.scheduler.has_work:
                break
            self.step()
        assert all(ledger.ended for ledger in self.ledgers.values()), "a request never ended"
        assert self.pool.num_held == 0 and self.pool.available == self.pool.total, "blocks leaked"
        assert not (self.scheduler.requests or self.scheduler.waiting or self.scheduler.running)
        assert sum(self.scheduler.stats.finished.values()) == sum(len(book.reasons) for book in self.ledgers.values())

    # ── what must hold ──────────────────────────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        """The books of blocks and rows; both queues in order; nobody lost between them."""
        self.scheduler.check()
        for queue in (self.scheduler.waiting, self.scheduler.running):
            orders = [seq.order for seq in queue]
            assert orders == sorted(orders), "a queue is out of order"
        for request in self.scheduler.requests.values():
            live = self.scheduler.live(request)
            assert len(live) == request.num_live > 0
            for seq in live:
                places = (seq in self.scheduler.waiting) + (seq in self.scheduler.running) + (not seq.born)
                assert places >= 1, "a live sequence is neither waiting nor running"

    def _schedule(self) -> Batch | None:
        oldest = self.scheduler.running[0] if self.scheduler.running else None
        ready = {seq for seq in self.scheduler.running if seq.born and seq.num_known - seq.num_computed == 1}
        batch = self.scheduler.schedule()
        if oldest is not None and not any(r.request.beam for r in self.scheduler.requests.values()):
            assert oldest.row >= 0, "the oldest running sequence was preempted"
        if batch is not None:
            counts = [chunk.count for chunk in batch.chunks]
            assert 0 < sum(counts) == batch.num_tokens <= self.setup.max_tokens, "the token budget is broken"
            decodes = [chunk.seq in ready for chunk in batch.chunks]
            assert decodes == sorted(decodes, reverse=True), "a prompt's chunk stands before a running sequence's decode"
        return batch

    def _receive(self, events: list[TokenEvent]) -> None:
        for event in events:
            self.events += 1
            ledger = self.ledgers[event.request_id]
            assert not ledger.ended, "an event after the last one"
            assert event.index not in ledger.reasons, "a sample speaks after it ended"
            ledger.outputs.setdefault(event.index, []).extend(event.token_ids)
            if event.prompt_logprobs is not None:
                given = [row and row.token_ids[0] for row in event.prompt_logprobs]
                assert given == [None, *ledger.request.prompt_token_ids[1:]], "prompt logprobs are not the prompt's"
            if event.finish_reason is not None:
                ledger.reasons[event.index] = event.finish_reason
                self._check_sample(ledger, event)
            ledger.ended = event.finished
            if event.finished:
                self._check_request(ledger)

    def _check_sample(self, ledger: Ledger, event: TokenEvent) -> None:
        request, output = ledger.request, ledger.outputs[event.index]
        assert event.num_cached_tokens < len(request.prompt_token_ids)
        if request.beam is not None:
            assert len(output) <= request.beam.max_tokens
            return
        expected, reason = expected_output(request, event.index, self.setup.max_len)
        if event.finish_reason in ("stop", "length"):
            assert (output, event.finish_reason) == (expected, reason), "the output depends on scheduling"
        else:
            assert output == expected[:len(output)]
            assert (event.error is None) == (event.finish_reason == "abort")

    def _check_request(self, ledger: Ledger) -> None:
        request = ledger.request
        if request.beam is None:
            assert sorted(ledger.reasons) == list(range(request.params.n)), "a sample never ended"
        elif not {"abort", "error"}.intersection(ledger.reasons.values()):
            found = [ledger.outputs[index] for index in range(len(ledger.reasons))]
            assert found == expected_beams(request, self.setup.max_len), "the beams depend on scheduling"


def random_request(rng: Random, name: str, prompts: list[list[int]], max_len: int) -> EngineRequest:
    """Few distinct beginnings, so that requests share prefixes; sometimes one that can never fit."""
    prompt = rng.choice(prompts)[:rng.randint(1, max_len)]
    if rng.random() < 0.3:
        prompt = [*prompt, *(rng.randrange(VOCAB) for _ in range(rng.randint(1, 4)))]
    params = SamplingParams(
        n=rng.choice([1, 1, 1, 1, 2, 3]), max_tokens=rng.choice([None, 1, 2, 5, 9, 20]), ignore_eos=rng.random() < 0.4,
        stop_token_ids=[3] if rng.random() < 0.2 else [], prompt_logprobs=0 if rng.random() < 0.1 else None,
        bad_word_ids=[[1, 2]] if rng.random() < 0.1 else [], skip_reading_prefix_cache=rng.random() < 0.1,
    )
    params.min_tokens = rng.choice([0, 0, 0, 1, 4]) if params.max_tokens is None else 0
    beam = None
    if rng.random() < 0.08:
        beam = BeamSearchParams(rng.randint(1, 3), rng.randint(1, 8), length_penalty=rng.choice([0.5, 1.0, 2.0]),
                                ignore_eos=params.ignore_eos)
    return EngineRequest(name, prompt, params, [EOS], beam=beam, priority=rng.randint(0, 2),
                         cache_salt=rng.choice(["", "", "", "tenant"]))


def random_walk(seed: int, operations: int, per_machine: int = 400) -> dict[str, int]:
    """Random operations over random machines. Returns what happened, so that a test can tell that much did."""
    rng = Random(seed)
    seen = dict.fromkeys(["operations", "requests", "refused", "preemptions", "evictions", "cached_tokens",
                          "stop", "length", "abort", "error"], 0)
    while seen["operations"] < operations:
        machine = Machine(Setup.random(rng))
        prompts = [[rng.randrange(VOCAB) for _ in range(48)] for _ in range(3)]
        for number in range(per_machine):
            operate(machine, rng, prompts, f"{seed}-{number}")
        machine.drain()
        seen["operations"] += per_machine
        _tally(seen, machine)
    return seen


def operate(machine: Machine, rng: Random, prompts: list[list[int]], name: str) -> None:
    choice = rng.random()
    if choice < 0.18:
        machine.add(random_request(rng, name, prompts, machine.setup.max_len))
    elif choice < 0.21:
        machine.abort(rng.choice([*machine.ledgers, "unknown"]) if rng.random() < 0.3
                      else rng.choice([*machine.scheduler.requests, "unknown"]))
    elif choice < 0.213:
        machine.clear_cache()
    else:
        machine.step(0.003, rng)


def _tally(seen: dict[str, int], machine: Machine) -> None:
    stats = machine.scheduler.snapshot()
    seen["requests"] += len(machine.ledgers)
    seen["refused"] += machine.refused
    seen["preemptions"] += stats.preemptions
    seen["evictions"] += stats.evictions
    seen["cached_tokens"] += stats.cached_tokens
    for reason, count in stats.finished.items():
        seen[reason] += count
