"""bitsandbytes, 8 bits (`load_in_8bit`): X.weight I8 [N, K], X.SCB F32 [N], X.weight_format U8 = 0; w = q · SCB / 127. The
library rounds activations too, but for columns in which they are large; here they are never rounded.

4 bits (`load_in_4bit`): NF4 and FP4. Two codes a byte along all rows one after the other, the first in the
upper half; a scale (absmax) for each block of them, the last of which may be partial.

    X.weight U8 [⌈NK/2⌉, 1]                 or these bytes as another `bnb_4bit_quant_storage`
    X.weight.absmax F32 [⌈NK/block⌉]        or U8, with X.weight.nested_absmax F32 and X.weight.nested_quant_map F32 [256]
    X.weight.quant_map F32 [16]             what the codes stand for
    X.weight.quant_state.bitsandbytes__nf4  (or __fp4) U8: JSON with the block size and the shape

A layer without these tensors is 16-bit.
"""

from __future__ import annotations

from workstation.config_fields import Fields
from workstation.kernels.code_tables import FP4, NF4
from workstation.quant.codes import CodePacking, CodeScheme
from workstation.quant.description import AnyScheme, Description, is_under, names_in
from workstation.quant.forms import HEAD_MODULE
from workstation.quant.integers import WHOLE_ROW, IntScheme, Packing

METHOD = "bitsandbytes"
BLOCK = 64  # the writer's own, where there are no tensors to look at
TABLES = {"nf4": NF4, "fp4": FP4}
STORAGES = {"uint8": "U8", "int8": "I8", "bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# How products were made where the file was written, and numbers of its 8-bit form.
_HARMLESS = ("quant_method", "bnb_4bit_compute_dtype", "llm_int8_threshold", "llm_int8_has_fp16_weight",
             "llm_int8_enable_fp32_cpu_offload", "bnb_4bit_use_double_quant", "target_parameters")


def describe(config: Fields) -> Description:
    config.asked.update(_HARMLESS)
    four, eight = (_flag(config, name) for name in ("load_in_4bit", "load_in_8bit"))
    if four and eight:
        raise config.refuse("load_in_8bit", "false beside load_in_4bit")
    if not four and not eight:
        raise config.refuse("load_in_4bit", "true, or load_in_8bit")
    scheme: AnyScheme = IntScheme(Packing.BNB, 8, WHOLE_ROW, symmetric=True) if eight else _four_bits(config)
    config.asked.update(("bnb_4bit_quant_type", "bnb_4bit_quant_storage"))
    kept = (HEAD_MODULE, *names_in(config, "llm_int8_skip_modules"))
    return Description(METHOD, (scheme,), lambda module: None if any(is_under(module, name) for name in kept) else scheme,
                       tuple(config.unasked()))


def _flag(config: Fields, name: str) -> bool:
    """Some writers put an underscore before it as well, or only."""
    config.asked.update((name, f"_{name}"))
    return config.boolean(name if config.raw(name) is not None else f"_{name}", False)


def _four_bits(config: Fields) -> CodeScheme:
    kind = config.text("bnb_4bit_quant_type", "fp4")
    if kind not in TABLES:
        raise config.refuse("bnb_4bit_quant_type", f"one of {', '.join(TABLES)}")
    if config.text("bnb_4bit_quant_storage", "uint8").removeprefix("torch.") not in STORAGES:
        raise config.refuse("bnb_4bit_quant_storage", f"one of {', '.join(STORAGES)}")
    return CodeScheme(CodePacking.BNB, TABLES[kind], BLOCK)
