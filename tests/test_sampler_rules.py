"""Penalties, masks and bias against naive oracles; broken and hostile rows; rows that come, fork and go."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sampler_cases import PROMPT, VARIED, WIDTH, build, random_logits, sample

from workstation.engine.request import SamplingParams
from workstation.engine.sampler import Sampler, SamplingState
from workstation.engine.sampling_state import banned_next, check_candidates, needs_history
from workstation.errors import InvalidRequestError

# ── adjustments ─────────────────────────────────────────────────────────────────────────────────────────────────────


def naive_adjusted(logits: list[float], params: SamplingParams, prompt: list[int], output: list[int],
                   banned: set[int]) -> list[float]:
    """vLLM's order, one token at a time."""
    x = list(logits)
    for token in range(len(x)):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            x[token] = -math.inf
        if token in banned or [token] in params.bad_word_ids:
            x[token] = -math.inf
        x[token] += params.logit_bias.get(token, 0.0)
        if token in prompt or token in output:
            x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        x[token] -= params.frequency_penalty * output.count(token)
        x[token] -= params.presence_penalty * (token in output)
    return x


@pytest.mark.parametrize("seed", range(8))
def test_greedy_steps_follow_a_naive_oracle_of_all_adjustments(seed: int) -> None:
    """Thirty greedy tokens on one fixed row of logits: every choice moves the penalties of the next."""
    generator = np.random.default_rng(seed)
    params = SamplingParams(
        temperature=0.0, presence_penalty=float(generator.uniform(-2, 2)),
        frequency_penalty=float(generator.uniform(-2, 2)), repetition_penalty=float(generator.uniform(0.5, 2)),
        logit_bias={int(t): float(generator.uniform(-4, 4)) for t in generator.integers(0, WIDTH, 9)},
        bad_word_ids=[[int(generator.integers(0, WIDTH))]], min_tokens=10,
        allowed_token_ids=[int(t) for t in generator.integers(0, WIDTH, 60)] if seed % 2 else None)
    logits, stop = random_logits(1, seed=seed), (int(generator.integers(0, WIDTH)), 5)
    state = SamplingState(4, WIDTH, "cpu")
    state.set_row(2, params, 0, 0, PROMPT, [], stop)
    state.flush()
    sampler, output = Sampler(state), []
    for step in range(30):
        x = naive_adjusted(logits[0].tolist(), params, PROMPT, output, set(stop) if step < 10 else set())
        token = sample(sampler, logits, [2], len(PROMPT) + step, step).tokens.item()
        assert x[token] == pytest.approx(max(x), abs=1e-4)
        output.append(token)


def test_counts_given_at_the_start_equal_counts_gathered_on_the_way() -> None:
    """A preempted sequence comes back with its output as a list."""
    fields = {"temperature": 0.8, "frequency_penalty": 0.7, "repetition_penalty": 1.3}
    logits = random_logits(1)
    stayed = build(fields, prompt=PROMPT)
    output = [sample(stayed, logits, position=len(PROMPT) + i).tokens.item() for i in range(12)]
    returned = build(fields, prompt=PROMPT, output=output)
    for i in range(12, 30):
        token = sample(stayed, logits, position=len(PROMPT) + i).tokens.item()
        assert token == sample(returned, logits, position=len(PROMPT) + i).tokens.item()


def test_logits_handed_in_are_left_as_they_were() -> None:
    logits = random_logits(len(VARIED))
    before = logits.clone()
    sample(build(*VARIED, prompt=PROMPT, stop_ids=(1,)), logits)
    assert torch.equal(logits, before)


def test_min_tokens_holds_back_stop_ids_until_it_is_reached() -> None:
    logits = torch.zeros(1, WIDTH)
    logits[0, 7], logits[0, 8], logits[0, 9] = 9.0, 8.0, 7.0
    sampler = build({"temperature": 0.0, "min_tokens": 3}, stop_ids=(7, 8, WIDTH + 5, -1))
    assert [sample(sampler, logits, step=step).tokens.item() for step in range(5)] == [9, 9, 9, 7, 7]


def test_a_bias_is_clamped_to_a_hundred() -> None:
    params = SamplingParams(temperature=0.0)
    params.logit_bias = {1: 1e30, 2: -1e30}  # past validation, as only a bug could put it
    state = SamplingState(1, 4, "cpu")
    state.set_row(0, params, 0)
    state.flush()
    logits = torch.tensor([[101.0, 0.0, 201.5, 0.0], [99.0, 0.0, 0.0, 0.0]])
    assert sample(Sampler(state), logits[:1]).tokens.item() == 2  # 201.5 - 100 beats 101 and 0 + 100
    assert sample(Sampler(state), logits[1:]).tokens.item() == 1


def test_bad_words_and_allow_lists_leave_no_mass_outside() -> None:
    logits = random_logits(1)
    sampler = build({"temperature": 9.0, "allowed_token_ids": [3, 4, 4, 95], "bad_word_ids": [[4], [1, 2]]})
    assert {sample(sampler, logits, position=i).tokens.item() for i in range(300)} == {3, 95}


