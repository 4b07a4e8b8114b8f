"""An oracle in float64 for single draws, and ways to run the sampling kernels and their twin on the same rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from workstation.engine.request import SamplingParams
from workstation.engine.sampler import Sampler
from workstation.engine.sampling_math import uniform
from workstation.engine.sampling_state import KEY, SamplingState
from workstation.kernels import ops_sampling

TOLERANCE = 1e-4  # of a row's weight: boundaries may move by rounding, a nucleus by a token of next to no weight

Rules = list[dict[str, Any]]


def state_of(rules: Rules, width: int, device: str = "cpu") -> SamplingState:
    """Row i follows rules[i], with the seed i."""
    state = SamplingState(len(rules), width, device)
    for row, fields in enumerate(rules):
        state.set_row(row, SamplingParams(**fields), seed=row)
    state.flush()
    return state


def logits_of(count: int, width: int, dtype: torch.dtype = torch.float32, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return (torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def kernels(
    state: SamplingState, logits: torch.Tensor, position: int = 10, rows: list[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, finite) by `ops_sampling.sample`, which must leave the tokens, and nothing else, in the table of last tokens."""
    rows = list(range(len(logits))) if rows is None else rows
    room = ops_sampling.sampling_room(logits.shape[1], logits.device)
    rows_t = torch.tensor(rows, dtype=torch.int64, device=logits.device)
    last = torch.full((state.max_rows + 1,), -5, device=logits.device)
    filtered = any(state.flags[row] & 2 for row in rows)
    before = logits.clone()
    positions = torch.full_like(rows_t, position)
    tokens, finite = ops_sampling.sample(logits, rows_t, positions, state.table, room, last, filtered=filtered)
    assert torch.equal(last[rows_t], tokens)
    assert (last == -5).sum() == state.max_rows + 1 - len(rows)
    assert not len(rows) or room.arrivals.eq(0).all()
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    return tokens, finite


def twin(state: SamplingState, logits: torch.Tensor, position: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, finite) by torch."""
    rows = list(range(len(logits)))
    rows_t = torch.arange(len(rows), device=logits.device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops_sampling, "samples", lambda logits: False)
        found = Sampler(state).sample(logits, rows, rows_t, torch.full_like(rows_t, position), [0] * len(rows))
    return found.tokens, found.finite


def check_draws(state: SamplingState, rules: Rules, logits: torch.Tensor, tokens: torch.Tensor, position: int = 10) -> None:
    """Every token is in the set its row keeps, and its row's uniform number lies in its share of the weight."""
    every = torch.arange(len(rules), device=logits.device)
    numbers = uniform(state.table[every, KEY], torch.full_like(every, position))
    for place, fields in enumerate(rules):
        params = SamplingParams(**fields)
        token = int(tokens[place])
        if params.greedy:
            assert token == int(logits[place].float().cpu().argmax())
        else:
            check_draw(logits[place].double(), params, token, float(numbers[place]))


def check_draw(x: torch.Tensor, params: SamplingParams, token: int, u: float) -> None:
    w = ((x - x.max()) / params.temperature).exp()
    assert w[token] >= params.min_p * (1 - TOLERANCE)
    w[w < params.min_p] = 0
    if params.top_k:
        assert (x > x[token]).sum() < params.top_k
        w[x < x.topk(params.top_k).values[-1]] = 0
    left = w.sum()
    if params.top_p < 1:
        assert w[x > x[token]].sum() < (params.top_p + TOLERANCE) * left
        order = x.argsort(descending=True)
        crossing = torch.searchsorted(w[order].cumsum(0), params.top_p * left)
        w[x < x[order[min(int(crossing), len(x) - 1)]]] = 0
    share = w.cumsum(0) / w.sum()
    assert share[token] >= u - TOLERANCE
    assert token == 0 or share[token - 1] <= u + TOLERANCE


def check_token_mask(width: int, words: int, dtype: torch.dtype, device: str) -> None:
    """Rows 0 and 2 have masks (the second first), row 1 has none; NaN and +inf stay; rows lie apart."""
    gen = torch.Generator().manual_seed(width)
    wide = torch.randn(3, width + 5, generator=gen).to(dtype)
    logits = wide[:, :width]
    logits[0, width // 2], logits[2, width - 1] = float("nan"), float("inf")
    bits = torch.randint(-2**31, 2**31, (2, words), generator=gen, dtype=torch.int64).to(torch.int32)
    index = torch.tensor([1, -1, 0], dtype=torch.int32)
    expected = logits.clone()
    for row, mask in ((0, 1), (2, 0)):
        for token in range(width):
            allowed = token < 32 * words and int(bits[mask, token // 32]) >> (token % 32) & 1
            if not allowed and not expected[row, token].isnan() and not expected[row, token].isposinf():
                expected[row, token] = float("-inf")
    given = wide.to(device)
    ops_sampling.mask_tokens(given[:, :width], bits.to(device), index.to(device))
    torch.testing.assert_close(given[:, :width].cpu(), expected, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(given[:, width:].cpu(), wide[:, width:], rtol=0, atol=0)
