"""Decoder layers of a 16- or 32-bit folder rounded by GPTQ, one after the other, on calibration text.

Each layer is rounded for the inputs that it gets behind the rounded ones before it. The device holds one layer, the sums of its
inputs' products, and the hidden states of all tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from workstation.architecture import ModelShape
from workstation.errors import ConfigError, ModelFolderError, OutOfMemoryError
from workstation.kernels import ops
from workstation.kernels.quantized import Operand
from workstation.model.layers import DecoderLayer
from workstation.model.linear import DenseLinear, Linear
from workstation.model.staging import Reader
from workstation.model.targets import TORCH_DTYPES
from workstation.model.tensor_names import EMBEDDING, targets
from workstation.model.transformer import Decoder
from workstation.model.whole_step import whole_step
from workstation.quant.forms import FusedLinear, WeightForms, layer_linears
from workstation.quant.gptq_rounding import gptq_groups
from workstation.quant.integers import NAMES, Groups, Packing
from workstation.quant.pack import SCALES, integer_tensors, integer_weight
from workstation.quant.unpack import fields
from workstation.safetensors_header import TensorEntry

MAX_WINDOWS, WINDOW_TOKENS = 128, 512
STEP_WINDOWS = 8
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_NAMES = NAMES[Packing.PACKED]


def layer_number(name: str) -> int:
    """Of a tensor or module; −1 outside the decoder layers."""
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """origin: what makes it the same text as another run's.  make: its windows of token ids, asked for when they are needed."""

    origin: str
    make: Callable[[], Sequence[Sequence[int]]]


class Recorder(Linear):
    """A dense layer that adds up what goes into it. hessian: [K, K] float32, Σ x xᵀ over all rows x."""

    def __init__(self, linear: DenseLinear) -> None:
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.hessian = torch.zeros(self.in_features, self.in_features, device=linear.weight.device)

    def __call__(self, x: Operand) -> torch.Tensor:
        assert isinstance(x, torch.Tensor)
        wide = x.float()
        self.hessian.addmm_(wide.t(), wide)
        return self.linear(x)

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes + self.hessian.nbytes


