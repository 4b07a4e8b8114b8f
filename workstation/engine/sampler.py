"""Logits + rows → tokens, on the device, without waiting for it.

The order is vLLM's: a grammar's mask, allowed ids, bans (bad words, min_tokens), bias, penalties; then greedy rows take the
argmax and the others go through temperature, min_p, top_k, top_p (over what top_k left) and one inverse-CDF draw whose uniform
depends on (seed, sample index, position) alone. So a row's sample is the same alone and in any company.

On a GPU `ops_sampling.sample` does all but the adjustments, on logits of the model's dtype: one launch, or three when a row has
top_k or top_p. On a CPU the same is done by `sampling_math`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from workstation.engine import sampling_math
from workstation.engine.masks import TokenMasks
from workstation.engine.sampling_plan import StepPlan, build_plan
from workstation.engine.sampling_state import (
    FREQUENCY,
    IN_PROMPT,
    INVERSE_TEMPERATURE,
    KEY,
    MIN_P,
    PRESENCE,
    REPETITION,
    TOP_K,
    TOP_P,
    SamplingState,
)
from workstation.kernels import ops_sampling
from workstation.memory import SAMPLING_ROWS

if TYPE_CHECKING:
    from workstation.kernels.launch_sampling import Room

NEG_INF = sampling_math.NEG_INF
PLANS_KEPT = 16  # of steps' row groups that come back unchanged


@dataclass(slots=True)
class SampleLogprobs:
    """Raw log-probabilities for those places of a step whose rows asked for them.

    Attributes:
        places: host list of M indices into the step's L samples, ascending.
        chosen: [M] float32.  ranks: [M] int64, 1-based.
        top_values: [M, k] float32, descending.  top_ids: [M, k] int64; k is the largest anyone asked for.
    """

    places: list[int]
    chosen: torch.Tensor
    top_values: torch.Tensor
    top_ids: torch.Tensor
    ranks: torch.Tensor


@dataclass(slots=True)
class SampleOutput:
    """One step's samples, on the device.

    Attributes:
        tokens: [L] int64, always valid ids (0 where not finite).
        finite: [L] bool; False where nothing can be drawn: the logits hold NaN or +inf or are all -inf, or the row's
            masks left no token. The engine ends such a request with an error.
        logprobs: None when no row of the step asked.
    """

    tokens: torch.Tensor
    finite: torch.Tensor
    logprobs: SampleLogprobs | None = None


class Sampler:
    """Samples from rows described by a SamplingState."""

    def __init__(self, state: SamplingState) -> None:
        self.state = state
        self._version = -1
        self._plans: dict[tuple[object, ...], StepPlan] = {}
        self._scratch: Room | None = None

    def prepare(self, dtype: torch.dtype) -> None:
        """Compile the kernels for logits of this dtype; without it the first steps wait for them. No-op on a CPU."""
        if self.state.device.type == "cuda":
            ops_sampling.prepare_sampling(dtype, self.state.table, self._room)
            self._prepare_masks(dtype)

    def _prepare_masks(self, dtype: torch.dtype) -> None:
        logits = torch.zeros(1, self.state.vocab_size, dtype=dtype, device=self.state.device)
        words = torch.zeros(1, -(-self.state.vocab_size // 32), dtype=torch.int32, device=self.state.device)
        ops_sampling.mask_tokens(logits, words, words[:, 0].contiguous())

    @torch.no_grad()
    def sample(
        self, logits: torch.Tensor, rows: Sequence[int], rows_t: torch.Tensor, positions_t: torch.Tensor,
        steps: Sequence[int], last_token: torch.Tensor | None = None, masks: TokenMasks | None = None,
    ) -> SampleOutput:
        """Draw one token a row. `state.flush()` must have run since the rows were last changed.

        logits: [L, V] float, left as they are but for the masks. rows: the L rows, distinct, on the host; rows_t: the same,
        [L] int64 on the device. positions_t: [L] int64, place in its sequence of the token being drawn (prompt length + k).
        steps: tokens each row's output holds so far (k), on the host; read for min_tokens only.
        last_token: [max_rows] int64 on the device; gets each row's token.
        masks: what grammars allow; log-probabilities are those of the logits before it.
        """
        if ops_sampling.samples(logits):
            plan = self._planned(rows, steps)
            if not (plan.adjusts or plan.logprob_host) or len(rows) <= SAMPLING_ROWS:
                return self._sample_fused(plan, logits, rows_t, positions_t, last_token, masks)
        elif len(rows) <= SAMPLING_ROWS or not self.state.flags[np.asarray(rows, dtype=np.int64)].any():
            return self._sample(self._planned(rows, steps), logits, rows_t, positions_t, last_token, masks)
        cuts = [slice(at, at + SAMPLING_ROWS) for at in range(0, len(rows), SAMPLING_ROWS)]
        return _joined([self.sample(logits[cut], rows[cut], rows_t[cut], positions_t[cut], steps[cut], last_token,
                                    masks.of(cut) if masks is not None else None) for cut in cuts])

    def _sample_fused(
        self, plan: StepPlan, logits: torch.Tensor, rows_t: torch.Tensor, positions_t: torch.Tensor,
        last_token: torch.Tensor | None, masks: TokenMasks | None,
    ) -> SampleOutput:
        """By our own kernels; a float32 copy is made of adjusted logits only."""
        told, x = self._masked(plan, logits, masks), logits
        if plan.adjusts:
            x = self._adjusted(logits, rows_t, plan)
            x[:, 0] += logits.amax(-1) * 0  # NaN where a mask might hide that the model is broken, else 0
        tokens, finite = ops_sampling.sample(
            x, rows_t, positions_t, self.state.table, self._room, last_token, filtered=plan.ordered_places is not None)
        return self._finished(plan, told, tokens, finite)

    def _sample(
        self, plan: StepPlan, logits: torch.Tensor, rows_t: torch.Tensor, positions_t: torch.Tensor,
        last_token: torch.Tensor | None, masks: TokenMasks | None,
    ) -> SampleOutput:
        """By torch, for rows whose temporaries fit the plan's memory."""
        told = self._masked(plan, logits, masks)
        raw = logits if logits.dtype == torch.float32 else logits.float()
        x = self._adjusted(raw, rows_t, plan)
        maximum, tokens = sampling_math.row_max(x)
        finite = torch.isfinite(maximum)
        if plan.adjusts:  # a mask may hide a NaN, but the model is broken all the same
            finite &= torch.isfinite(raw.amax(-1))
        if plan.random:
            tokens = self._drawn(x, maximum, tokens, rows_t, positions_t, plan)
        tokens = torch.where(finite, tokens, 0)
        if last_token is not None:
            last_token.index_copy_(0, rows_t, tokens)
        return self._finished(plan, told, tokens, finite)

    @staticmethod
    def _masked(plan: StepPlan, logits: torch.Tensor, masks: TokenMasks | None) -> torch.Tensor:
        """Lay the masks over the logits. Returns the logits as they were, of the rows that tell log-probabilities."""
        told = logits
        if masks is not None:
            if plan.logprob_places is not None:
                told = logits.index_select(0, plan.logprob_places)
            ops_sampling.mask_tokens(logits, masks.bits, masks.index)
        return told

    def _finished(self, plan: StepPlan, raw: torch.Tensor, tokens: torch.Tensor, finite: torch.Tensor) -> SampleOutput:
        """Count the tokens for the penalties, and add the log-probabilities that were asked for."""
        if plan.penalty_places is not None and plan.penalty_slots is not None:
            self.state.counts.add(plan.penalty_slots, tokens.index_select(0, plan.penalty_places))
        return SampleOutput(tokens, finite, self._logprobs(raw, tokens, plan))

    def _drawn(
        self, x: torch.Tensor, maximum: torch.Tensor, best: torch.Tensor, rows_t: torch.Tensor,
        positions_t: torch.Tensor, plan: StepPlan,
    ) -> torch.Tensor:
        """Greedy rows keep `best`; the others draw. Returns [L] int64."""
        table = self.state.table.index_select(0, rows_t)
        numbers = table.view(torch.float64)
        inverse = numbers[:, INVERSE_TEMPERATURE].float()
        w = sampling_math.weights(x, maximum, inverse)
        if plan.min_p:
            sampling_math.cut(w, w, numbers[:, MIN_P].float())
        if plan.ordered_places is not None:
            self._filter(x, w, maximum, inverse, table, plan)
        drawn = sampling_math.draw(w, sampling_math.uniform(table[:, KEY], positions_t))
        return torch.where(inverse > 0, drawn, best)

    def _filter(
        self, x: torch.Tensor, w: torch.Tensor, maximum: torch.Tensor, inverse: torch.Tensor, table: torch.Tensor,
        plan: StepPlan,
    ) -> None:
        """Zero the weights that top_k and top_p cut, in place, ordering only the rows that ask for it."""
        places = plan.ordered_places
        assert places is not None
        some = (x, w, maximum, inverse, table)
        if not plan.ordered_all:
            x, w, maximum, inverse, table = (item.index_select(0, places) for item in some)
        threshold = sampling_math.filter_threshold(
            x, w, maximum, inverse, table[:, TOP_K], table.view(torch.float64)[:, TOP_P],
            largest_k=plan.largest_k, any_top_p=plan.any_top_p,
        )
        sampling_math.cut(w, x, threshold)
        if not plan.ordered_all:
            some[1].index_copy_(0, places, w)

    def _adjusted(self, raw: torch.Tensor, rows_t: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        """Logits after masks, bias and penalties: `raw` itself when no row has any, else a float32 copy."""
        if not plan.adjusts:
            return raw
        x = raw.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        flat = x.view(-1)
        if plan.allowed_flat is not None and plan.allowed_places is not None:
            kept = flat.index_select(0, plan.allowed_flat)
            x.index_fill_(0, plan.allowed_places, NEG_INF)
            flat.index_copy_(0, plan.allowed_flat, kept)
        if plan.banned_flat is not None:
            flat.index_fill_(0, plan.banned_flat, NEG_INF)
        if plan.bias_flat is not None and plan.bias_values is not None:
            flat.index_add_(0, plan.bias_flat, plan.bias_values)
        if plan.penalty_places is not None and plan.penalty_slots is not None:
            self._penalise(x, rows_t, plan.penalty_places, plan.penalty_slots)
        return x

    def _penalise(self, x: torch.Tensor, rows_t: torch.Tensor, places: torch.Tensor, slots: torch.Tensor) -> None:
        numbers = self.state.table.index_select(0, rows_t.index_select(0, places)).view(torch.float64).float()
        counts = self.state.counts.table.index_select(0, slots)
        changed = sampling_math.repeat_penalties(
            x.index_select(0, places), (counts & (IN_PROMPT - 1)).float(), counts.clamp(max=1).float(),
            numbers[:, REPETITION], numbers[:, FREQUENCY], numbers[:, PRESENCE],
        )
        x.index_copy_(0, places, changed)

    def _logprobs(self, raw: torch.Tensor, tokens: torch.Tensor, plan: StepPlan) -> SampleLogprobs | None:
        if plan.logprob_places is None or plan.logprob_host is None:
            return None
        if len(plan.logprob_host) < len(raw):
            raw = raw.index_select(0, plan.logprob_places)
        if len(plan.logprob_host) < len(tokens):
            tokens = tokens.index_select(0, plan.logprob_places)
        chosen, values, ids, ranks = sampling_math.token_logprobs(raw, tokens, plan.top_logprobs)
        return SampleLogprobs(plan.logprob_host, chosen, values, ids, ranks)

    @property
    def _room(self) -> Room:
        if self._scratch is None:
            self._scratch = ops_sampling.sampling_room(self.state.vocab_size, self.state.device)
        return self._scratch

    def _planned(self, rows: Sequence[int], steps: Sequence[int]) -> StepPlan:
        state = self.state
        short: tuple[int, ...] = ()
        if state.waiting_for_min:
            short = tuple(place for place, (row, step) in enumerate(zip(rows, steps, strict=True))
                          if row in state.waiting_for_min and step < state.rules[row].min_tokens)
        key = (state.version, short, tuple(rows))
        plan = self._plans.get(key)
        if plan is None:
            if state.version != self._version or len(self._plans) >= PLANS_KEPT:
                self._plans.clear()
            self._version = state.version
            plan = self._plans[key] = build_plan(state, rows, short)
        return plan


def _joined(parts: list[SampleOutput]) -> SampleOutput:
    """The outputs of consecutive groups of rows as one."""
    asked = [part.logprobs for part in parts if part.logprobs is not None]
    logprobs = None
    if asked:
        widest = max(item.top_ids.shape[1] for item in asked)
        first, places = 0, list[int]()
        for part in parts:
            places += [first + place for place in (part.logprobs.places if part.logprobs else [])]
            first += len(part.tokens)
        logprobs = SampleLogprobs(
            places, torch.cat([item.chosen for item in asked]),
            torch.cat([_widened(item.top_values, widest) for item in asked]),
            torch.cat([_widened(item.top_ids, widest) for item in asked]), torch.cat([item.ranks for item in asked]))
    return SampleOutput(torch.cat([part.tokens for part in parts]), torch.cat([part.finite for part in parts]), logprobs)


def _widened(top: torch.Tensor, width: int) -> torch.Tensor:
    """[M, k] → [M, width]; the columns added are asked for by nobody in this group."""
    return torch.nn.functional.pad(top, (0, width - top.shape[1]))


@torch.no_grad()
def prompt_logprobs(logits: torch.Tensor, targets: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    """Log-probabilities of given next tokens: `targets[i]` under `logits[i]`.

    logits: [N, V] float; targets: [N] int64; k: 0…V. Returns chosen [N] float32, top values [N, k] float32,
    top ids [N, k] int64, ranks [N] int64. The workspace is bounded: rows go in chunks.
    """
    return sampling_math.token_logprobs(logits, targets, k)


@torch.no_grad()
def top_logprobs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most likely tokens of each row, for beam search. Returns values [N, k] float32 and ids [N, k] int64."""
    nobody = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    _, values, ids, _ = sampling_math.token_logprobs(logits, nobody, k)
    return values, ids


__all__ = ["SampleLogprobs", "SampleOutput", "Sampler", "SamplingState", "prompt_logprobs", "top_logprobs"]
