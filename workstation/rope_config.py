"""The rotary-embedding part of config.json, resolved to plain numbers. Imports no torch.

Reads both spellings: `rope_scaling` beside `rope_theta` (transformers 4) and `rope_parameters` (transformers 5).
Formulas that use the numbers are in `model/rope.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from workstation.config_fields import Fields
from workstation.errors import ModelFolderError
from workstation.model_folder import shown

MAX_POSITIONS = 1 << 27
MAX_FACTOR = 1e6
DEFAULT_THETA = 10000.0

_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_FIELDS_OF_KIND: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset({"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
                       "mscale", "mscale_all_dim", "truncate"}),
    "longrope": frozenset({"factor", "original_max_position_embeddings", "attention_factor", "short_factor",
                           "long_factor"}),
}


@dataclass(frozen=True, slots=True)
class RopeReading:
    """What the config says: see `architecture.RopeShape`; `max_position` is the window after scaling, in tokens."""

    kind: str
    theta: float
    options: dict[str, Any]
    max_position: int


def read_rope(config: Fields, head_dim: int) -> RopeReading:
    """Read and check the rotary fields of a config. Raises ModelFolderError naming the field."""
    trained = config.integer("max_position_embeddings", 1, MAX_POSITIONS)
    rope = _rope_fields(config)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in _FIELDS_OF_KIND:
        name = "rope_type" if rope.raw("rope_type") is not None else "type"
        raise rope.refuse(name, f"one of {', '.join(_FIELDS_OF_KIND)}")
    _refuse_foreign_fields(rope, kind)
    for fields in (rope, config):
        if fields.number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0:
            raise fields.refuse("partial_rotary_factor", "1.0: these architectures rotate whole heads")
    theta = rope.number("rope_theta", 2.0, 1e15, None)
    outer = config.number("rope_theta", 2.0, 1e15, DEFAULT_THETA)
    original = _original_max_position(config, rope, kind, trained)
    options, window = _options(rope, kind, trained, original, head_dim)
    if not 1 <= window <= MAX_POSITIONS:
        raise ModelFolderError(f"{rope.where}: RoPE scaling makes a window of {window} positions; "
                               f"the limit is {MAX_POSITIONS}")
    return RopeReading(kind, outer if theta is None else theta, options, window)


def _rope_fields(config: Fields) -> Fields:
    """The dict with RoPE's numbers; `rope_scaling` wins when both are given, as in transformers."""
    chosen: tuple[str, dict[str, Any]] = ("rope_parameters", {})
    for name in ("rope_parameters", "rope_scaling"):
        value = config.raw(name, {})
        if not isinstance(value, dict):
            raise config.refuse(name, "an object or null")
        if value:
            chosen = (name, value)
    return Fields(chosen[1], f"{config.where}: {chosen[0]}")


def _refuse_foreign_fields(rope: Fields, kind: str) -> None:
    """A number this kind does not use means the config wants other mathematics than we would run."""
    known = _COMMON | _FIELDS_OF_KIND[kind] | {"finetuned"}
    for name, value in rope.values.items():
        if name not in known and value is not None:
            raise ModelFolderError(f"{rope.where}: {shown(name)} = {shown(value)} is not a field of RoPE kind "
                                   f"{kind!r} in these architectures", param=name)


def _original_max_position(config: Fields, rope: Fields, kind: str, trained: int) -> int:
    """Positions the model was trained on before scaling; a field beside the dict wins, as in transformers."""
    inner: int = rope.integer("original_max_position_embeddings", 1, MAX_POSITIONS, trained)
    outer: int = config.integer("original_max_position_embeddings", 1, MAX_POSITIONS, inner)
    return outer if kind in ("llama3", "yarn", "longrope") else inner


def _options(rope: Fields, kind: str, trained: int, original: int, head_dim: int) -> tuple[dict[str, Any], int]:
    if kind == "default":
        return {}, trained
    if kind in ("linear", "dynamic"):
        factor = rope.number("factor", 1.0, MAX_FACTOR)
        options = {"factor": factor}
        if kind == "dynamic":
            options["trained_max_position"] = trained
        return options, int(trained * factor)
    if kind == "llama3":
        return _llama3(rope, original), trained
    if kind == "yarn":
        options = _yarn(rope, trained, original)
        return options, int(original * options["factor"])
    return _longrope(rope, trained, original, head_dim), trained


def _llama3(rope: Fields, original: int) -> dict[str, Any]:
    low = rope.number("low_freq_factor", 1e-6, MAX_FACTOR)
    high = rope.number("high_freq_factor", 1e-6, MAX_FACTOR)
    if high <= low:
        raise rope.refuse("high_freq_factor", f"above low_freq_factor ({low:g})")
    return {"factor": rope.number("factor", 1.0, MAX_FACTOR), "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position": original}


def _yarn(rope: Fields, trained: int, original: int) -> dict[str, Any]:
    factor = rope.number("factor", 1.0, MAX_FACTOR, None) or max(trained / original, 1.0)
    mscale = rope.number("mscale", 0.0, MAX_FACTOR, None)
    mscale_all = rope.number("mscale_all_dim", 0.0, MAX_FACTOR, None)
    attention = rope.number("attention_factor", 0.0, MAX_FACTOR, None)
    if attention is None:
        attention = _yarn_mscale(factor, 1.0)
        if mscale and mscale_all:
            attention = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all)
    beta_fast = rope.number("beta_fast", 0.0, MAX_FACTOR, None) or 32.0
    beta_slow = rope.number("beta_slow", 0.0, MAX_FACTOR, None) or 1.0
    if beta_fast < beta_slow:
        raise rope.refuse("beta_fast", f"at least beta_slow ({beta_slow:g})")
    return {"factor": factor, "original_max_position": original, "attention_factor": attention,
            "beta_fast": beta_fast, "beta_slow": beta_slow, "truncate": rope.boolean("truncate", True)}


def _yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature (Peng et al. 2023, arXiv 2309.00071, eq. 22): 0.1 · mscale · ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _longrope(rope: Fields, trained: int, original: int, head_dim: int) -> dict[str, Any]:
    factor = rope.number("factor", 1.0, MAX_FACTOR, None) or trained / original
    attention = rope.number("attention_factor", 0.0, MAX_FACTOR, None)
    if attention is None:  # LongRoPE (Ding et al. 2024, arXiv 2402.13753): sqrt(1 + ln(factor) / ln(original))
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1.0 and original > 1 else 1.0
    return {"original_max_position": original, "attention_factor": attention,
            "short_factor": rope.numbers("short_factor", head_dim // 2, 1e-6, MAX_FACTOR),
            "long_factor": rope.numbers("long_factor", head_dim // 2, 1e-6, MAX_FACTOR)}
