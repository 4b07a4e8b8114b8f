"""Weights of 4-bit codes with a table of 16 values, on the device: NF4, FP4, MXFP4 and NVFP4.

A chunk of 128 columns is 32 words of 16 bits. Beside scales that are bytes codes lie as 4-bit integers do (`int_weights.py`).
Beside float32 ones, whose tables need looking up, the codes of two neighbouring columns share a byte, the first in its lower
half: words 2j and 2j + 1 of a chunk are the bytes of columns 2j, 32 + 2j, 64 + 2j and 96 + 2j and the ones behind them.

Scales that are bytes lie four neighbouring groups to a word of 32 bits, lowest bits first, so that a chunk's scales are one
word of a row (two for groups of 16), and words of neighbouring rows are neighbours. Groups narrower than a chunk fill up the
last one with zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from workstation.kernels import int_weights
from workstation.kernels.code_tables import CHUNK, ScaleKind, Table
from workstation.kernels.int_weights import UNIT

BITS = 4
PLANES = CHUNK // UNIT


class CodeWeight(NamedTuple):
    """`w[n, k] = table[code[n, k]] · (scale[n, k // size] · factor[n])`, N rows, K columns; `/ factor[n]` where it divides.

    words: [N, W] int16, the codes.  scale: [G, N] float32, or [G / 4, N] int32 holding four bytes of `kind` each.
    factor: [N] float32 or None for 1.  divides: the factor divides.  table: [16] float32, and the same as Python numbers.
    size: columns of a group, a divisor of K.  columns: K.
    """

    words: torch.Tensor
    scale: torch.Tensor
    factor: torch.Tensor | None
    table: torch.Tensor
    values: Table
    kind: ScaleKind
    size: int
    columns: int
    divides: bool = False

    @property
    def rows(self) -> int:
        return self.words.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.words.shape[0], self.columns

    def part(self, start: int, stop: int) -> CodeWeight:
        """Rows [start, stop), without a copy."""
        factor = None if self.factor is None else self.factor[start:stop]
        return self._replace(words=self.words[start:stop], scale=self.scale[:, start:stop], factor=factor)


def pack(codes: torch.Tensor, kind: ScaleKind) -> torch.Tensor:
    """codes [N, K] uint8 → words [N, W] int16, beside scales of this kind."""
    if kind is not ScaleKind.F32:
        return int_weights.pack(codes, BITS)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % CHUNK))
    pairs = (codes[:, 0::2] | codes[:, 1::2] << BITS).view(codes.shape[0], -1, PLANES, UNIT // 2)
    return pairs.transpose(2, 3).contiguous().view(torch.int16).view(codes.shape[0], -1)


def unpack(words: torch.Tensor, columns: int, kind: ScaleKind) -> torch.Tensor:
    """`pack`'s inverse: codes [N, columns] uint8."""
    if kind is not ScaleKind.F32:
        return int_weights.unpack(words, BITS, columns)
    pairs = words.view(torch.uint8).view(words.shape[0], -1, UNIT // 2, PLANES).transpose(2, 3)
    return torch.stack((pairs & 15, pairs >> BITS), -1).flatten(1)[:, :columns]


def pack_scales(scales: torch.Tensor, kept: torch.Tensor) -> None:
    """scales [N, G] float32 or uint8 → `kept`, a `CodeWeight.scale`, in place; the groups behind the last are zeros."""
    count = kept.shape[0] * (1 if kept.dtype == torch.float32 else 4)
    if count != scales.shape[1]:
        scales = torch.nn.functional.pad(scales, (0, count - scales.shape[1]))
    kept.copy_((scales if kept.dtype == torch.float32 else scales.contiguous().view(torch.int32)).t())


def unpack_scales(weight: CodeWeight) -> torch.Tensor:
    """[N, G] float32, the groups of whole rows."""
    kept = weight.scale.t().flatten()
    groups = weight.columns // weight.size
    if weight.kind is not ScaleKind.F32:
        kept = kept.view(torch.float8_e4m3fn if weight.kind is ScaleKind.E4M3 else torch.float8_e8m0fnu).float()
    return kept.view(weight.rows, -1)[:, :groups]
