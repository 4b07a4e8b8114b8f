"""How weights quantised here are written to disk: compressed-tensors, and bitsandbytes for nf4, as others read it. No torch.

    fp8     float-quantized   X.weight F8_E4M3 [N, K]           X.weight_scale BF16 [N, 1]     activations FP8 a token
    int8    pack-quantized    X.weight_packed I32 [N, ⌈K/4⌉]    X.weight_scale BF16 [N, 1]     X.weight_shape I64 [2]
    int4    pack-quantized    X.weight_packed I32 [N, ⌈K/8⌉]    X.weight_scale BF16 [N, G]     X.weight_shape I64 [2]
    nf4     bitsandbytes      X.weight U8 [NK/2, 1]             X.weight.absmax F32 [NG]       X.weight.quant_map, .quant_state…
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from workstation.quant import bitsandbytes, compressed_tensors
from workstation.quant.at_load import CHOICES, SCALE_DTYPE
from workstation.quant.codes import Codes
from workstation.quant.compressed_tensors import MODULE_CLASS
from workstation.quant.description import REGEX_PREFIX
from workstation.quant.forms import HEAD_MODULE, Form, Part
from workstation.quant.integers import NAMES, Groups, Packing, stored_shapes
from workstation.safetensors_header import DTYPE_NAMES

WRITABLE = CHOICES
STATE = f"weight.quant_state.bitsandbytes__{Form.NF4}"
Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name → safetensors dtype, shape
_FORMATS = {Form.FP8_CHANNEL: "float-quantized", Form.INT8: "pack-quantized", Form.INT4: "pack-quantized"}
_TOKEN = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def written_tensors(module: str, part: Part, rows: int, columns: int, dtype: str) -> Tensors:
    """The tensors of one layer whose 16- or 32-bit weight [rows, columns], stored as `dtype`, takes the form of `part`."""
    if isinstance(part.groups, Codes):
        state = quant_state(part.groups, rows, columns, dtype)
        return {f"{module}.weight": ("U8", (rows * columns // 2, 1)),
                f"{module}.weight.absmax": ("F32", (rows * columns // part.groups.size,)),
                f"{module}.weight.quant_map": ("F32", (len(part.groups.table),)), f"{module}.{STATE}": ("U8", (len(state),))}
    if not isinstance(part.groups, Groups):
        return {f"{module}.weight": ("F8_E4M3", (rows, columns)), f"{module}.weight_scale": (SCALE_DTYPE, (rows, 1))}
    names = NAMES[Packing.PACKED]
    shapes = stored_shapes(Packing.PACKED, part.groups.bits, rows, columns, part.groups.count(columns))
    return {f"{module}.{names.codes}": ("I32", shapes[names.codes]),
            f"{module}.{names.scale}": (part.groups.scale_dtype, shapes[names.scale]),
            f"{module}.weight_shape": ("I64", (2,))}


def quant_state(codes: Codes, rows: int, columns: int, dtype: str) -> bytes:
    """What bitsandbytes notes beside 4-bit codes. dtype: of the weight before, in safetensors' words."""
    return json.dumps({"quant_type": str(Form.NF4), "blocksize": codes.size, "dtype": DTYPE_NAMES[dtype],
                       "shape": [rows, columns]}).encode()


def description(parts: Mapping[str, Part], columns: Mapping[str, int], kept: Iterable[str], dtype: str) -> dict[str, Any]:
    """`quantization_config` for config.json.

    Args:
        parts: the quantised layers by name, all of one bit width.  columns: K of each.  kept: layers that stay as they are.
        dtype: what the weights were stored as.
    """
    if next(iter(parts.values())).form is Form.NF4:
        return _bitsandbytes(sorted({HEAD_MODULE, *kept}), DTYPE_NAMES[dtype])
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


def _bitsandbytes(kept: list[str], dtype: str) -> dict[str, Any]:
    return {"quant_method": bitsandbytes.METHOD, "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True,
            "_load_in_8bit": False, "bnb_4bit_quant_type": str(Form.NF4), "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": kept,
            "llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False, "llm_int8_enable_fp32_cpu_offload": False}


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
