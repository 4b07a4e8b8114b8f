"""Samplers over a few rows, exact distributions and a chi-square, for the sampler's tests."""

from __future__ import annotations

import math

import numpy as np
import torch

from workstation.engine.request import SamplingParams
from workstation.engine.sampler import SampleOutput, Sampler, SamplingState

WIDTH = 96
PROMPT = [3, 4, 5, 5, 9]

VARIED = [
    {"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.02}, {"repetition_penalty": 1.4, "temperature": 0.9},
    {"presence_penalty": 1.0, "frequency_penalty": -0.5}, {"logit_bias": {1: 5.0, 2: -100.0}}, {"logprobs": 4},
    {"allowed_token_ids": [1, 5, 9, 30], "temperature": 1.0}, {"bad_word_ids": [[7], [8]]}, {"min_tokens": 3},
]

CUTS = {
    "temperature": {"temperature": 0.8}, "hot": {"temperature": 5.0}, "top_k": {"top_k": 5}, "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2}, "k_and_p": {"top_k": 9, "top_p": 0.6}, "all": {"top_k": 12, "top_p": 0.9, "min_p": 0.05},
    "all_warm": {"temperature": 1.7, "top_k": 30, "top_p": 0.95, "min_p": 0.01},
}


def build(*rules: dict[str, object], width: int = WIDTH, prompt: list[int] | None = None,
          output: list[int] | None = None, seeds: list[int] | None = None, stop_ids: tuple[int, ...] = ()) -> Sampler:
    """A sampler whose row i follows rules[i]."""
    state = SamplingState(len(rules), width, "cpu")
    for row, fields in enumerate(rules):
        state.set_row(row, SamplingParams(**fields), seeds[row] if seeds else row, 0, prompt or [], output or [],
                      stop_ids)
    state.flush()
    return Sampler(state)


def sample(sampler: Sampler, logits: torch.Tensor, rows: list[int] | None = None, position: int | list[int] = 10,
           step: int = 0) -> SampleOutput:
    rows = list(range(len(logits))) if rows is None else rows
    positions = torch.tensor([position] * len(rows) if isinstance(position, int) else position)
    return sampler.sample(logits, rows, torch.tensor(rows), positions, [step] * len(rows))


def random_logits(rows: int, width: int = WIDTH, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale


def exact_distribution(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """Temperature, min_p, top_k, top_p one after the other in float64, each on the renormalised rest."""
    p = np.exp((logits.double().numpy() - logits.max().item()) / params.temperature)
    p /= p.sum()
    p[p < params.min_p * p.max()] = 0.0
    if params.top_k:
        p[p < np.sort(p)[::-1][params.top_k - 1]] = 0.0
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    reached = np.cumsum(p[order]) - p[order]  # mass before each token
    p[order[reached >= params.top_p]] = 0.0
    return p / p.sum()


def histogram(logits: torch.Tensor, params: SamplingParams, draws: int, rows: int = 250) -> np.ndarray:
    """Counts of `draws` tokens: every (row, position) has a number of its own."""
    state = SamplingState(rows, logits.shape[0], "cpu")
    for row in range(rows):
        state.set_row(row, params, seed=7000 + row)
    state.flush()
    sampler = Sampler(state)
    batch = logits.expand(rows, -1).contiguous()
    counts = np.zeros(logits.shape[0], dtype=np.int64)
    for position in range(draws // rows):
        counts += np.bincount(sample(sampler, batch, position=position).tokens.numpy(), minlength=len(counts))
    return counts


def chi_square_tail(counts: np.ndarray, p: np.ndarray) -> float:
    """p-value by Wilson and Hilferty's normal approximation; rare tokens are pooled so that each cell expects ≥ 8."""
    total = counts.sum()
    common = p * total >= 8
    observed = np.append(counts[common], counts[~common].sum()).astype(float)
    expected = np.append(p[common], p[~common].sum()) * total
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    if freedom == 0:
        return 1.0
    chi = float(((observed - expected) ** 2 / expected).sum())
    z = ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))
