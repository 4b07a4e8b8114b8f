"""How the KV cache is kept: in the model's dtype, or in FP8 (e4m3) with a scale for the keys and one for the values of a layer.

    stored = value / scale, rounded to e4m3        read = stored · scale

A checkpoint may say that its cache was calibrated for FP8 and carry the scales; one without scales means 1. They are read from
the files here, without torch: they are part of the plan rather than of the weights.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from workstation.architecture import ModelShape
from workstation.errors import ConfigError, ModelFolderError
from workstation.model_folder import shown
from workstation.quant.description import FP8_KV, WHERE
from workstation.quant.detect import describe
from workstation.safetensors_header import TensorEntry

log = logging.getLogger(__name__)

FP8_NAMES = ("fp8", "fp8_e4m3")
# Pairs of names below `self_attn`, in the order in which they count.
_NAMES = (
    ("k_scale", "v_scale"),  # compressed-tensors
    ("attn.k_scale", "attn.v_scale"),  # the same, from a module of its own
    ("k_proj.k_scale", "v_proj.v_scale"),  # ModelOpt
    ("k_proj.output_scale", "v_proj.output_scale"),  # compressed-tensors, older
    ("kv_scale", "kv_scale"),  # older still: one for both
)
_FORMATS = {"F32": "<f", "F16": "<e"}
_CURE = "a kv_cache_dtype of the model's own dtype needs none"


@dataclass(frozen=True, slots=True)
class KVCacheForm:
    """fp8: elements are e4m3 codes, else the model's dtype.  scales: (key, value) a layer; empty when all are 1."""

    fp8: bool = False
    scales: tuple[tuple[float, float], ...] = ()


def kv_cache_form(
    asked: str, dtype: str, shape: ModelShape, stored: Mapping[str, TensorEntry] | None,
) -> KVCacheForm:
    """What becomes of `kv_cache_dtype`.

    "auto" is FP8 where the checkpoint says that its cache is, else the model's dtype; "fp8" (or "fp8_e4m3") is FP8, with the
    checkpoint's scales where it has some; the name of the model's dtype is that.

    Args:
        asked: as the user wrote it.  dtype: of the model's activations, by name.
        stored: the checkpoint's headers, None when there are none (dummy weights).

    Raises ConfigError for another value, ModelFolderError for scales that cannot be.
    """
    if asked not in ("auto", *FP8_NAMES, dtype):
        raise ConfigError(f"kv_cache_dtype must be auto, {', '.join(FP8_NAMES)} or the model's dtype ({dtype}), "
                          f"got {shown(asked)}", param="kv_cache_dtype")
    scheme = checkpoint_scheme(shape)
    if asked == "auto" and scheme and scheme != FP8_KV:
        log.warning("%s describes a KV cache that is not served (%s); the cache is kept in %s", WHERE, scheme, dtype)
    if not is_fp8(asked, scheme):
        return KVCacheForm()
    scales = read_scales(shape, stored) if stored is not None else ()
    if scheme == FP8_KV and stored is not None and not scales:
        log.warning("%s describes an FP8 KV cache, but there are no scales for it; they count as 1", WHERE)
    return KVCacheForm(True, scales)


def is_fp8(asked: str, scheme: str) -> bool:
    """Whether the cache is FP8, given `kv_cache_dtype` and the checkpoint's own scheme."""
    return asked in FP8_NAMES or (asked == "auto" and scheme == FP8_KV)


def checkpoint_scheme(shape: ModelShape) -> str:
    """What the checkpoint says about its cache: "" for nothing, "fp8", or another scheme in its own words."""
    description = describe(shape)
    return description.kv_cache if description else ""


def read_scales(shape: ModelShape, stored: Mapping[str, TensorEntry]) -> tuple[tuple[float, float], ...]:
    """(key, value) scales, one pair a layer; none when no layer has any. Raises ModelFolderError naming the tensor."""
    names = [_layer_names(layer, stored) for layer in range(shape.num_layers)]
    if not any(names):
        return ()
    pairs = []
    for layer, pair in enumerate(names):
        if pair is None:
            raise _missing(f"{_prefix(layer)}k_scale", "other layers have one")
        for name, other in (pair, pair[::-1]):
            if name not in stored:
                raise _missing(name, f"{other} is there")
        pairs.append((_number(stored[pair[0]]), _number(stored[pair[1]])))
    return tuple(pairs)


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}.self_attn."


def _layer_names(layer: int, stored: Mapping[str, TensorEntry]) -> tuple[str, str] | None:
    """The first pair of names of which the checkpoint has one."""
    for key, value in _NAMES:
        pair = (_prefix(layer) + key, _prefix(layer) + value)
        if pair[0] in stored or pair[1] in stored:
            return pair
    return None


def _number(entry: TensorEntry) -> float:
    if math.prod(entry.shape) != 1:
        raise _broken(entry, f"has the shape {list(entry.shape)}")
    if entry.dtype not in (*_FORMATS, "BF16"):
        raise _broken(entry, f"is {entry.dtype}")
    with Path(entry.path).open("rb") as file:
        file.seek(entry.start)
        data = file.read(entry.nbytes)
    if len(data) != entry.nbytes:
        raise _broken(entry, "is cut off")
    # bfloat16 is the upper half of a float32.
    value: float = struct.unpack(_FORMATS.get(entry.dtype, "<f"), b"\0\0" + data if entry.dtype == "BF16" else data)[0]
    if not (math.isfinite(value) and value > 0):
        raise _broken(entry, f"is {value:g}")
    return value


def _broken(entry: TensorEntry, what: str) -> ModelFolderError:
    return ModelFolderError(f"tensor {entry.name} in {entry.file} {what}; a scale of the FP8 KV cache must be one finite "
                            f"number above 0 in F32, F16 or BF16 ({_CURE})", param="kv_cache_dtype")


def _missing(name: str, why: str) -> ModelFolderError:
    return ModelFolderError(f"tensor {name} is missing from the checkpoint, but {why}; an FP8 KV cache needs a scale for the "
                            f"keys and one for the values of every layer ({_CURE})", param="kv_cache_dtype")
