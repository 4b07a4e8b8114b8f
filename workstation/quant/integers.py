"""Weights as integers with a scale a group: how checkpoints pack them, and what is kept on the device. No torch.

    w[n, k] = (code[n, k] − zero[k // size, n]) · scale[k // size, n]        codes unsigned, 4 or 8 bits

Formats with signed codes add 2^(bits−1) before they pack, so their codes are these, and a symmetric weight has the zero point
2^(bits−1) everywhere: it is not kept. `kernels/int_weights.py` says how codes lie in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

UNIT = 32  # columns that lie side by side; `kernels.int_weights` has the same
WORD_BITS = 16
SCALE_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
WHOLE_ROW = 0


class Packing(StrEnum):
    """How a checkpoint stores the codes. N rows, K columns, G groups, p = 32 / bits codes a word, lowest bits first."""

    PACKED = "pack-quantized"  # weight_packed [N, ⌈K/p⌉], weight_scale [N, G], weight_zero_point [⌈N/p⌉, G]
    GPTQ = "gptq"  # qweight [K/p, N], scales [G, N], qzeros [G, N/p] holding zero − 1, g_idx [K]
    GPTQ_V2 = "gptq_v2"  # the same with qzeros holding zero
    ROWS = "int-quantized"  # weight I8 [N, K], signed, weight_scale [N, G]
    BNB = "bitsandbytes int8"  # weight I8 [N, K], signed, SCB [N] holding 127 times the scale
    AWQ = "awq"  # qweight [K, N/p], scales [G, N], qzeros [G, N/p]; the codes of a word in an order of their own


@dataclass(frozen=True, slots=True)
class Names:
    """The last names of a packing's tensors beside a layer."""

    codes: str
    scale: str
    zero: str
    order: str  # the group of each column


_GPTQ_NAMES = Names("qweight", "scales", "qzeros", "g_idx")
NAMES = {
    Packing.PACKED: Names("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"),
    Packing.ROWS: Names("weight", "weight_scale", "weight_zero_point", ""), Packing.BNB: Names("weight", "SCB", "", ""),
    Packing.GPTQ: _GPTQ_NAMES, Packing.GPTQ_V2: _GPTQ_NAMES, Packing.AWQ: _GPTQ_NAMES,
}
SIGNED = (Packing.ROWS, Packing.BNB)  # their codes are called as plain weights are
CODE_NAMES = tuple(dict.fromkeys(names.codes for packing, names in NAMES.items() if packing not in SIGNED))


@dataclass(frozen=True, slots=True)
class IntScheme:
    """What a description says about a group of layers.

    Attributes:
        group_size: columns a scale covers, `WHOLE_ROW` for all of them.
        activations: may be rounded to 8 bits, each token by its own largest value.
    """

    packing: Packing
    bits: int
    group_size: int
    symmetric: bool
    activations: bool = False


@dataclass(frozen=True, slots=True)
class Groups:
    """The numbers of one matrix on the device.

    Attributes:
        bits: of a code.  size: columns a scale covers, `WHOLE_ROW` for all.  zero_points: whether there are some.
        scale_dtype: as stored, in safetensors' words: scales keep their bits.
        order: where groups are not neighbours (act-order), the columns by group, int32; else empty.
    """

    bits: int
    size: int
    zero_points: bool
    scale_dtype: str
    order: bytes = b""

    def count(self, columns: int) -> int:
        """Groups of a row."""
        return columns // self.size if self.size else 1

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes on the device: codes, scales, zero points (as wide as the codes), order."""
        count = self.count(columns)
        zeros = count * rows * self.bits // 8 if self.zero_points else 0
        return 2 * rows * words(self.bits, columns) + count * rows * SCALE_BYTES[self.scale_dtype] + zeros + len(self.order)


def words(bits: int, columns: int) -> int:
    """16-bit words a row of codes takes: whole chunks of `UNIT` words."""
    return -(-columns // (UNIT * WORD_BITS // bits)) * UNIT


def stored_shapes(packing: Packing, bits: int, rows: int, columns: int, groups: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a packing's tensors by last name."""
    names, per = NAMES[packing], 32 // bits
    if packing is Packing.PACKED:
        return {names.codes: (rows, -(-columns // per)), names.scale: (rows, groups), names.zero: (-(-rows // per), groups),
                names.order: (columns,)}
    if packing in SIGNED:
        return {names.codes: (rows, columns), names.scale: (rows, groups) if packing is Packing.ROWS else (rows,)}
    codes = (columns, rows // per) if packing is Packing.AWQ else (columns // per, rows)
    return {names.codes: codes, names.scale: (groups, rows), names.zero: (groups, rows // per), names.order: (columns,)}
