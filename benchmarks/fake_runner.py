"""An engine without a model: the real Scheduler and Committer, random tokens, a given step time. Runs on any machine."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any, cast

from workstation.architecture import KVGroup
from workstation.engine.admission import SchedulerLimits
from workstation.engine.batch import Batch, StepResult
from workstation.engine.blocks import BlockPool
from workstation.engine.engine import Engine
from workstation.engine.request import EngineInfo
from workstation.engine.runner import ModelRunner
from workstation.engine.scheduler import Scheduler

SPIN_SECONDS = 0.0003  # a sleep may end this much late; the rest of a step is waited for awake
FIRST_TOKEN = 5


@dataclass(slots=True)
class FakeStep:
    """A launched step and when its imagined device is done with it."""

    batch: Batch
    done: float


class FakeRunner:
    """What Engine asks of a ModelRunner. Steps follow each other on one imagined device, `step_seconds` each."""

    def __init__(self, vocabulary: int, step_seconds: float = 0.0) -> None:
        self._random = random.Random(7)
        self._vocabulary = vocabulary
        self._step_seconds = step_seconds
        self._free_at = 0.0

    def launch(self, batch: Batch) -> FakeStep:
        self._free_at = max(time.perf_counter(), self._free_at) + self._step_seconds
        return FakeStep(batch, self._free_at)

    def collect(self, step: FakeStep) -> StepResult:
        if self._step_seconds:
            time.sleep(max(0.0, step.done - time.perf_counter() - SPIN_SECONDS))
            while time.perf_counter() < step.done:
                pass
        count = len(step.batch.samples)
        tokens = self._random.choices(range(FIRST_TOKEN, self._vocabulary), k=count)
        return StepResult(tokens, [True] * count, [None] * count)


def fake_engine(*, vocabulary: int, rows: int, max_len: int, budget: int, step_seconds: float = 0.0, overlap: bool = True,
                ) -> Engine:
    """An Engine on a FakeRunner whose pool holds all rows at full length."""
    blocks = rows * (max_len // 16 + 1) + 1
    scheduler = Scheduler(BlockPool(blocks), (KVGroup("full", (0,)),), SchedulerLimits(budget, rows, max_len))
    info = EngineInfo(model="fake", max_model_len=max_len, logits_width=vocabulary, num_blocks=blocks - 1, max_num_seqs=rows,
                      max_num_batched_tokens=budget, device="cpu", dtype="none")
    runner: Any = FakeRunner(vocabulary, step_seconds)
    return Engine(scheduler, cast(ModelRunner, runner), info, overlap=overlap)
