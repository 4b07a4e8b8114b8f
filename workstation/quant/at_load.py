"""Which form the layers of a 16- or 32-bit checkpoint take when they are quantised while loading. No torch.

    fp8    a scale a row                       int8   a scale a row
    int4   a scale a group of 128 columns      nf4    a scale a group of 64 columns

`int4-g64` and `int4-g32` have smaller groups. Where a size does not divide a layer's columns, the next smaller one does, or the
layer stays as it is. Head and embedding always do.
"""

from __future__ import annotations

import logging

from workstation.architecture import ModelShape
from workstation.kernels.code_tables import NF4, ScaleKind
from workstation.quant.codes import Codes
from workstation.quant.forms import HEAD_MODULE, Activations, Form, Part, WeightForms, all_linears
from workstation.quant.integers import WHOLE_ROW, Groups

log = logging.getLogger(__name__)

QUANTIZATIONS = ("fp8", "int8", "int4", "nf4")
GROUP_SIZES = {"int4": (128, 64, 32), "int4-g64": (64, 32), "int4-g32": (32,), "nf4": (64, 32)}
SMALLER_GROUPS = ("int4-g64", "int4-g32")
CHOICES = (*QUANTIZATIONS, *SMALLER_GROUPS)
SCALE_DTYPE = "BF16"
_WIDE = Activations(quantised=False)


def forms_at_load(shape: ModelShape, quantization: str) -> WeightForms:
    """quantization: one of CHOICES."""
    parts = {module: part for linear in all_linears(shape) for module, _ in linear.parts
             if module != HEAD_MODULE and (part := _part(quantization, linear.in_features)) is not None}
    return WeightForms(parts, method=quantization)


def _part(quantization: str, columns: int) -> Part | None:
    if quantization == "fp8":
        return Part(Form.FP8_CHANNEL, at_load=True)
    if quantization == "int8":
        return Part(Form.INT8, activations=_WIDE, at_load=True, groups=Groups(8, WHOLE_ROW, False, SCALE_DTYPE))
    sizes = GROUP_SIZES[quantization]
    size = next((size for size in sizes if columns % size == 0), None)
    if size is None:
        log.warning("layers of %d columns stay as they are: groups of %d do not divide them", columns, sizes[-1])
        return None
    if quantization == "nf4":
        return Part(Form.NF4, activations=_WIDE, at_load=True, groups=Codes(NF4, size, ScaleKind.F32))
    groups = Groups(4, size if size < columns else WHOLE_ROW, False, SCALE_DTYPE)
    return Part(Form.INT4, activations=_WIDE, at_load=True, groups=groups)
