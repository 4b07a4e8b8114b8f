"""AWQ (`quant_method: "awq"`, version gemm), 4 bits: X.qweight I32 packed along N, X.scales, X.qzeros; no order of groups.

Names in `modules_to_not_convert` are parts of a layer's path.
"""

from __future__ import annotations

from workstation.config_fields import Fields
from workstation.quant.description import Description, names_in
from workstation.quant.forms import HEAD_MODULE
from workstation.quant.integers import WHOLE_ROW, IntScheme, Packing

METHOD = "awq"
MAX_GROUP = 1 << 16
_HARMLESS = ("quant_method", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config")


def describe(config: Fields) -> Description:
    config.asked.update(_HARMLESS)
    version = config.text("version", config.text("format", "gemm"))
    if version.lower() != "gemm":
        raise config.refuse("version" if config.raw("version") else "format", "gemm (other layouts are not served)")
    if not config.boolean("zero_point", True):
        raise config.refuse("zero_point", "true")
    bits = "bits" if config.raw("bits") is not None else "w_bit"
    if config.integer(bits, 1, 16, 4) != 4:
        raise config.refuse(bits, "4")
    size_name = "group_size" if config.raw("group_size") is not None else "q_group_size"
    size = config.integer(size_name, -1, MAX_GROUP, 128)
    if size == 0:
        raise config.refuse(size_name, f"-1 or 1 to {MAX_GROUP}")
    scheme = IntScheme(Packing.AWQ, 4, WHOLE_ROW if size < 0 else size, symmetric=False)
    kept = names_in(config, "modules_to_not_convert")
    has_head = config.boolean("lm_head", False)

    def scheme_of(module: str) -> IntScheme | None:
        if module == HEAD_MODULE:
            return scheme if has_head else None
        return None if any(name in module for name in kept) else scheme

    return Description(METHOD, (scheme,), scheme_of, tuple(config.unasked()))
