"""The only door to the kernels: shapes are checked here once, then Triton (CUDA) or the plain-torch twin (CPU) runs.

Letters in shapes: T tokens of the step, S sequences, H hidden size, F feed-forward size, D head dim, Hq query heads,
Hkv key/value heads, BS tokens a block. Activations are float32, bfloat16 or float16; inner arithmetic is float32. The
KV cache has the activations' dtype, or float8_e4m3fn with a scale for keys and one for values.
A shape, dtype or layout that no kernel serves raises ValueError naming the argument.
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from workstation.kernels import reference, reference_fp8
from workstation.kernels.gemm import MAX_ROWS
from workstation.kernels.paging import FP8, UNSCALED, KVScales
from workstation.kernels.quantized import Quantized

if TYPE_CHECKING:
    from workstation.kernels.paging import AttentionPlan

# `WS_KERNELS=triton` sends CPU tensors to the Triton kernels too; that needs Triton's interpreter (TRITON_INTERPRET=1).
FORCE_TRITON = os.environ.get("WS_KERNELS") == "triton"


@cache
def _triton() -> Any:
    """The Triton kernels, imported at their first use: a CPU install may lack Triton."""
    from workstation.kernels import launch

    return launch


@cache
def _fp8() -> Any:
    from workstation.kernels import launch_fp8

    return launch_fp8


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`(x / sqrt(mean(x^2) + eps)).to(x.dtype) * weight` over the last dimension (RMSNorm, arXiv:1910.07467).

    x: [..., H], rows contiguous. weight: [H]. Returns a new tensor of x's shape and dtype.
    """
    _check(x.shape[-1:] == weight.shape, "weight", weight, "must be [H] for x [..., H]")
    if x.is_cuda or FORCE_TRITON:
        return _triton().rms_norm(x, weight, eps)  # type: ignore[no-any-return]
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual += x` in place, then RMSNorm of the sum: (normed, residual), both [T, H]."""
    _check(x.shape == residual.shape, "residual", residual, "must have x's shape")
    _check(x.shape[-1:] == weight.shape, "weight", weight, "must be [H] for x [T, H]")
    if x.is_cuda or FORCE_TRITON:
        return _triton().add_rms_norm(x, residual, weight, eps)  # type: ignore[no-any-return]
    return reference.add_rms_norm(x, residual, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's product: `silu(gate) * up` for gate_up [T, 2F] = gate | up. Returns [T, F] (arXiv:2002.05202)."""
    _check(gate_up.shape[-1] % 2 == 0, "gate_up", gate_up, "must be [T, 2F]")
    if gate_up.is_cuda or FORCE_TRITON:
        return _triton().silu_mul(gate_up)  # type: ignore[no-any-return]
    return reference.silu_mul(gate_up)


def rope_and_cache(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    kv_layer: torch.Tensor,
    slots: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    scales: KVScales = UNSCALED,
) -> torch.Tensor:
    """Optional RMSNorm of each query and key head, rotary embedding, and the write of K and V into the paged cache.

    RoPE in the half-split form (arXiv:2104.09864 as in GPT-NeoX): `x1*cos - x2*sin | x2*cos + x1*sin` on the first
    rotary_dim components of a head, the others pass through.

    Args:
        qkv: [T, (Hq + 2 Hkv) * D], query | key | value heads; not changed.
        positions: [T] int64, each below cos_sin's rows.
        cos_sin: [max_position, rotary_dim] float32, cosines in the first half, then sines, any scale folded in.
        q_norm, k_norm: [D] weights (both or neither).  eps: their epsilon.
        kv_layer: [blocks, 2, Hkv, BS, D], a layer's view of the pool; K and V are cast to its dtype.
        slots: [T] int64, `block * BS + offset`; a negative slot writes nothing.
        scales: of an FP8 cache, which keeps K / scales.key and V / scales.value, rounded to nearest even; beyond 448 they
            saturate, NaN stays NaN.
    Returns:
        q: [T, Hq, D] of qkv's dtype.
    """
    head_dim = kv_layer.shape[-1]
    width = (num_heads + 2 * num_kv_heads) * head_dim
    _check(qkv.shape[-1] == width, "qkv", qkv, "must be [T, (Hq + 2 Hkv) * D]")
    _check(cos_sin.shape[-1] <= head_dim and cos_sin.shape[-1] % 2 == 0, "cos_sin", cos_sin, "is wider than a head")
    _check(slots.shape == positions.shape == qkv.shape[:1], "slots", slots, "and positions must be [T]")
    _check(kv_layer.shape[2] == num_kv_heads, "kv_layer", kv_layer, "must be [blocks, 2, Hkv, BS, D]")
    _check(scales == UNSCALED or kv_layer.dtype == FP8, "kv_layer", kv_layer, "has scales only in FP8")
    _check((q_norm is None) == (k_norm is None), "k_norm", k_norm, "and q_norm come together")
    if qkv.is_cuda or FORCE_TRITON:
        return _triton().rope_and_cache(  # type: ignore[no-any-return]
            qkv, positions, cos_sin, q_norm, k_norm, eps, kv_layer, slots, num_heads, num_kv_heads, scales
        )
    return reference.rope_and_cache(
        qkv, positions, cos_sin, q_norm, k_norm, eps, kv_layer, slots, num_heads, num_kv_heads, scales
    )


def attention(
    q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, scale: float, scales: KVScales = UNSCALED
) -> torch.Tensor:
    """Causal attention of a step's queries over the paged cache (arXiv:2309.06180): grouped query heads, optional window.

    A query at position p sees keys (p - window, p], or all up to p. What lies in a block beyond a sequence's length, or
    before its window, never reaches the result, NaN included. A sequence of length 0 (padding) gives zeros.

    Args:
        q: [T, Hq, D], D a multiple of 16 up to 256; head h reads key head h // (Hq / Hkv). Tokens behind the last
            sequence are padding, and their result is undefined.
        kv_layer: [blocks, 2, Hkv, BS, D], already holding this step's keys and values.
        plan: the step's lengths and block tables; its scratch is filled by the first layer and reused by the others.
        scale: factor on the scores, as a rule D ** -0.5.
        scales: of an FP8 cache, as it was written with.
    Returns:
        [T, Hq, D] contiguous, of q's dtype.
    """
    _check(q.dim() == 3 and q.shape[2] == kv_layer.shape[4], "q", q, "must be [T, Hq, D] with the cache's D")
    _check(q.shape[1] % kv_layer.shape[2] == 0, "q", q, "must have a multiple of the cache's heads")
    _check(kv_layer.shape[3] == plan.block_size, "kv_layer", kv_layer, "must have the plan's block size")
    _check(q.shape[2] % 16 == 0 and q.shape[2] <= 256, "q", q, "needs a head dim that is a multiple of 16, at most 256")
    _check(scales == UNSCALED or kv_layer.dtype == FP8, "kv_layer", kv_layer, "has scales only in FP8")
    if q.is_cuda or FORCE_TRITON:
        return _triton().attention(q, kv_layer, plan, scale, scales)  # type: ignore[no-any-return]
    return reference.attention(q, kv_layer, plan, scale, scales)


def copy_blocks(kv: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy whole blocks over all layers, `kv[target[i]] = kv[source[i]]`; no block may be both a source and a target.

    kv: [blocks, ...], a block contiguous. source, target: [N] int64, targets distinct.
    """
    _check(source.shape == target.shape and source.dim() == 1, "target", target, "must be [N] like source")
    _check(kv[0].is_contiguous(), "kv", kv, "must hold each block contiguously")
    if source.numel() == 0:
        return
    if kv.is_cuda or FORCE_TRITON:
        _triton().copy_blocks(kv, source, target)
    else:
        reference.copy_blocks(kv, source, target)


def quantize_fp8_per_token(x: torch.Tensor, bound: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations to FP8 with one scale a token: `x ≈ x8 * scale[:, None]`, scale = max |x| / 448.

    x: [T, K], rows contiguous. bound: the largest value a scale is made from; what lies beyond it saturates.
    Returns (x8 [T, K] float8_e4m3fn, scale [T] float32). A row of zeros has the scale 1 / 448.
    """
    _check(x.dim() == 2 and x.stride(1) == 1, "x", x, "must be [T, K] with contiguous rows")
    limit = float("inf") if bound is None else bound
    if x.is_cuda or FORCE_TRITON:
        return _fp8().quantize_fp8_per_token(x, limit)  # type: ignore[no-any-return]
    return reference_fp8.quantize_fp8_per_token(x, limit)


def add_rms_norm_fp8(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, bound: float | None = None
) -> tuple[Quantized, torch.Tensor]:
    """`add_rms_norm`, its result rounded to FP8 per token: equal to `quantize_fp8_per_token` of it, in one kernel.

    x, residual: [T, H], rows contiguous; residual += x in place.  bound: see `quantize_fp8_per_token`.
    """
    _check(x.shape == residual.shape and x.dim() == 2, "residual", residual, "must be [T, H] like x")
    _check(x.shape[-1:] == weight.shape, "weight", weight, "must be [H] for x [T, H]")
    limit = float("inf") if bound is None else bound
    if x.is_cuda or FORCE_TRITON:
        return _fp8().add_rms_norm_fp8(x, residual, weight, eps, limit)  # type: ignore[no-any-return]
    normed, residual = reference.add_rms_norm(x, residual, weight, eps)
    return Quantized(*reference_fp8.quantize_fp8_per_token(normed, limit), x.dtype), residual


def multiplies_fp8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether x [T, K] would be rounded to FP8 for this weight, and few enough rows for our own kernels."""
    return x.is_cuda and x.shape[0] <= MAX_ROWS and bool(_fp8().multiplies_fp8(x, weight, scale))


def linear_quantized(
    x: Quantized, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None, *, silu: bool = False
) -> torch.Tensor:
    """`linear_fp8` (or `silu_mul_fp8`) for activations that are FP8 already: [T, N] or [T, N / 2] of x.dtype."""
    _check(x.values.shape[0] <= MAX_ROWS, "x", x.values, f"must have at most {MAX_ROWS} rows")
    return _fp8().product_of_quantized(x, weight, scale, bias, silu=silu)  # type: ignore[no-any-return]


def linear_fp8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None, *,
    quantized_activations: bool = True, bound: float | None = None,
) -> torch.Tensor:
    """`y = x · Wᵀ + b` with FP8 weights: W[n, k] = weight[n, k] * scale[n], or * scale[n // 128, k // 128].

    With a scale a row, `quantized_activations` rounds x to FP8 per token where the GPU multiplies FP8 (compute capability
    8.9 and above) and x is 16-bit. Everywhere else the weights are widened and x keeps its dtype.

    Args:
        x: [T, K].  weight: [N, K] float8_e4m3fn.  scale: [N] or [⌈N/128⌉, ⌈K/128⌉] float32.  bias: [N] of x's dtype.
        bound: see `quantize_fp8_per_token`.
    Returns:
        [T, N] of x's dtype.
    """
    rows, columns = weight.shape
    _check(x.dim() == 2 and x.shape[1] == columns and x.stride(1) == 1, "x", x, "must be [T, K] with contiguous rows")
    _check(weight.dtype == torch.float8_e4m3fn and weight.is_contiguous(), "weight", weight, "must be contiguous e4m3")
    grid = (-(-rows // 128), -(-columns // 128))
    _check(scale.shape in ((rows,), grid) and scale.dtype == torch.float32, "scale", scale, "must be [N] or a block's each")
    _check(bias is None or bias.shape == (rows,), "bias", bias, "must be [N]")
    if x.is_cuda or FORCE_TRITON:
        limit = float("inf") if bound is None else bound
        return _fp8().linear_fp8(  # type: ignore[no-any-return]
            x, weight, scale, bias, quantized=quantized_activations, bound=limit
        )
    return reference_fp8.linear_fp8(x, weight, scale, bias)


def silu_mul_fp8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None, *,
    quantized_activations: bool = True, bound: float | None = None,
) -> torch.Tensor:
    """`silu_mul(linear_fp8(…))` for weight [2F, K] = gate | up, in one kernel where the rows are few. Returns [T, F]."""
    if (x.is_cuda or FORCE_TRITON) and x.shape[0] <= MAX_ROWS:
        limit = float("inf") if bound is None else bound
        fused = _fp8().silu_mul_fp8(x, weight, scale, bias, quantized=quantized_activations, bound=limit)
        if fused is not None:
            return fused  # type: ignore[no-any-return]
    return silu_mul(linear_fp8(x, weight, scale, bias, quantized_activations=quantized_activations, bound=bound))


def _check(ok: bool, name: str, tensor: torch.Tensor | None, message: str) -> None:
    if not ok:
        shape = "None" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
        raise ValueError(f"{name} ({shape}) {message}")
