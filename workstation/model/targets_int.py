"""Places for the stored tensors of integer layers: unpacked, put in order, and packed as the kernels want them."""

from __future__ import annotations

import torch

from workstation.kernels.int_weights import pack, pack_zeros
from workstation.model.staging import Reader
from workstation.model.targets import TORCH_DTYPES, Scratch, Shapes, Target
from workstation.quant import unpack
from workstation.quant.integers import Packing
from workstation.quant.quantise import quantise_groups
from workstation.safetensors_header import TensorEntry

WORDS = ("I32",)


class _Unpacked(Target):
    """What is read whole into the scratch buffer first."""

    __slots__ = ()
    through_scratch = True

    @staticmethod
    def _stored(reader: Reader, entry: TensorEntry, scratch: Scratch) -> torch.Tensor:
        stored = TORCH_DTYPES[entry.dtype]
        found = scratch.take(entry.nbytes).view(stored).view(entry.shape)
        reader.read(entry, stored, found)
        return found


class PackedCodes(_Unpacked):
    """Codes. tensor: [N, W] int16; order: [K] int32 or None."""

    __slots__ = ("_bits", "_columns", "_order", "_packing")

    def __init__(self, tensor: torch.Tensor, shape: tuple[int, ...], packing: Packing, bits: int, columns: int,
                 order: torch.Tensor | None) -> None:
        super().__init__(tensor, (shape,), WORDS)
        self._packing, self._bits, self._columns, self._order = packing, bits, columns, order

    def read(self, reader: Reader, entry: TensorEntry, scratch: Scratch) -> None:
        stored = self._stored(reader, entry, scratch)
        rows = self.tensor.shape[0]
        step = max(8, unpack.CHUNK_ELEMENTS // self._columns // 8 * 8)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            codes = unpack.codes(stored, self._packing, self._bits, part, self._columns)
            if self._order is not None:
                codes = codes.index_select(1, self._order)
            self.tensor[part] = pack(codes, self._bits)


class SignedCodes(_Unpacked):
    """Signed 8-bit codes, row by row. tensor: [N, W] int16."""

    __slots__ = ()

    def __init__(self, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        super().__init__(tensor, (shape,), ("I8",))

    def read(self, reader: Reader, entry: TensorEntry, scratch: Scratch) -> None:
        stored = self._stored(reader, entry, scratch).view(torch.uint8)
        step = max(1, unpack.CHUNK_ELEMENTS // stored.shape[1])
        for start in range(0, stored.shape[0], step):
            part = slice(start, start + step)
            self.tensor[part] = pack(stored[part] ^ 0x80, 8)  # q + 128


class GroupScales(_Unpacked):
    """A scale a group and row. tensor: [G, N], perhaps a part of wider rows."""

    __slots__ = ("_by_row", "_divisor")

    def __init__(self, tensor: torch.Tensor, shapes: Shapes, dtypes: tuple[str, ...], packing: Packing) -> None:
        super().__init__(tensor, shapes, dtypes)
        self._by_row = packing in (Packing.PACKED, Packing.ROWS)
        self._divisor = 127 if packing is Packing.BNB else None

    def read(self, reader: Reader, entry: TensorEntry, scratch: Scratch) -> None:
        stored = self._stored(reader, entry, scratch)
        if self._divisor is not None:
            stored = stored / self._divisor
        self.tensor.copy_(stored.t() if self._by_row else stored)

    def is_broken(self) -> torch.Tensor:
        return ~self.tensor.isfinite().all()


class GroupZeros(_Unpacked):
    """A zero point a group and row. tensor: uint8 [G, N / 2] (4 bits) or [G, N] (8 bits), perhaps a part of wider rows."""

    __slots__ = ("_bits", "_packing", "_rows")

    def __init__(self, tensor: torch.Tensor, shape: tuple[int, ...], packing: Packing, bits: int, rows: int) -> None:
        super().__init__(tensor, (shape,), WORDS)
        self._packing, self._bits, self._rows = packing, bits, rows

    def read(self, reader: Reader, entry: TensorEntry, scratch: Scratch) -> None:
        zeros = unpack.zeros(self._stored(reader, entry, scratch), self._packing, self._bits, self._rows)
        self.tensor.copy_(pack_zeros(zeros, self._bits))


class QuantisedGroups(_Unpacked):
    """A 16- or 32-bit weight that is kept as integers. tensor: [N, W] int16; scale: [G, N], perhaps a part of wider rows."""

    __slots__ = ("_bits", "scale")

    def __init__(self, tensor: torch.Tensor, scale: torch.Tensor, bits: int, columns: int) -> None:
        super().__init__(tensor, ((tensor.shape[0], columns),))
        self.scale, self._bits = scale, bits

    def read(self, reader: Reader, entry: TensorEntry, scratch: Scratch) -> None:
        quantise_groups(self._stored(reader, entry, scratch), self.tensor, self.scale, self._bits)

    def is_broken(self) -> torch.Tensor:
        return ~self.scale.isfinite().all()
