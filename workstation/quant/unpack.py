"""Stored integer tensors → codes, zero points and scales by (row, column) and (group, row). Words are little-endian.

    w[n, k] = (code[n, k] − zero[g, n]) · scale[g, n]      codes and zero points unsigned
"""

from __future__ import annotations

import torch

from workstation.quant.integers import Packing

CHUNK_ELEMENTS = 1 << 24
# The nibbles of an AWQ word, lowest first, hold its columns 0, 2, 4, 6, 1, 3, 5, 7: where each column is found.
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def fields(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, C] int32 → [R, C · 32 / bits] uint8, lowest bits first."""
    found = stored.contiguous().view(torch.uint8)
    return found if bits == 8 else torch.stack((found & 15, found >> 4), -1).flatten(1)


def codes(stored: torch.Tensor, packing: Packing, bits: int, rows: slice, columns: int) -> torch.Tensor:
    """The codes of some rows, [n, K] uint8. rows: between multiples of 8, the last of which may be the end."""
    if packing is Packing.PACKED:
        return fields(stored[rows], bits)[:, :columns]
    if packing is Packing.AWQ:
        return _awq(stored[:, rows.start // 8:-(-rows.stop // 8)]).t()
    return fields(stored[:, rows].t(), bits)


def zeros(stored: torch.Tensor, packing: Packing, bits: int, rows: int) -> torch.Tensor:
    """[G, N] uint8."""
    if packing is Packing.PACKED:
        return fields(stored.t(), bits)[:, :rows]
    if packing is Packing.AWQ:
        return _awq(stored)
    found = fields(stored, bits)
    return found + 1 & (1 << bits) - 1 if packing is Packing.GPTQ else found


def _awq(stored: torch.Tensor) -> torch.Tensor:
    """[R, C] int32 → [R, 8 · C] uint8, columns in order."""
    places = torch.tensor(AWQ_PLACES, device=stored.device)
    return fields(stored, 4).view(stored.shape[0], -1, 8)[:, :, places].flatten(1)
