"""The door to the model's kernels: shapes are checked here once, then Triton (CUDA) or the plain-torch twin (CPU) runs.

Letters in shapes: T tokens of the step, S sequences, H hidden size, F feed-forward size, D head dim, Hq query heads,
Hkv key/value heads, BS tokens a block. Activations are float32, bfloat16 or float16; inner arithmetic is float32. The
KV cache has the activations' dtype, or float8_e4m3fn with a scale for keys and one for values.
A shape, dtype or layout that no kernel serves raises ValueError naming the argument.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from workstation.kernels import int8_activations, reference, reference_codes, reference_fp8, reference_int
from workstation.kernels.code_tables import kept_groups
from workstation.kernels.code_weights import CodeWeight
from workstation.kernels.door import FORCE_TRITON, check
from workstation.kernels.gemm import MAX_ROWS
from workstation.kernels.int_weights import IntWeight
from workstation.kernels.paging import FP8, UNSCALED, KVScales
from workstation.kernels.quantized import Fp8Operand, Halves, Halving, IntOperand, Operand, Quantized, Rounding
from workstation.kernels.tuning import FEW_ROWS, FEW_SPAN, NARROW_ROWS, most_rows

if TYPE_CHECKING:
    from workstation.kernels.paging import AttentionPlan, StepInputs


@cache
def _triton() -> Any:
    """The Triton kernels, imported at their first use: a CPU install may lack Triton."""
    from workstation.kernels import launch

    return launch


@cache
def _fp8() -> Any:
    from workstation.kernels import launch_fp8

    return launch_fp8


@cache
def _int() -> Any:
    from workstation.kernels import launch_int

    return launch_int


@cache
def _codes() -> Any:
    from workstation.kernels import launch_codes

    return launch_codes


def step_inputs(
    tokens: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, last_token: torch.Tensor,
    tables: tuple[torch.Tensor, ...], block_size: int,
) -> StepInputs:
    """A step's inputs from the rows' state, on the device.

    Args:
        tokens: [T] int64, negative where only the device knows the token: the last one its row sampled.
        positions: [T] int64, negative for padding.  rows: [T] int64, the rows the tokens belong to.
        last_token: [R] int64.  tables: a KV group each, [R, W] int32.
    """
    check(tokens.shape == positions.shape == rows.shape and tokens.dim() == 1, "tokens", tokens, "must be [T] like the rest")
    if tokens.is_cuda or FORCE_TRITON:
        return _triton().step_inputs(tokens, positions, rows, last_token, tables, block_size)  # type: ignore[no-any-return]
    return reference.step_inputs(tokens, positions, rows, last_token, tables, block_size)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`(x / sqrt(mean(x^2) + eps)).to(x.dtype) * weight` over the last dimension (RMSNorm, arXiv:1910.07467).

    x: [..., H], rows contiguous. weight: [H]. Returns a new tensor of x's shape and dtype.
    """
    check(x.shape[-1:] == weight.shape, "weight", weight, "must be [H] for x [..., H]")
    if x.is_cuda or FORCE_TRITON:
        return _triton().rms_norm(x, weight, eps)  # type: ignore[no-any-return]
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, form: Rounding | Halving | None = None
) -> tuple[Operand, torch.Tensor]:
    """`residual += x` in place, then RMSNorm of the sum: (normed, residual), both [T, H], rows contiguous.

    With a form the first is made so in the same kernel: rounded, equal to `quantize_fp8` of the normed sum; or taken apart,
    for x [T ≤ 4, 128 n] of bfloat16.
    """
    check(x.shape == residual.shape and x.dim() == 2, "residual", residual, "must be [T, H] like x")
    check(x.shape[-1:] == weight.shape, "weight", weight, "must be [H] for x [T, H]")
    if isinstance(form, Halving):
        few = x.shape[0] <= FEW_ROWS and x.shape[1] % FEW_SPAN == 0
        check(few and x.dtype == torch.bfloat16, "x", x, "must be bfloat16 [T, 128 n], T at most 4, to be taken apart")
    if x.is_cuda or FORCE_TRITON:
        if isinstance(form, Rounding):
            return _fp8().add_rms_norm_fp8(x, residual, weight, eps, form)  # type: ignore[no-any-return]
        normed = _triton().add_rms_norm if form is None else _triton().add_rms_norm_halves
        return normed(x, residual, weight, eps)  # type: ignore[no-any-return]
    normed, residual = reference.add_rms_norm(x, residual, weight, eps)
    if isinstance(form, Rounding):
        return reference_fp8.quantize_fp8(normed, form), residual
    return (normed if form is None else reference_int.take_apart(normed)), residual


