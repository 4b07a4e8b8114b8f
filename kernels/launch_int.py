"""Products with integer weights on a GPU: which kernel serves a layer. Called through `ops.py`, which checks the shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import triton

from workstation.kernels import gemm_int, gemm_launch
from workstation.kernels.code_weights import CodeWeight
from workstation.kernels.gemm_launch import Call, Operands
from workstation.kernels.int_weights import UNIT, WORD_BITS, IntWeight
from workstation.kernels.launch import silu_mul
from workstation.kernels.launch_hopper import is_hopper
from workstation.kernels.quantized import Halves, IntOperand
from workstation.kernels.tuning import (
    CHANNELS,
    FEW_SPAN,
    HALVED_ROWS,
    MAX_ROWS,
    NARROW_ROWS,
    WIDE_ABOVE,
    WIDE_GROUP,
    GemmConfig,
    Output,
    Problem,
    Scheme,
    is_few,
    is_wide,
    most_rows,
)

# Of weights widened at a time, in bytes of x's type; the memory plan has the same (`quant.forms.SCRATCH_BYTES`).
SCRATCH_BYTES = 64 << 20
WIDENED_ROWS = 32
FUSED_ROWS_ZEROS = 16  # of activations, at most, where gate and up share a program and have zero points
ZEROS_ROWS = 64  # of a program, at most, where there are zero points
NARROW = 128  # columns of a group with zero points, below which rings lack registers
HOPPER_WORDS = 64  # of a row, the least step of `gemm_grouped_hopper.py`
NARROW_CHANNELS = 64  # of a program, at most, where groups are narrower than a chunk


def linear_int(
    x: IntOperand, weight: IntWeight, bias: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    if isinstance(x, Halves):
        return _of_halves(x, weight, bias, "linear", out)
    config = _choose(x, weight, "linear")
    if config is not None:
        return gemm_launch.run_linear(Operands(x, weight, bias=bias), config, x.dtype, out=out)
    return widened(x, weight, bias, out)


def silu_mul_int(x: IntOperand, weight: IntWeight, bias: torch.Tensor | None) -> torch.Tensor:
    if isinstance(x, Halves):
        return _of_halves(x, weight, bias, "silu_mul", None)
    config = _choose(x, weight, "silu_mul") if _fuses(x, weight) else None
    if config is not None:
        return gemm_launch.run_linear(Operands(x, weight, bias=bias), config, x.dtype, silu=True)
    made: torch.Tensor = silu_mul(linear_int(x, weight, bias, None))
    return made


def takes_halves(tokens: int, dtype: torch.dtype, weight: IntWeight) -> bool:
    """For whole tiles of channels, and scales that TMA can read: rows of whole 16 bytes."""
    whole = weight.rows % (2 * CHANNELS) == 0 and weight.scale.stride(0) % 8 == 0 and weight.scale.itemsize == 2
    return 0 < tokens <= HALVED_ROWS and is_hopper(weight.words.device) and whole and _serves_few(weight, dtype)


def _of_halves(
    x: Halves, weight: IntWeight, bias: torch.Tensor | None, output: Output, out: torch.Tensor | None
) -> torch.Tensor:
    config = _cached_choice("int4_halves", output, x.tokens, weight.rows, weight.columns, x.device, True)
    return gemm_launch.run_linear(Operands(x, weight, bias=bias), config, torch.bfloat16, silu=output == "silu_mul", out=out)


def _fuses(x: torch.Tensor, weight: IntWeight) -> bool:
    """Whether one program has registers for gate and up: not with a sum for every 32 columns, nor beside zero points with many
    rows, but for rings of so many that weights are scaled first."""
    if x.shape[0] > MAX_ROWS:
        return weight.scales_first(x.dtype)
    return _step(weight, 0) > 0 and (weight.zero is None or x.shape[0] <= FUSED_ROWS_ZEROS)


def scheme_of(weight: IntWeight) -> Scheme:
    return "int4" if weight.bits == 4 else "int8_weight"


def _choose(x: torch.Tensor, weight: IntWeight, output: Output) -> GemmConfig | None:
    """The configuration of `int_gemm_kernel`; None where weights are widened for the library."""
    tokens = x.shape[0]
    if tokens == 0:
        return GemmConfig("dot", block_k=_chunk(weight.bits))  # nothing will be launched
    scheme = scheme_of(weight)
    if tokens > most_rows(scheme) or weight.size % UNIT or weight.rows % 16 or weight.columns % 16 or x.stride(0) % 16:
        return None
    if x.data_ptr() % 16 or (x.is_cuda and x.dtype == torch.float32):
        return None
    if tokens > WIDE_ABOVE:  # one choice for all
        if _serves_wide(weight, x.dtype):
            tokens = WIDE_ABOVE + 1
        elif tokens <= NARROW_ROWS and weight.zero is None and weight.scales_first(x.dtype):
            tokens = WIDE_ABOVE
        else:
            return None
    rings = rings_serve(weight, output)
    config = _cached_choice(scheme, output, tokens, weight.rows, weight.columns, x.device, rings)
    unfit = is_wide(output, config) and not _serves_wide(weight, x.dtype)
    return None if config.kind == "library" or unfit else fitted(config, weight, x.dtype)


def rings_serve(weight: IntWeight, output: Output) -> bool:
    """Whether `gemm_grouped_hopper.py` can read the weight: its groups and steps must fit, and TMA wants rows of 16 bytes. Zero
    points of narrow groups take more registers than there are."""
    groups = suits_groups(weight, HOPPER_WORDS * WORD_BITS // weight.bits)
    tiles = output == "linear" or not isinstance(weight.words, torch.Tensor) or weight.rows % (2 * CHANNELS) == 0
    narrow = weight.zero is not None and weight.size < NARROW
    return groups and tiles and not narrow and (not isinstance(weight.scale, torch.Tensor) or weight.scale.stride(0) % 8 == 0)


def _serves_few(weight: IntWeight, dtype: torch.dtype) -> bool:
    """Whether `gemm_few_hopper.py` serves: 4 bits around the middle, groups of whole chunks, activations of eight bits."""
    whole = weight.size % FEW_SPAN == 0 and weight.columns % FEW_SPAN == 0
    return dtype == torch.bfloat16 and weight.bits == 4 and weight.zero is None and whole


def _serves_wide(weight: IntWeight, dtype: torch.dtype) -> bool:
    """Whether programs of 256 channels serve: registers and shared memory have no room for a group's sums, zero points, or
    more than one scale for 128 columns."""
    return weight.scales_first(dtype) and weight.zero is None and weight.size == WIDE_GROUP


def suits_groups(weight: IntWeight | CodeWeight, step: int) -> bool:
    """Whether a step of so many columns holds whole groups, or lies in one."""
    return weight.size == weight.columns or weight.size % step == 0 or step % weight.size == 0


@cache
def _cached_choice(
    scheme: Scheme, output: Output, m: int, n: int, k: int, device: torch.device, rings: bool
) -> GemmConfig:
    return gemm_launch.chosen(Problem(scheme, output, m, n, k), device, rings=rings)


def _chunk(bits: int) -> int:
    """Columns of a chunk of the layout, the least step along K."""
    return UNIT * WORD_BITS // bits


def fitted(config: GemmConfig, weight: IntWeight, dtype: torch.dtype) -> GemmConfig:
    """The configuration with a step that groups allow, within one or else a single chunk of the layout, and with as many rows
    as zero points leave room for, in registers and in shared memory. A ring's step holds whole groups, or lies in one; few rows
    get another ring where the weight or activations of `dtype` are not what theirs can read."""
    if config.kind == "hopper":
        if is_few(config) and not _serves_few(weight, dtype):
            config = replace(config, block_m=8)
        whole = suits_groups(weight, config.block_k)
        return config if whole else replace(config, block_k=HOPPER_WORDS * WORD_BITS // weight.bits)
    if weight.zero is not None:
        config = replace(config, block_m=min(config.block_m, ZEROS_ROWS))
    step = _step(weight, config.block_k)
    if step:
        return replace(config, block_k=step)
    return replace(config, block_k=_chunk(weight.bits), block_n=min(config.block_n, NARROW_CHANNELS))


def _step(weight: IntWeight, wanted: int) -> int:
    """The longest step up to `wanted`, and at least a chunk of the layout, that lies within one group; 0 where none does."""
    chunk = _chunk(weight.bits)
    step = max(wanted, chunk)
    while step >= chunk:
        if weight.size == weight.columns or weight.size % step == 0:
            return step
        step //= 2
    return 0


def int_call(operands: Operands, config: GemmConfig, out: Any, m: int, n: int, k: int, *, silu: bool) -> Call:
    """The kernel for a weight of n channels (2n with silu), writing out [splits, m, n]; `hopper` sums its splits: [m, n].

    Dtypes may stand for tensors.
    """
    weight: IntWeight = operands.weight
    if config.kind == "hopper":
        from workstation.kernels.launch_few_hopper import few_rows_call  # Gluon, for one kind of GPU only
        from workstation.kernels.launch_grouped_hopper import grouped_call

        if is_few(config):
            return Call(*few_rows_call(operands.x, weight, operands.bias, out, config, m, n, k, silu=silu))
        return Call(*grouped_call(operands.x, weight, operands.bias, out, config, m, n, k, silu=silu))
    chunk = gemm_launch.chunk_size(k, config)
    kept = isinstance(weight.words, torch.Tensor)
    x_stride = operands.x.stride(0) if kept else k
    w_stride = weight.words.stride(0) if kept else -(-k // _chunk(weight.bits)) * UNIT
    scale_stride = weight.scale.stride(0) if kept else n
    zero_stride = weight.zero.stride(0) if kept and weight.zero is not None else n
    whole = weight.size == weight.columns
    row_tiles = triton.cdiv(m, config.block_m)
    options: dict[str, Any] = {"num_warps": config.warps, "num_stages": config.stages, "SILU": silu, "PDL": config.pdl}
    options |= {"BLOCK_N": config.block_n, "BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "STAGES": config.stages}
    options |= {"BITS": weight.bits, "EVEN_K": k % config.block_k == 0, "EVICT": "evict_first" if row_tiles == 1 else ""}
    groups = gemm_int.WHOLE if whole else gemm_int.PLANES if weight.size % config.block_k else gemm_int.STEPS
    options["GROUPS"] = groups.value
    if config.pdl:
        options["launch_pdl"] = True
    arguments = (operands.x, weight.words, out, weight.scale, weight.zero, operands.bias, m, n, k, chunk, x_stride, w_stride,
                 scale_stride, zero_stride, weight.size)  # fmt: skip
    grid = (triton.cdiv(n, config.block_n) * row_tiles, triton.cdiv(k, chunk))
    return Call(gemm_int.int_gemm_kernel, grid, arguments, options)


def widen_call(weight: IntWeight, out: Any) -> Call:
    """`out[:] = weight` for out [N, K], contiguous."""
    kept = isinstance(weight.words, torch.Tensor)
    parts = (weight.words, weight.scale, weight.zero)
    strides = [part.stride(0) if kept and part is not None else weight.columns for part in parts]
    grid = (triton.cdiv(weight.rows, WIDENED_ROWS) if kept else 1, triton.cdiv(weight.columns, _chunk(weight.bits)))
    rows = weight.rows if kept else WIDENED_ROWS
    arguments = (weight.words, out, weight.scale, weight.zero, rows, weight.columns, *strides, weight.size)
    return Call(gemm_int.widen_kernel, grid, arguments, {"BITS": weight.bits, "ROWS": WIDENED_ROWS, "num_warps": 4})


def widened(
    x: torch.Tensor, weight: IntWeight | CodeWeight, bias: torch.Tensor | None, out: torch.Tensor | None,
    widen: Callable[[Any, torch.Tensor], Call] = widen_call,
) -> torch.Tensor:
    """Part by part through one buffer: `widen`, then the library's product into its columns of the result."""
    if out is None:
        out = torch.empty(x.shape[0], weight.rows, dtype=x.dtype, device=x.device)
    if not x.shape[0]:
        return out
    most = max(16, SCRATCH_BYTES // (weight.columns * x.element_size()) // 16 * 16)
    buffer = torch.empty(min(most, weight.rows), weight.columns, dtype=x.dtype, device=x.device)
    for start in range(0, weight.rows, most):
        stop = min(start + most, weight.rows)
        wide = buffer[: stop - start]
        widen(weight.part(start, stop), wide).launch()
        if bias is None:
            torch.mm(x, wide.t(), out=out[:, start:stop])
        else:
            torch.addmm(bias[start:stop], x, wide.t(), out=out[:, start:stop])
    return out
