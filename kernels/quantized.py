"""Activations that have been rounded to FP8 on their way to a product."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Quantized(NamedTuple):
    """`x ≈ values * scale[:, None]`.

    values: [T, K] float8_e4m3fn.  scale: [T] float32.  dtype: x's own, which the product returns.
    """

    values: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype
