"""compressed-tensors: groups of layers, and their FP8 weights (`float-quantized`, `naive-quantized`); integers: see
`compressed_integers`, 4-bit floats: `compressed_floats`. FP8: X.weight F8_E4M3 [N, K], X.weight_scale.

    strategy tensor    one number           strategy channel    [N, 1]           strategy block    [⌈N/128⌉, ⌈K/128⌉]

What a group's `weights` and `input_activations` say decides, not the preset's name. Static activation scales
(X.input_scale) are not used: each token is scaled by its own largest value, so that nothing is clipped.
"""

from __future__ import annotations

import re
from typing import Any

from workstation.config_fields import Fields
from workstation.errors import ModelFolderError
from workstation.quant import compressed_floats
from workstation.quant.compressed_integers import INTEGER_FORMATS, PACKED_FORMAT, SIGNED_FORMATS, integer_weights
from workstation.quant.description import (
    FP8_KV,
    REGEX_PREFIX,
    AnyScheme,
    Description,
    Scheme,
    block_of_128,
    kv_cache_in,
    names_in,
    pattern,
)
from workstation.quant.forms import Activations, Granularity

METHOD = "compressed-tensors"
MODULE_CLASS = "Linear"
MAX_GROUPS = 256
_FORMATS = ("float-quantized", *INTEGER_FORMATS, *compressed_floats.FORMATS, "mixed-precision", "dense")
_HARMLESS = ("quant_method", "quantization_status", "global_compression_ratio", "version", "run_compressed")  # how it was made
_NOT_ARITHMETIC = ("actorder", "observer", "observer_kwargs", "scale_dtype", "zp_dtype")


def describe(config: Fields) -> Description:
    config.asked.update(_HARMLESS)
    if config.text("format", _FORMATS[0]) not in _FORMATS:
        raise config.refuse("format", f"one of {', '.join(_FORMATS)} (other formats are not served yet)")
    for name in ("sparsity_config", "transform_config"):
        value = config.raw(name, {})
        if not isinstance(value, dict) or (value and value.get("format", "") != "dense"):
            raise config.refuse(name, "empty: sparse and transformed weights are not served")
    kv_cache = kv_cache_in(config)
    groups = [] if kv_cache == FP8_KV and not config.raw("config_groups") else _groups(config)  # none: the cache alone
    ignored = Names(names_in(config, "ignore"), config.where)
    schemes = tuple(dict.fromkeys(scheme for _, scheme in groups))

    def scheme_of(module: str) -> AnyScheme | None:
        if ignored.names(module) or ignored.has_class:
            return None
        by_name = [scheme for targets, scheme in groups if targets.names(module)]
        by_class = [scheme for targets, scheme in groups if targets.has_class]
        return next(iter([*by_name, *by_class]), None)

    return Description(METHOD, schemes, scheme_of, tuple(config.unasked()), kv_cache)


class Names:
    """Layers by path, by `re:` pattern (matched from the path's start), or by the class `Linear`."""

    def __init__(self, names: tuple[str, ...], where: str) -> None:
        self.has_class = MODULE_CLASS in names
        self._paths = {name for name in names if not name.startswith(REGEX_PREFIX)}
        self._patterns: list[re.Pattern[str]] = [
            pattern(name.removeprefix(REGEX_PREFIX), where) for name in names if name.startswith(REGEX_PREFIX)]

    def names(self, module: str) -> bool:
        return module in self._paths or any(item.match(module) for item in self._patterns)


def _groups(config: Fields) -> list[tuple[Names, AnyScheme]]:
    value = config.raw("config_groups", {})
    if not isinstance(value, dict) or not value or len(value) > MAX_GROUPS:
        raise config.refuse("config_groups", f"an object of 1 to {MAX_GROUPS} groups")
    return [_group(name, group, config) for name, group in value.items()]


