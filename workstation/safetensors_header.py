"""The headers of a checkpoint's safetensors files: what lies where, checked before a byte of data is read. No torch.

Format: 8 bytes little-endian header length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.
Offsets count from the end of the header; tensors lie without gaps or overlaps and fill the file exactly.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workstation.errors import ModelFolderError
from workstation.model_folder import (
    file_in_folder,
    has_file,
    model_folder,
    parse_json_object,
    read_json_object,
    shown,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BARE_EMBEDDING = "embed_tokens.weight"
MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 100_000
MAX_RANK = 8
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack")

# Bits, because 4-bit and 6-bit floats exist.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint.

    Attributes:
        file: the file's name in the model folder.  path: where it really lies.
        start: byte offset from the file's beginning.  nbytes: the tensor's length.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    path: Path
    start: int
    nbytes: int


def read_header(path: Path, label: str) -> list[TensorEntry]:
    """The entries of one safetensors file, in file order.

    Args:
        path: a regular file (see `file_in_folder`).  label: the name used in errors.

    Raises ModelFolderError for a truncated file, a header that is too large, malformed, or does not fit the file.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise ModelFolderError(f"{label} is truncated: {size} bytes cannot hold its header; download it again")
        if length > MAX_HEADER_BYTES:
            raise ModelFolderError(f"{label}: the header's {length} bytes exceed the limit of {MAX_HEADER_BYTES}")
        data = file.read(length)
    header = parse_json_object(data, f"{label} (header)", max_bytes=MAX_HEADER_BYTES)
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise ModelFolderError(f"{label}: {len(header)} tensors exceed the limit of {MAX_TENSORS}")
    entries = [_entry(name, item, path, label, 8 + length) for name, item in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    _check_cover(entries, 8 + length, size, label)
    return entries


def _entry(name: str, item: Any, path: Path, label: str, data_start: int) -> TensorEntry:
    where = f"{label}: tensor {shown(name)}"
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise ModelFolderError(f"{where} must have dtype, shape and data_offsets")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ModelFolderError(f"{where} has the unknown dtype {shown(dtype)}")
    if not _whole_numbers(shape) or len(shape) > MAX_RANK:
        raise ModelFolderError(f"{where} has a malformed shape: {shown(shape)}")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise ModelFolderError(f"{where} has malformed data_offsets: {shown(offsets)}")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    nbytes = offsets[1] - offsets[0]
    if bits != nbytes * 8:
        raise ModelFolderError(f"{where} is {dtype} {shown(shape)}, which is not the {nbytes} bytes of its "
                               "data_offsets")
    return TensorEntry(name, dtype, tuple(shape), label, path, data_start + offsets[0], nbytes)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _check_cover(entries: list[TensorEntry], data_start: int, size: int, label: str) -> None:
    end = data_start
    for entry in entries:
        if entry.start != end:
            kind = "a gap before" if entry.start > end else "an overlap at"
            raise ModelFolderError(f"{label}: {kind} tensor {shown(entry.name)}, byte {entry.start}")
        end += entry.nbytes
    if end > size:
        raise ModelFolderError(f"{label} is truncated: its header promises {end} bytes, the file has {size}; "
                               "download it again")
    if end < size:
        raise ModelFolderError(f"{label}: {size - end} bytes after the last tensor belong to none")


def read_checkpoint(folder: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """Every tensor of a folder's checkpoint by name: `model.safetensors`, else the shards its index names.

    Raises ModelFolderError: no safetensors (pickles are refused by name), an absent, misnamed or malformed shard,
    a tensor that the index places where it is not, or that two shards hold.
    """
    root = model_folder(folder)
    if has_file(root, SINGLE_FILE):
        entries = read_header(file_in_folder(root, SINGLE_FILE), SINGLE_FILE)
        return _with_prefix({entry.name: entry for entry in entries})
    if not has_file(root, INDEX_FILE):
        raise _no_safetensors(root)
    return _with_prefix(_read_shards(root))


def _with_prefix(found: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Checkpoints of a model without its head (embedding models) leave `model.` out of every name."""
    if BARE_EMBEDDING not in found:
        return found
    return {f"model.{name}": replace(entry, name=f"model.{name}") for name, entry in found.items()}


def _read_shards(root: Path) -> dict[str, TensorEntry]:
    weight_map = read_json_object(root, INDEX_FILE, max_bytes=MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFolderError(f"{INDEX_FILE}: weight_map must be an object from tensor to file, "
                               f"got {shown(weight_map)}")
    if len(weight_map) > MAX_TENSORS:
        raise ModelFolderError(f"{INDEX_FILE}: {len(weight_map)} tensors exceed the limit of {MAX_TENSORS}")
    found: dict[str, TensorEntry] = {}
    paths = {shard: file_in_folder(root, shard) for shard in map(_shard_name, weight_map.items())}
    for shard, path in paths.items():
        for entry in read_header(path, shard):
            if entry.name in found:
                raise ModelFolderError(f"tensor {shown(entry.name)} is in {found[entry.name].file} "
                                       f"and again in {shard}")
            if weight_map.get(entry.name, shard) != shard:
                raise ModelFolderError(f"{INDEX_FILE} places tensor {shown(entry.name)} in "
                                       f"{shown(weight_map[entry.name])}, but it is in {shard}")
            found[entry.name] = entry
    for name, shard in weight_map.items():
        if name not in found:
            raise ModelFolderError(f"{INDEX_FILE} places tensor {shown(name)} in {shown(shard)}, which does not hold it")
    return found


def _shard_name(item: tuple[str, Any]) -> str:
    name, shard = item
    if not isinstance(shard, str) or not shard.endswith(".safetensors"):
        raise ModelFolderError(f"{INDEX_FILE}: tensor {shown(name)} is in {shown(shard)}, "
                               "which is not a .safetensors file name")
    return shard


def _no_safetensors(root: Path) -> ModelFolderError:
    others = sorted(path.name for path in root.iterdir() if path.name.endswith(PICKLE_ENDINGS))
    if others:
        return ModelFolderError(f"{root} holds {others[0]} and no safetensors; weights are read from safetensors only, "
                                "because other formats can run code: convert the model first")
    loose = sorted(path.name for path in root.iterdir() if path.name.endswith(".safetensors"))
    if loose:
        return ModelFolderError(f"{root} holds {loose[0]} but neither {SINGLE_FILE} nor {INDEX_FILE}")
    return ModelFolderError(f"{root} holds no weights: {SINGLE_FILE} or {INDEX_FILE} is missing")


def checkpoint_bytes(folder: str | os.PathLike[str]) -> int:
    """Bytes of all tensors of a folder's checkpoint, from the headers alone. Raises as `read_checkpoint` does."""
    return sum(entry.nbytes for entry in read_checkpoint(folder).values())


def checkpoint_dtype(folder: str | os.PathLike[str]) -> str | None:
    """The dtype most elements are stored in ("bfloat16", "float16", "float32"); None without weights or for others."""
    root = model_folder(folder)
    if not (has_file(root, SINGLE_FILE) or has_file(root, INDEX_FILE)):
        return None
    elements: Counter[str] = Counter()
    for entry in read_checkpoint(root).values():
        elements[entry.dtype] += math.prod(entry.shape)
    return DTYPE_NAMES.get(elements.most_common(1)[0][0]) if elements else None
