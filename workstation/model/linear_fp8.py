"""Linear layers whose weights stay FP8 on the device."""

from __future__ import annotations

import torch

from workstation.kernels import ops
from workstation.kernels.quantized import Fp8Operand, Halves, Operand, Quantized, Rounding
from workstation.model.linear import Linear
from workstation.quant.forms import Activations, Form, Segment, scale_grid

# Random e4m3 codes without the highest exponent bit: finite, at most 1.875, and this is their root mean square.
DUMMY_CODES = 0xBF
DUMMY_RMS = 0.5985


class Fp8Linear(Linear):
    """W[n, k] = weight[n, k] · scale[…].

    Attributes:
        weight: [N, K] float8_e4m3fn.  scale: float32, its shape the subclass's.  bias: [N] of the model's dtype, or None.
        activations: whether x may be rounded to FP8 per token, where the GPU can multiply that.
    """

    __slots__ = ("activations", "bias", "in_features", "out_features", "scale", "weight")

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None,
                 activations: Activations | None = None) -> None:
        self.weight, self.scale, self.bias = weight, scale, bias
        self.activations = activations or Activations()
        self.out_features, self.in_features = weight.shape

    def __call__(self, x: Operand) -> torch.Tensor:
        return ops.linear_fp8(self._operand(x), self.weight, self.scale, self.bias)

    def silu_mul(self, x: Operand, following: Linear) -> Operand:
        operand = self._operand(x)
        return ops.silu_mul_fp8(operand, self.weight, self.scale, self.bias, following.rounding(operand.dtype))

    def write(self, x: Operand, out: torch.Tensor) -> None:
        ops.linear_fp8(self._operand(x), self.weight, self.scale, self.bias, out)

    def _operand(self, x: Operand) -> Fp8Operand:
        """x as the product takes it, where its maker has left it alone."""
        assert not isinstance(x, Halves)
        return x

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scale.nbytes + (self.bias.nbytes if self.bias is not None else 0)

    def randomise(self, generator: torch.Generator) -> None:
        self.weight.view(torch.uint8).random_(generator=generator).bitwise_and_(DUMMY_CODES)
        self.scale.fill_(self.in_features**-0.5 / DUMMY_RMS)
        if self.bias is not None:
            self.bias.normal_(0.0, 0.02, generator=generator)


class Fp8ChannelLinear(Fp8Linear):
    """One scale a row: scale [N]. Also what one scale a matrix becomes."""

    __slots__ = ()

    def rounding(self, dtype: torch.dtype) -> Rounding | None:
        if not (self.activations.quantised and ops.multiplies_fp8(dtype, self.weight, self.scale)):
            return None
        return Rounding() if self.activations.bound is None else Rounding(self.activations.bound)

    def _operand(self, x: Operand) -> Fp8Operand:
        operand = super()._operand(x)
        rounding = None if isinstance(operand, Quantized) else self.rounding(operand.dtype)
        return operand if rounding is None else ops.quantize_fp8(operand, rounding)  # type: ignore[arg-type]


class Fp8BlockLinear(Fp8Linear):
    """One scale for 128 × 128 elements: scale [⌈N/128⌉, ⌈K/128⌉], the last block of a row or column perhaps partial."""

    __slots__ = ()


def empty_fp8(segment: Segment, *, dtype: torch.dtype, device: torch.device) -> Fp8Linear:
    """A layer of the segment's form with uninitialised weights, for a loader to fill. dtype: of the bias."""
    rows, columns = segment.linear.out_features, segment.linear.in_features
    blocked = segment.form is Form.FP8_BLOCK
    weight = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty(scale_grid(rows, columns) if blocked else (rows,), dtype=torch.float32, device=device)
    bias = torch.empty(rows, dtype=dtype, device=device) if segment.linear.bias else None
    return (Fp8BlockLinear if blocked else Fp8ChannelLinear)(weight, scale, bias, segment.activations)
