"""Activations that become FP8 on their way to a product: rounded, or each as the sum of two."""

from __future__ import annotations

from typing import NamedTuple

import torch

from workstation.kernels.tuning import FEW_ROWS, FEW_SPAN


class Rounding(NamedTuple):
    """One scale a token, max |x| / 448. bound: the largest value a scale is made from; what lies beyond it saturates."""

    bound: float = float("inf")


class Halving(NamedTuple):
    """Every bfloat16 number as two of e4m3: see `Halves`."""


class Quantized(NamedTuple):
    """`x ≈ values * scale[:, None]`.

    values: [T, K] float8_e4m3fn.  scale: [T] float32.  dtype: x's own, which the product returns.
    """

    values: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype

    def tokens(self, first: int, count: int) -> Quantized:
        """Tokens [first, first + count), without a copy."""
        return Quantized(self.values[first : first + count], self.scale[first : first + count], self.dtype)


class Halves(NamedTuple):
    """bfloat16 x [T, K], T ≤ 4, K a multiple of 128, taken apart: `x[t] ≈ 2^e · (high + low)`, e for 128 columns.

    high is x / 2^e cut to e4m3's precision, low the rest, rounded: exact for numbers of at least 2^-9 of their group's
    largest, to 2^-16 of that for others. A group with a number that is not finite has NaN for its 2^e.

    values: [K / 128 · 8, 128] e4m3: eight rows a group of columns, high and low of a token after another, those of no token
        undefined. Their columns have the order that bytes of `IntWeight`'s 4-bit words have: `halves_order`.
    factors: [K / 128, 16] float32. At 2t and 2t + 1: 2^e. At 8 + 2t: −8 / 512 · 2^e · Σ (high + low); at 9 + 2t: 0.
    """

    values: torch.Tensor
    factors: torch.Tensor
    tokens: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens, self.factors.shape[0] * FEW_SPAN

    @property
    def device(self) -> torch.device:
        return self.values.device

    @classmethod
    def empty(cls, tokens: int, width: int, device: torch.device) -> Halves:
        groups = width // FEW_SPAN
        values = torch.empty(groups * 2 * FEW_ROWS, FEW_SPAN, dtype=torch.float8_e4m3fn, device=device)
        return cls(values, torch.empty(groups, 4 * FEW_ROWS, dtype=torch.float32, device=device), tokens)


# What products may be given: with FP8 weights, with integer ones, and any.
Fp8Operand = torch.Tensor | Quantized
IntOperand = torch.Tensor | Halves
Operand = Fp8Operand | Halves
