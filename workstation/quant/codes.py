"""Weights as 4-bit codes with a table of values and a scale a group: how checkpoints store them, and what is kept. No torch.

    w[n, k] = table[code[n, k]] · scale[n, k // size] · factor[n]        or / factor[n]

Every format keeps two codes a byte; bitsandbytes puts the first of them into the upper half, all others into the lower.
`kernels/code_weights.py` says how codes and scales lie in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from workstation.kernels.code_tables import E2M1, ScaleKind, Table, kept_groups
from workstation.quant.integers import words

MX_SIZE, NV_SIZE = 32, 16


class CodePacking(StrEnum):
    """How a checkpoint stores the codes. N rows, K columns."""

    BNB = "bitsandbytes"  # weight [⌈NK/2⌉, 1], weight.absmax [⌈NK/block⌉], weight.quant_map [16], weight.quant_state.…
    MXFP4 = "mxfp4-pack-quantized"  # weight_packed [N, K/2], weight_scale [N, K/32]
    NVFP4 = "nvfp4-pack-quantized"  # weight_packed [N, K/2], weight_scale [N, K/16], weight_global_scale, a divisor
    MODELOPT = "modelopt NVFP4"  # weight [N, K/2], weight_scale [N, K/16], weight_scale_2, a multiplier


@dataclass(frozen=True, slots=True)
class CodeNames:
    """The last names of a packing's tensors beside a layer; factor: "" where there is none."""

    codes: str
    scale: str
    factor: str = ""


CODE_TENSORS = {
    CodePacking.BNB: CodeNames("weight", "weight.absmax"),
    CodePacking.MXFP4: CodeNames("weight_packed", "weight_scale"),
    CodePacking.NVFP4: CodeNames("weight_packed", "weight_scale", "weight_global_scale"),
    CodePacking.MODELOPT: CodeNames("weight", "weight_scale", "weight_scale_2"),
}


@dataclass(frozen=True, slots=True)
class CodeScheme:
    """What a description says about a group of layers. table, block: bitsandbytes' own, for layers without tensors."""

    packing: CodePacking
    table: Table = E2M1
    block: int = 0


@dataclass(frozen=True, slots=True)
class Blocks:
    """bitsandbytes: a scale covers `size` weights of the matrix row after row, perhaps beyond a row's end.

    nested_size: where absmax are bytes themselves, how many of them share a scale; 0: they are float32.
    offset: what is added to each of them then.
    """

    size: int
    nested_size: int = 0
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Codes:
    """One matrix on the device.

    Attributes:
        table: what the codes stand for.  size: columns a scale covers.  scale: what a scale is.
        factor: whether each row has one.  divides: whether it divides.
    """

    table: Table
    size: int
    scale: ScaleKind
    factor: bool = False
    divides: bool = False

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes on the device: codes, scales, factors, and the table as float32."""
        scales = rows * kept_groups(self.size, columns) * self.scale.nbytes
        return 2 * rows * words(4, columns) + scales + 4 * rows * self.factor + 4 * len(self.table)


MX = Codes(E2M1, MX_SIZE, ScaleKind.E8M0)
NV = Codes(E2M1, NV_SIZE, ScaleKind.E4M3, factor=True)
NV_DIVIDED = Codes(E2M1, NV_SIZE, ScaleKind.E4M3, factor=True, divides=True)
KEPT = {CodePacking.MXFP4: MX, CodePacking.NVFP4: NV_DIVIDED, CodePacking.MODELOPT: NV}
