"""Integer weights on the device, and how their codes lie in memory.

A row of codes is cut into chunks of 32 words of 16 bits. Word j of a chunk holds, lowest bits first, the codes of the columns
j, 32 + j, 64 + j and 96 + j of the chunk (4 bits; a chunk is 128 columns) or j and 32 + j (8 bits; 64 columns). So one shift
and one mask of a tile of words give a tile of neighbouring columns, a word being as wide as the 16-bit floats it turns into:
it lies in registers where tensor cores want those. The last chunk of a row is filled up with zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

UNIT = 32  # words of a chunk, and neighbouring columns
WORD_BITS = 16


class IntWeight(NamedTuple):
    """`w[n, k] = (code[n, k] − zero[k // size, n]) · scale[k // size, n]`, N rows, K columns, G groups.

    words: [N, W] int16, the codes.  scale: [G, N] float16, bfloat16 or float32.
    zero: uint8, [G, N / 2] (4 bits; an even row in the lower half of a byte) or [G, N] (8 bits); None: 2^(bits−1).
    bits: 4 or 8.  size: columns of a group, a divisor of K.  columns: K.
    """

    words: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int
    size: int
    columns: int

    @property
    def rows(self) -> int:
        return self.words.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.words.shape[0], self.columns

    def scales_first(self, dtype: torch.dtype) -> bool:
        """Whether products may have weights that were scaled in activations' `dtype`: rounded as if widened to it, there being
        more than a scale a row."""
        scale = self.scale if isinstance(self.scale, torch.dtype) else self.scale.dtype  # a type, in kernels only compiled
        return scale == dtype and self.size < self.columns

    def part(self, start: int, stop: int) -> IntWeight:
        """Rows [start, stop), both even, without a copy."""
        zero = self.zero
        if zero is not None:
            zero = zero[:, start // 2 : stop // 2] if self.bits == 4 else zero[:, start:stop]
        return self._replace(words=self.words[start:stop], scale=self.scale[:, start:stop], zero=zero)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes [N, K] uint8 → words [N, W] int16."""
    per = WORD_BITS // bits
    rows, columns = codes.shape
    chunks = -(-columns // (per * UNIT))
    if columns != chunks * per * UNIT:
        codes = torch.nn.functional.pad(codes, (0, chunks * per * UNIT - columns))
    planes = codes.view(rows, chunks, per, UNIT)
    if bits == 8:
        halves = [planes[:, :, 0], planes[:, :, 1]]
    else:
        halves = [planes[:, :, 0] | planes[:, :, 1] << 4, planes[:, :, 2] | planes[:, :, 3] << 4]
    return torch.stack(halves, -1).view(torch.int16).view(rows, chunks * UNIT)


def unpack(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """words [N, W] int16 → codes [N, columns] uint8."""
    rows = words.shape[0]
    halves = words.view(torch.uint8).view(rows, -1, UNIT, 2)
    planes = [halves[..., 0], halves[..., 1]]
    if bits == 4:
        planes = [plane >> shift & 15 for plane in planes for shift in (0, 4)]
    return torch.stack(planes, 2).view(rows, -1)[:, :columns]


def pack_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """zeros [G, N] uint8 → as they are kept."""
    return zeros if bits == 8 else zeros[:, 0::2] | zeros[:, 1::2] << 4


def unpack_zeros(zero: torch.Tensor, bits: int) -> torch.Tensor:
    """`pack_zeros`' inverse."""
    return zero if bits == 8 else torch.stack((zero & 15, zero >> 4), -1).flatten(1)
