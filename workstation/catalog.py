"""models.toml → ModelEntry: names people can remember for the models they serve.

    [llama-8b]
    model = "meta-llama/Llama-3.1-8B-Instruct"   # hub id, or a folder: absolute, ~, or relative to the file
    context = 131072                             # the model's own window, for `ws models`
    shape = { model_type = "llama", … }          # the fields of config.json that decide sizes, for `ws estimate` offline
    tools = "llama3_json"                        # the format its template writes tool calls in
    licence = "Apache-2.0"
    sampling = { temperature = 0.6, top_p = 0.9 }
    serve = { max_model_len = "32k" }            # settings of `ws serve`, by their names
    notes = "..."

The file beside the checkout (or in share/ws of the installation) is read first; the person's own
~/.config/ws/models.toml adds entries and replaces those of the same name.
"""

from __future__ import annotations

import math
import os
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

from workstation.errors import ConfigError, ModelNotFoundError
from workstation.settings import unknown_key

BUNDLED = "bundled:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEYS = ["model", "revision", "quantization", "context", "shape", "tools", "licence", "sampling", "serve", "notes",
         "needs"]  # fmt: skip
_QUANTIZATIONS = ("fp8", "int4", "mxfp4", "nf4", "nvfp4")
# The fields of a config.json that decide how many bytes a model takes; others do not belong into a catalogue.
SHAPE_FIELDS = (
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "torch_dtype", "attention_bias", "mlp_bias", "quantization_config",
)  # fmt: skip
_SAMPLING: dict[str, tuple[float, float]] = {
    "temperature": (0, 100), "top_p": (0, 1), "top_k": (-1, 2**31 - 1), "min_p": (0, 1), "repetition_penalty": (0, 100),
    "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2),
}  # fmt: skip
MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One named model.

    Attributes:
        model: hub id, folder, or "bundled:demo".  revision: branch, tag or commit on the hub.
        quantization: the weights' form when it is not 16-bit, such as "fp8".  context: tokens of the model's window.
        shape: fields of config.json that decide sizes, {} when the entry has none.
        tools: format of tool calls, "" when unknown.  licence: of the weights, "" when unknown.
        sampling: default sampling parameters.  serve: defaults for settings.  needs: why it cannot be served yet, or "".
        source: the file that names it.
    """

    name: str
    model: str
    revision: str | None = None
    quantization: str = ""
    context: int | None = None
    shape: dict[str, Any] = field(default_factory=dict)
    tools: str = ""
    licence: str = ""
    sampling: dict[str, float | int] = field(default_factory=dict)
    serve: dict[str, Any] = field(default_factory=dict)
    notes: str = ""
    needs: str = ""
    source: str = "models.toml"

    @property
    def is_bundled(self) -> bool:
        return self.model.startswith(BUNDLED)


def catalogue_files(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """The files that exist, in reading order: later ones override."""
    beside = Path(__file__).resolve().parent.parent / "models.toml"
    installed = Path(sys.prefix) / "share" / "ws" / "models.toml"
    config = Path(environment.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "ws" / "models.toml"
    shipped = next((path for path in (beside, installed) if path.is_file()), None)
    return [path for path in (shipped, config) if path is not None and path.is_file()]


def load_catalogue(files: list[Path] | None = None) -> dict[str, ModelEntry]:
    """All entries by name. Raises ConfigError naming the file, the entry and the key that is wrong."""
    entries: dict[str, ModelEntry] = {}
    for path in catalogue_files() if files is None else files:
        entries |= read_catalogue(path)
    return entries


def read_catalogue(path: Path) -> dict[str, ModelEntry]:
    """The entries of one file."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return {name: _entry(name, table, path) for name, table in data.items()}


def find(name: str, entries: Mapping[str, ModelEntry]) -> ModelEntry:
    """The entry called `name`. Raises ModelNotFoundError naming the nearest."""
    if name in entries:
        return entries[name]
    near = get_close_matches(name, list(entries), 1)
    hint = f"; did you mean {near[0]!r}?" if near else "; `ws models` lists the names"
    raise ModelNotFoundError(f"no model is called {name!r}{hint}", param="model")


