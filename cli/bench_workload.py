"""What the benchmarks send and how they sum up: seeded lengths, random prompts, percentiles, a plain table."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from workstation.errors import ConfigError

# Spread of the lognormal lengths: most requests are short, a few are several times the mean, as people's are.
LOGNORMAL_SIGMA = 0.8


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a benchmark: prompt ids and how many tokens to generate."""

    prompt: list[int]
    output_len: int


def random_prompt(rng: random.Random, length: int, vocabulary: Sequence[int]) -> list[int]:
    return [vocabulary[rng.randrange(len(vocabulary))] for _ in range(length)]


def lognormal_length(rng: random.Random, mean: int, limit: int) -> int:
    """A length from the lognormal distribution with this mean: exp(N(ln mean − σ²/2, σ)), cut to 1…limit."""
    drawn = rng.lognormvariate(math.log(mean) - LOGNORMAL_SIGMA**2 / 2, LOGNORMAL_SIGMA)
    return max(1, min(limit, round(drawn)))


def make_jobs(
    count: int, input_len: int, output_len: int, vocabulary: Sequence[int], window: int, *, seed: int, lognormal: bool
) -> list[Job]:
    """`count` jobs of exact or lognormal lengths. Raises ConfigError when the lengths do not fit the window."""
    if input_len + output_len > window:
        raise ConfigError(
            f"--input-len {input_len} + --output-len {output_len} do not fit the window of {window} tokens", param="input_len"
        )
    rng = random.Random(seed)
    jobs = []
    for _ in range(count):
        out = lognormal_length(rng, output_len, window // 2) if lognormal else output_len
        into = lognormal_length(rng, input_len, window - out) if lognormal else input_len
        jobs.append(Job(random_prompt(rng, into, vocabulary), out))
    return jobs


def uniform_jobs(
    count: int, inputs: tuple[int, int], outputs: tuple[int, int], vocabulary: Sequence[int], seed: int
) -> list[Job]:
    """`count` jobs with lengths drawn evenly from the two closed ranges."""
    rng = random.Random(seed)
    return [Job(random_prompt(rng, rng.randint(*inputs), vocabulary), rng.randint(*outputs)) for _ in range(count)]


def decode_context(lengths: Iterable[tuple[int, int]]) -> float:
    """Tokens a sequence holds in its mean decode step, over requests of (prompt tokens, generated tokens)."""
    held = [(out * (into + out / 2), out) for into, out in lengths]
    return sum(tokens for tokens, _ in held) / sum(steps for _, steps in held)


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the closest ranks; NaN without values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def kv_waste(samples: Sequence[tuple[int, int]], block_size: int) -> float:
    """1 − tokens held / slots allocated, averaged over the steps that held blocks.

    Args:
        samples: (tokens held, blocks held) after each step.
    """
    shares = [1 - tokens / (blocks * block_size) for tokens, blocks in samples if blocks > 0]
    return sum(shares) / len(shares) if shares else math.nan


def print_rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Two aligned columns under a title, on stdout."""
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, value in rows:
        print(f"  {name:<{width}}  {value:>12}")