def test_bans_of_a_step_last_until_the_next_call() -> None:
    logits = torch.zeros(1, WIDTH)
    logits[0, 7], logits[0, 8] = 9.0, 8.0
    sampler = build({"temperature": 0.0})
    found = []
    for banned in ([], [7], [7, 8, 0], []):
        sampler.state.set_banned(0, banned)
        found.append(sample(sampler, logits).tokens.item())
    assert found == [7, 8, 1, 7]


def test_a_long_bad_word_bans_its_last_token_only_after_the_others() -> None:
    words = [[1, 2, 3], [2, 9], [5]]
    assert banned_next(words, [7, 1, 2]) == [3, 9]
    assert banned_next(words, [1]) == []
    assert needs_history(SamplingParams(bad_word_ids=words))
    assert not needs_history(SamplingParams(bad_word_ids=[[5]]))


def test_an_allow_list_that_bans_empty_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="allowed_token_ids"):
        check_candidates(SamplingParams(allowed_token_ids=[2, 3], bad_word_ids=[[3]], min_tokens=1), [2])
    check_candidates(SamplingParams(allowed_token_ids=[2, 3], bad_word_ids=[[3]]), [2])


def test_an_extreme_repetition_penalty_still_gives_a_valid_token() -> None:
    sampler = build({"repetition_penalty": 1e-45, "logit_bias": {3: -100.0}, "bad_word_ids": [[4]]}, prompt=PROMPT)
    found = sample(sampler, random_logits(1) + 5)
    assert found.finite.tolist() == [True]
    assert found.tokens.item() in (5, 9)  # the seen tokens, divided by nearly nothing


# ── isolation ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "all -inf"])
@pytest.mark.parametrize("fields", VARIED, ids=lambda fields: "-".join(fields))
def test_a_broken_row_is_reported_and_touches_nobody(fields: dict[str, object], poison: float) -> None:
    rules = [{"temperature": 1.0}, fields, {"temperature": 0.0}, {"top_p": 0.9, "top_k": 30}]
    logits = random_logits(4)
    healthy = sample(build(*rules, prompt=PROMPT), logits)
    broken = logits.clone()
    if poison == -math.inf:
        broken[1] = poison
    else:
        broken[1, 40] = poison
    found = sample(build(*rules, prompt=PROMPT), broken)
    assert found.finite.tolist() == [True, False, True, True]
    assert found.tokens[1].item() == 0
    assert [found.tokens[i].item() for i in (0, 2, 3)] == [healthy.tokens[i].item() for i in (0, 2, 3)]


def test_a_nan_under_a_ban_is_still_reported() -> None:
    logits = random_logits(1)
    logits[0, 7] = math.nan
    assert sample(build({"bad_word_ids": [[7]]}), logits).finite.tolist() == [False]


def test_single_minus_infinities_are_only_impossible_tokens() -> None:
    logits = torch.full((1, WIDTH), -math.inf)
    logits[0, 33] = -5.0
    for fields in VARIED[:10]:
        found = sample(build(fields), logits)
        assert (found.finite.item(), found.tokens.item()) == (True, 33)


def test_a_row_whose_masks_leave_nothing_is_reported() -> None:
    found = sample(build({"allowed_token_ids": [5], "bad_word_ids": [[5]]}, {}), random_logits(2))
    assert found.finite.tolist() == [False, True]


@pytest.mark.parametrize(("field", "value"), [
    ("allowed_token_ids", [WIDTH]), ("allowed_token_ids", [WIDTH + 3, 1]), ("logit_bias", {WIDTH: 100.0}),
    ("logit_bias", {2**31 - 1: 100.0}), ("bad_word_ids", [[2 * WIDTH]]), ("stop_token_ids", [WIDTH]),
])
def test_ids_beyond_the_row_are_refused_before_anything_changes(field: str, value: object) -> None:
    sampler = build({"temperature": 1.0}, {"temperature": 0.9})
    before, logits = sampler.state.table.clone(), random_logits(2)
    expected = sample(sampler, logits).tokens
    with pytest.raises(InvalidRequestError, match=str(WIDTH)):
        sampler.state.set_row(0, SamplingParams(**{field: value}), 0)
    sampler.state.flush()
    assert torch.equal(sampler.state.table, before)
    assert torch.equal(sample(sampler, logits).tokens, expected)


@pytest.mark.parametrize("hostile", [-1, WIDTH, 10**6, -WIDTH])
def test_hostile_prompt_and_banned_ids_do_not_reach_a_neighbour(hostile: int) -> None:
    sampler = build({"presence_penalty": 1.0}, {"presence_penalty": 1.0}, prompt=PROMPT)
    counts = sampler.state.counts.table.clone()
    for prompt, output in (([hostile], []), ([1], [2, hostile])):
        with pytest.raises(InvalidRequestError, match="token_ids must be"):
            sampler.state.set_row(1, SamplingParams(presence_penalty=1.0), 0, 0, prompt, output)
    with pytest.raises(InvalidRequestError, match="bad_words"):
        sampler.state.set_banned(1, [hostile])
    sampler.state.flush()
    assert torch.equal(sampler.state.counts.table, counts)


