"""Weights → integers, each column's error made up for by the columns after it: GPTQ (Frantar et al. 2022, arXiv:2210.17323).

Rounding W [N, K] to Q moves a layer's outputs for the inputs x of a calibration text by Σ |(W − Q) x|² = tr (W − Q) H (W − Q)ᵀ,
H = Σ x xᵀ. Columns are rounded in order. When column j has become q, the least that can be had of it is had by

    e = (w_j − q) / U_jj        w_k ← w_k − e · U_jk for k > j        U upper triangular, Uᵀ U = H⁻¹

A group's scales are searched for when its first column's turn has come, for the weights as they are by then.
"""

from __future__ import annotations

import torch

from workstation.quant.quantise import search_scale, signed_codes

# Of H's mean diagonal, added to all of it until Cholesky's algorithm goes through; the paper takes the first.
DAMPINGS = (0.01, 0.1, 1.0)
CHUNK_ELEMENTS = 1 << 27


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """H with `damping` times its mean diagonal added to the diagonal: inputs that were always 0 get a curvature, too."""
    mean = hessian.diagonal().mean()
    return hessian + torch.diag(torch.where(mean > 0, mean * damping, 1.0).expand(len(hessian)))


def compensation(hessian: torch.Tensor) -> torch.Tensor:
    """U of a damped H, both [K, K] float32.

    H reversed in both directions is L Lᵀ. So H = R Rᵀ, where R, L reversed, is upper triangular, and U = R⁻¹.

    Raises ValueError when H is not finite.
    """
    if not hessian.isfinite().all():
        raise ValueError("has inputs that are not finite on the calibration text")
    for damping in DAMPINGS:
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, damping).flip(0, 1))
        if not failed:
            upper = lower.flip(0, 1)
            inverse: torch.Tensor = torch.linalg.solve_triangular(upper, torch.eye(len(upper), device=upper.device), upper=True)
            return inverse
    raise ValueError("has inputs on the calibration text whose products are not positive definite, however damped")


def gptq_groups(
    weight: torch.Tensor, hessian: torch.Tensor, groups: int, bits: int, dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix to symmetric integers with a scale a group of neighbouring columns.

    Args:
        weight: [N, K], finite.  hessian: [K, K] float32, Σ x xᵀ of the layer's inputs.
        groups: a row's, G, a divisor of K.  dtype: of the scales.
    Returns:
        Unsigned codes [N, K] uint8, scales [N, G].

    Raises ValueError for inputs that are not finite.
    """
    factor, importance = compensation(hessian), damped(hessian, DAMPINGS[0]).diagonal()
    rows = max(1, CHUNK_ELEMENTS // weight.shape[1])
    made = [_rounded(weight[start:start + rows].float(), factor, importance, groups, bits, dtype)
            for start in range(0, len(weight), rows)]
    codes, scales = zip(*made, strict=True)
    return torch.cat(codes), torch.cat(scales)


def _rounded(
    rest: torch.Tensor, factor: torch.Tensor, importance: torch.Tensor, groups: int, bits: int, dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gptq_groups` of a few rows. A group's errors reach the columns behind the group in one product."""
    codes, scales, size = torch.empty_like(rest.t(), dtype=torch.uint8), [], rest.shape[1] // groups
    rest = rest.clone()
    for start in range(0, rest.shape[1], size):
        group = slice(start, start + size)
        scale = search_scale(rest[:, None, group], bits, dtype, importance[group])[:, 0, 0]
        block, inner = rest[:, group].t().contiguous(), factor[group, group]  # a column lies in one piece
        errors = torch.empty_like(block)
        for column in range(size):
            found = signed_codes(block[column], scale, bits)
            errors[column] = (block[column] - found * scale) / inner[column, column]
            block[column + 1:].addr_(inner[column, column + 1:], errors[column], alpha=-1)
            codes[start + column] = found + (1 << bits - 1)
        rest[:, group.stop:] -= errors.t() @ factor[group, group.stop:]
        scales.append(scale.to(dtype))
    return codes.t().contiguous(), torch.stack(scales, 1)
