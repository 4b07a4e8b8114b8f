"""What becomes of stored 4-bit codes: put into the order of `kernels.code_weights`, their scales into that of the codes."""

from __future__ import annotations

import torch

from workstation.kernels.code_tables import ScaleKind
from workstation.kernels.code_weights import CodeWeight, pack, pack_scales
from workstation.model.staging import Reader
from workstation.model.targets import TORCH_DTYPES, Scratch, Shapes, Target
from workstation.quant.bitsandbytes import STORAGES
from workstation.quant.codes import Blocks
from workstation.quant.quantise_codes import quantise_codes
from workstation.safetensors_header import DTYPE_BITS, TensorEntry

CHUNK_ELEMENTS = 1 << 24
NESTED_ENTRIES = 256
MAX_EXPONENT = 136  # of an e8m0 scale, 2^9: what kernels can multiply with
MAX_E4M3 = 0x7E  # the largest positive number; beyond lie NaN and what is negative
LARGEST = 6 * 448  # of e2m1, of e4m3
LARGEST_WEIGHT = 1e4  # a factor that allows more is the other way round


def storage_shapes(codes: int) -> tuple[Shapes, tuple[str, ...]]:
    """The shapes and dtypes in which bitsandbytes stores so many codes."""
    count = -(-codes // 2)
    sizes = dict.fromkeys(DTYPE_BITS[dtype] // 8 for dtype in STORAGES.values())
    return tuple((count // size, 1) for size in sizes), tuple(STORAGES.values())


class StoredCodes(Target):
    """Two codes a byte, row after row. Kept as `CodeWeight.words`, [N, W] int16."""

    __slots__ = ("_columns", "_first_is_high", "_kind")
    through_scratch = True

    def __init__(self, weight: CodeWeight, shapes: Shapes, dtypes: tuple[str, ...], *, first_is_high: bool = False) -> None:
        super().__init__(weight.words, shapes, dtypes)
        self._columns, self._kind, self._first_is_high = weight.columns, weight.kind, first_is_high

    def read(self, reader: Reader, entry: TensorEntry, scratch: Scratch) -> None:
        stored = _raw(reader, entry, scratch).view(-1, self._columns // 2)
        step = max(1, CHUNK_ELEMENTS // self._columns)
        for start in range(0, stored.shape[0], step):
            low, high = stored[start:start + step] & 15, stored[start:start + step] >> 4
            pair = (high, low) if self._first_is_high else (low, high)
            self.tensor[start:start + step] = pack(torch.stack(pair, -1).flatten(1), self._kind)


class ByteScales(Target):
    """A byte a group, [N, G]. Kept as `CodeWeight.scale`, [G / 4, N] int32."""

    __slots__ = ("_broken", "_kind")
    through_scratch = True

    def __init__(self, weight: CodeWeight, dtypes: tuple[str, ...]) -> None:
        super().__init__(weight.scale, ((weight.rows, weight.columns // weight.size),), dtypes)
        self._kind = weight.kind

    @property
    def complaint(self) -> str:
        return f"holds scales that are NaN or {'above 2^9' if self._kind is ScaleKind.E8M0 else 'negative'}"

    def read(self, reader: Reader, entry: TensorEntry, scratch: Scratch) -> None:
        stored = _raw(reader, entry, scratch).view(entry.shape)
        self._broken = stored.max() > (MAX_EXPONENT if self._kind is ScaleKind.E8M0 else MAX_E4M3)
        pack_scales(stored, self.tensor)

    def is_broken(self) -> torch.Tensor:
        return self._broken


class Factor(Target):
    """One number for a matrix, kept for each of its rows. tensor: [N] float32, perhaps a part of more rows."""

    __slots__ = ("_divides",)

    def __init__(self, tensor: torch.Tensor, *, divides: bool) -> None:
        super().__init__(tensor, ((), (1,)), ("F32",))
        self._divides = divides

    @property
    def complaint(self) -> str:
        ours, other = ("divisor", "multiplier") if self._divides else ("multiplier", "divisor")
        return (f"is not a positive {ours} that keeps weights below {LARGEST_WEIGHT:g}; "
                f"in another format the same number is a {other}")

    def read(self, reader: Reader, entry: TensorEntry, scratch: Scratch) -> None:
        one = self.tensor.new_empty(1)
        reader.read(entry, torch.float32, one)
        self.tensor.copy_(one.expand_as(self.tensor))

    def is_broken(self) -> torch.Tensor:
        largest = LARGEST / self.tensor[0] if self._divides else LARGEST * self.tensor[0]
        return ~((self.tensor[0] > 0) & (largest <= LARGEST_WEIGHT) & (largest > 0))


class Absmax(Target):
    """bitsandbytes' scales, a block of the whole matrix each. Kept a group and row, `CodeWeight.scale`, [G, N] float32."""

    __slots__ = ("_blocks", "_weight")

    def __init__(self, weight: CodeWeight, blocks: Blocks) -> None:
        super().__init__(weight.scale, ((block_count(weight, blocks),),), ("F32",))
        self._weight, self._blocks = weight, blocks

    def read(self, reader: Reader, entry: TensorEntry, scratch: Scratch) -> None:
        stored = self.tensor.new_empty(entry.shape)
        reader.read(entry, torch.float32, stored)
        spread_blocks(stored, self._weight, self._blocks)

    def is_broken(self) -> torch.Tensor:
        return ~self.tensor.isfinite().all()


class NestedAbsmax:
    """Absmax that are bytes themselves: `table[byte] · scale[j // nested size] + offset`, once all three have been read."""

    def __init__(self, weight: CodeWeight, blocks: Blocks) -> None:
        self._weight, self._blocks = weight, blocks
        count = block_count(weight, blocks)
        self.absmax = _Nested(self, (count,), "U8", torch.uint8)
        self.scale = _Nested(self, (-(-count // blocks.nested_size),), "F32", torch.float32)
        self.table = _Nested(self, (NESTED_ENTRIES,), "F32", torch.float32)

    @property
    def kept(self) -> torch.Tensor:
        return self._weight.scale

    def finish(self) -> None:
        codes, scale, table = self.absmax.stored, self.scale.stored, self.table.stored
        if codes is None or scale is None or table is None:
            return
        wide = table[codes.to(torch.int32)] * scale.repeat_interleave(self._blocks.nested_size)[:len(codes)]
        spread_blocks(wide + self._blocks.offset, self._weight, self._blocks)
        self.absmax.stored = self.scale.stored = self.table.stored = None


class _Nested(Target):
    """One of the three."""

    __slots__ = ("_owner", "_stored_dtype", "stored")

    def __init__(self, owner: NestedAbsmax, shape: tuple[int, ...], dtype: str, stored: torch.dtype) -> None:
        super().__init__(owner.kept, (shape,), (dtype,))
        self._owner, self._stored_dtype = owner, stored
        self.stored: torch.Tensor | None = None

    def read(self, reader: Reader, entry: TensorEntry, scratch: Scratch) -> None:
        self.stored = torch.empty(entry.shape, dtype=self._stored_dtype, device=self.tensor.device)
        reader.read(entry, self._stored_dtype, self.stored)
        self._owner.finish()

    def is_broken(self) -> torch.Tensor:
        return ~self.tensor.isfinite().all()


class QuantisedCodes(Target):
    """A 16- or 32-bit weight that is kept as codes of its form's table."""

    __slots__ = ("_weight",)
    through_scratch = True

    def __init__(self, weight: CodeWeight) -> None:
        super().__init__(weight.words, (weight.shape,))
        self._weight = weight

    def read(self, reader: Reader, entry: TensorEntry, scratch: Scratch) -> None:
        stored = TORCH_DTYPES[entry.dtype]
        raw = scratch.take(entry.nbytes).view(stored).view(entry.shape)
        reader.read(entry, stored, raw)
        quantise_codes(raw, self._weight)

    def is_broken(self) -> torch.Tensor:
        return ~self._weight.scale.isfinite().all()


def block_count(weight: CodeWeight, blocks: Blocks) -> int:
    return -(-weight.rows * weight.columns // blocks.size)


def spread_blocks(absmax: torch.Tensor, weight: CodeWeight, blocks: Blocks) -> None:
    """absmax [⌈NK / block⌉] → the weight's scales: a group lies within one block."""
    groups = weight.columns // weight.size
    if weight.size == blocks.size:
        pack_scales(absmax.view(weight.rows, groups), weight.scale)
        return
    first = torch.arange(weight.rows * groups, device=absmax.device) * weight.size
    pack_scales(absmax[first // blocks.size].view(weight.rows, groups), weight.scale)


def _raw(reader: Reader, entry: TensorEntry, scratch: Scratch) -> torch.Tensor:
    """A stored tensor's bytes, in the scratch buffer."""
    found = scratch.take(entry.nbytes)
    reader.read(entry, torch.uint8, found)
    return found
