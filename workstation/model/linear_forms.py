"""A fused layer and the forms of its parts → an empty Linear for the loader to fill."""

from __future__ import annotations

import torch

from workstation.model.linear import DenseLinear, Linear, SplitLinear
from workstation.model.linear_codes import empty_codes
from workstation.model.linear_fp8 import empty_fp8
from workstation.model.linear_int import empty_int
from workstation.quant.codes import Codes
from workstation.quant.forms import Form, FusedLinear, Segment, WeightForms


def empty_linear(linear: FusedLinear, forms: WeightForms, *, dtype: torch.dtype, device: torch.device) -> Linear:
    """One Linear a segment; several become a SplitLinear. dtype: of dense weights and of biases."""
    made = [_empty_segment(segment, dtype, device) for segment in forms.segments(linear)]
    return made[0] if len(made) == 1 else SplitLinear(made)


def pieces(linear: Linear) -> tuple[Linear, ...]:
    """The Linears of a fused layer, one a segment, in order."""
    return linear.pieces if isinstance(linear, SplitLinear) else (linear,)


def _empty_segment(segment: Segment, dtype: torch.dtype, device: torch.device) -> Linear:
    if isinstance(segment.groups, Codes):
        return empty_codes(segment, segment.groups, dtype=dtype, device=device)
    if segment.groups is not None:
        return empty_int(segment, segment.groups, dtype=dtype, device=device)
    if segment.form is not Form.DENSE:
        return empty_fp8(segment, dtype=dtype, device=device)
    part = segment.linear
    return DenseLinear.empty(part.in_features, part.out_features, bias=part.bias, dtype=dtype, device=device)
