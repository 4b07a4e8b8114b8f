"""compressed-tensors with 4-bit floats (e2m1): `mxfp4-pack-quantized` and `nvfp4-pack-quantized`. Two codes a byte, the first
in the lower half.

    MXFP4   X.weight_packed U8 [N, K/2]   X.weight_scale U8 [N, K/32], exponents (e8m0)
    NVFP4   X.weight_packed U8 [N, K/2]   X.weight_scale F8_E4M3 [N, K/16]   X.weight_global_scale F32 [1], a divisor

Activations stay 16-bit, whatever `input_activations` says: 4-bit products need hardware of their own.
"""

from __future__ import annotations

from typing import Any

from workstation.config_fields import Fields
from workstation.quant.codes import MX_SIZE, NV_SIZE, CodePacking, CodeScheme

BITS = 4
FORMATS = (CodePacking.NVFP4.value, CodePacking.MXFP4.value)
_STRATEGIES = {"tensor_group": (NV_SIZE, CodePacking.NVFP4), "group": (MX_SIZE, CodePacking.MXFP4)}
_SCALES = {CodePacking.NVFP4: ("float8_e4m3fn",), CodePacking.MXFP4: ("uint8", "float8_e8m0fnu")}


def float_codes(weights: Fields) -> CodeScheme:
    """A group's `weights` of type float and 4 bits. Raises ModelFolderError naming the field."""
    strategy = weights.text("strategy", "tensor_group")
    if strategy not in _STRATEGIES:
        raise weights.refuse("strategy", "tensor_group (NVFP4) or group (MXFP4) with 4-bit floats")
    size, packing = _STRATEGIES[strategy]
    if weights.raw("group_size") != size or isinstance(weights.raw("group_size"), bool):
        raise weights.refuse("group_size", f"{size} with the strategy {strategy}")
    if not weights.boolean("symmetric", True):
        raise weights.refuse("symmetric", "true")
    if weights.raw("dynamic", False) is not False:
        raise weights.refuse("dynamic", "false")
    if weights.raw("block_structure") is not None:
        raise weights.refuse("block_structure", "null")
    scale = weights.text("scale_dtype", _SCALES[packing][0]).removeprefix("torch.")
    if scale not in _SCALES[packing]:
        raise weights.refuse("scale_dtype", f"{' or '.join(_SCALES[packing])} with the strategy {strategy}")
    return CodeScheme(packing)


def check_inputs(group: Fields, inputs: Any) -> None:
    """What a group says about activations, which are not rounded: only what it may be is held."""
    if inputs is None:
        return
    if not isinstance(inputs, dict) or inputs.get("num_bits") not in (BITS, 8) or inputs.get("type") != "float":
        raise group.refuse("input_activations", "null, or floats of 4 or 8 bits, with 4-bit float weights")
