"""Linear layers whose weights stay 4-bit codes on the device."""

from __future__ import annotations

import torch

from workstation.kernels import ops
from workstation.kernels.code_tables import ScaleKind, kept_groups
from workstation.kernels.code_weights import CodeWeight
from workstation.kernels.quantized import Operand
from workstation.model.linear import Linear
from workstation.quant.codes import Codes
from workstation.quant.forms import Segment
from workstation.quant.integers import words


class CodeLinear(Linear):
    """4-bit codes with a table and a scale a group of columns, and activations as they are.

    Attributes:
        weight: codes, scales, factors, table.  bias: [N] of the model's dtype, or None.
    """

    __slots__ = ("bias", "in_features", "out_features", "weight")

    def __init__(self, weight: CodeWeight, bias: torch.Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape

    def __call__(self, x: Operand) -> torch.Tensor:
        assert isinstance(x, torch.Tensor)
        return ops.linear_codes(x, self.weight, self.bias)

    def silu_mul(self, x: Operand, following: Linear) -> Operand:
        assert isinstance(x, torch.Tensor)
        return ops.silu_mul_codes(x, self.weight, self.bias, following.rounding(x.dtype))

    def write(self, x: Operand, out: torch.Tensor) -> None:
        assert isinstance(x, torch.Tensor)
        ops.linear_codes(x, self.weight, self.bias, out)

    @property
    def nbytes(self) -> int:
        tensors = (self.weight.words, self.weight.scale, self.weight.factor, self.weight.table, self.bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def randomise(self, generator: torch.Generator) -> None:
        weight = self.weight
        weight.words.view(torch.uint8).random_(generator=generator)
        # Codes are even over the table, whose mean square a scale has to make 1 / K.
        scale = (sum(value * value for value in weight.values) / len(weight.values) * self.in_features) ** -0.5
        if weight.kind is ScaleKind.F32:
            weight.scale.fill_(scale)
        elif weight.kind is ScaleKind.E4M3 and weight.factor is not None:
            weight.scale.view(torch.uint8).fill_(0x38)  # 1
            weight.factor.fill_(1 / scale if weight.divides else scale)
        else:  # the nearest power of two
            exponent = round(float(torch.tensor(scale).log2()))
            weight.scale.view(torch.uint8).fill_(127 + exponent)
        if self.bias is not None:
            self.bias.normal_(0.0, 0.02, generator=generator)


def empty_codes(segment: Segment, codes: Codes, *, dtype: torch.dtype, device: torch.device) -> CodeLinear:
    """A layer of the segment's form with uninitialised weights, for a loader to fill. dtype: of the bias."""
    rows, columns = segment.linear.out_features, segment.linear.in_features
    groups = kept_groups(codes.size, columns)
    stored = torch.empty(rows, words(4, columns), dtype=torch.int16, device=device)
    if codes.scale is ScaleKind.F32:
        scale = torch.empty(groups, rows, device=device)
    else:
        scale = torch.empty(groups // 4, rows, dtype=torch.int32, device=device)
    factor = torch.empty(rows, device=device) if codes.factor else None
    table = torch.tensor(codes.table, dtype=torch.float32, device=device)
    bias = torch.empty(rows, dtype=dtype, device=device) if segment.linear.bias else None
    weight = CodeWeight(stored, scale, factor, table, codes.table, codes.scale, codes.size, columns, codes.divides)
    return CodeLinear(weight, bias)
