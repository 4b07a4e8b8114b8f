"""Linear layers whose weights stay integers on the device."""

from __future__ import annotations

import torch

from workstation.kernels import ops
from workstation.kernels.int_weights import IntWeight
from workstation.kernels.quantized import Halves, Halving, Operand, Rounding
from workstation.model.linear import Linear
from workstation.quant.forms import Segment
from workstation.quant.integers import Groups, words

TORCH_SCALES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class IntLinear(Linear):
    """Integers with a scale a group of columns, and activations as they are, or rounded where the checkpoint says so.

    Attributes:
        weight: codes, scales and zero points.  bias: [N] of the model's dtype, or None.
        rounds: whether x may be rounded to 8 bits per token, where that is faster.
        order: [K] int32, the columns of x as the weight has them (GPTQ's act-order), or None where they are the same.
    """

    __slots__ = ("bias", "in_features", "order", "out_features", "rounds", "weight")

    def __init__(self, weight: IntWeight, bias: torch.Tensor | None = None, order: torch.Tensor | None = None,
                 rounds: bool = False) -> None:
        self.weight, self.bias, self.order, self.rounds = weight, bias, order, rounds
        self.out_features, self.in_features = weight.rows, weight.columns

    def __call__(self, x: Operand) -> torch.Tensor:
        return self._product(x, None)

    def silu_mul(self, x: Operand, following: Linear) -> Operand:
        if isinstance(x, Halves):
            return ops.silu_mul_int(x, self.weight, self.bias)
        assert isinstance(x, torch.Tensor)
        if self.rounds and ops.multiplies_int8(x, self.weight):
            return super().silu_mul(x, following)
        return ops.silu_mul_int(self._ordered(x), self.weight, self.bias, following.rounding(x.dtype))

    def after_norm(self, tokens: int, dtype: torch.dtype) -> Rounding | Halving | None:
        return Halving() if self.order is None and ops.takes_halves(tokens, dtype, self.weight) else None

    def write(self, x: Operand, out: torch.Tensor) -> None:
        self._product(x, out)

    def _product(self, x: Operand, out: torch.Tensor | None) -> torch.Tensor:
        if isinstance(x, Halves):
            return ops.linear_int(x, self.weight, self.bias, out)
        ordered = self._ordered(x)
        if self.rounds and ops.multiplies_int8(ordered, self.weight):
            return ops.linear_int8(ordered, self.weight, self.bias, out)
        return ops.linear_int(ordered, self.weight, self.bias, out)

    def _ordered(self, x: Operand) -> torch.Tensor:
        assert isinstance(x, torch.Tensor)
        return x if self.order is None else x.index_select(1, self.order)

    @property
    def nbytes(self) -> int:
        tensors = (self.weight.words, self.weight.scale, self.weight.zero, self.bias, self.order)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def randomise(self, generator: torch.Generator) -> None:
        weight = self.weight
        weight.words.view(torch.uint8).random_(generator=generator)
        if weight.zero is not None:
            weight.zero.fill_(0x88 if weight.bits == 4 else 0x80)
        # Codes are even over the whole range: their distance from the middle has the variance (4^bits + 2) / 12.
        weight.scale.fill_(((4**weight.bits + 2) / 12 * self.in_features) ** -0.5)
        if self.bias is not None:
            self.bias.normal_(0.0, 0.02, generator=generator)


def empty_int(segment: Segment, groups: Groups, *, dtype: torch.dtype, device: torch.device) -> IntLinear:
    """A layer of the segment's form with uninitialised weights, for a loader to fill. dtype: of the bias."""
    rows, columns = segment.linear.out_features, segment.linear.in_features
    count = groups.count(columns)
    codes = torch.empty(rows, words(groups.bits, columns), dtype=torch.int16, device=device)
    scale = torch.empty(count, rows, dtype=TORCH_SCALES[groups.scale_dtype], device=device)
    zero = torch.empty(count, rows * groups.bits // 8, dtype=torch.uint8, device=device) if groups.zero_points else None
    bias = torch.empty(rows, dtype=dtype, device=device) if segment.linear.bias else None
    order = None
    if groups.order:
        order = torch.frombuffer(bytearray(groups.order), dtype=torch.int32).to(device)
    return IntLinear(IntWeight(codes, scale, zero, groups.bits, groups.size or columns, columns), bias, order,
                     segment.activations.quantised)
