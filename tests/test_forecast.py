"""Admission looks ahead: what runs, and what is begun beside it, shall find room until it ends."""

from __future__ import annotations

import pytest

from workstation.architecture import KVGroup
from workstation.engine.admission import SchedulerLimits
from workstation.engine.batch import StepResult
from workstation.engine.blocks import BlockPool
from workstation.engine.commit import Committer
from workstation.engine.request import EngineRequest, SamplingParams
from workstation.engine.scheduler import Scheduler

SIZE = 16


def scheduler(blocks: int, rows: int = 64) -> Scheduler:
    limits = SchedulerLimits(max_tokens=4096, max_rows=rows, max_len=4096)
    return Scheduler(BlockPool(blocks + 1, SIZE), (KVGroup("full", (0,)),), limits, caching=False)


def add(scheduler: Scheduler, name: str, prompt: int, outputs: int, *, ignore_eos: bool = True) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=ignore_eos)
    scheduler.add(EngineRequest(name, [7] * prompt, params, eos_token_ids=[2]))


def step(scheduler: Scheduler, committer: Committer, token: int = 9) -> int:
    """→ sequences that ran."""
    batch = scheduler.schedule()
    assert batch is not None
    committer.commit(batch, StepResult([token] * len(batch.samples), [True] * len(batch.samples), [None] * len(batch.samples)))
    return len(batch.chunks)


def drain(scheduler: Scheduler) -> int:
    """→ the most sequences that ran at once."""
    committer, most = Committer(scheduler), 0
    while scheduler.has_work:
        most = max(most, step(scheduler, committer))
        scheduler.check()
    return most


@pytest.mark.parametrize("blocks", [100, 137, 400])
def test_requests_of_known_length_are_never_preempted(blocks: int) -> None:
    made = scheduler(blocks)
    for number in range(30):
        add(made, str(number), 60 + 7 * number, 40 + 11 * (number % 7))
    drain(made)
    assert made.stats.preemptions == 0


def test_a_pool_with_room_for_all_at_their_ends_runs_all_at_once() -> None:
    made = scheduler(blocks=10 * 9)
    for number in range(10):
        add(made, str(number), 64, 64)  # 8 blocks each at its end
    assert drain(made) == 10


def test_those_who_end_soon_make_room_for_those_who_come() -> None:
    """7 + 4 blocks now, and never more than 13 at once, although the lengths add up to 15."""
    made = scheduler(blocks=14)
    committer = Committer(made)
    add(made, "long", 64, 128)  # 12 blocks at its end
    step(made, committer)
    add(made, "short", 16, 2)
    assert step(made, committer) == 2
    drain(made)
    assert made.stats.preemptions == 0


def test_the_first_in_line_starts_when_nothing_else_runs_however_long_it_may_become() -> None:
    made = scheduler(blocks=20)
    add(made, "a", 200, 100)
    add(made, "b", 200, 100)
    assert drain(made) == 1


def test_outputs_that_end_by_themselves_are_expected_to_be_as_long_as_those_before() -> None:
    """Limits of 900 tokens that nobody reaches do not keep the pool empty, once it has been seen."""
    made = scheduler(blocks=64)
    committer = Committer(made)
    for number in range(200):
        add(made, str(number), 32, 900, ignore_eos=False)
    most = []
    while made.has_work:
        batch = made.schedule()
        assert batch is not None
        ends = [2 if sample.position - 32 >= 20 else 9 for sample in batch.samples]
        committer.commit(batch, StepResult(ends, [True] * len(ends), [None] * len(ends)))
        most.append(len(batch.chunks))
    assert max(most[:10]) <= 4  # 18 blocks each, by the first guess
    assert max(most) >= 12  # 4 blocks each, as they are


def test_a_refused_request_is_asked_again_when_somebody_has_left() -> None:
    made = scheduler(blocks=20)
    committer = Committer(made)
    add(made, "first", 64, 100)
    add(made, "second", 64, 230)
    ran = [step(made, committer) for _ in range(99)]
    assert set(ran) == {1}
    step(made, committer)  # the first one's last
    assert step(made, committer) == 1 and made.running[0].request.request_id == "second"
