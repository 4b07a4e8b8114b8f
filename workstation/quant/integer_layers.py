"""Layers stored as integers: their tensors held against the description, and the few bytes that decide their form. No torch.

Read here are the order of groups (`g_idx`), the zero points of symmetric layers, which must all be 2^(bits−1), and the shape
that packed rows were cut to. Everything else waits for the loader.
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from workstation.errors import ModelFolderError
from workstation.quant.description import WHERE
from workstation.quant.forms import Activations, Form, Part
from workstation.quant.integers import NAMES, SCALE_BYTES, Groups, IntScheme, Names, Packing, stored_shapes
from workstation.safetensors_header import TensorEntry

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 28  # of a tensor that is read here
DEFAULT_SCALE = "BF16"  # of layers without tensors to look at
_FORMS = {4: Form.INT4, 8: Form.INT8}


def integer_part(scheme: IntScheme, module: str, columns: int, scale_dtype: str = DEFAULT_SCALE, order: bytes = b"") -> Part:
    """The form of a layer with K = columns. Raises ModelFolderError for a group size that does not divide K."""
    if scheme.group_size and columns % scheme.group_size:
        raise ModelFolderError(f"{WHERE}: group_size {scheme.group_size} does not divide the {columns} columns of {module}",
                               param="quantization_config")
    # One group a row is the same whatever it is called.
    size = scheme.group_size if scheme.group_size < columns else 0
    groups = Groups(scheme.bits, size, not scheme.symmetric, scale_dtype, order)
    activations = Activations(quantised=scheme.activations)
    return Part(_FORMS[scheme.bits], f"{module}.{NAMES[scheme.packing].scale}", activations=activations,
                scale_dtypes=(scale_dtype,), groups=groups, packing=scheme.packing)


class IntegerLayers:
    """Reads layers one by one, and remembers which small tensors need no loading any more."""

    def __init__(self, stored: Mapping[str, TensorEntry]) -> None:
        self._stored = stored
        self.read: list[str] = []
        self._relabelled = False

    def part(self, module: str, scheme: IntScheme, rows: int, columns: int) -> Part:
        """The form of a layer whose codes are stored. Raises ModelFolderError naming the tensor."""
        names = NAMES[scheme.packing]
        self._check_layout(module, scheme, rows, columns)
        scale = self._stored.get(f"{module}.{names.scale}")
        if scale is None:
            raise self._refuse(self._stored[f"{module}.{names.codes}"], f"has no scale: {module}.{names.scale} is missing")
        if scale.dtype not in SCALE_BYTES:
            raise self._refuse(scale, f"is {scale.dtype}; scales must be {', '.join(SCALE_BYTES)}")
        self._check_zeros(module, scheme, names)
        self._check_row_major(module)
        self._check_shape(module, rows, columns)
        part = integer_part(scheme, module, columns, scale.dtype, self._order(module, scheme, columns, names))
        if not scheme.symmetric and rows % 2:
            raise ModelFolderError(f"{module} has {rows} rows; layers with zero points need an even number")
        return part

    def _check_layout(self, module: str, scheme: IntScheme, rows: int, columns: int) -> None:
        """Whether the codes lie as the description says, where another packing explains them better."""
        codes = self._stored[f"{module}.{NAMES[scheme.packing].codes}"]
        for other in (Packing.GPTQ, Packing.AWQ):
            for bits in (4, 8):
                mine = stored_shapes(scheme.packing, scheme.bits, rows, columns, 1)[NAMES[scheme.packing].codes]
                theirs = stored_shapes(other, bits, rows, columns, 1).get(NAMES[scheme.packing].codes)
                if codes.shape == theirs != mine:
                    raise self._refuse(codes, f"has the shape {list(codes.shape)} of {bits}-bit {other} codes, but {WHERE} "
                                              f"describes {scheme.bits}-bit {scheme.packing}")

    def _check_zeros(self, module: str, scheme: IntScheme, names: Names) -> None:
        entry = self._stored.get(f"{module}.{names.zero}")
        if not scheme.symmetric:
            if entry is None:
                raise self._refuse(self._stored[f"{module}.{names.codes}"],
                                   f"has no zero points: {module}.{names.zero} is missing and {WHERE} says they exist")
            return
        if entry is None:
            return
        self.read.append(entry.name)
        data = self._bytes(entry)
        middle = 0x88 if scheme.bits == 4 else 0x80
        below = 0x77 if scheme.bits == 4 else 0x7F
        expected = {Packing.GPTQ: below, Packing.ROWS: 0}.get(scheme.packing, middle)
        # Old compressed-tensors files hold zeros as they are, before the offset that codes have.
        other = {Packing.GPTQ: middle, Packing.GPTQ_V2: below}.get(scheme.packing, 0)
        if data.count(expected) == len(data):
            return
        if data.count(other) != len(data):
            raise self._refuse(entry, f"holds zero points other than {1 << scheme.bits - 1}, but {WHERE} says that the weights "
                                      "are symmetric")
        if scheme.packing is not Packing.PACKED and not self._relabelled:
            self._relabelled = True
            log.warning("%s names the wrong checkpoint_format: %s of %s is stored the other way; symmetric weights are "
                        "read by what is stored", WHERE, names.zero, module)

    def _check_row_major(self, module: str) -> None:
        """bitsandbytes' `weight_format`: 0, the order of rows; old versions wrote the orders of their kernels as well."""
        entry = self._stored.get(f"{module}.weight_format")
        if entry is None:
            return
        self.read.append(entry.name)
        if any(self._bytes(entry)):
            raise self._refuse(entry, "is not 0: only rows one after the other are served")

    def _check_shape(self, module: str, rows: int, columns: int) -> None:
        """`weight_shape` is the truth about rows that were padded."""
        entry = self._stored.get(f"{module}.weight_shape")
        if entry is None:
            return
        self.read.append(entry.name)
        data = self._bytes(entry)
        if entry.dtype not in ("I64", "I32") or entry.shape != (2,):
            raise self._refuse(entry, f"is {entry.dtype} {list(entry.shape)}; it must be two integers")
        found = array("q" if entry.dtype == "I64" else "i", data).tolist()
        if data and found != [rows, columns]:
            raise self._refuse(entry, f"says {found}; config.json makes it [{rows}, {columns}]")

    def _order(self, module: str, scheme: IntScheme, columns: int, names: Names) -> bytes:
        entry = self._stored.get(f"{module}.{names.order}")
        if entry is None:
            return b""
        self.read.append(entry.name)
        if entry.dtype != "I32" or entry.shape != (columns,):
            raise self._refuse(entry, f"is {entry.dtype} {list(entry.shape)}; it must be I32 [{columns}]")
        data = self._bytes(entry)
        size = scheme.group_size or columns
        if not data or columns % size:
            return b""
        try:
            return _order(data, size)
        except ValueError as error:
            raise self._refuse(entry, str(error)) from None

    @staticmethod
    def _bytes(entry: TensorEntry) -> bytes:
        """A tensor's bytes; none when only the header is on this disk."""
        if entry.nbytes > MAX_BYTES:
            raise IntegerLayers._refuse(entry, f"has {entry.nbytes} bytes; the limit is {MAX_BYTES}")
        path = Path(entry.path)
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            file.seek(entry.start)
            return file.read(entry.nbytes)

    @staticmethod
    def _refuse(entry: TensorEntry, what: str) -> ModelFolderError:
        return ModelFolderError(f"tensor {entry.name} in {entry.file} {what}", param="quantization_config")


@lru_cache(maxsize=8)  # layers with the same input share an order
def _order(data: bytes, size: int) -> bytes:
    """g_idx, the group of every column → the columns by group, int32; empty when they lie so already.

    All zeros is what some writers leave where groups are neighbours. Raises ValueError for groups that are not full.
    """
    group_of = array("i", data).tolist()
    columns = len(group_of)
    if not any(group_of) or group_of == [column // size for column in range(columns)]:
        return b""
    found = Counter(group_of)
    if found != dict.fromkeys(range(columns // size), size):
        raise ValueError(f"must give {size} columns to each of the groups 0 to {columns // size - 1}")
    return array("i", sorted(range(columns), key=group_of.__getitem__)).tobytes()
