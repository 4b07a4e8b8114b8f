"""Products of 8-bit integers with activations rounded to 8 bits, a scale a token, by the library's integer GEMM.

    x8[t, k] = round(x[t, k] / s[t]), s[t] = max_k |x[t, k]| / 127
    y[t, n]  = s[t] · scale[n] · Σ_k x8[t, k] · (code[n, k] − 128)         the sum exact, in int32

Codes lie in chunks of 32 words, two columns a word (`int_weights.py`): x8 is put into that order, which leaves the sum as it
is, so that the codes only lose their offset, in a buffer, on their way to the library. Plain torch: a CPU computes the same.
"""

from __future__ import annotations

import torch

from workstation.kernels.int_weights import UNIT, IntWeight

INT8_MAX = 127.0
LEAST_TOKENS = 17  # of the library on CUDA
MULTIPLE = 8  # of rows, there
OFFSET_BIT = 0x80  # of a code without its sign's offset
SCRATCH_BYTES = 32 << 20  # of codes, and of sums, at a time: together what the memory plan keeps for widened weights
ROUNDED_ELEMENTS = 1 << 23  # of activations in float32 at a time


def multiplies_int8(weight: IntWeight) -> bool:
    """Whether the weight is one whose rows have one scale and no zero point, and a size the library takes."""
    return weight.bits == 8 and weight.zero is None and weight.size == weight.columns and weight.rows % MULTIPLE == 0


def linear_int8(
    x: torch.Tensor, weight: IntWeight, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [T, K] → [T, N] of x's dtype, for a weight that `multiplies_int8`; sums in int32, scales in float32.

    A token that holds NaN or infinity gives NaN.
    """
    tokens = x.shape[0]
    x8, scale = round_tokens(x)
    if tokens < LEAST_TOKENS:
        x8 = torch.nn.functional.pad(x8, (0, 0, 0, LEAST_TOKENS - tokens))
    if out is None:
        out = torch.empty(tokens, weight.rows, dtype=x.dtype, device=x.device)
    wide = x8.shape[1]
    step = max(MULTIPLE, min(SCRATCH_BYTES // wide, SCRATCH_BYTES // (4 * len(x8))) // MULTIPLE * MULTIPLE)
    for start in range(0, weight.rows, step):
        part = slice(start, min(start + step, weight.rows))
        signed = (weight.words[part].view(torch.uint8) ^ OFFSET_BIT).view(torch.int8)
        sums = torch._int_mm(x8, signed.t())[:tokens].float()
        sums.mul_(scale[:, None]).mul_(weight.scale[0, part].float())
        out[:, part] = sums if bias is None else sums.add_(bias[part])
    return out


def round_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x8 [T, K'] int8 in the order of the codes' bytes, K' the columns filled up to whole chunks; s [T] float32).

    A token of zeros has the scale 1; one that is not finite has the scale NaN.
    """
    tokens, columns = x.shape
    chunk = 2 * UNIT
    wide = -(-columns // chunk) * chunk
    found = torch.zeros(tokens, wide, dtype=torch.int8, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    step = max(1, ROUNDED_ELEMENTS // wide)
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        values = x[part].float()
        largest = values.abs().amax(1)
        most = largest.new_full((), INT8_MAX)  # by a plain number CUDA does not divide: it multiplies by the reciprocal
        factor = torch.where(largest == 0, 1.0, largest / most)
        scale[part] = torch.where(factor.isfinite(), factor, torch.nan)
        found[part, :columns] = (values / factor[:, None]).round_().nan_to_num_(0.0).to(torch.int8)
    # A chunk's bytes are its columns 0, 32, 1, 33, …
    return found.view(tokens, -1, 2, UNIT).transpose(2, 3).reshape(tokens, wide), scale
