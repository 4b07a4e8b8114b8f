"""The sampler's draws against exact distributions, its random streams and its log-probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampler_cases import (
    CUTS,
    PROMPT,
    VARIED,
    WIDTH,
    build,
    chi_square_tail,
    exact_distribution,
    histogram,
    random_logits,
    sample,
)

from workstation.engine.request import SamplingParams
from workstation.engine.sampler import Sampler, SamplingState, prompt_logprobs, top_logprobs
from workstation.engine.sampling_math import draw, mix_int, row_key, signed, uniform

# ── distributions ───────────────────────────────────────────────────────────────────────────────────────────────────


def check_draws(fields: dict[str, object], draws: int) -> None:
    params = SamplingParams(**fields)
    logits = random_logits(1, 50, seed=11, scale=1.5)[0]
    p = exact_distribution(logits, params)
    counts = histogram(logits, params, draws)
    assert counts[p == 0].sum() == 0
    assert chi_square_tail(counts, p) > 1e-3


@pytest.mark.parametrize("fields", CUTS.values(), ids=CUTS.keys())
def test_draws_follow_the_exact_distribution(fields: dict[str, object]) -> None:
    check_draws(fields, 25_000)


@pytest.mark.long
@pytest.mark.parametrize("fields", CUTS.values(), ids=CUTS.keys())
def test_a_million_draws_follow_the_exact_distribution(fields: dict[str, object]) -> None:
    check_draws(fields, 1_000_000)


def test_the_chi_square_notices_a_shifted_distribution() -> None:
    logits = random_logits(1, 50, seed=11, scale=1.5)[0]
    counts = histogram(logits, SamplingParams(temperature=1.0), 25_000)
    assert chi_square_tail(counts, exact_distribution(logits, SamplingParams(temperature=1.1))) < 1e-6


@pytest.mark.parametrize("width", [1, 2, 31, 64, 65, 100, 1000, 4096, 70_001])
def test_wide_and_odd_rows_are_drawn_from_all_over(width: int) -> None:
    w = torch.ones(1, width)
    u = torch.tensor([0.0, 0.25, 0.5, 0.999999999, 1 - 2.0**-52], dtype=torch.float64)
    tokens = draw(w.expand(5, -1).contiguous(), u)
    assert tokens.tolist() == [min(int(value * width), width - 1) for value in u.tolist()]


def test_a_zero_weight_is_never_drawn_at_either_end() -> None:
    u = torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64)
    for width in (5, 64, 200, 4096, 5000):
        w = torch.zeros(2, width)
        w[:, width // 2] = 1e-30
        w[:, width // 2 + 1] = 0.3
        assert draw(w, u).tolist() == [width // 2, width // 2 + 1]


def test_top_p_keeps_the_token_that_crosses_the_line() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    seen = {sample(build({"top_p": 0.6}, width=4), logits, position=i).tokens.item() for i in range(200)}
    assert seen == {0, 1}


def test_top_p_cuts_what_top_k_left_not_the_whole_row() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()  # of the best two, 0.4 is 57 %: alone enough for 0.5
    seen = {sample(build({"top_p": 0.5, "top_k": 2}, width=4), logits, position=i).tokens.item() for i in range(200)}
    assert seen == {0}


def test_ties_with_the_last_kept_token_are_kept() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    for fields in ({"top_k": 2}, {"top_p": 0.6}):
        seen = {sample(build(fields, width=5), logits, position=i).tokens.item() for i in range(200)}
        assert seen == {0, 1, 2, 3}


def test_a_top_k_of_one_is_greedy_and_breaks_ties_by_the_lowest_id() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 3.0]])
    tokens = {sample(build({"top_k": 1, "temperature": 9.0}, width=4), logits, position=i).tokens.item()
              for i in range(50)}
    assert tokens == {1}


def test_small_and_large_top_k_cut_alike() -> None:
    logits = random_logits(1, 4096, seed=4)
    for k in (2, 40, 128, 129, 2000, 4096, 2**31 - 1):
        kept = set(logits[0].topk(min(k, 4096)).indices.tolist())
        sampler = build({"top_k": k, "temperature": 50.0}, width=4096)
        assert all(sample(sampler, logits, position=i).tokens.item() in kept for i in range(25))


# ── randomness ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_device_and_python_agree_on_the_generator() -> None:
    """The stream is splitmix64's: its published first outputs for state 1234567 come back."""
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    golden = 0x9E3779B97F4A7C15
    assert [mix_int(1234567 + golden * (i + 1)) for i in range(3)] == first
    numbers = uniform(torch.tensor([1234567] * 3), torch.arange(3)).tolist()
    assert numbers == [(value >> 12) * 2.0**-52 for value in first]


