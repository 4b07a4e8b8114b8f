"""compressed-tensors with integer weights and 16-bit activations (`pack-quantized`: W4A16, W8A16).

    X.weight_packed I32 [N, ⌈K·bits/32⌉]   X.weight_scale [N, G]   X.weight_shape I64 [2] = (N, K)
    X.weight_zero_point I32 [⌈N·bits/32⌉, G] unless symmetric   X.weight_g_idx I32 [K] where groups are not neighbours

What a group's `weights` say decides. `actorder` does not: X.weight_g_idx is there or not.
"""

from __future__ import annotations

from workstation.config_fields import Fields
from workstation.quant.integers import WHOLE_ROW, IntScheme, Packing

MAX_GROUP = 1 << 16


def integer_weights(weights: Fields) -> IntScheme:
    """A group's `weights` of type int. Raises ModelFolderError naming the field."""
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
    return IntScheme(Packing.PACKED, bits, size if size > 0 else WHOLE_ROW, weights.boolean("symmetric", True))
