"""Linear layers behind one interface; each weight form is a class of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from workstation.kernels import gemm, ops
from workstation.kernels.quantized import Halving, Operand, Rounding


class Linear(ABC):
    """`y = x · Wᵀ + b` for x [T, in_features] → [T, out_features], of x's dtype."""

    in_features: int
    out_features: int

    @abstractmethod
    def __call__(self, x: Operand) -> torch.Tensor:
        """x: [T, in_features] → [T, out_features]. x in another form only as `rounding` or `after_norm` asked for it."""

    def silu_mul(self, x: Operand, following: Linear) -> Operand:
        """SwiGLU's first half for a gate | up layer: [T, in_features] → [T, out_features / 2], ready for `following`."""
        gate_up = self(x)
        return ops.silu_mul(gate_up, following.rounding(gate_up.dtype))

    def write(self, x: Operand, out: torch.Tensor) -> None:
        """`out[:] = self(x)`, without a copy where the layer can."""
        out.copy_(self(x))

    def rounding(self, dtype: torch.dtype) -> Rounding | None:
        """How whoever makes this layer's input, of this dtype, may round it without a kernel of its own; None: not at all."""
        return None

    def after_norm(self, tokens: int, dtype: torch.dtype) -> Rounding | Halving | None:
        """The form in which the norm in front of this layer may hand over so many tokens."""
        return self.rounding(dtype)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes the layer's tensors hold on the device."""

    def randomise(self, generator: torch.Generator) -> None:
        """Random weights of plausible size, in place: matrices of variance 1 / in_features, biases of 0.02²."""
        raise TypeError(f"weights are drawn before they are packed, not into {type(self).__name__}")


class DenseLinear(Linear):
    """16- or 32-bit weights [out_features, in_features] as stored, and an optional bias [out_features]."""

    __slots__ = ("bias", "in_features", "out_features", "weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.out_features, self.in_features = weight.shape

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device,
    ) -> DenseLinear:
        """A layer with uninitialised weights, for a loader to fill."""
        weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        return cls(weight, torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def __call__(self, x: Operand) -> torch.Tensor:
        assert isinstance(x, torch.Tensor)
        if x.is_cuda and x.shape[0] <= gemm.MAX_ROWS:
            return gemm.linear(x, self.weight, bias=self.bias)
        return F.linear(x, self.weight, self.bias)

    def silu_mul(self, x: Operand, following: Linear) -> Operand:
        assert isinstance(x, torch.Tensor)
        if x.is_cuda and x.shape[0] <= gemm.MAX_ROWS and x.dtype != torch.float32:
            return gemm.linear_silu_mul(x, self.weight, bias=self.bias)
        return super().silu_mul(x, following)

    def write(self, x: Operand, out: torch.Tensor) -> None:
        assert isinstance(x, torch.Tensor)
        if x.is_cuda:
            gemm.linear(x, self.weight, bias=self.bias, out=out)
        else:
            super().write(x, out)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)

    def randomise(self, generator: torch.Generator) -> None:
        self.weight.normal_(0.0, self.in_features**-0.5, generator=generator)
        if self.bias is not None:
            self.bias.normal_(0.0, 0.02, generator=generator)


class SplitLinear(Linear):
    """A fused layer whose parts are kept in different forms: `pieces`, whose outputs stand side by side."""

    __slots__ = ("in_features", "out_features", "pieces")

    def __init__(self, pieces: Iterable[Linear]) -> None:
        self.pieces = tuple(pieces)
        self.in_features = self.pieces[0].in_features
        self.out_features = sum(piece.out_features for piece in self.pieces)

    def __call__(self, x: Operand) -> torch.Tensor:
        return torch.cat([piece(x) for piece in self.pieces], -1)

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def randomise(self, generator: torch.Generator) -> None:
        for piece in self.pieces:
            piece.randomise(generator)


class PackedLinear(Linear):
    """A dense layer for the CPU, its weight in oneDNN's blocked order.

    Faster than the plain order, whose GEMM repacks the weight at every call. On the CPUs tried, a row's result is also
    the same bit for bit whatever else is in the batch, which the plain order does not give.
    """

    __slots__ = ("_apply", "_nbytes", "_packed", "bias", "in_features", "out_features")

    ROWS_HINT = 32

    def __init__(self, dense: DenseLinear) -> None:
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.bias = dense.bias
        self._nbytes = dense.nbytes
        self._packed = torch.ops.mkldnn._reorder_linear_weight(dense.weight, self.ROWS_HINT)
        self._apply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Operand) -> torch.Tensor:
        y: torch.Tensor = self._apply(x, self._packed, self.bias, "none", [], "")
        return y

    @property
    def nbytes(self) -> int:
        return self._nbytes


def packed(layer: Linear) -> Linear:
    """The layer in the CPU's packed order where this machine has it for the dtype; else the layer itself."""
    if isinstance(layer, SplitLinear):
        return SplitLinear(packed(piece) for piece in layer.pieces)
    if not isinstance(layer, DenseLinear) or layer.weight.device.type != "cpu" or not _can_pack(layer.weight.dtype):
        return layer
    return PackedLinear(layer)


def _can_pack(dtype: torch.dtype) -> bool:
    if not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
