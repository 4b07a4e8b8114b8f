"""compressed-tensors with integer weights: `pack-quantized` (W4A16, W8A16) and `int-quantized` (W8A8).

    X.weight_packed I32 [N, ⌈K·bits/32⌉]   X.weight_scale [N, G]   X.weight_shape I64 [2] = (N, K)
    X.weight_zero_point I32 [⌈N·bits/32⌉, G] unless symmetric   X.weight_g_idx I32 [K] where groups are not neighbours

    X.weight I8 [N, K]                X.weight_scale [N, G]          `int-quantized` and `naive-quantized`

Activations (W8A8) may be rounded where a row has one scale. Their static scales and zero points are not used: each token is
scaled by its own largest value.

What a group's `weights` say decides. `actorder` does not: X.weight_g_idx is there or not.
"""

from __future__ import annotations

from workstation.config_fields import Fields
from workstation.quant.integers import WHOLE_ROW, IntScheme, Packing

MAX_GROUP = 1 << 16


SIGNED_FORMATS, PACKED_FORMAT = ("int-quantized", "naive-quantized"), "pack-quantized"
INTEGER_FORMATS = (*SIGNED_FORMATS, PACKED_FORMAT)


def integer_weights(weights: Fields, inputs: Fields | None, layout: str) -> IntScheme:
    """A group's `weights` of type int. Raises ModelFolderError naming the field.

    inputs: its `input_activations`, None for 16 bits.  layout: its format.
    """
    bits = weights.integer("num_bits", 1, 16)
    if bits not in (4, 8):
        raise weights.refuse("num_bits", "4 or 8")
    if weights.raw("dynamic", False) is not False:
        raise weights.refuse("dynamic", "false")
    strategy = weights.text("strategy", "group" if weights.raw("group_size") is not None else "channel")
    if strategy not in ("group", "channel"):
        raise weights.refuse("strategy", "group or channel")
    size = weights.integer("group_size", -1, MAX_GROUP, -1)
    if size == 0 or (size > 0) != (strategy == "group"):
        raise weights.refuse("group_size", f"1 to {MAX_GROUP} with the strategy group, and null otherwise")
    if weights.raw("block_structure") is not None:
        raise weights.refuse("block_structure", "null")
    symmetric, group = weights.boolean("symmetric", True), size if size > 0 else WHOLE_ROW
    if inputs is not None:
        _eight_bits(inputs)
    if layout not in SIGNED_FORMATS:
        return IntScheme(Packing.PACKED, bits, group, symmetric)
    if bits != 8:
        raise weights.refuse("num_bits", f"8 in the format {layout}")
    if not symmetric:
        raise weights.refuse("symmetric", f"true in the format {layout}")
    return IntScheme(Packing.ROWS, bits, group, symmetric, activations=inputs is not None and group == WHOLE_ROW)


def _eight_bits(inputs: Fields) -> None:
    if inputs.text("type", "int") != "int":
        raise inputs.refuse("type", "int beside integer weights")
    if inputs.integer("num_bits", 1, 16) != 8:
        raise inputs.refuse("num_bits", "8")
    if inputs.text("strategy", "token") not in ("tensor", "token"):
        raise inputs.refuse("strategy", "tensor or token")
    if inputs.raw("dynamic", False) not in (True, False):
        raise inputs.refuse("dynamic", "true or false")
    if inputs.raw("group_size") is not None or inputs.raw("block_structure") is not None:
        raise inputs.refuse("group_size" if inputs.raw("group_size") is not None else "block_structure", "null")
    inputs.boolean("symmetric", True)
