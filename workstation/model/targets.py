"""What becomes of a stored tensor: copied, spread over rows, or quantised, into its place on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from workstation.model.staging import Reader
from workstation.quant.quantise import quantise_rows
from workstation.safetensors_header import TensorEntry

PLAIN_DTYPES = ("BF16", "F16", "F32")
# U8 is read as an exponent (e8m0), and only where a target says that it takes one.
TORCH_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu, "U8": torch.float8_e8m0fnu, "I32": torch.int32, "I8": torch.int8,
}
NAN_CODE = 0x7F
CHUNK_ELEMENTS = 1 << 24

Shapes = tuple[tuple[int, ...], ...]


class Target(ABC):
    """A place for one stored tensor.

    Attributes:
        tensor: what is filled.  shapes, dtypes: what may be stored, in safetensors' words.
        through_scratch: whether a stored tensor lies in the scratch buffer on its way.
    """

    __slots__ = ("dtypes", "shapes", "tensor")
    through_scratch = False

    def __init__(self, tensor: torch.Tensor, shapes: Shapes | None = None, dtypes: tuple[str, ...] = PLAIN_DTYPES) -> None:
        self.tensor, self.dtypes = tensor, dtypes
        self.shapes: Shapes = (tuple(tensor.shape),) if shapes is None else shapes

    @property
    def complaint(self) -> str:
        """What is wrong with what `is_broken`."""
        return "holds values that are not finite"

    @abstractmethod
    def read(self, reader: Reader, entry: TensorEntry, scratch: Scratch) -> None:
        """Fill the place from a checked entry."""

    def is_broken(self) -> torch.Tensor | None:
        """A boolean on the device: whether what was read cannot be a weight. None where nothing is looked at."""
        return None


class Copied(Target):
    """Stored as it is kept, up to a conversion between plain dtypes."""

    def read(self, reader: Reader, entry: TensorEntry, scratch: Scratch) -> None:
        reader.read(entry, TORCH_DTYPES[entry.dtype], self.tensor)


class CopiedFp8(Copied):
    """FP8 weights."""

    def is_broken(self) -> torch.Tensor:
        codes = self.tensor.view(-1).view(torch.uint8)
        found = torch.zeros((), dtype=torch.bool, device=codes.device)
        for start in range(0, codes.numel(), CHUNK_ELEMENTS):
            found |= (codes[start:start + CHUNK_ELEMENTS] & NAN_CODE).max() == NAN_CODE
        return found


class CopiedScale(Copied):
    """One scale a row, or a block's each."""

    def is_broken(self) -> torch.Tensor:
        return ~self.tensor.isfinite().all()


class SpreadScale(CopiedScale):
    """One scale a matrix, written to each of its rows."""

    def read(self, reader: Reader, entry: TensorEntry, scratch: Scratch) -> None:
        one = self.tensor.new_empty(1)
        reader.read(entry, TORCH_DTYPES[entry.dtype], one)
        self.tensor.copy_(one.expand_as(self.tensor))


class Quantised(Target):
    """A 16- or 32-bit weight that is kept in FP8. tensor: [N, K] float8_e4m3fn; scale: [N] float32."""

    __slots__ = ("scale",)
    through_scratch = True

    def __init__(self, tensor: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__(tensor)
        self.scale = scale

    def read(self, reader: Reader, entry: TensorEntry, scratch: Scratch) -> None:
        stored = TORCH_DTYPES[entry.dtype]
        weight = scratch.take(entry.nbytes).view(stored).view(self.tensor.shape)
        reader.read(entry, stored, weight)
        quantise_rows(weight, self.tensor, self.scale)

    def is_broken(self) -> torch.Tensor:
        return ~self.scale.isfinite().all()


class Scratch:
    """One buffer on the device for tensors that are not kept as they are stored, made for the largest of them."""

    def __init__(self, targets: dict[str, Target], entries: list[TensorEntry], device: torch.device) -> None:
        largest = max((entry.nbytes for entry in entries if targets[entry.name].through_scratch), default=0)
        self._buffer = torch.empty(largest, dtype=torch.uint8, device=device)

    def take(self, nbytes: int) -> torch.Tensor:
        return self._buffer[:nbytes]