def test_a_row_outside_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="row must be between 0 and 0"):
        SamplingState(1, WIDTH, "cpu").set_row(1, SamplingParams(), 0)


def test_thirty_one_neighbours_of_a_row_with_every_rule_sample_as_without_it() -> None:
    logits, quiet = random_logits(32), [{"temperature": 1.0}] * 31
    loud = {"logit_bias": dict.fromkeys(range(WIDTH), 100.0), "presence_penalty": 2.0, "repetition_penalty": 100.0,
            "frequency_penalty": 2.0, "bad_word_ids": [[i] for i in range(50)], "allowed_token_ids": [0, 95],
            "top_k": 3, "top_p": 0.1, "min_p": 0.9, "logprobs": 20, "min_tokens": 9}
    without = sample(build(*quiet, {}), logits).tokens[:31]
    assert torch.equal(sample(build(*quiet, loud, prompt=PROMPT, stop_ids=(1,)), logits).tokens[:31], without)


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_fork_keeps_the_counts_and_parts_from_its_source() -> None:
    state = SamplingState(3, WIDTH, "cpu")
    params = SamplingParams(temperature=0.0, frequency_penalty=1.0)
    state.set_row(0, params, 5, 0, PROMPT)
    state.flush()
    sampler, logits = Sampler(state), random_logits(1)
    for i in range(6):
        sample(sampler, logits, [0], position=5 + i)
    state.fork_row(0, 2, sample_index=1)
    state.flush()
    slots = [state.counts.slot(row) for row in (0, 2)]
    assert slots[0] != slots[1]
    assert torch.equal(state.counts.table[slots[0]], state.counts.table[slots[1]])
    pair = logits.expand(2, -1).contiguous()
    assert sample(sampler, pair, [0, 2], [11, 11]).tokens.unique().numel() == 1  # greedy: same counts, same token
    before = state.counts.table[slots[0]].clone()
    sample(sampler, logits, [2], position=12)
    assert torch.equal(state.counts.table[slots[0]], before)


def test_a_fork_has_a_random_stream_of_its_own() -> None:
    state = SamplingState(3, WIDTH, "cpu")
    state.set_row(0, SamplingParams(temperature=4.0, logit_bias={3: 1.0}), seed=5)
    state.fork_row(0, 1, sample_index=1)
    state.set_row(2, SamplingParams(temperature=4.0, logit_bias={3: 1.0}), seed=5, sample_index=1)
    state.flush()
    logits = random_logits(1).expand(3, -1).contiguous()
    draws = torch.stack([sample(Sampler(state), logits, position=i).tokens for i in range(30)])
    assert torch.equal(draws[:, 1], draws[:, 2])
    assert not torch.equal(draws[:, 0], draws[:, 1])


def test_a_forks_bans_leave_its_source_alone() -> None:
    state = SamplingState(2, WIDTH, "cpu")
    state.set_row(0, SamplingParams(temperature=0.0), 0)
    state.fork_row(0, 1, 1)
    state.set_banned(1, [7])
    state.flush()
    logits = torch.zeros(2, WIDTH)
    logits[:, 7] = 5.0
    assert sample(Sampler(state), logits).tokens.tolist() == [7, 0]


def test_a_reused_row_remembers_nothing() -> None:
    loud = {"temperature": 0.0, "repetition_penalty": 9.0, "logit_bias": {1: 9.0}, "bad_word_ids": [[2]],
            "allowed_token_ids": [1, 2, 3], "logprobs": 3, "min_tokens": 5}
    sampler = build(loud, prompt=PROMPT, stop_ids=(9,))
    logits = random_logits(1)
    sample(sampler, logits)
    sampler.state.set_row(0, SamplingParams(temperature=0.0), 0)
    sampler.state.flush()
    found = sample(sampler, logits)
    assert found.tokens.item() == logits.argmax().item()
    assert found.logprobs is None


def test_penalty_slots_are_reused_clean_and_grow_by_doubling() -> None:
    state = SamplingState(16, WIDTH, "cpu")
    params = SamplingParams(presence_penalty=1.0)
    for round_ in range(3):
        for row in range(5):
            state.set_row(row, params, 0, 0, [round_], [10 + round_])
        state.flush()
    assert state.counts.table.shape == (8, WIDTH)
    seen = state.counts.table[[state.counts.slot(row) for row in range(5)]]
    assert (seen != 0).sum(-1).tolist() == [2] * 5
    assert (seen[:, [2, 12]] != 0).all()
    for row in range(5):
        state.clear_row(row)
        state.clear_row(row)
    state.set_row(9, params, 0)
    assert state.counts.table.shape[0] == 8


def test_rows_without_penalties_cost_no_counts() -> None:
    assert build(*VARIED[:6]).state.counts.table.numel() == 0