def demo_folder() -> Path:
    """The bundled demo model's folder. Raises ModelNotFoundError when the installation lacks it."""
    folder = Path(str(resources.files("workstation.demo").joinpath("model")))
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError("the bundled demo model is missing from this installation", param="model")
    return folder


def _entry(name: str, table: object, path: Path) -> ModelEntry:
    label = f"{path}: [{name}]"
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{label}: a name is 1 to 64 letters, digits, dots, dashes and underscores")
    if not isinstance(table, dict):
        raise ConfigError(f"{label} must be a table with a `model` key")
    for key in table:
        if key not in _KEYS and isinstance(table[key], dict):
            raise ConfigError(f"{label}: {key!r} is not a known key; a name with dots is written in quotes", param=key)
        if key not in _KEYS:
            raise unknown_key(f"{label}: {key!r}", key, _KEYS)
    return ModelEntry(
        name=name,
        model=_location(_text(table, "model", label, required=True), path),
        revision=_text(table, "revision", label) or None,
        quantization=_quantization(_text(table, "quantization", label), label),
        context=_context(table.get("context"), label),
        shape=_shape(table.get("shape", {}), f"{label}: shape"),
        tools=_text(table, "tools", label),
        licence=_text(table, "licence", label),
        sampling=check_sampling(table.get("sampling", {}), f"{label}: sampling"),
        serve=_table(table.get("serve", {}), f"{label}: serve"),
        notes=_text(table, "notes", label),
        needs=_text(table, "needs", label),
        source=str(path),
    )


def _location(model: str, path: Path) -> str:
    """Folders become absolute: `~` is the home, `./` and `../` start at the catalogue file."""
    if model.startswith("~"):
        return str(Path(model).expanduser())
    if model.startswith(("./", "../")):
        return str((path.parent / model).resolve())
    return model


def _text(table: Mapping[str, Any], key: str, label: str, *, required: bool = False) -> str:
    value = table.get(key, "")
    if not isinstance(value, str) or "\0" in value or (required and not value):
        raise ConfigError(f"{label}: {key} must be a {'non-empty ' if required else ''}string, got {value!r}", param=key)
    return value


def _quantization(name: str, label: str) -> str:
    if name and name not in _QUANTIZATIONS:
        raise ConfigError(f"{label}: quantization must be one of {', '.join(_QUANTIZATIONS)} or absent, got {name!r}",
                          param="quantization")
    return name


def _shape(value: object, label: str) -> dict[str, Any]:
    """The fields of config.json; their values are checked where a config.json is read."""
    shape = _table(value, label)
    for key in shape:
        if key not in SHAPE_FIELDS:
            raise unknown_key(f"{label}.{key}", key, list(SHAPE_FIELDS))
    return shape


def _context(value: object, label: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**31 - 1:
        raise ConfigError(f"{label}: context must be a whole number of tokens from 1, got {value!r}", param="context")
    return value


def _table(value: object, label: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{label} must be a table, got {value!r}")
    return dict(value)


def check_sampling(value: object, label: str) -> dict[str, float | int]:
    """Default sampling parameters, by name. Raises ConfigError naming `label`, the key, the value and its limits."""
    sampling = _table(value, label)
    for key, number in sampling.items():
        if key not in _SAMPLING:
            raise unknown_key(f"{label}.{key}", key, list(_SAMPLING))
        low, high = _SAMPLING[key]
        whole = key == "top_k"
        proper = isinstance(number, int if whole else (int, float)) and not isinstance(number, bool)
        if not proper or not math.isfinite(number) or not low <= number <= high:
            raise ConfigError(
                f"{label}.{key} must be a {'whole ' if whole else ''}number between {low:g} and {high:g}, "
                f"got {number!r}",
                param=key,
            )
    return sampling
