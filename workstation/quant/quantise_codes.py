"""16- and 32-bit weights → 4-bit codes: the table's entry nearest to w / absmax, absmax the largest |w| of a group."""

from __future__ import annotations

import torch

from workstation.kernels.code_weights import CodeWeight, pack, pack_scales

CHUNK_ELEMENTS = 1 << 22
LEAST = 1e-38  # of what is divided by: a group of zeros gets the code of zero


def quantise_codes(weight: torch.Tensor, into: CodeWeight) -> None:
    """Quantise a matrix into given tensors, a few rows at a time.

    Args:
        weight: [N, K] float32, bfloat16 or float16.  into: with a rising table from −1 to 1 and float32 scales.

    As bitsandbytes quantises: w is multiplied by 1 / absmax, rounded, and halfway between two entries the lower one is taken.
    A group that holds a value which is not finite gets a scale which is not finite.
    """
    bounds = (into.table[:-1] + into.table[1:]) / 2
    rows = max(1, CHUNK_ELEMENTS // max(1, into.columns))
    for start in range(0, into.rows, rows):
        part = into.part(start, min(start + rows, into.rows))
        values = weight[start:start + rows].float().view(part.rows, -1, into.size)
        absmax = values.abs().amax(2)
        scaled = values * (1.0 / absmax.clamp(min=LEAST))[:, :, None]
        codes = torch.bucketize(scaled.clamp_(-1, 1), bounds, out_int32=True)
        part.words.copy_(pack(codes.to(torch.uint8).flatten(1), part.kind))
        pack_scales(absmax, part.scale)