def silu_mul(gate_up: torch.Tensor, rounding: Rounding | None = None) -> Operand:
    """SwiGLU's product: `silu(gate) * up` for gate_up [T, 2F] = gate | up. Returns [T, F] (arXiv:2002.05202).

    With `rounding` it is FP8: equal to `quantize_fp8` of the product, in one kernel.
    """
    check(gate_up.shape[-1] % 2 == 0, "gate_up", gate_up, "must be [T, 2F]")
    if gate_up.is_cuda or FORCE_TRITON:
        if rounding is not None:
            return _fp8().silu_mul_round(gate_up, rounding)  # type: ignore[no-any-return]
        return _triton().silu_mul(gate_up)  # type: ignore[no-any-return]
    product = reference.silu_mul(gate_up)
    return product if rounding is None else reference_fp8.quantize_fp8(product, rounding)


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
    check(qkv.shape[-1] == width, "qkv", qkv, "must be [T, (Hq + 2 Hkv) * D]")
    check(cos_sin.shape[-1] <= head_dim and cos_sin.shape[-1] % 2 == 0, "cos_sin", cos_sin, "is wider than a head")
    check(slots.shape == positions.shape == qkv.shape[:1], "slots", slots, "and positions must be [T]")
    check(kv_layer.shape[2] == num_kv_heads, "kv_layer", kv_layer, "must be [blocks, 2, Hkv, BS, D]")
    check(scales == UNSCALED or kv_layer.dtype == FP8, "kv_layer", kv_layer, "has scales only in FP8")
    check((q_norm is None) == (k_norm is None), "k_norm", k_norm, "and q_norm come together")
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
    check(q.dim() == 3 and q.shape[2] == kv_layer.shape[4], "q", q, "must be [T, Hq, D] with the cache's D")
    check(q.shape[1] % kv_layer.shape[2] == 0, "q", q, "must have a multiple of the cache's heads")
    check(kv_layer.shape[3] == plan.block_size, "kv_layer", kv_layer, "must have the plan's block size")
    check(q.shape[2] % 16 == 0 and q.shape[2] <= 256, "q", q, "needs a head dim that is a multiple of 16, at most 256")
    check(scales == UNSCALED or kv_layer.dtype == FP8, "kv_layer", kv_layer, "has scales only in FP8")
    if q.is_cuda or FORCE_TRITON:
        return _triton().attention(q, kv_layer, plan, scale, scales)  # type: ignore[no-any-return]
    return reference.attention(q, kv_layer, plan, scale, scales)


