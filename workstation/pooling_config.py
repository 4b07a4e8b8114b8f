"""What a sentence-transformers folder says about embeddings: which hidden states, normalised or not. Imports no torch.

modules.json lists the parts of such a model in order; the folder of its Pooling part holds a config.json of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workstation.engine.request import Pooling
from workstation.errors import ModelFolderError
from workstation.model_folder import (
    MAX_JSON_BYTES,
    file_in_folder,
    has_file,
    model_folder,
    parse_json_object,
    read_json_object,
    shown,
)

_MODES: dict[str, Pooling] = {"lasttoken": "last", "mean_tokens": "mean", "mean": "mean"}
_FLAG = "; --pooling last or --pooling mean decides without it"


@dataclass(frozen=True, slots=True)
class PoolingConfig:
    """Attributes:
        pooling: the last token's final hidden state, or the mean of all.  normalise: to length 1.
        sizes: shorter ones the model was trained for (matryoshka); None allows any.
    """

    pooling: Pooling = "last"
    normalise: bool = True
    sizes: tuple[int, ...] | None = ()


def read_pooling(folder: str | Path, pooling: Pooling | None = None) -> PoolingConfig:
    """Read a folder; without modules.json the last token counts, normalised, as vLLM has it.

    Args:
        pooling: overrides the folder's, and leaves its Pooling part unread.

    Raises ModelFolderError naming the file and field: broken, or a kind of pooling or part that is not served.
    """
    root = model_folder(folder)
    sizes = _sizes(read_json_object(root, "config.json")) if has_file(root, "config.json") else ()
    if not has_file(root, "modules.json"):
        return PoolingConfig(pooling or "last", True, sizes)
    normalise, found = False, pooling
    for kind, path in _modules(root):
        if kind == "Normalize":
            normalise = True
        elif kind == "Pooling":
            found = found or _pooling(root, path)
        elif kind != "Transformer":
            raise ModelFolderError(f"modules.json: the part {shown(kind)} is not served; "
                                   "Transformer, Pooling and Normalize are")
    return PoolingConfig(found or "mean", normalise, sizes)


def _modules(root: Path) -> list[tuple[str, str]]:
    """(class name, sub-folder) of each part, in order."""
    with file_in_folder(root, "modules.json").open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    items = parse_json_object(b'{"modules":' + data + b"}", "modules.json")["modules"]  # the file holds a list
    if not isinstance(items, list) or not all(isinstance(item, dict) and isinstance(item.get("type"), str) for item in items):
        raise ModelFolderError(f"modules.json must hold a list of objects with a type, got {shown(items)}")
    return [(item["type"].rpartition(".")[2], str(item.get("path", ""))) for item in items]


def _pooling(root: Path, path: str) -> Pooling:
    where = f"{path}/config.json"
    values = read_json_object(root, "config.json", below=path)
    chosen = [name.removeprefix("pooling_mode_") for name, value in values.items()
              if name.startswith("pooling_mode_") and value is True]
    newer = values.get("pooling_mode")  # one name, in the place of a switch a mode
    chosen = [str(newer)] if newer is not None else chosen
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise ModelFolderError(f"{where}: pooling must be one of {', '.join(_MODES)}, got {', '.join(chosen) or 'none'}{_FLAG}",
                               param="pooling")
    return _MODES[chosen[0]]


def _sizes(config: dict[str, Any]) -> tuple[int, ...] | None:
    """vLLM's two fields: is_matryoshka allows any size, matryoshka_dimensions those it lists."""
    listed = config.get("matryoshka_dimensions")
    if listed is None:
        return None if config.get("is_matryoshka") is True else ()
    if not isinstance(listed, list) or not all(type(size) is int and size > 0 for size in listed):
        raise ModelFolderError(f"config.json: matryoshka_dimensions must be a list of sizes, got {shown(listed)}")
    return tuple(listed)
