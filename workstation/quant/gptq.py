"""GPTQ (`quant_method: "gptq"`), 4 and 8 bits: X.qweight I32 packed along K, X.scales, X.qzeros packed along N, X.g_idx.

`checkpoint_format` says whether qzeros hold the zero point or one less ("gptq", the default). Layers without these tensors are
16-bit. `dynamic` changes the numbers of some layers: `-:pattern` leaves them 16-bit, `pattern` or `+:pattern` overrides.
"""

from __future__ import annotations

import re
from typing import Any

from workstation.config_fields import Fields
from workstation.quant.description import Description, is_under, pattern
from workstation.quant.forms import HEAD_MODULE
from workstation.quant.integers import WHOLE_ROW, IntScheme, Packing

METHOD = "gptq"
MAX_RULES = 256
MAX_GROUP = 1 << 16
# How the codes were found; the tensors say the same or do not depend on it.
_HARMLESS = ("quant_method", "desc_act", "static_groups", "true_sequential", "damp_percent", "damp_auto_increment",
             "act_group_aware", "meta", "model_name_or_path", "model_file_base_name", "dataset", "tokenizer", "use_exllama",
             "exllama_config", "max_input_length", "cache_block_outputs", "module_name_preceding_first_block", "batch_size",
             "block_name_to_quantize", "use_cuda_fp16", "model_seqlen", "pad_token_id", "disable_exllama", "backend", "version",
             "pack_dtype", "quantizer", "mse", "quant_algorithm")
_PACKINGS = {"gptq": Packing.GPTQ, "gptq_v2": Packing.GPTQ_V2}
_NUMBERS = ("bits", "group_size", "sym")


def describe(config: Fields) -> Description:
    config.asked.update(_HARMLESS)
    label = config.text("checkpoint_format", config.text("format", "gptq"))
    if label not in _PACKINGS:
        name = "checkpoint_format" if config.raw("checkpoint_format") else "format"
        raise config.refuse(name, f"one of {', '.join(_PACKINGS)}: convert the checkpoint to one of these")
    default = _scheme(config, _PACKINGS[label])
    rules = _rules(config, default)
    has_head = config.boolean("lm_head", False)
    inside = _inside(config)

    def scheme_of(module: str) -> IntScheme | None:
        if module == HEAD_MODULE:
            return default if has_head else None
        for matches, scheme in rules:
            if matches.match(module):
                return scheme
        return default if not inside or any(is_under(module, name) for name in inside) else None

    schemes = tuple(dict.fromkeys([default, *(scheme for _, scheme in rules if scheme is not None)]))
    return Description(METHOD, schemes, scheme_of, tuple(config.unasked()))


def _scheme(config: Fields, packing: Packing) -> IntScheme:
    bits = config.integer("bits", 1, 16)
    if bits not in (4, 8):
        raise config.refuse("bits", "4 or 8")
    size = config.integer("group_size", -1, MAX_GROUP, -1)
    if size == 0:
        raise config.refuse("group_size", f"-1 or 1 to {MAX_GROUP}")
    return IntScheme(packing, bits, WHOLE_ROW if size < 0 else size, config.boolean("sym", True))


def _rules(config: Fields, default: IntScheme) -> list[tuple[re.Pattern[str], IntScheme | None]]:
    value = config.raw("dynamic", {})
    if not isinstance(value, dict) or len(value) > MAX_RULES or not all(isinstance(item, dict) for item in value.values()):
        raise config.refuse("dynamic", f"an object of at most {MAX_RULES} objects")
    where = f"{config.where}.dynamic"
    return [(pattern(name.removeprefix("-:").removeprefix("+:"), where),
             None if name.startswith("-:") else _override(config, name, changes, default)) for name, changes in value.items()]


def _override(config: Fields, name: str, changes: dict[str, Any], default: IntScheme) -> IntScheme:
    mixed = {**{key: config.values.get(key) for key in _NUMBERS}, **changes}
    fields = Fields(mixed, f"{config.where}.dynamic.{name}")
    fields.asked.update(_HARMLESS)
    scheme = _scheme(fields, default.packing)
    for unknown in fields.unasked():
        raise fields.refuse(unknown, "absent: it is not known")
    return scheme


def _inside(config: Fields) -> tuple[str, ...]:
    """Last names of the layers that are quantised, in groups that were quantised together; none: all."""
    value = config.raw("modules_in_block_to_quantize", [])
    if not isinstance(value, list):
        raise config.refuse("modules_in_block_to_quantize", "a list of lists of layer names")
    flat = [name for item in value for name in (item if isinstance(item, list) else [item])]
    if not all(isinstance(name, str) for name in flat):
        raise config.refuse("modules_in_block_to_quantize", "a list of lists of layer names")
    return tuple(flat)
