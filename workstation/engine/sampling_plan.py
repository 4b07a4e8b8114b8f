"""What the rows of one step need, compiled from host rules into index tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from workstation.engine.sampling_state import RowFlag, SamplingState, upload


@dataclass(slots=True)
class StepPlan:
    """What the rows of a step need, as index tensors; kept while the same rows come back unchanged.

    `*_places` are [·] int64 indices into the step's L samples, `*_flat` are place * V + token. None: no row needs it.
    """

    random: bool = False
    min_p: bool = False
    ordered_places: torch.Tensor | None = None
    ordered_all: bool = False
    largest_k: int = 0
    any_top_p: bool = False
    penalty_places: torch.Tensor | None = None
    penalty_slots: torch.Tensor | None = None
    allowed_places: torch.Tensor | None = None
    allowed_flat: torch.Tensor | None = None
    banned_flat: torch.Tensor | None = None
    bias_flat: torch.Tensor | None = None
    bias_values: torch.Tensor | None = None
    logprob_host: list[int] | None = None
    logprob_places: torch.Tensor | None = None
    top_logprobs: int = 0

    @property
    def adjusts(self) -> bool:
        found = (self.penalty_places, self.allowed_flat, self.banned_flat, self.bias_flat)
        return any(item is not None for item in found)


def build_plan(state: SamplingState, rows: Sequence[int], short: Sequence[int]) -> StepPlan:
    """Compile the rows' host rules. short: places whose output has not reached min_tokens."""
    flags = state.flags[np.asarray(rows, dtype=np.int64)]
    some = RowFlag(int(np.bitwise_or.reduce(flags))) if len(flags) else RowFlag.NONE

    def places(flag: RowFlag) -> list[int]:
        found: list[int] = np.flatnonzero(flags & int(flag)).tolist()
        return found

    plan = StepPlan(random=bool(some & RowFlag.RANDOM), min_p=bool(some & RowFlag.MIN_P),
                    any_top_p=bool(some & RowFlag.TOP_P))
    if some & RowFlag.ORDERED:
        _plan_ordered(plan, state, rows, places(RowFlag.ORDERED))
    if some & RowFlag.PENALTIES:
        penalised = places(RowFlag.PENALTIES)
        plan.penalty_places = _index(penalised, state)
        plan.penalty_slots = _index([state.counts.slot(rows[place]) for place in penalised], state)
    if some & RowFlag.ALLOWED:
        _plan_allowed(plan, state, rows, places(RowFlag.ALLOWED))
    if some & RowFlag.SPARSE or short:
        _plan_sparse(plan, state, rows, places(RowFlag.SPARSE), short)
    if some & RowFlag.LOGPROBS:
        plan.logprob_host = places(RowFlag.LOGPROBS)
        plan.logprob_places = _index(plan.logprob_host, state)
        plan.top_logprobs = max(state.rules[rows[place]].logprobs or 0 for place in plan.logprob_host)
    return plan


def _index(values: Sequence[int], state: SamplingState) -> torch.Tensor:
    return upload(np.asarray(values, dtype=np.int64), state.device)


def _plan_ordered(plan: StepPlan, state: SamplingState, rows: Sequence[int], places: list[int]) -> None:
    top_k = [state.rules[rows[place]].top_k for place in places]
    plan.largest_k = max(top_k) if min(top_k) > 0 else 0
    plan.ordered_places = _index(places, state)
    plan.ordered_all = len(places) == len(rows)


def _plan_allowed(plan: StepPlan, state: SamplingState, rows: Sequence[int], places: list[int]) -> None:
    plan.allowed_places = _index(places, state)
    plan.allowed_flat = _index([place * state.vocab_size + token for place in places
                                for token in state.rules[rows[place]].allowed or ()], state)


def _plan_sparse(
    plan: StepPlan, state: SamplingState, rows: Sequence[int], places: list[int], short: Sequence[int],
) -> None:
    width = state.vocab_size
    banned: list[int] = []
    bias: dict[int, float] = {}
    early = set(short)
    for place in sorted(early.union(places)):
        rules = state.rules[rows[place]]
        tokens = rules.banned | rules.step_banned | (rules.until_min if place in early else frozenset())
        banned.extend(place * width + token for token in tokens)
        bias.update({place * width + token: value for token, value in rules.bias.items()})
    if banned:
        plan.banned_flat = _index(banned, state)
    if bias:
        plan.bias_flat = _index(list(bias), state)
        plan.bias_values = upload(np.fromiter(bias.values(), dtype=np.float32), state.device)
