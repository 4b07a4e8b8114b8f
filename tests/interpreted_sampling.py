"""The sampling kernels, interpreted on the CPU, in small chunks; `test_interpreted.py` runs this file in a process apart.

Everything that torch allocates and does not fill, results and scratch, starts as garbage here.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from products import some_of
from sampler_cases import PROMPT, VARIED, chi_square_tail, exact_distribution
from sampling_checks import check_draws, check_token_mask, kernels, logits_of, state_of, twin

from workstation.engine import sampling_math
from workstation.engine.request import SamplingParams
from workstation.engine.sampler import Sampler
from workstation.engine.sampling_state import SamplingState
from workstation.kernels import launch_sampling, ops, ops_sampling
from workstation.kernels.sampling import pick, pick_span, uniform

assert os.environ["TRITON_INTERPRET"] == "1" and ops.FORCE_TRITON

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
GREEDY: dict[str, Any] = {"temperature": 0.0}
PLAIN: list[dict[str, Any]] = [GREEDY, {"temperature": 0.7}, {"temperature": 1.0, "min_p": 0.1}, {"temperature": 5.0}]
FILTERED: list[dict[str, Any]] = [
    {"top_k": 7}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.9, "min_p": 0.02}, {"top_p": 0.9, "min_p": 0.3},
    {"top_p": 0.99, "temperature": 4.0}, {"top_p": 0.01},
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_chunks_of_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_sampling, "LEAST_CHUNK", 64)
    monkeypatch.setattr(launch_sampling, "TILE", 128)
    empty = torch.empty

    def garbage(*shape: Any, **options: Any) -> torch.Tensor:
        return empty(*shape, **options).fill_(torch.nan if options.get("dtype") == torch.float32 else 99)

    monkeypatch.setattr(torch, "empty", garbage)


# ── one launch: greedy and plain random rows ────────────────────────────────────────────────────────────────────────


@DTYPES
@pytest.mark.parametrize("width", [1, 31, 64, 65, 300])
def test_greedy_rows_take_the_argmax(width: int, dtype: torch.dtype) -> None:
    logits = logits_of(2, width, dtype)
    tokens, finite = kernels(state_of([GREEDY] * 2, width), logits)
    assert tokens.tolist() == logits.float().argmax(-1).tolist()
    assert finite.all()


@DTYPES
@pytest.mark.parametrize(("width", "words"), [(1, 1), (37, 2), (100, 3), (300, 12), (2500, 79)])
def test_a_mask_leaves_the_allowed_tokens_and_what_is_broken(width: int, words: int, dtype: torch.dtype) -> None:
    check_token_mask(width, words, dtype, "cpu")


@pytest.mark.parametrize("places", [[0, 299], [70, 71, 130], [63, 64], [299]])
def test_a_tie_goes_to_the_lowest_id(places: list[int]) -> None:
    logits = torch.zeros(1, 300)
    logits[0, places] = 2.0
    assert kernels(state_of([GREEDY], 300), logits)[0].tolist() == [places[0]]


@some_of(1, width=[1, 37, 128, 500], dtype=[torch.float32, torch.bfloat16, torch.float16])
def test_plain_rows_of_any_mix_draw_what_the_twin_draws(width: int, dtype: torch.dtype) -> None:
    state = state_of(PLAIN, width)
    for position in range(2):
        logits = logits_of(len(PLAIN), width, dtype, seed=position)
        tokens, finite = kernels(state, logits, position)
        assert tokens.tolist() == twin(state, logits, position)[0].tolist()
        assert finite.all()
        check_draws(state, PLAIN, logits, tokens, position)


def test_a_row_gives_the_same_token_alone_and_in_company_however_it_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = PLAIN[:3] + FILTERED[1:3]
    state, logits = state_of(rules, 130), logits_of(len(rules), 130, torch.bfloat16)
    expected, _ = kernels(state, logits)
    for programs, alone, order in ((1, 1, [4, 0, 3]), (3, 4, [3, 1]), (1000, 2, [4, 2])):
        monkeypatch.setattr(launch_sampling, "SCAN_PROGRAMS", programs)
        monkeypatch.setattr(launch_sampling, "GATHER_PROGRAMS", programs)
        assert kernels(state, logits)[0].tolist() == expected.tolist()
        assert kernels(state, logits[alone : alone + 1], rows=[alone])[0].tolist() == [expected[alone]]
        assert kernels(state, logits[order], rows=order)[0].tolist() == expected[order].tolist()


def test_rows_may_lie_apart() -> None:
    state, wide = state_of(PLAIN, 100), logits_of(len(PLAIN), 160)
    assert kernels(state, wide[:, :100])[0].tolist() == kernels(state, wide[:, :100].contiguous())[0].tolist()


def test_a_step_without_rows_gives_nothing() -> None:
    tokens, finite = kernels(state_of([GREEDY], 40), torch.empty(0, 40))
    assert tokens.shape == finite.shape == (0,)


def test_more_rows_than_before_get_more_room() -> None:
    rules = FILTERED[:4]
    state, room = state_of(rules, 100), ops_sampling.sampling_room(100, torch.device("cpu"))
    logits, rows = logits_of(len(rules), 100, torch.bfloat16), torch.arange(len(rules))
    expected = kernels(state, logits)[0]
    unfiltered = state_of(PLAIN, 100)
    for count in (1, len(rows), 2):
        tokens, _ = ops_sampling.sample(logits[:count], rows[:count], rows[:count] * 0 + 10, state.table, room, filtered=True)
        assert tokens.tolist() == expected[:count].tolist()
        wider = torch.arange(min(count + 1, len(PLAIN)))
        tokens, _ = ops_sampling.sample(logits[wider], wider, wider * 0 + 10, unfiltered.table, room, filtered=False)
        assert tokens.tolist() == twin(unfiltered, logits[wider])[0].tolist()


def test_a_wide_row_has_longer_chunks_rather_than_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_sampling, "MOST_CHUNKS", 2)
    assert ops_sampling.sampling_room(300, torch.device("cpu")).chunk == 256
    state, logits = state_of(PLAIN + FILTERED[:3], 300), logits_of(7, 300)
    assert kernels(state, logits)[0].tolist() == twin(state, logits)[0].tolist()


# ── rows nothing can be drawn from ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "all -inf"])
def test_a_broken_row_gives_token_zero_and_touches_nobody(poison: float) -> None:
    rules = [{"temperature": 1.0}, GREEDY, {"temperature": 1.0}, {"min_p": 0.1}, {"top_k": 5}, {"top_p": 0.9}, GREEDY]
    state, logits = state_of(rules, 130), logits_of(7, 130, torch.bfloat16)
    healthy, _ = kernels(state, logits)
    if poison == -math.inf:
        logits[1:6] = poison
    else:
        logits[1:6, 100] = poison
    tokens, finite = kernels(state, logits)
    assert finite.tolist() == [True, False, False, False, False, False, True]
    assert tokens.tolist() == [healthy[0], 0, 0, 0, 0, 0, healthy[6]]


@pytest.mark.parametrize(("place", "half"), [(0, 0), (63, 1), (64, 0), (199, 1)])
def test_the_only_possible_token_is_drawn(place: int, half: int) -> None:
    rules = (PLAIN + FILTERED)[half::2]
    logits = torch.full((len(rules), 200), -math.inf, dtype=torch.bfloat16)
    logits[:, place] = -5.0
    tokens, finite = kernels(state_of(rules, 200), logits)
    assert tokens.unique().tolist() == [place]
    assert finite.all()


@pytest.mark.parametrize("rules", [{"temperature": 1.0}, {"min_p": 1e-9}, {"top_k": 100}, {"top_p": 0.999}])
def test_a_token_of_weight_zero_is_never_drawn(rules: dict[str, Any]) -> None:
    logits = torch.full((1, 220), -200.0, dtype=torch.bfloat16)
    logits[0, [70, 200]] = torch.tensor([0.0, -0.5], dtype=torch.bfloat16)
    logits[0, 201:] = -math.inf
    state = state_of([rules], 220)
    assert {kernels(state, logits, position)[0].item() for position in range(5)} == {70, 200}


@triton.jit
def _pick_kernel(w, target, found, SIZE: tl.constexpr):
    values = tl.load(w + tl.arange(0, SIZE))
    index, _ = pick(values.to(tl.float64), tl.load(target), SIZE)
    span, before = pick_span(values, tl.load(target), SIZE)
    tl.store(found, index)
    tl.store(found + 1, span)
    tl.store(found + 2, tl.floor(before).to(tl.int32))


@pytest.mark.parametrize(("target", "index"), [(0.0, 3), (0.5, 3), (1.0, 40), (2.9, 40), (3.0, 40), (9.0, 40)])
def test_a_target_at_or_past_the_end_still_picks_a_weight(target: float, index: int) -> None:
    w, found = torch.zeros(64), torch.zeros(3, dtype=torch.int32)
    w[3], w[40] = 1.0, 2.0
    _pick_kernel[(1,)](w, torch.tensor([target], dtype=torch.float64), found, SIZE=64)
    assert found.tolist() == [index, index // 32, 1 if index == 40 else 0]


# ── randomness ──────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _uniform_kernel(keys, positions, out):
    at = tl.program_id(0)
    tl.store(out + at, uniform(tl.load(keys + at), tl.load(positions + at)))


def test_the_generator_gives_the_bits_of_its_twin() -> None:
    keys = torch.tensor([0, 1, -1, 1234567, 2**63 - 1, -(2**63), 987654321987654321])
    for positions in (torch.zeros(7, dtype=torch.int64), torch.arange(7), torch.full((7,), 2**62), torch.full((7,), -3)):
        out = torch.zeros(7, dtype=torch.float64)
        _uniform_kernel[(7,)](keys, positions, out)
        assert torch.equal(out, sampling_math.uniform(keys, positions))


@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("fields", "draws"), [({"temperature": 1.4}, 100), ({"min_p": 0.05}, 50), ({"top_k": 12, "top_p": 0.9}, 24)]
)
def test_draws_follow_the_exact_distribution(fields: dict[str, Any], draws: int, times: int) -> None:
    draws *= times
    logits = logits_of(1, 80, torch.bfloat16, seed=11, scale=2.5)
    tokens, _ = kernels(state_of([fields] * draws, 80), logits.expand(draws, -1).contiguous())
    p = exact_distribution(logits[0], SamplingParams(**fields))
    counts = np.bincount(tokens.numpy(), minlength=80)
    assert counts[p == 0].sum() == 0
    assert chi_square_tail(counts, p) > 1e-3


# ── top_k, top_p and min_p ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("head", "width", "dtype"),
    [
        (1, 300, torch.bfloat16), (8, 300, torch.float16), (8, 40, torch.bfloat16), (10_000, 100, torch.float32),
        *(pytest.param(*case, marks=pytest.mark.long) for case in [
            (8, 300, torch.bfloat16), (8, 300, torch.float32), (10_000, 300, torch.bfloat16)]),
    ],
)  # fmt: skip
def test_filtered_rows_draw_what_the_twin_draws_whether_or_not_their_heads_fit(
    monkeypatch: pytest.MonkeyPatch, head: int, width: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(launch_sampling, "HEAD", head)
    state = state_of(FILTERED, width)
    logits = logits_of(len(FILTERED), width, dtype, seed=width)
    tokens, finite = kernels(state, logits)
    assert tokens.tolist() == twin(state, logits)[0].tolist()
    assert finite.all()
    check_draws(state, FILTERED, logits, tokens)


@pytest.mark.parametrize(
    "logits",
    [
        logits_of(3, 100, scale=1e-4), logits_of(3, 100) + 3e7, logits_of(3, 100) - 500.0, logits_of(3, 100, scale=1e5),
        logits_of(3, 100, scale=1e37), torch.zeros(3, 100), logits_of(3, 100, scale=1e-40),
    ],
    ids=["flat", "far above zero", "below zero", "steep", "at the end of float32", "all equal", "subnormal"],
)  # fmt: skip
def test_logits_of_any_scale_are_filtered_as_the_twin_does(logits: torch.Tensor) -> None:
    rules = [{"top_k": 9}, {"top_p": 0.7}, {"top_k": 50, "top_p": 0.5, "min_p": 0.3}]
    state = state_of(rules, 100)
    assert kernels(state, logits)[0].tolist() == twin(state, logits)[0].tolist()


def seen(fields: dict[str, Any], logits: torch.Tensor, draws: int = 10) -> set[int]:
    state = state_of([fields] * draws, logits.shape[1])
    return set(kernels(state, logits.to(torch.bfloat16).expand(draws, -1).contiguous())[0].tolist())


def test_ties_with_the_last_kept_token_are_kept() -> None:
    logits = torch.full((1, 200), -9.0)
    logits[0, [5, 70, 130, 199]] = torch.tensor([2.0, 1.0, 1.0, 1.0])
    assert seen({"top_k": 2}, logits) == seen({"top_p": 0.6}, logits) == {5, 70, 130, 199}


def test_zeros_of_either_sign_tie() -> None:
    logits = torch.full((1, 70), -9.0)
    logits[0, [3, 68, 69]] = torch.tensor([1.0, 0.0, -0.0])
    assert seen({"top_k": 2}, logits) == {3, 68, 69}


def test_top_p_keeps_the_token_that_crosses_the_line() -> None:
    assert seen({"top_p": 0.6}, torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()) == {0, 1}


def test_top_p_cuts_what_top_k_left_not_the_whole_row() -> None:
    assert seen({"top_p": 0.5, "top_k": 2}, torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()) == {0}


def test_top_p_cuts_what_min_p_left_not_the_whole_row() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()  # min_p leaves 0.4 and 0.3; 0.4 is 57 % of them
    assert seen({"top_p": 0.55, "min_p": 0.6}, logits) == {0}


def test_a_top_k_beyond_the_possible_tokens_keeps_them_all() -> None:
    logits = torch.full((1, 100), -math.inf)
    logits[0, [3, 50, 99]] = 1.0
    assert seen({"top_k": 20}, logits) == {3, 50, 99}


# ── through the sampler ─────────────────────────────────────────────────────────────────────────────────────────────


def both_samplers(logits: torch.Tensor, monkeypatch: pytest.MonkeyPatch, steps: int = 2) -> list[list[Any]]:
    """What VARIED's rows give through the kernels and through torch; penalties move from step to step."""
    found: list[list[Any]] = []
    for fused in (True, False):
        monkeypatch.setattr(ops_sampling, "FORCE_TRITON", fused)
        state = SamplingState(len(VARIED), logits.shape[1], "cpu")
        for row, fields in enumerate(VARIED):
            state.set_row(row, SamplingParams(**fields), row, 0, PROMPT, [1], [2])
        state.flush()
        rows, sampler = torch.arange(len(VARIED)), Sampler(state)
        last = torch.zeros(len(VARIED) + 1, dtype=torch.int64)
        found.append([])
        for step in range(steps):
            output = sampler.sample(logits, rows.tolist(), rows, rows + 20 + step, [step] * len(rows), last)
            assert torch.equal(last[rows], output.tokens)
            found[-1] += [output.tokens.tolist(), output.finite.tolist(), output.logprobs]
    return found


@some_of(1, dtype=[torch.float32, torch.bfloat16], group=[128, 5])
def test_every_rule_gives_the_tokens_of_the_torch_path(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, group: int
) -> None:
    monkeypatch.setattr("workstation.engine.sampler.SAMPLING_ROWS", group)
    fused, torch_path = both_samplers(logits_of(len(VARIED), 96, dtype), monkeypatch)
    for mine, theirs in zip(fused, torch_path, strict=True):
        if not hasattr(mine, "places"):
            assert mine == theirs
            continue
        assert mine.places == theirs.places
        assert torch.equal(mine.top_ids, theirs.top_ids)
        assert torch.equal(mine.chosen, theirs.chosen)


def test_what_a_mask_hides_is_still_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(len(VARIED), 96)
    banned = next(row for row, fields in enumerate(VARIED) if "bad_word_ids" in fields)
    allowed = next(row for row, fields in enumerate(VARIED) if "allowed_token_ids" in fields)
    logits[banned, 7], logits[allowed, 40] = math.nan, math.inf
    fused, torch_path = both_samplers(logits, monkeypatch, steps=1)
    assert fused[:2] == torch_path[:2]
    assert [row for row, finite in enumerate(fused[1]) if not finite] == sorted([banned, allowed])