def test_uniforms_are_uniform_and_uncorrelated_over_seeds_samples_and_positions() -> None:
    keys = torch.tensor([row_key(seed, index) for seed in range(-50, 50) for index in range(10)])
    table = uniform(keys.repeat_interleave(100), torch.arange(100).repeat(1000)).view(1000, 100)
    assert chi_square_tail(np.histogram(table.flatten().numpy(), bins=64, range=(0, 1))[0], np.full(64, 1 / 64)) > 1e-3
    centred = table - 0.5
    assert abs((centred[:, 1:] * centred[:, :-1]).mean().item()) < 1.5e-3
    assert abs((centred[1:] * centred[:-1]).mean().item()) < 1.5e-3


def test_seeds_up_to_the_limits_have_streams_of_their_own() -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 2**64 + 5]
    assert len({row_key(seed, index) for seed in seeds for index in range(64)}) == len(seeds) * 64
    assert signed(2**64 - 1) == -1


def test_a_row_gives_the_same_sample_alone_and_in_shuffled_company() -> None:
    rules = [VARIED[i % len(VARIED)] for i in range(32)]
    logits = random_logits(32)
    sampler = build(*rules, prompt=PROMPT, output=[1, 9], stop_ids=(0, 2))
    expected: list[int] = []
    for row in range(32):
        alone = build(rules[row], prompt=PROMPT, output=[1, 9], stop_ids=(0, 2), seeds=[row])
        expected.append(sample(alone, logits[row : row + 1], position=50 + row, step=2).tokens.item())
    for attempt in range(5):
        order = torch.randperm(32, generator=torch.Generator().manual_seed(attempt)).tolist()
        subset = order[: 32 - 6 * attempt]
        fresh = build(*rules, prompt=PROMPT, output=[1, 9], stop_ids=(0, 2))
        found = sample(fresh, logits[subset], subset, [50 + row for row in subset], step=2)
        assert found.tokens.tolist() == [expected[row] for row in subset]
    assert sample(sampler, logits, position=[50 + row for row in range(32)], step=2).tokens.tolist() == expected


def test_a_uniform_row_beside_a_filtered_one_draws_as_alone_at_full_width() -> None:
    logits = random_logits(2, 4096, seed=9)
    alone, both = build({"temperature": 2.0}, width=4096), build({"temperature": 2.0}, {"top_p": 0.9}, width=4096)
    for position in range(200):
        company = sample(both, logits, position=position).tokens[0]
        assert sample(alone, logits[:1], position=position).tokens[0] == company


def test_positions_and_sample_indices_change_the_draw() -> None:
    state = SamplingState(2, WIDTH, "cpu")
    for index in range(2):
        state.set_row(index, SamplingParams(temperature=5.0), seed=1, sample_index=index)
    state.flush()
    logits = random_logits(1).expand(2, -1).contiguous()
    pairs = [sample(Sampler(state), logits, position=i).tokens.tolist() for i in range(40)]
    assert len({pair[0] for pair in pairs}) > 10
    assert any(a != b for a, b in pairs)


# ── log-probabilities ───────────────────────────────────────────────────────────────────────────────────────────────


def test_logprobs_are_of_the_raw_logits_whatever_the_rules() -> None:
    rules = [{"temperature": 0.3, "logprobs": 2, "logit_bias": {1: 90.0}}, {"temperature": 0.0},
             {"top_k": 3, "logprobs": 5, "presence_penalty": 2.0}]
    logits = random_logits(3)
    found = sample(build(*rules, prompt=PROMPT), logits)
    raw = logits.double().log_softmax(-1)
    assert found.logprobs is not None
    assert found.logprobs.places == [0, 2]
    for i, place in enumerate(found.logprobs.places):
        token = found.tokens[place].item()
        assert found.logprobs.chosen[i].item() == pytest.approx(raw[place, token].item(), abs=1e-5)
        assert found.logprobs.ranks[i].item() == 1 + (raw[place] > raw[place, token]).sum().item()
        top = raw[place].topk(5)
        assert found.logprobs.top_ids[i].tolist() == top.indices.tolist()
        assert torch.allclose(found.logprobs.top_values[i].double(), top.values, atol=1e-5)


