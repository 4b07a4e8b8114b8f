"""Opening files of a model folder safely: a folder from the internet is input like any other. Imports no torch.

Only regular files are opened, by plain names, and only inside the folder. The one way out is the link a Hugging Face
cache makes: `snapshots/<revision>/name` → `../../blobs/<hash>`.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from workstation.errors import ModelFolderError

MAX_JSON_BYTES = 1 << 20
MAX_JSON_DEPTH = 64
MAX_NAME_BYTES = 255


def shown(value: object, limit: int = 80) -> str:
    """`repr` of a value from a file, cut so that an error message stays readable."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def model_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder, resolved. Raises ModelFolderError when it is missing or not a folder."""
    try:
        path = Path(folder).resolve(strict=True)
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"model folder {shown(str(folder), 200)} does not exist") from error
    except RuntimeError as error:  # a loop of links
        raise ModelFolderError(f"model folder {shown(str(folder), 200)} is a loop of links") from error
    if not path.is_dir():
        raise ModelFolderError(f"{path} is not a folder; a model is a folder with config.json and safetensors files")
    return path


def file_in_folder(folder: Path, name: str, *, below: str = "") -> Path:
    """The real path of a regular file directly inside `folder`, or inside its sub-folder `below`.

    Args:
        folder: as returned by `model_folder`.  name, below: plain names, often read from another file.

    Raises ModelFolderError naming the file: path parts, absolute names, NUL, over-long names, links that leave the
    folder (Hugging Face's `blobs` excepted), FIFOs, devices, folders, and missing files.
    """
    if not _is_plain(name) or (below and not _is_plain(below)):
        raise ModelFolderError(f"file name {shown(name)} in {folder / below} must be a plain name without path parts")
    inside = folder / below
    try:
        real = (inside / name).resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelFolderError(f"{name} is missing from {inside}, or its link is broken") from error
    if real.parent not in (inside, _blobs_of(folder)):
        raise ModelFolderError(f"{name} in {inside} is a link that leaves the folder; copy the file into it")
    if not stat.S_ISREG(mode):
        raise ModelFolderError(f"{name} in {inside} is not a regular file")
    return real


def _is_plain(name: str) -> bool:
    short = len(name.encode(errors="replace")) <= MAX_NAME_BYTES
    return short and name not in ("", ".", "..") and not any(sign in name for sign in ("/", "\\", "\0"))


def _blobs_of(folder: Path) -> Path | None:
    """The `blobs` folder that a Hugging Face cache keeps beside `snapshots/<revision>`."""
    return folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else None


def has_file(folder: Path, name: str) -> bool:
    return os.path.lexists(folder / name)


def read_json_object(folder: Path, name: str, *, max_bytes: int = MAX_JSON_BYTES, below: str = "") -> dict[str, Any]:
    """A JSON object from a file of the folder, or of its sub-folder `below`; strict as `parse_json_object` is."""
    path = file_in_folder(folder, name, below=below)
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    return parse_json_object(data, name, max_bytes=max_bytes)


def parse_json_object(data: bytes, name: str, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Strict JSON: UTF-8, one object, no NaN or infinity, no field twice, bounded size and depth.

    Raises ModelFolderError that begins with `name`.
    """
    if len(data) > max_bytes:
        raise ModelFolderError(f"{name} is larger than the limit of {max_bytes} bytes")
    if not data.strip():
        raise ModelFolderError(f"{name} is empty")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelFolderError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from error

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) != len(items):
            raise ModelFolderError(f"{name}: the field {shown(_first_repeated(items))} is given twice")
        return made

    def constant(word: str) -> NoReturn:
        raise ModelFolderError(f"{name} holds {word}, which is not JSON")

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError as error:
        raise ModelFolderError(f"{name} is nested too deeply; the limit is {MAX_JSON_DEPTH}") from error
    except ValueError as error:
        raise ModelFolderError(f"{name} is not valid JSON: {shown(str(error), 160)}") from error
    if not isinstance(value, dict):
        raise ModelFolderError(f"{name} must hold a JSON object, got {shown(value)}")
    check_depth(value, name)
    return value


def _first_repeated(items: list[tuple[str, Any]]) -> str | None:
    seen: set[str] = set()
    for key, _ in items:
        if key in seen:
            return key
        seen.add(key)
    return None


def check_depth(value: object, name: str) -> None:
    """Raise ModelFolderError when a parsed value nests deeper than MAX_JSON_DEPTH; walks without recursion."""
    level: list[object] = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    raise ModelFolderError(f"{name} is nested too deeply; the limit is {MAX_JSON_DEPTH}")


def _children(item: object) -> Iterable[object]:
    if isinstance(item, dict):
        return item.values()
    return item if isinstance(item, list) else ()
