"""Layers stored as 4-bit codes: their tensors held against the description, and the few bytes that decide their form. No torch.

Read here are bitsandbytes' table and its quant_state. Everything else waits for the loader.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import gcd, isfinite
from pathlib import Path

from workstation.config_fields import Fields
from workstation.errors import ModelFolderError
from workstation.kernels.code_tables import NF4, ScaleKind, Table
from workstation.model_folder import parse_json_object, shown
from workstation.quant.bitsandbytes import STORAGES, TABLES
from workstation.quant.codes import CODE_TENSORS, KEPT, Blocks, CodePacking, Codes, CodeScheme
from workstation.quant.description import WHERE
from workstation.quant.forms import Activations, Form, Part
from workstation.safetensors_header import TensorEntry

BYTES = "U8"
STATE = "weight.quant_state.bitsandbytes__"
TABLE = "weight.quant_map"
NESTED_SCALE, NESTED_TABLE = "weight.nested_absmax", "weight.nested_quant_map"
NESTED_ENTRIES = 256
MAX_BLOCK = 1 << 16
LEAST_GROUP = 8  # columns: narrower ones would hold more bytes of scales than of codes
MAX_STATE_BYTES = 4096
SCALE_DTYPES = {ScaleKind.F32: ("F32",), ScaleKind.E8M0: ("U8", "F8_E8M0"), ScaleKind.E4M3: ("F8_E4M3",)}
_FORMS = {CodePacking.MXFP4: Form.MXFP4, CodePacking.NVFP4: Form.NVFP4, CodePacking.MODELOPT: Form.NVFP4}
_ACTIVATIONS = Activations(quantised=False)


def code_part(scheme: CodeScheme, module: str, columns: int) -> Part:
    """The form of a layer with K = columns. Raises ModelFolderError for a group size that does not divide K."""
    if scheme.packing is CodePacking.BNB:
        return _block_part(module, columns, scheme, Blocks(scheme.block))
    codes = KEPT[scheme.packing]
    if columns % codes.size:
        raise ModelFolderError(f"{WHERE}: groups of {codes.size} do not divide the {columns} columns of {module}",
                               param="quantization_config")
    return _part(module, scheme.packing, _FORMS[scheme.packing], codes)


def _block_part(module: str, columns: int, scheme: CodeScheme, blocks: Blocks, table: Table | None = None) -> Part:
    """The form of a layer whose scales run on from row to row: a group is what rows and blocks can both be cut into."""
    size = gcd(blocks.size, columns)
    if size < LEAST_GROUP:
        raise ModelFolderError(f"the {columns} columns of {module} and blocks of {blocks.size} weights have only {size} as a "
                               f"common divisor; {LEAST_GROUP} is the least that is served", param="quantization_config")
    form = Form.NF4 if scheme.table == NF4 else Form.FP4
    return _part(module, CodePacking.BNB, form, Codes(table or scheme.table, size, ScaleKind.F32), blocks)


def _part(module: str, packing: CodePacking, form: Form, codes: Codes, blocks: Blocks | None = None) -> Part:
    dtypes = (BYTES,) if blocks is not None and blocks.nested_size else SCALE_DTYPES[codes.scale]
    return Part(form, f"{module}.{CODE_TENSORS[packing].scale}", activations=_ACTIVATIONS, scale_dtypes=dtypes, groups=codes,
                packing=packing, blocks=blocks)


class CodeLayers:
    """Reads layers one by one, and remembers which small tensors need no loading any more."""

    def __init__(self, stored: Mapping[str, TensorEntry]) -> None:
        self._stored = stored
        self.read: list[str] = []

    def packing(self, module: str, scheme: object) -> CodePacking | None:
        """Which 4-bit codes a module has by its tensors' names and dtypes; None for none."""
        if any(f"{module}.{name}" in self._stored for name in (CODE_TENSORS[CodePacking.BNB].scale, TABLE)):
            return CodePacking.BNB
        described = scheme.packing if isinstance(scheme, CodeScheme) else None
        packed, weight = self._stored.get(f"{module}.weight_packed"), self._stored.get(f"{module}.weight")
        if packed is not None and packed.dtype == BYTES:
            divided = described is CodePacking.NVFP4 or f"{module}.weight_global_scale" in self._stored
            return CodePacking.NVFP4 if divided else CodePacking.MXFP4
        if weight is not None and weight.dtype == BYTES:
            return described if described is CodePacking.BNB else CodePacking.MODELOPT
        return None

    def part(self, module: str, scheme: CodeScheme, rows: int, columns: int) -> Part:
        """The form of a layer whose codes are stored. Raises ModelFolderError naming the tensor."""
        names = CODE_TENSORS[scheme.packing]
        codes = self._entry(module, names.codes, None)
        for other in ("weight", "weight_packed"):
            if other != names.codes and f"{module}.{other}" in self._stored:
                raise _refuse(codes, f"is {codes.dtype}, but {module}.{other} is there as well")
        self._entry(module, names.scale, codes)
        if names.factor:
            self._entry(module, names.factor, codes)
        if scheme.packing is CodePacking.BNB:
            return self._blocks(module, scheme, codes, rows, columns)
        return code_part(scheme, module, columns)

    def _entry(self, module: str, name: str, codes: TensorEntry | None) -> TensorEntry:
        entry = self._stored.get(f"{module}.{name}")
        if entry is not None:
            return entry
        if codes is None:
            raise ModelFolderError(f"tensor {module}.{name} is missing from the checkpoint, and its scales are there",
                                   param="quantization_config")
        raise _refuse(codes, f"holds 4-bit codes, but {module}.{name} is missing")

    def _blocks(self, module: str, scheme: CodeScheme, codes: TensorEntry, rows: int, columns: int) -> Part:
        if codes.dtype not in STORAGES.values() or codes.nbytes != -(-rows * columns // 2):
            raise _refuse(codes, f"is {codes.dtype} {list(codes.shape)}, {codes.nbytes} bytes; {rows} × {columns} codes of "
                                 f"4 bits are {-(-rows * columns // 2)} bytes of {', '.join(STORAGES.values())}")
        kind, state = self._state(module, codes)
        if TABLES[kind] != scheme.table:
            raise _refuse(state, f"is of {kind} codes, but {WHERE} describes another bnb_4bit_quant_type")
        table = self._table(module, kind, codes)
        absmax = self._stored[f"{module}.{CODE_TENSORS[CodePacking.BNB].scale}"]
        nested = absmax.dtype == BYTES
        blocks = self._read_state(state, kind, nested, rows, columns) or _assumed(absmax, rows * columns, nested)
        if nested:
            self._entry(module, NESTED_SCALE, codes)
            self._entry(module, NESTED_TABLE, codes)
        return _block_part(module, columns, scheme, blocks, table)

    def _state(self, module: str, codes: TensorEntry) -> tuple[str, TensorEntry]:
        """The kind of codes, nf4 or fp4, and the tensor whose name says so."""
        found = [(kind, self._stored[name]) for kind in TABLES if (name := f"{module}.{STATE}{kind}") in self._stored]
        if len(found) != 1:
            raise _refuse(codes, f"holds 4-bit codes, but {'both' if found else 'neither'} of "
                                 f"{' and '.join(f'{module}.{STATE}{kind}' for kind in TABLES)} is there")
        return found[0]

    def _table(self, module: str, kind: str, codes: TensorEntry) -> Table:
        entry = self._entry(module, TABLE, codes)
        self.read.append(entry.name)
        if entry.dtype != "F32" or entry.shape != (16,):
            raise _refuse(entry, f"is {entry.dtype} {list(entry.shape)}; it must be F32 [16]")
        data = _bytes(entry)
        if not data:
            return TABLES[kind]
        table = struct.unpack("<16f", data)
        if not all(isfinite(value) and abs(value) <= 1 for value in table):
            raise _refuse(entry, f"holds {shown(table)}; its values must lie between -1 and 1")
        return table

    def _read_state(self, entry: TensorEntry, kind: str, nested: bool, rows: int, columns: int) -> Blocks | None:
        """The JSON in a quant_state; None when only the header is on this disk."""
        self.read.append(entry.name)
        if entry.dtype != BYTES or entry.nbytes > MAX_STATE_BYTES:
            raise _refuse(entry, f"is {entry.dtype} of {entry.nbytes} bytes; it must be U8 of at most {MAX_STATE_BYTES}")
        data = _bytes(entry)
        if not data:
            return None
        state = Fields(parse_json_object(data, entry.name), entry.name)
        if state.text("quant_type", "") != kind:
            raise state.refuse("quant_type", kind)
        if state.raw("shape") != [rows, columns]:
            raise state.refuse("shape", f"[{rows}, {columns}], as config.json makes it")
        state.text("dtype", "")  # of the weight before; what is served has the model's
        size = state.integer("blocksize", 1, MAX_BLOCK)
        if size & (size - 1):
            raise state.refuse("blocksize", "a power of two")
        if nested != (state.raw("nested_blocksize") is not None):
            raise state.refuse("nested_blocksize", "given exactly where absmax is U8")
        blocks = Blocks(size)
        if nested:
            if state.text("nested_dtype", "float32") != "float32":
                raise state.refuse("nested_dtype", "float32")
            blocks = Blocks(size, state.integer("nested_blocksize", 1, MAX_BLOCK), state.number("nested_offset", -1e30, 1e30))
        for name in state.unasked():
            raise state.refuse(name, "absent: it is not known")
        return blocks


def _assumed(absmax: TensorEntry, weights: int, nested: bool) -> Blocks:
    """Where only headers are at hand: the block size that gives as many scales as there are."""
    count = absmax.shape[0] if absmax.shape else 1
    sizes = [1 << power for power in range(5, 13) if -(-weights >> power) == count]
    return Blocks(sizes[0] if sizes else 64, NESTED_ENTRIES if nested else 0)


def _bytes(entry: TensorEntry) -> bytes:
    """A small tensor's bytes; none when only the header is on this disk."""
    path = Path(entry.path)
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        file.seek(entry.start)
        return file.read(entry.nbytes)


def _refuse(entry: TensorEntry, what: str) -> ModelFolderError:
    return ModelFolderError(f"tensor {entry.name} in {entry.file} {what}", param="quantization_config")