def copy_blocks(kv: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy whole blocks over all layers, `kv[target[i]] = kv[source[i]]`; no block may be both a source and a target.

    kv: [blocks, ...], a block contiguous. source, target: [N] int64, targets distinct.
    """
    check(source.shape == target.shape and source.dim() == 1, "target", target, "must be [N] like source")
    check(kv[0].is_contiguous(), "kv", kv, "must hold each block contiguously")
    if source.numel() == 0:
        return
    if kv.is_cuda or FORCE_TRITON:
        _triton().copy_blocks(kv, source, target)
    else:
        reference.copy_blocks(kv, source, target)


def quantize_fp8(x: torch.Tensor, rounding: Rounding) -> Quantized:
    """Activations to FP8 with one scale a token: `x ≈ values * scale[:, None]`, scale = max |x| / 448.

    x: [T, K], rows contiguous. A row of zeros has the scale 1 / 448.
    """
    check(x.dim() == 2 and x.stride(1) == 1, "x", x, "must be [T, K] with contiguous rows")
    if x.is_cuda or FORCE_TRITON:
        return _fp8().quantize_fp8(x, rounding)  # type: ignore[no-any-return]
    return reference_fp8.quantize_fp8(x, rounding)


def multiplies_fp8(dtype: torch.dtype, weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether activations of this dtype may be rounded to FP8 for this weight: the device multiplies FP8 by FP8
    (compute capability 8.9 and above), with a scale a row, for 16-bit types and shapes that are multiples of 16."""
    return weight.is_cuda and bool(_fp8().multiplies_fp8(dtype, weight, scale))


def linear_fp8(
    x: Fp8Operand, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`y = x · Wᵀ + b` with FP8 weights: W[n, k] = weight[n, k] * scale[n], or * scale[n // 128, k // 128].

    Args:
        x: [T, K]: Quantized where `multiplies_fp8`; else weights are widened and x keeps its dtype.
        weight: [N, K] float8_e4m3fn.  scale: [N] or [⌈N/128⌉, ⌈K/128⌉] float32.  bias: [N] of x's dtype.
        out: [T, N] of x's dtype, contiguous, to write into.
    Returns:
        [T, N] of x's dtype.
    """
    rows, columns = weight.shape
    values = x.values if isinstance(x, Quantized) else x
    check(values.dim() == 2 and values.shape[1] == columns and values.stride(1) == 1, "x", values,
           "must be [T, K] with contiguous rows")  # fmt: skip
    check(weight.dtype == torch.float8_e4m3fn and weight.is_contiguous(), "weight", weight, "must be contiguous e4m3")
    grid = (-(-rows // 128), -(-columns // 128))
    check(scale.shape in ((rows,), grid) and scale.dtype == torch.float32, "scale", scale, "must be [N] or a block's each")
    check(bias is None or bias.shape == (rows,), "bias", bias, "must be [N]")
    check(out is None or out.shape == (values.shape[0], rows), "out", out, "must be [T, N]")
    if values.is_cuda or FORCE_TRITON:
        return _fp8().linear_fp8(x, weight, scale, bias, out)  # type: ignore[no-any-return]
    y = reference_fp8.linear_fp8(x, weight, scale, bias)
    return y if out is None else out.copy_(y)


def silu_mul_fp8(
    x: Fp8Operand, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None,
    rounding: Rounding | None = None,
) -> Operand:
    """`silu_mul(linear_fp8(…), rounding)` for weight [2F, K] = gate | up; few rows that are FP8 already take one kernel,
    and their result is left unrounded."""
    if isinstance(x, Quantized) and x.values.shape[0] <= MAX_ROWS and weight.shape[0] % 32 == 0 and x.values.is_cuda:
        return _fp8().silu_mul_of_quantized(x, weight, scale, bias)  # type: ignore[no-any-return]
    return silu_mul(linear_fp8(x, weight, scale, bias), rounding)


def takes_halves(tokens: int, dtype: torch.dtype, weight: IntWeight) -> bool:
    """Whether products of so many tokens, of this type, are faster with activations taken apart (`Halves`) than with plain
    ones: one or two of bfloat16, on compute capability 9.0, with 4-bit codes around the middle in groups of 128 n columns."""
    return weight.words.is_cuda and bool(_int().takes_halves(tokens, dtype, weight))


def linear_int(
    x: IntOperand, weight: IntWeight, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`y = x · Wᵀ + b` with integer weights, W[n, k] = (code[n, k] − zero[k // size, n]) · scale[k // size, n].

    Args:
        x: [T, K], rows contiguous, its columns in the weight's order, or such taken apart where `takes_halves`.
        bias: [N] of x's dtype.
        out: [T, N] of x's dtype, contiguous, to write into.
    Returns:
        [T, N] of x's dtype.
    """
    rows = weight.rows
    if isinstance(x, Halves):
        check(x.shape[1] == weight.columns, "x", x.values, "must be of K columns")
    else:
        check(x.dim() == 2 and x.shape[1] == weight.columns and x.stride(1) == 1, "x", x, "must be [T, K] with contiguous rows")
    check(weight.scale.shape == (weight.columns // weight.size, rows), "scale", weight.scale, "must be [G, N]")
    check(bias is None or bias.shape == (rows,), "bias", bias, "must be [N]")
    check(out is None or out.shape == (x.shape[0], rows), "out", out, "must be [T, N]")
    if isinstance(x, Halves) or x.is_cuda or FORCE_TRITON:
        return _int().linear_int(x, weight, bias, out)  # type: ignore[no-any-return]
    y = reference_int.linear_int(x, weight, bias)
    return y if out is None else out.copy_(y)


def silu_mul_int(
    x: IntOperand, weight: IntWeight, bias: torch.Tensor | None = None, rounding: Rounding | None = None
) -> Operand:
    """`silu_mul(linear_int(…), rounding)` for W [2F, K] = gate | up; few rows may take one kernel, unrounded."""
    if isinstance(x, Halves):
        return _int().silu_mul_int(x, weight, bias)  # type: ignore[no-any-return]
    most = most_rows("int4") if rounding is None else MAX_ROWS
    if x.is_cuda and x.shape[0] <= most and x.dtype != torch.float32 and weight.rows % 32 == 0:
        return _int().silu_mul_int(x, weight, bias)  # type: ignore[no-any-return]
    return silu_mul(linear_int(x, weight, bias), rounding)


def multiplies_int8(x: torch.Tensor, weight: IntWeight) -> bool:
    """Whether `linear_int8` may serve: many rows of a 16-bit type, on a GPU. With fewer the weights' bytes decide, whatever
    they are multiplied with; a CPU would gain nothing."""
    many = x.is_cuda and x.shape[0] > MAX_ROWS and x.dtype != torch.float32
    return many and int8_activations.multiplies_int8(weight)


def linear_int8(
    x: torch.Tensor, weight: IntWeight, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`linear_int` with activations rounded to 8 bits, a scale a token, where `multiplies_int8`."""
    check(x.dim() == 2 and x.shape[1] == weight.columns, "x", x, "must be [T, K]")
    check(int8_activations.multiplies_int8(weight), "weight", weight.words, "must have 8 bits, a scale a row and 8 n rows")
    check(out is None or out.shape == (x.shape[0], weight.rows), "out", out, "must be [T, N]")
    return int8_activations.linear_int8(x, weight, bias, out)


def linear_codes(
    x: torch.Tensor, weight: CodeWeight, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`y = x · Wᵀ + b` with 4-bit codes, W[n, k] = table[code[n, k]] · scale[n, k // size] · factor[n].

    Args:
        x: [T, K], rows contiguous.  bias: [N] of x's dtype.  out: [T, N] of x's dtype, contiguous, to write into.
    Returns:
        [T, N] of x's dtype.
    """
    rows = weight.rows
    groups = kept_groups(weight.size, weight.columns) // (1 if weight.scale.dtype == torch.float32 else 4)
    check(x.dim() == 2 and x.shape[1] == weight.columns and x.stride(1) == 1, "x", x, "must be [T, K] with contiguous rows")
    check(weight.scale.shape == (groups, rows), "scale", weight.scale, "must be [G, N]")
    check(bias is None or bias.shape == (rows,), "bias", bias, "must be [N]")
    check(out is None or out.shape == (x.shape[0], rows), "out", out, "must be [T, N]")
    if x.is_cuda or FORCE_TRITON:
        return _codes().linear_codes(x, weight, bias, out)  # type: ignore[no-any-return]
    y = reference_codes.linear_codes(x, weight, bias)
    return y if out is None else out.copy_(y)


def silu_mul_codes(
    x: torch.Tensor, weight: CodeWeight, bias: torch.Tensor | None = None, rounding: Rounding | None = None
) -> Operand:
    """`silu_mul(linear_codes(…), rounding)` for W [2F, K] = gate | up; few rows may take one kernel, unrounded."""
    most = NARROW_ROWS if rounding is None else MAX_ROWS
    if x.is_cuda and x.shape[0] <= most and x.dtype != torch.float32 and weight.rows % 32 == 0:
        return _codes().silu_mul_codes(x, weight, bias)  # type: ignore[no-any-return]
    return silu_mul(linear_codes(x, weight, bias), rounding)
