"""Which form the layers of a 16- or 32-bit checkpoint take when they are quantised while loading. No torch.

    fp8    a scale a row                       int8   a scale a row
    int4   a scale a group of 128 columns      nf4    a scale a group of 64 columns

Where that does not divide a layer's columns, a smaller group does, down to 32, or the layer stays as it is. Head and embedding
always do.
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
GROUP_SIZES = (128, 64, 32)
NF4_SIZE = 64
_WIDE = Activations(quantised=False)


def forms_at_load(shape: ModelShape, quantization: str) -> WeightForms:
    """quantization: one of QUANTIZATIONS."""
    parts = {module: part for linear in all_linears(shape) for module, _ in linear.parts
             if module != HEAD_MODULE and (part := _part(quantization, linear.in_features)) is not None}
    return WeightForms(parts, method=quantization)


def _part(quantization: str, columns: int) -> Part | None:
    if quantization == "fp8":
        return Part(Form.FP8_CHANNEL, at_load=True)
    if quantization == "int8":
        return Part(Form.INT8, activations=_WIDE, at_load=True, groups=Groups(8, WHOLE_ROW, False, "F32"))
    largest = NF4_SIZE if quantization == "nf4" else GROUP_SIZES[0]
    size = next((size for size in GROUP_SIZES if size <= largest and columns % size == 0), None)
    if size is None:
        log.warning("layers of %d columns stay as they are: groups of %d do not divide them", columns, GROUP_SIZES[-1])
        return None
    if quantization == "nf4":
        return Part(Form.NF4, activations=_WIDE, at_load=True, groups=Codes(NF4, size, ScaleKind.F32))
    groups = Groups(4, size if size < columns else WHOLE_ROW, False, "BF16")
    return Part(Form.INT4, activations=_WIDE, at_load=True, groups=groups)
