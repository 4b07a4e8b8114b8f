"""The cos/sin table of rotary embeddings (Su et al. 2021, arXiv 2104.09864), for every kind of scaling.

Dynamic NTK and LongRoPE depend on how long a sequence gets. Here they are fixed once, from max_model_len: a key that is
cached by one request, or by an earlier chunk, is then the key every later request would compute.
"""

from __future__ import annotations

import math

import torch

from workstation.architecture import RopeShape


def cos_sin_table(rope: RopeShape, max_model_len: int, device: torch.device) -> torch.Tensor:
    """[max_model_len, rotary_dim] float32: cosines in the first half, sines in the second; attention factor folded in.

    Row p, column i holds cos(p · f_i) · a and column rotary_dim / 2 + i holds sin(p · f_i) · a.
    """
    frequencies = inverse_frequencies(rope, max_model_len)
    positions = torch.arange(max_model_len, dtype=torch.float32)
    angles = positions[:, None] * frequencies
    factor: float = rope.options.get("attention_factor", 1.0)
    return (torch.cat((angles.cos(), angles.sin()), dim=-1) * factor).to(device)


def inverse_frequencies(rope: RopeShape, max_model_len: int) -> torch.Tensor:
    """[rotary_dim / 2] float32: the angle a position adds, by component. Raises ValueError for an unknown kind."""
    makers = {
        "default": _default, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn,
        "longrope": _longrope,
    }
    if rope.kind not in makers:
        raise ValueError(f"rope kind {rope.kind!r} is unknown; known are {', '.join(makers)}")
    return makers[rope.kind](rope, max_model_len)


def _powers(theta: float, dim: int) -> torch.Tensor:
    """theta ** (2 i / dim) for i in 0 … dim / 2 - 1."""
    return theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)


def _default(rope: RopeShape, max_model_len: int) -> torch.Tensor:
    return 1.0 / _powers(rope.theta, rope.rotary_dim)


def _linear(rope: RopeShape, max_model_len: int) -> torch.Tensor:
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595)."""
    factor: float = rope.options["factor"]
    return _default(rope, max_model_len) / factor


def _dynamic(rope: RopeShape, max_model_len: int) -> torch.Tensor:
    """Dynamic NTK: theta grows with the ratio of the longest sequence to the trained window; within it nothing changes."""
    dim = rope.rotary_dim
    factor: float = rope.options["factor"]
    trained: int = rope.options["trained_max_position"]
    longest = max(max_model_len, trained)
    growth = factor * longest / trained - (factor - 1)
    return 1.0 / _powers(rope.theta * growth ** (dim / (dim - 2)), dim)


def _llama3(rope: RopeShape, max_model_len: int) -> torch.Tensor:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between are blended linearly."""
    options = rope.options
    plain = _default(rope, max_model_len)
    turns = options["original_max_position"] / (2 * math.pi / plain)  # turns within the original window
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    kept: torch.Tensor = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    slowed: torch.Tensor = plain / options["factor"]
    return (1 - kept) * slowed + kept * plain


def _yarn(rope: RopeShape, max_model_len: int) -> torch.Tensor:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): interpolate slow components, keep fast ones, ramp between."""
    options, dim = rope.options, rope.rotary_dim
    powers = _powers(rope.theta, dim)
    low = _component_with_turns(rope, options["beta_fast"])
    high = _component_with_turns(rope, options["beta_slow"])
    if options["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    factor: float = options["factor"]
    return interpolated / (factor * powers) + (1 - interpolated) / powers


def _component_with_turns(rope: RopeShape, turns: float) -> float:
    """The (fractional) component that makes `turns` turns within the original window."""
    window: int = rope.options["original_max_position"]
    return rope.rotary_dim * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def _longrope(rope: RopeShape, max_model_len: int) -> torch.Tensor:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): a searched factor a component, one set for long windows."""
    long = max_model_len > rope.options["original_max_position"]
    factors = torch.tensor(rope.options["long_factor" if long else "short_factor"], dtype=torch.float32)
    return 1.0 / (factors * _powers(rope.theta, rope.rotary_dim))
