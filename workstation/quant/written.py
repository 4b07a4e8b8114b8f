"""How weights quantised here are written to disk: compressed-tensors, as transformers and vLLM read it. No torch.

    fp8     float-quantized   X.weight F8_E4M3 [N, K]           X.weight_scale BF16 [N, 1]     activations FP8 a token
    int8    pack-quantized    X.weight_packed I32 [N, ⌈K/4⌉]    X.weight_scale BF16 [N, 1]     X.weight_shape I64 [2]
    int4    pack-quantized    X.weight_packed I32 [N, ⌈K/8⌉]    X.weight_scale BF16 [N, G]     X.weight_shape I64 [2]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from workstation.quant import compressed_tensors
from workstation.quant.at_load import SCALE_DTYPE, SMALLER_GROUPS
from workstation.quant.compressed_tensors import MODULE_CLASS
from workstation.quant.description import REGEX_PREFIX
from workstation.quant.forms import HEAD_MODULE, Form, Part
from workstation.quant.integers import NAMES, Groups, Packing, stored_shapes

WRITABLE = ("fp8", "int8", "int4", *SMALLER_GROUPS)
Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name → safetensors dtype, shape
_FORMATS = {Form.FP8_CHANNEL: "float-quantized", Form.INT8: "pack-quantized", Form.INT4: "pack-quantized"}
_TOKEN = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def written_tensors(module: str, part: Part, rows: int, columns: int) -> Tensors:
    """The tensors of one layer whose 16- or 32-bit weight [rows, columns] takes the form of `part`."""
    if not isinstance(part.groups, Groups):
        return {f"{module}.weight": ("F8_E4M3", (rows, columns)), f"{module}.weight_scale": (SCALE_DTYPE, (rows, 1))}
    names = NAMES[Packing.PACKED]
    shapes = stored_shapes(Packing.PACKED, part.groups.bits, rows, columns, part.groups.count(columns))
    return {f"{module}.{names.codes}": ("I32", shapes[names.codes]),
            f"{module}.{names.scale}": (part.groups.scale_dtype, shapes[names.scale]),
            f"{module}.weight_shape": ("I64", (2,))}


def description(parts: Mapping[str, Part], columns: Mapping[str, int], kept: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` for config.json.

    Args:
        parts: the quantised layers by name, all of one bit width.  columns: K of each.  kept: layers that stay as they are.
    """
    groups: dict[int, set[str]] = {}
    for module, part in parts.items():
        groups.setdefault(_size(part, columns[module]), set()).add(module)
    form = next(iter(parts.values())).form
    listed = {f"group_{number}": {
        "targets": [MODULE_CLASS] if len(groups) == 1 else list(_patterns(modules)),
        "weights": _weights(form, size), "input_activations": dict(_TOKEN) if form is Form.FP8_CHANNEL else None,
        "output_activations": None, "format": _FORMATS[form]} for number, (size, modules) in enumerate(groups.items())}
    return {"quant_method": compressed_tensors.METHOD, "format": _FORMATS[form], "quantization_status": "compressed",
            "ignore": sorted({HEAD_MODULE, *kept}), "kv_cache_scheme": None, "global_compression_ratio": None,
            "config_groups": listed}


def _size(part: Part, columns: int) -> int:
    """Columns a scale covers; 0 for a scale a row."""
    return (part.groups.size or columns) if part.form is Form.INT4 and isinstance(part.groups, Groups) else 0


def _weights(form: Form, size: int) -> dict[str, Any]:
    kind = "float" if form is Form.FP8_CHANNEL else "int"
    return {"num_bits": 4 if form is Form.INT4 else 8, "type": kind, "symmetric": True,
            "strategy": "group" if size else "channel", "group_size": size or None, "dynamic": False}


def _patterns(modules: set[str]) -> Iterator[str]:
    """Layers of one width by their last two names, which are the same in all decoder layers."""
    for last in sorted({".".join(module.split(".")[-2:]) for module in modules}):
        yield f"{REGEX_PREFIX}.*\\.{re.escape(last)}$"