def _group(name: str, value: Any, config: Fields) -> tuple[Names, AnyScheme]:
    where = f"{config.where}.config_groups.{name}"
    if not isinstance(value, dict):
        raise ModelFolderError(f"{where} must be an object", param="config_groups")
    group = Fields(value, where)
    if group.raw("output_activations") is not None:
        raise group.refuse("output_activations", "null")
    if group.text("format", _FORMATS[0]) not in _FORMATS:
        raise group.refuse("format", f"one of {', '.join(_FORMATS)}")
    targets = Names(names_in(group, "targets"), where)
    weights, inputs = group.raw("weights"), group.raw("input_activations")
    if not isinstance(weights, dict):
        raise group.refuse("weights", "an object")
    arguments = Fields(weights, f"{where}.weights")
    if arguments.text("type", "int") == "int":
        if inputs is not None and not isinstance(inputs, dict):
            raise group.refuse("input_activations", "an object or null")
        activations = None if inputs is None else Fields(inputs, f"{where}.input_activations")
        layout = _layout(group, config, activations)
        if activations is not None and layout == PACKED_FORMAT:
            raise group.refuse("input_activations", f"null in the format {layout}")
        scheme = integer_weights(arguments, activations, layout)
        for fields in (arguments, *([activations] if activations else [])):
            _all_asked(fields)
        _all_asked(group)
        return targets, scheme
    if arguments.text("type", "int") == "float" and arguments.raw("num_bits") == compressed_floats.BITS:
        compressed_floats.check_inputs(group, inputs)
        codes = compressed_floats.float_codes(arguments)
        _all_asked(arguments)
        _all_asked(group)
        return targets, codes
    granularity = _weights(arguments)
    if inputs is not None:
        if not isinstance(inputs, dict):
            raise group.refuse("input_activations", "an object or null")
        _inputs(Fields(inputs, f"{where}.input_activations"))
    _all_asked(group)
    # Block scales are multiplied into 16-bit activations' sums; activations are not rounded there.
    quantised = inputs is not None and granularity is not Granularity.BLOCK
    return targets, Scheme(granularity, activations=Activations(quantised=quantised))


def _layout(group: Fields, config: Fields, inputs: Fields | None) -> str:
    """The format of a group of integers: its own word, else the folder's, else the one its activations ask for."""
    named = group.text("format", config.text("format", _FORMATS[0]))
    return named if named in INTEGER_FORMATS else PACKED_FORMAT if inputs is None else SIGNED_FORMATS[0]


def _weights(weights: Fields) -> Granularity:
    _eight_bit_float(weights)
    if weights.raw("dynamic", False) is not False:
        raise weights.refuse("dynamic", "false")
    strategy = weights.text("strategy", "tensor")
    if strategy not in list(Granularity):
        raise weights.refuse("strategy", "tensor, channel or block")
    is_block = strategy == Granularity.BLOCK
    if block_of_128(weights, "block_structure") != is_block:
        raise weights.refuse("block_structure", "[128, 128] with the strategy block, and null otherwise")
    if weights.raw("group_size") is not None and not is_block:
        raise weights.refuse("group_size", "null")
    _all_asked(weights)
    return Granularity(strategy)


def _inputs(inputs: Fields) -> None:
    _eight_bit_float(inputs)
    if inputs.text("strategy", "token") not in ("tensor", "token", "group"):
        raise inputs.refuse("strategy", "tensor, token or group")
    if inputs.raw("dynamic", False) not in (True, False):
        raise inputs.refuse("dynamic", "true or false")
    if inputs.raw("group_size") not in (None, 128):
        raise inputs.refuse("group_size", "null or 128")
    inputs.asked.add("block_structure")
    _all_asked(inputs)


def _eight_bit_float(args: Fields) -> None:
    if args.text("type", "int") != "float":
        raise args.refuse("type", "float or int")
    if args.raw("num_bits") != 8:
        raise args.refuse("num_bits", "8, or 4 for weights")
    if not args.boolean("symmetric", True):
        raise args.refuse("symmetric", "true")


def _all_asked(args: Fields) -> None:
    """A field of a scheme that is not understood may change its arithmetic."""
    for name in args.unasked():
        if name not in _NOT_ARITHMETIC:
            raise args.refuse(name, "absent: it is not known")
