"""An engine that is watched while it steps: what its decode steps cost, and when each request had its first token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    """One step. `ended`: time.perf_counter().  number: of steps with work so far.  tokens, prompt_tokens: it computed.

    kv_tokens, blocks: held after it.
    """

    ended: float
    number: int
    tokens: int
    prompt_tokens: int
    kv_tokens: int
    blocks: int


@dataclass(frozen=True, slots=True)
class DecodeSteps:
    """Means over steps of decode rows alone: sequences, seconds."""

    rows: float
    seconds: float


class WatchedEngine:
    """An engine that notes each step; everything else passes through."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.steps: list[Step] = []
        self.first_tokens: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self) -> Any:
        events = self._engine.step()
        ended, stats = time.perf_counter(), self._engine.stats()
        for event in events:
            self.first_tokens.setdefault(event.request_id, ended)
        self.steps.append(Step(ended, stats.steps, stats.step_tokens, stats.step_prompt_tokens, stats.kv_tokens_held,
                               stats.blocks_held))  # fmt: skip
        return events

    def clear(self) -> None:
        """Forget what was noted."""
        self.steps, self.first_tokens = [], {}


def decode_steps(steps: Sequence[Step]) -> DecodeSteps | None:
    """The steps that neither computed prompts nor followed one that did; None without such steps.

    The step before counts because a step that overlaps the next is finished within it. Time is from the end of one step to the
    end of the next, so that work between them belongs to it.
    """
    plain = [(step, step.ended - before.ended) for before, step in pairwise(steps)
             if step.number > before.number and not (step.prompt_tokens or before.prompt_tokens)]  # fmt: skip
    rows = sum(step.tokens for step, _ in plain)
    if not rows:
        return None
    return DecodeSteps(rows / len(plain), sum(seconds for _, seconds in plain) / len(plain))
