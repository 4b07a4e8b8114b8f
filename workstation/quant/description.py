"""A checkpoint's `quantization_config`, read: which layers are stored in FP8, as integers or as 4-bit codes, and how. No torch.

One small file a format makes a Description; what they share is here. Every error names the field, its value and the limit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from workstation.config_fields import Fields
from workstation.errors import ModelFolderError
from workstation.model_folder import shown
from workstation.quant.codes import CodeScheme
from workstation.quant.forms import BLOCK, Activations, Granularity
from workstation.quant.integers import IntScheme

WHERE = "config.json: quantization_config"
REGEX_PREFIX = "re:"
FP8_KV = "fp8"
MAX_PATTERN, MAX_REPEATS, MAX_PATTERNS = 512, 4, 4096
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_BACKSLASHED = re.compile(r"\\.")
# A scheme for the cache that leaves a field out means this.
_FP8_SCHEME = {"type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
_CLASSES = re.compile(r"\[[^\]]*\]")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a group of layers is stored in FP8.

    Attributes:
        granularity: what one scale covers.  scale_names: the scale tensor's last name, in the spellings the format has.
        scale_dtypes: safetensors dtypes the scales may have.
    """

    granularity: Granularity
    scale_names: tuple[str, ...] = ("weight_scale",)
    activations: Activations = field(default_factory=Activations)
    scale_dtypes: tuple[str, ...] = ("F32", "BF16", "F16")


AnyScheme = Scheme | IntScheme | CodeScheme


@dataclass(frozen=True, slots=True)
class Description:
    """What a format's description says.

    Attributes:
        method: the format's name.  schemes: all schemes that some layer may have.
        scheme_of: a checkpoint module name → its scheme, None when it is kept in 16 bits.
        kv_cache: what it says about the KV cache: "" for nothing, `FP8_KV`, or another scheme as it is written.
        unread: fields that are unknown, and so not used.
    """

    method: str
    schemes: tuple[AnyScheme, ...]
    scheme_of: Callable[[str], AnyScheme | None]
    unread: tuple[str, ...] = ()
    kv_cache: str = ""


def kv_cache_in(config: Fields, name: str = "kv_cache_scheme") -> str:
    """`Description.kv_cache` from a scheme in compressed-tensors' words: FP8 is a static scale a layer, 8 bits of float."""
    value = config.raw(name)
    if value is None:
        return ""
    if isinstance(value, dict):
        kind = tuple(value.get(key, default) for key, default in _FP8_SCHEME.items())
        if kind == tuple(_FP8_SCHEME.values()) and value.get("num_bits") == 8:
            return FP8_KV
    return shown(value)


def names_in(config: Fields, name: str) -> tuple[str, ...]:
    """A list of layer names or patterns; absent is empty."""
    value = config.raw(name, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value) or len(value) > MAX_PATTERNS:
        raise config.refuse(name, f"a list of at most {MAX_PATTERNS} layer names")
    return tuple(value)


def block_of_128(config: Fields, name: str) -> bool:
    """Whether a block size is given; only 128 × 128 is served."""
    value = config.raw(name)
    if value is None:
        return False
    if value not in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"):
        raise config.refuse(name, f"[{BLOCK}, {BLOCK}] or null")
    return True


def is_under(module: str, name: str) -> bool:
    """Whether `name` is the module, one of its parents, or its last names."""
    return module == name or module.startswith(f"{name}.") or module.endswith(f".{name}")


def pattern(text: str, where: str) -> re.Pattern[str]:
    """Compile a pattern from a model folder. One that could take for ever to match is refused."""
    plain = _CLASSES.sub("x", _BACKSLASHED.sub("x", text))
    if len(text) > MAX_PATTERN or sum(plain.count(sign) for sign in "*+{") > MAX_REPEATS or _REPEATED_GROUP.search(plain):
        raise ModelFolderError(f"{where}: the pattern {shown(text)} must have at most {MAX_PATTERN} characters, at most "
                               f"{MAX_REPEATS} repeats, and no repeated group", param="quantization_config")
    try:
        return re.compile(text)
    except (re.error, OverflowError) as error:
        raise ModelFolderError(f"{where}: {shown(text)} is not a regular expression: {error}",
                               param="quantization_config") from error