class CalibratedRounding:
    """Gives the rounded tensors of each layer; asked for in the order of layers.

    Args:
        entries: the folder's tensors.  windows: token ids, each window read from its first token.
        found: tensors of layers that an earlier run rounded, by name, and the files they are in.

    Attributes:
        states: what the next layer gets, [tokens, H] for every STEP_WINDOWS windows; empty before the first.

    Raises ConfigError for windows that are too many, too long, or of other tokens than the model's.
    """

    def __init__(
        self, shape: ModelShape, forms: WeightForms, entries: Sequence[TensorEntry], windows: Sequence[Sequence[int]],
        found: Mapping[str, Path], device: torch.device,
    ) -> None:
        _check_windows(windows, shape)
        self._shape, self._forms, self._found, self._device = shape, forms, found, device
        self._entries = {entry.name: entry for entry in entries}
        self._dtype = _dtype(entries, device)
        self._batches = [windows[start:start + STEP_WINDOWS] for start in range(0, len(windows), STEP_WINDOWS)]
        self.states: list[torch.Tensor] = []
        self._rounded: dict[str, dict[str, torch.Tensor]] = {}
        self._layer = -1
        # One layer is a decoder of its own; its embedding and final norm are not used.
        one = replace(shape, num_layers=1, layer_kinds=shape.layer_kinds[:1], vocab_size=1, tie_embeddings=True)
        self._decoder = Decoder(one, dtype=self._dtype, device=device, max_model_len=max(map(len, windows)))
        self._targets = targets(self._decoder)

    def take(self, module: str) -> dict[str, torch.Tensor]:
        """The stored tensors of a linear layer, by name, once; on the CPU.

        Raises ModelFolderError for weights that are not finite or give activations that are not, OutOfMemoryError.
        """
        while self._layer < layer_number(module):
            self._layer += 1
            try:
                self._round_layer()
            except torch.OutOfMemoryError as error:
                raise OutOfMemoryError(f"calibrating layer {self._layer} does not fit into the free memory of {self._device}; "
                                       "free the device, or take --rounding search") from error
        return self._rounded.pop(module)

    def _round_layer(self) -> None:
        self.states = self.states or self._embedded()
        self._rounded = {}
        self._read()
        layer, linears = self._decoder.layers[0], list(layer_linears(self._shape, self._layer))
        ours = _linears(layer)
        if all(self._is_found(name) for fused in linears for name, _ in fused.parts):
            for fused, linear in zip(linears, ours, strict=True):
                self._restore(fused, linear)
        else:
            recorders = _record(layer)
            for batch, state in zip(self._batches, self.states, strict=True):
                self._forward(batch, state)
            _set_linears(layer, ours)
            for fused, recorder in zip(linears, recorders, strict=True):
                self._round(fused, recorder)
        for batch, state in zip(self._batches, self.states, strict=True):
            state.copy_(self._forward(batch, state))

    def _round(self, fused: FusedLinear, recorder: Recorder) -> None:
        """Rounds a fused layer, whose parts have the same inputs and so the same groups, in place and for `take`."""
        groups = self._forms.part(fused.parts[0][0]).groups
        if not isinstance(groups, Groups):
            return
        weight = recorder.linear.weight
        try:
            codes, scale = gptq_groups(weight, recorder.hessian, groups.count(weight.shape[1]), groups.bits,
                                       SCALES[groups.scale_dtype])
        except ValueError as error:
            raise ModelFolderError(f"layer {fused.parts[0][0]} {error}") from error
        weight.copy_(integer_weight(codes, scale, groups.bits))
        for name, rows in _rows(fused):
            made = integer_tensors(codes[rows], scale[rows], groups.bits)
            self._rounded[name] = {f"{name}.{last}": tensor.cpu() for last, tensor in made.items()}

    def _is_found(self, module: str) -> bool:
        """Whether an earlier run rounded it, or nobody does."""
        return f"{module}.{_NAMES.codes}" in self._found or not isinstance(self._forms.part(module).groups, Groups)

    def _restore(self, fused: FusedLinear, linear: DenseLinear) -> None:
        """What an earlier run rounded takes the weights' place."""
        for name, rows in _rows(fused):
            groups = self._forms.part(name).groups
            if isinstance(groups, Groups):
                codes, scale = (self._stored(f"{name}.{last}") for last in (_NAMES.codes, _NAMES.scale))
                wide = integer_weight(fields(codes, groups.bits)[:, :linear.in_features], scale, groups.bits)
                linear.weight[rows] = wide.to(linear.weight)

    def _stored(self, name: str) -> torch.Tensor:
        with safe_open(self._found[name], framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def _embedded(self) -> list[torch.Tensor]:
        entry = self._entries[EMBEDDING]
        stored = TORCH_DTYPES[entry.dtype]
        table = torch.empty(entry.shape, dtype=stored)
        with Reader() as reader:
            reader.read(entry, stored, table)
        flat = [torch.tensor([token for window in batch for token in window]) for batch in self._batches]
        return [table[tokens].to(self._device, self._dtype) for tokens in flat]

    def _read(self) -> None:
        """The layer's tensors from the folder."""
        with Reader() as reader:
            for name, target in self._targets.items():
                if layer_number(name) < 0:
                    continue
                entry = self._entries[name.replace(".0.", f".{self._layer}.", 1)]
                staged = torch.empty(entry.shape, dtype=self._dtype)
                reader.read(entry, TORCH_DTYPES[entry.dtype], staged)
                if not staged.isfinite().all():
                    raise ModelFolderError(f"tensor {entry.name} in {entry.file} holds values that are not finite")
                target.tensor.copy_(staged)

    def _forward(self, batch: Sequence[Sequence[int]], state: torch.Tensor) -> torch.Tensor:
        """The layer's output [tokens, H] for its input."""
        shape, layer = self._shape, self._decoder.layers[0]
        group = next(group for group in shape.kv_groups if self._layer in group.layers)
        alone = replace(self._decoder.shape, kv_groups=(replace(group, layers=(0,)),))
        inputs, (kv,) = whole_step(alone, batch, self._dtype, self._device)
        qkv = layer.attention.qkv(ops.rms_norm(state, layer.attention_norm, shape.norm_eps))
        out, residual = layer(qkv, state.clone(), inputs.positions, kv[:, 0], inputs.slots[0], inputs.plans[0])
        return out + residual


def _linears(layer: DecoderLayer) -> list[DenseLinear]:
    found = (layer.attention.qkv, layer.attention.o, layer.gate_up, layer.down)
    return [linear for linear in found if isinstance(linear, DenseLinear)]


def _set_linears(layer: DecoderLayer, linears: Sequence[Linear]) -> None:
    layer.attention.qkv, layer.attention.o, layer.gate_up, layer.down = linears


def _record(layer: DecoderLayer) -> list[Recorder]:
    recorders = [Recorder(linear) for linear in _linears(layer)]
    _set_linears(layer, recorders)
    return recorders


def _rows(fused: FusedLinear) -> Iterator[tuple[str, slice]]:
    start = 0
    for name, count in fused.parts:
        yield name, slice(start, start + count)
        start += count


def _dtype(entries: Sequence[TensorEntry], device: torch.device) -> torch.dtype:
    """Of weights and activations: as stored on a GPU, where that is one 16-bit type; else float32."""
    stored = {entry.dtype for entry in entries if layer_number(entry.name) >= 0}
    return TORCH_DTYPES[stored.pop()] if device.type == "cuda" and len(stored) == 1 else torch.float32


def _check_windows(windows: Sequence[Sequence[int]], shape: ModelShape) -> None:
    if not 1 <= len(windows) <= MAX_WINDOWS:
        raise ConfigError(f"calibration takes 1 to {MAX_WINDOWS} windows, got {len(windows)}", param="calibration")
    longest = min(WINDOW_TOKENS, shape.max_position)
    for number, window in enumerate(windows):
        if not 1 <= len(window) <= longest:
            raise ConfigError(f"calibration window {number} has {len(window)} tokens; 1 to {longest} can be",
                              param="calibration")
        if not 0 <= min(window) <= max(window) < shape.vocab_size:
            raise ConfigError(f"calibration window {number} has the tokens {min(window)} to {max(window)}; the model has "
                              f"{shape.vocab_size}", param="calibration")
