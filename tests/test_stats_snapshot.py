"""The engine's picture: block states, request rows, single blocks, in step with the scheduler's own books."""

from __future__ import annotations

import base64
from random import Random

import pytest
from scheduler_machine import Machine, Setup

from workstation.architecture import KVGroup
from workstation.engine.admission import SchedulerLimits
from workstation.engine.blocks import CACHED, FREE, OWNED, SHARED, BlockPool
from workstation.engine.request import EngineRequest, SamplingParams
from workstation.engine.scheduler import Scheduler
from workstation.engine.snapshot import MAX_ROWS, Look, take_picture
from workstation.server.stats import fold

PROMPT = list(range(10))


def scheduler(num_blocks: int = 20, rows: int = 4) -> Scheduler:
    pool = BlockPool(num_blocks, 4)
    return Scheduler(pool, (KVGroup("full", (0,)),), SchedulerLimits(64, rows, 64), clock=lambda: 5.0)


def step(planner: Scheduler) -> None:
    batch = planner.schedule()
    assert batch is not None
    for sample in batch.samples:
        sample.seq.pending -= 1
        sample.seq.tokens.append(7)


def ask(planner: Scheduler, name: str, prompt: list[int] | None = None, **params: object) -> None:
    given = SamplingParams(**{"max_tokens": 8, **params})  # type: ignore[arg-type]
    planner.add(EngineRequest(name, prompt or PROMPT, given, label="editor"))


def test_a_fresh_pool_is_all_free() -> None:
    assert take_picture(scheduler(), Look()).states == bytes([FREE] * 19)


def test_a_running_request_owns_its_blocks_and_the_second_of_its_kind_shares_the_full_ones() -> None:
    planner = scheduler()
    ask(planner, "a")
    step(planner)
    assert take_picture(planner, Look()).states.count(OWNED) == 3
    ask(planner, "b")
    step(planner)
    states = take_picture(planner, Look()).states
    assert (states.count(SHARED), states.count(OWNED)) == (2, 2)


def test_blocks_of_a_finished_request_turn_cached_and_free() -> None:
    planner = scheduler()
    ask(planner, "a")
    step(planner)
    planner.finish(planner.running[0], "stop")
    states = take_picture(planner, Look()).states
    assert (states.count(CACHED), states.count(FREE)) == (2, 17)


def test_a_row_says_who_asked_and_how_far_it_is() -> None:
    planner = scheduler()
    ask(planner, "a")
    step(planner)
    (row,) = take_picture(planner, Look()).rows
    assert (row.id, row.label, row.state, row.prompt, row.computed, row.generated, row.blocks) == (
        "a", "editor", "decode", 10, 10, 1, 3)


def test_a_request_in_the_queue_waits_and_one_thrown_out_is_preempted() -> None:
    planner = scheduler(rows=1)
    ask(planner, "a")
    ask(planner, "b")
    step(planner)
    assert [row.state for row in take_picture(planner, Look()).rows] == ["decode", "waiting"]
    planner._preempt(planner.running[0])
    picture = take_picture(planner, Look())
    assert [row.state for row in picture.rows] == ["preempted", "waiting"]
    assert picture.preempted == 1


def test_a_long_prompt_in_chunks_is_in_prefill() -> None:
    pool = BlockPool(40, 4)
    planner = Scheduler(pool, (KVGroup("full", (0,)),), SchedulerLimits(8, 4, 100))
    ask(planner, "a", list(range(30)))
    planner.schedule()
    (row,) = take_picture(planner, Look()).rows
    assert (row.state, row.computed, row.generated) == ("prefill", 8, 0)


def test_details_hold_the_block_table_and_an_unknown_request_has_none() -> None:
    planner = scheduler()
    ask(planner, "a")
    step(planner)
    detail = take_picture(planner, Look(request_id="a")).detail
    assert detail is not None and detail.samples[0].tables == [[1, 2, 3]] and detail.max_tokens == 8
    assert take_picture(planner, Look(request_id="zz")).detail is None


def test_a_single_block_names_its_owners_and_their_tokens() -> None:
    planner = scheduler()
    ask(planner, "a")
    step(planner)
    ask(planner, "b")
    step(planner)
    first, *_ = take_picture(planner, Look(first=1, last=3)).blocks
    assert (first.refs, first.published, first.state) == (2, True, SHARED)
    assert {(owner.request_id, owner.begin, owner.end) for owner in first.owners} == {("a", 0, 4), ("b", 0, 4)}


def test_blocks_beyond_the_pool_are_left_out() -> None:
    assert [row.block for row in take_picture(scheduler(), Look(first=18, last=400)).blocks] == [18, 19]


def test_a_long_queue_is_cut_and_the_running_stay() -> None:
    planner = scheduler(rows=1)
    for number in range(MAX_ROWS + 20):
        ask(planner, f"q{number}")
    step(planner)
    picture = take_picture(planner, Look())
    assert picture.requests == MAX_ROWS + 20 and len(picture.rows) == MAX_ROWS
    assert picture.rows[0].state == "decode"


@pytest.mark.parametrize("seed", range(6))
def test_pictures_agree_with_the_books_under_random_operations(seed: int) -> None:
    rng = Random(seed)
    machine = Machine(Setup.random(rng))
    for turn in range(150):
        if rng.random() < 0.4:
            machine.add(EngineRequest(str(turn), [rng.randrange(3) + 1 for _ in range(rng.randint(1, 12))],
                                      SamplingParams(n=rng.randint(1, 2), max_tokens=rng.randint(1, 6))))
        if rng.random() < 0.1:
            machine.abort(str(rng.randrange(turn + 1)))
        machine.step()
        picture, pool = take_picture(machine.scheduler, Look()), machine.pool
        assert picture.states.count(FREE) == pool.num_free and picture.states.count(CACHED) == pool.num_cached
        assert picture.stats.kv_tokens_held == slots_in_use(machine.scheduler)
        assert {row.id for row in picture.rows} == set(machine.scheduler.requests)


def slots_in_use(planner: Scheduler) -> int:
    """Counted one block at a time."""
    size, used = planner.pool.block_size, dict[int, int]()
    for seq in planner.running:
        for table in seq.tables:
            for entry, block in enumerate(table):
                if block:
                    used.setdefault(block, min(size, max(0, seq.num_computed - entry * size)))
    return sum(used.values())


def test_heat_ranks_cached_blocks_by_their_turn_to_be_evicted() -> None:
    pool = BlockPool(9)
    taken = [pool.allocate() for _ in range(4)]
    for number, block in enumerate(taken[:3]):
        pool.publish(block, 0, bytes([number]), (number,))
    for block in (taken[1], taken[0], taken[2]):
        pool.release(block)
    heat = pool.heat_bytes()
    assert len(heat) == 8 and heat[taken[3] - 1] == 0
    assert heat[taken[1] - 1] == 255 > heat[taken[0] - 1] > heat[taken[2] - 1] > 0


def test_a_cell_is_as_warm_as_its_next_block_to_go() -> None:
    folded = fold(bytes([3] * 6), 2, bytes([1, 200, 3, 0, 0, 9]))
    assert base64.b64decode(folded.heat or "") == bytes([200, 9]) and fold(bytes(6), 2).heat is None


def test_a_blocks_age_starts_when_it_is_taken_and_again_when_it_is_let_go() -> None:
    pool = BlockPool(3)
    block = pool.allocate()
    taken = pool.since(block)
    pool.publish(block, 0, b"d", (1,))
    pool.release(block)
    assert 0.0 < taken <= pool.since(block)
