"""ModelOpt's FP8 family and NVFP4, described in config.json or in hf_quant_config.json beside it.

    FP8                         X.weight_scale one number, X.input_scale one number
    FP8_PER_CHANNEL_PER_TOKEN   X.weight_scale [N] or [N, 1]
    FP8_PB_WO                   X.weight_scale [⌈N/128⌉, 1, ⌈K/128⌉, 1]; activations stay 16-bit
    NVFP4, W4A16_NVFP4          X.weight U8 [N, K/2], two e2m1 codes a byte, the first in the lower half,
                                X.weight_scale F8_E4M3 [N, K/16], X.weight_scale_2 F32, a multiplier; activations stay 16-bit
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from workstation.config_fields import Fields
from workstation.model_folder import shown
from workstation.quant.codes import NV_SIZE, CodePacking, CodeScheme
from workstation.quant.description import FP8_KV, MAX_REPEATS, AnyScheme, Description, Scheme, kv_cache_in, names_in
from workstation.quant.forms import HEAD_MODULE, Activations, Granularity

METHOD = "modelopt"
BESIDE = "hf_quant_config.json"
_SCHEMES = {
    "FP8": Scheme(Granularity.TENSOR),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme(Granularity.CHANNEL),
    "FP8_PB_WO": Scheme(Granularity.BLOCK, activations=Activations(quantised=False)),
    "FP8_BLOCK_SCALES": Scheme(Granularity.BLOCK, activations=Activations(quantised=False)),
}
_NVFP4 = ("NVFP4", "W4A16_NVFP4")
_KNOWN = ("quant_method", "producer", "config_groups", "quantized_layers")  # `config_groups` repeats the algorithm


def describe(config: Fields) -> Description:
    inner = config.raw("quantization")
    if inner is not None:
        if not isinstance(inner, dict):
            raise config.refuse("quantization", "an object")
        config = Fields(inner, f"{BESIDE}: quantization")
    config.asked.update(_KNOWN)
    kv_cache = _kv_cache(config)
    algorithm = config.text("quant_algo", "")
    if kv_cache == FP8_KV and not algorithm:  # the cache alone
        return Description(METHOD, (), lambda module: None, tuple(config.unasked()), kv_cache)
    scheme = _scheme(config, algorithm)
    kept = (HEAD_MODULE, *names_in(config, "exclude_modules"), *names_in(config, "ignore"))
    for name in kept:
        if name.count("*") + name.count("?") > MAX_REPEATS:
            where = "exclude_modules" if name in (config.values.get("exclude_modules") or ()) else "ignore"
            raise config.refuse(where, f"names with at most {MAX_REPEATS} wildcards")
    return Description(METHOD, (scheme,), lambda module: None if any(_matches(module, name) for name in kept) else scheme,
                       tuple(config.unasked()), kv_cache)


def _scheme(config: Fields, algorithm: str) -> AnyScheme:
    if algorithm in _NVFP4:
        if config.raw("group_size", NV_SIZE) != NV_SIZE:
            raise config.refuse("group_size", f"{NV_SIZE} with {algorithm}")
        return CodeScheme(CodePacking.MODELOPT)
    if algorithm not in _SCHEMES:
        raise config.refuse("quant_algo", f"one of {', '.join((*_SCHEMES, *_NVFP4))} (other algorithms are not served yet)")
    if config.raw("group_size") not in (None, 128):
        raise config.refuse("group_size", "null or 128")
    return _SCHEMES[algorithm]


def _kv_cache(config: Fields) -> str:
    algorithm = config.raw("kv_cache_quant_algo")
    if algorithm is None:
        return kv_cache_in(config)
    config.asked.add("kv_cache_scheme")  # says the same again
    return FP8_KV if algorithm == "FP8" else shown(algorithm)


def _matches(module: str, name: str) -> bool:
    """A wildcard name, or one that stands for all that lies under it."""
    return fnmatchcase(module, name) or fnmatchcase(module, f"{name}.*") or (
        name.endswith("*") and fnmatchcase(module, f"{name[:-1]}.*"))
