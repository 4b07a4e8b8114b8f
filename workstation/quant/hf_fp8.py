"""`quant_method: "fp8"`: one scale a matrix, or one for 128 × 128 elements (`weight_block_size`).

    per tensor   X.weight F8_E4M3 [N, K], X.weight_scale (or weight_scale_inv) one number, static X.input_scale
    per block    X.weight F8_E4M3 [N, K], X.weight_scale_inv [⌈N/128⌉, ⌈K/128⌉]

Every scale is a multiplier, whatever its name says. A static activation scale is not used: each token is scaled by its own
largest value, so that nothing is clipped.
"""

from __future__ import annotations

from workstation.config_fields import Fields
from workstation.quant.description import FP8_KV, Description, Scheme, block_of_128, is_under, kv_cache_in, names_in
from workstation.quant.forms import HEAD_MODULE, Activations, Granularity

METHOD = "fp8"
STATIC_KV = "static"  # a word where other formats have a scheme
# `dequantize` asks transformers to widen the weights while loading; the weights mean the same either way.
_HARMLESS = ("quant_method", "dequantize")


def describe(config: Fields) -> Description:
    config.asked.update(_HARMLESS)
    if config.text("fmt", "e4m3") != "e4m3":
        raise config.refuse("fmt", "e4m3")
    if config.raw("expert_dtype", "fp8") != "fp8":
        raise config.refuse("expert_dtype", "fp8")
    activation = config.text("activation_scheme", "dynamic")
    if activation not in ("dynamic", "static"):
        raise config.refuse("activation_scheme", "dynamic or static")
    if config.raw("modules_to_convert") is not None:
        raise config.refuse("modules_to_convert", "null")
    scheme = _block(config, activation) if block_of_128(config, "weight_block_size") else _tensor(config)
    kept = (HEAD_MODULE, *names_in(config, "modules_to_not_convert"), *names_in(config, "ignored_layers"))
    kv_cache = FP8_KV if config.raw("kv_cache_scheme") == STATIC_KV else kv_cache_in(config)
    return Description(METHOD, (scheme,), lambda module: None if any(is_under(module, name) for name in kept) else scheme,
                       tuple(config.unasked()), kv_cache)


def _tensor(config: Fields) -> Scheme:
    if config.text("scale_fmt", "float") != "float":
        raise config.refuse("scale_fmt", "float without weight_block_size")
    return Scheme(Granularity.TENSOR, ("weight_scale", "weight_scale_inv"))


def _block(config: Fields, activation: str) -> Scheme:
    if activation == "static":
        raise config.refuse("activation_scheme", "dynamic when weight_block_size is given")
    scale_format = config.text("scale_fmt", "float")
    if scale_format not in ("float", "ue8m0"):
        raise config.refuse("scale_fmt", "float or ue8m0")
    powers = ("F8_E8M0", "U8") if scale_format == "ue8m0" else ()
    return Scheme(Granularity.BLOCK, ("weight_scale_inv",), Activations(quantised=False),
                  ("F32", "BF16", "F16", *powers))
