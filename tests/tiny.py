"""Writes tiny random checkpoints with transformers' own `save_pretrained`, for every architecture we serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
_SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
}


def write_tiny(
    folder: str | Path, kind: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32,
    max_shard_size: str = "50GB", **overrides: Any,
) -> Path:
    """Write a random model of `kind` into `folder` and return its path.

    Defaults: 128 tokens, hidden 64, FFN 96, 3 layers, 4 + 2 heads of 16, window 512, no sliding window, untied.
    `overrides` are fields of transformers' config class (for example rope_parameters, tie_word_embeddings).
    Weights are large enough for tokens to differ clearly, and biases and norms are random too, so that a test
    notices when one is forgotten.
    """
    config_class, model_class = _CLASSES[kind]
    defaults = dict(_SMALL)
    if kind == "mistral":
        defaults["sliding_window"] = None
    if kind == "qwen3":
        defaults["head_dim"] = 16
    config = config_class(**{**defaults, **overrides})
    model = model_class(config)
    _randomise(model, torch.Generator().manual_seed(seed))
    path = Path(folder)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return path


def _randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0.0, 1.5 * weight.shape[1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.5, generator=generator)
            else:
                weight.uniform_(0.5, 1.5, generator=generator)


def edit_config(folder: Path, remove: tuple[str, ...] = (), **changes: Any) -> Path:
    """Change fields of a folder's config.json in place."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for name in remove:
        config.pop(name, None)
    config.update(changes)
    file.write_text(json.dumps(config))
    return folder
