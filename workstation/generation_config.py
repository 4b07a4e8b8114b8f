"""generation_config.json → what ends a sample and how the model's makers sample it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workstation.engine.request import SamplingParams
from workstation.errors import InvalidRequestError, ModelFolderError
from workstation.model_folder import has_file, model_folder, read_json_object

# Hugging Face's names that mean the same here. max_new_tokens is left out: it is a caller's wish, not the model's nature.
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Attributes:
        eos_token_ids: end a sample unless the request ignores them.
        sampling: SamplingParams fields used where a request is silent.
    """

    eos_token_ids: tuple[int, ...]
    sampling: dict[str, Any] = field(default_factory=dict)


def read_generation_defaults(folder: str | Path, config_eos: tuple[int, ...] = (),
                             overrides: Mapping[str, Any] | None = None) -> GenerationDefaults:
    """Read a folder's generation_config.json, if it has one.

    Args:
        config_eos: the ids config.json names; used when generation_config.json names none.
        overrides: sampling fields that win (models.toml, command line).
    Raises:
        ModelFolderError: the file is broken or holds a value out of range.
    """
    root = model_folder(folder)
    values = read_json_object(root, "generation_config.json") if has_file(root, "generation_config.json") else {}
    sampling = {name: values[name] for name in SAMPLING_FIELDS if values.get(name) is not None}
    if values.get("do_sample") is False:
        sampling = {name: value for name, value in sampling.items() if name == "repetition_penalty"} | {"temperature": 0.0}
    if sampling.get("temperature") is not None and "top_k" in sampling:
        sampling["top_k"] = max(0, sampling["top_k"]) if isinstance(sampling["top_k"], int) else sampling["top_k"]
    sampling |= dict(overrides or {})
    try:
        SamplingParams(**sampling)
    except InvalidRequestError as error:
        raise ModelFolderError(f"generation_config.json: {error.message}", param=error.param) from error
    return GenerationDefaults(_eos(values.get("eos_token_id")) or config_eos, sampling)


def _eos(value: object) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise ModelFolderError(f"generation_config.json: eos_token_id must be token ids, got {value!r}")
    return tuple(ids)