def test_no_extra_logprobs_still_give_the_chosen_one() -> None:
    found = sample(build({"temperature": 0.0, "logprobs": 0}), random_logits(1))
    assert found.logprobs is not None
    assert found.logprobs.top_ids.shape == (1, 0)
    assert found.logprobs.ranks.tolist() == [1]


def test_prompt_logprobs_in_chunks_equal_those_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = random_logits(50).to(torch.bfloat16), torch.arange(50)
    whole = prompt_logprobs(logits, targets, 3)
    monkeypatch.setattr("workstation.engine.sampling_math.LOGPROB_CHUNK", 7 * WIDTH)
    for one, other in zip(whole, prompt_logprobs(logits, targets, 3), strict=True):
        assert torch.equal(one, other)
    exact = logits.double().log_softmax(-1)[torch.arange(50), targets]
    assert torch.allclose(whole[0].double(), exact, atol=1e-5)


def test_prompt_logprobs_of_nothing_are_empty() -> None:
    chosen, values, ids, ranks = prompt_logprobs(torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.int64), 2)
    assert (chosen.shape, values.shape, ids.shape, ranks.shape) == ((0,), (0, 2), (0, 2), (0,))


def test_top_logprobs_are_the_best_of_each_row() -> None:
    logits = random_logits(4)
    values, ids = top_logprobs(logits, 8)
    assert torch.allclose(values, logits.log_softmax(-1).topk(8).values, atol=1e-5)
    assert torch.equal(ids, logits.topk(8).indices)


def test_half_precision_logits_are_sampled_as_their_float32_values() -> None:
    logits = random_logits(len(VARIED)).to(torch.bfloat16)
    half = sample(build(*VARIED, prompt=PROMPT), logits)
    assert torch.equal(half.tokens, sample(build(*VARIED, prompt=PROMPT), logits.float()).tokens)


# ── on a GPU ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.gpu
def test_a_gpu_step_never_waits_and_samples_what_the_cpu_samples() -> None:
    logits = random_logits(len(VARIED), 4096, seed=3)
    states = [SamplingState(len(VARIED), 4096, device) for device in ("cpu", "cuda")]
    found = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for state in states:
            moved = logits.pin_memory().to(state.device, non_blocking=True)
            for row, fields in enumerate(VARIED):
                state.set_row(row, SamplingParams(**fields), row, 0, PROMPT, [1], [2])
            state.flush()
            rows = list(range(len(VARIED)))
            rows_t, positions = (torch.arange(len(rows), device=state.device) + shift for shift in (0, 20))
            sampler = Sampler(state)
            found.append([sampler.sample(moved, rows, rows_t, positions + i, [i] * len(rows)).tokens for i in range(5)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [step.tolist() for step in found[0]] == [step.tolist() for step in found[1]]


def test_many_rows_are_sampled_in_groups_and_no_row_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 40
    logits = random_logits(rows, 300, seed=9)
    params = [SamplingParams(temperature=0.9, top_p=0.8, logprobs=row % 4 if row % 3 else None) for row in range(rows)]
    found = []
    for size in (1000, 7):
        monkeypatch.setattr("workstation.engine.sampler.SAMPLING_ROWS", size)
        state = SamplingState(rows, 300, "cpu")
        for row in range(rows):
            state.set_row(row, params[row], seed=row)
        state.flush()
        every = torch.arange(rows)
        found.append(Sampler(state).sample(logits, list(range(rows)), every, every + 3, [0] * rows))
    one, many = found
    assert one.tokens.tolist() == many.tokens.tolist() and one.finite.tolist() == many.finite.tolist()
    assert one.logprobs is not None and many.logprobs is not None
    assert one.logprobs.places == many.logprobs.places
    assert torch.allclose(one.logprobs.chosen, many.logprobs.chosen)
    for at, place in enumerate(one.logprobs.places):
        wanted = params[place].logprobs or 0
        assert one.logprobs.top_ids[at, :wanted].tolist() == many.logprobs.top_ids[at, :wanted].tolist()
