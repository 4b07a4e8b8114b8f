"""BlockPool, KVManager, Scheduler and Committer under random operations: nothing leaks, every request ends once, and
what a request produces does not depend on its company. Planted bugs prove that the machine would notice."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from scheduler_machine import GROUPS, Machine, Setup, operate, random_request, random_walk

from workstation.engine import kv as kv_module
from workstation.engine import scheduler as scheduler_module
from workstation.engine.blocks import BlockPool
from workstation.engine.commit import Committer
from workstation.engine.kv import KVManager
from workstation.engine.request import EngineRequest, SamplingParams
from workstation.engine.scheduler import Scheduler

Patch = pytest.MonkeyPatch

# ── random walks ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_fifty_thousand_random_operations_leak_nothing_and_end_every_request_once() -> None:
    seen = random_walk(seed=1, operations=50_000)
    assert seen["operations"] >= 50_000
    for what in ("requests", "refused", "preemptions", "evictions", "cached_tokens", "stop", "length", "abort", "error"):
        assert seen[what] > 100, f"the walk hardly met {what}: {seen}"


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(100, 120))
def test_two_million_random_operations_leak_nothing(seed: int) -> None:
    random_walk(seed, operations=100_000)


@pytest.mark.usefixtures("no_forecast")
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("overlap", [False, True], ids=["step by step", "overlapped"])
def test_every_kind_of_group_survives_a_crowd_in_a_small_pool(groups: str, overlap: bool) -> None:
    rng = Random(groups)
    machine = Machine(Setup(groups=groups, num_blocks=24, max_rows=6, overlap=overlap))
    prompts = [[rng.randrange(8) for _ in range(20)] for _ in range(2)]
    for number in range(1500):
        operate(machine, rng, prompts, str(number))
    machine.drain()


@pytest.mark.usefixtures("no_forecast")
def test_requests_larger_than_half_the_pool_all_end_by_taking_turns() -> None:
    machine = Machine(Setup(num_blocks=11, max_len=30, max_rows=4))
    for number in range(6):
        params = SamplingParams(max_tokens=18, ignore_eos=True)
        assert machine.add(EngineRequest(str(number), [number % 8] * 12, params))
    machine.drain()
    assert machine.scheduler.stats.preemptions > 0


# ── planted bugs ────────────────────────────────────────────────────────────────────────────────────────────────────


def _leak(patch: Patch) -> None:
    release, calls = BlockPool.release, [0]

    def forgetful(pool: BlockPool, block: int) -> None:
        calls[0] += 1
        if calls[0] % 200:
            release(pool, block)

    patch.setattr(BlockPool, "release", forgetful)


def _no_copy_on_write(patch: Patch) -> None:
    patch.setattr(KVManager, "_must_copy", lambda *_: False)


def _shared_across_salts(patch: Patch) -> None:
    patch.setattr(scheduler_module, "root_digest", lambda salt: b"same")


def _weak_digest(patch: Patch) -> None:
    patch.setattr(kv_module, "chain_digest", lambda parent, tokens: bytes([sum(tokens) % 2]))


def _slides_too_early(patch: Patch) -> None:
    slide = KVManager.slide

    def early(manager: KVManager, seq: object) -> None:
        seq.num_computed += manager.pool.block_size
        slide(manager, seq)
        seq.num_computed -= manager.pool.block_size

    patch.setattr(KVManager, "slide", early)


def _publishes_too_early(patch: Patch) -> None:
    publish = KVManager.publish

    def early(manager: KVManager, seq: object) -> None:
        held = min((len(table) for table in seq.tables), default=0) * manager.pool.block_size
        computed, seq.num_computed = seq.num_computed, max(seq.num_computed, held)
        publish(manager, seq)
        seq.num_computed = computed

    patch.setattr(KVManager, "publish", early)
    patch.setattr(KVManager, "grow", _grow_far(KVManager.grow))


def _grow_far(grow: Callable[..., object]) -> Callable[..., object]:
    """Blocks for all known tokens at the first chunk, so that publishing early finds unwritten ones."""
    def far(manager: KVManager, seq: object, num_tokens: int) -> object:
        done = grow(manager, seq, max(num_tokens, len(seq.tokens)))
        return grow(manager, seq, num_tokens) if done is None else done
    return far


def _fork_without_a_table(patch: Patch) -> None:
    fork = KVManager.fork

    def bare(manager: KVManager, parent: object, child: object) -> None:
        fork(manager, parent, child)
        child.table_updates = []

    patch.setattr(KVManager, "fork", bare)


def _forgets_the_preempted(patch: Patch) -> None:
    preempt = Scheduler._preempt

    def forgetful(scheduler: Scheduler, seq: object) -> None:
        preempt(scheduler, seq)
        scheduler.waiting.remove(seq)

    patch.setattr(Scheduler, "_preempt", forgetful)


def _frees_a_row_twice(patch: Patch) -> None:
    leave = Scheduler._leave

    def twice(scheduler: Scheduler, seq: object) -> None:
        scheduler._free_rows.append(seq.row)
        leave(scheduler, seq)

    patch.setattr(Scheduler, "_leave", twice)


def _repeats_an_event(patch: Patch) -> None:
    commit = Committer.commit
    patch.setattr(Committer, "commit", lambda *args: (events := commit(*args)) + events[-1:])


def _waits_for_blocks_it_will_not_need(patch: Patch) -> None:
    patch.setattr(KVManager, "needed_whole", lambda manager, seq, _: manager.needed(seq, seq.num_known))


PLANTED = [_leak, _no_copy_on_write, _shared_across_salts, _weak_digest, _slides_too_early, _publishes_too_early,
           _fork_without_a_table, _forgets_the_preempted, _frees_a_row_twice, _repeats_an_event,
           _waits_for_blocks_it_will_not_need]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__.strip("_"))
def test_the_machine_catches_a_planted_bug(plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        random_walk(seed=2, operations=60_000)


def test_a_leak_is_caught_even_when_nobody_runs() -> None:
    machine = Machine(Setup())
    machine.pool.allocate()
    with pytest.raises(AssertionError, match="its users count 0"):
        machine.check()


# ── the pool against a model ────────────────────────────────────────────────────────────────────────────────────────


class ModelPool:
    """The same promises in the plainest way: a list of cached blocks in the order of their release, dicts for the rest."""

    def __init__(self, total: int) -> None:
        self.free, self.cached = set(range(1, total + 1)), list[int]()
        self.refs: dict[int, int] = {}
        self.key_of: dict[int, bytes] = {}

    def take(self, block: int) -> None:
        if self.free:
            assert block in self.free, "a cached block was evicted while others were free"
            self.free.remove(block)
        else:
            assert block == self.cached.pop(0), "not the least recently used block was evicted"
            del self.key_of[block]
        self.refs[block] = 1

    def acquire(self, block: int) -> None:
        if block in self.cached:
            self.cached.remove(block)
        self.refs[block] = self.refs.get(block, 0) + 1

    def release(self, block: int) -> None:
        self.refs[block] -= 1
        if self.refs[block] == 0:
            del self.refs[block]
            if block in self.key_of:
                self.cached.append(block)
            else:
                self.free.add(block)

    def withdraw(self, block: int) -> None:
        self.key_of.pop(block, None)
        if block in self.cached:
            self.cached.remove(block)
            self.free.add(block)


@pytest.mark.parametrize("seed", range(4))
def test_the_pool_follows_a_plain_model_of_itself(seed: int) -> None:
    rng, total = Random(seed), 12
    pool, model = BlockPool(total + 1, block_size=2), ModelPool(total)
    for _ in range(5000):
        _one_pool_operation(rng, pool, model)
        assert (pool.num_free, pool.num_cached, pool.num_held) == (len(model.free), len(model.cached), len(model.refs))
        pool.check([block for block, count in model.refs.items() for _ in range(count)])


def _one_pool_operation(rng: Random, pool: BlockPool, model: ModelPool) -> None:
    operation = rng.choice(["allocate", "allocate", "release", "release", "publish", "hit", "withdraw"])
    tokens = (rng.randrange(6), rng.randrange(2))
    key = bytes(tokens)
    if operation == "allocate":
        if pool.available:
            model.take(pool.allocate())
        else:
            with pytest.raises(IndexError):
                pool.allocate()
    elif operation == "hit":
        found = pool.lookup(0, key, tokens)
        assert found == next((block for block, owner in model.key_of.items() if owner == key), None)
        assert pool.lookup(0, key, (9, 9)) is None and pool.lookup(1, key, tokens) is None
        if found is not None:
            pool.acquire(found)
            model.acquire(found)
    elif model.refs:
        block = rng.choice(sorted(model.refs))
        if operation == "release":
            pool.release(block)
            model.release(block)
        elif operation == "withdraw":
            pool.withdraw(block)
            model.withdraw(block)
        elif block not in model.key_of and key not in model.key_of.values():
            pool.publish(block, 0, key, tokens)
            model.key_of[block] = key
        else:
            pool.publish(block, 0, key, tokens)  # a second owner of a key, or a second key: nothing changes


def test_a_block_given_back_too_often_is_an_error() -> None:
    pool = BlockPool(3)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(ValueError, match="more often"):
        pool.release(block)


# ── hypothesis: short histories that shrink ─────────────────────────────────────────────────────────────────────────


class EngineMachine(RuleBasedStateMachine):
    """The same machine, driven by hypothesis so that a failure shrinks to its cause."""

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed: int) -> None:
        self.rng = Random(seed)
        self.machine = Machine(Setup.random(self.rng))
        self.prompts = [[self.rng.randrange(8) for _ in range(40)] for _ in range(2)]
        self.count = 0

    @rule(seed=st.integers(0, 2**16))
    def add(self, seed: int) -> None:
        self.count += 1
        self.machine.add(random_request(Random(seed), str(self.count), self.prompts, self.machine.setup.max_len))

    @precondition(lambda self: self.machine.scheduler.requests)
    @rule(which=st.integers(0, 7))
    def abort(self, which: int) -> None:
        live = list(self.machine.scheduler.requests)
        self.machine.abort(live[which % len(live)])

    @rule(turns=st.integers(1, 6))
    def step(self, turns: int) -> None:
        for _ in range(turns):
            self.machine.step(0.01, self.rng)

    @rule()
    def clear_cache(self) -> None:
        self.machine.clear_cache()

    def teardown(self) -> None:
        if hasattr(self, "machine"):
            self.machine.drain()


EngineMachine.TestCase.settings = hypothesis.settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(hypothesis.HealthCheck))
test_short_histories_of_every_kind = EngineMachine.TestCase
