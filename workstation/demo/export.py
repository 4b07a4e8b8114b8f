"""Writes the trained network as a Hugging Face folder: configuration, weights in safetensors, tokenizer files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from workstation.demo.network import Network, Size

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def export(network: Network, tokenizer: Any, tokenizer_folder: Path, folder: Path) -> None:
    """Saves `network` in bf16 under Qwen3's tensor names. `tokenizer` is asked for the end tokens' ids."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in named_tensors(network).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    _write(folder / "config.json", model_config(network.size, ends))
    # Greedy unless the request says otherwise: every skill of this model has one right answer.
    _write(
        folder / "generation_config.json",
        {"do_sample": False, "temperature": 0.0, "eos_token_id": ends, "pad_token_id": ends[1]},
    )
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).resolve() != (folder / name).resolve():
            shutil.copyfile(tokenizer_folder / name, folder / name)


def load(network: Network, folder: Path) -> None:
    """Copies an exported folder's weights into `network`. KeyError: a tensor is missing; RuntimeError: it is misshapen."""
    from safetensors.torch import load_file

    saved = load_file(folder / "model.safetensors")
    for name, value in named_tensors(network).items():
        value.copy_(saved[name])


def named_tensors(network: Network) -> dict[str, torch.Tensor]:
    """Every weight under its Hugging Face name. The output head is the embedding (tied) and is not saved twice."""
    stacked = {
        "self_attn.q_proj": network.q,
        "self_attn.k_proj": network.k,
        "self_attn.v_proj": network.v,
        "self_attn.o_proj": network.o,
        "self_attn.q_norm": network.q_norm,
        "self_attn.k_norm": network.k_norm,
        "mlp.gate_proj": network.gate,
        "mlp.up_proj": network.up,
        "mlp.down_proj": network.down,
        "input_layernorm": network.input_norm,
        "post_attention_layernorm": network.post_norm,
    }
    named = {"model.embed_tokens.weight": network.embedding.data, "model.norm.weight": network.norm.data}
    for name, values in stacked.items():
        for layer, value in enumerate(values.data):
            named[f"model.layers.{layer}.{name}.weight"] = value
    return named


def model_config(size: Size, ends: list[int]) -> dict[str, Any]:
    """config.json of the Qwen3 architecture."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": size.norm_eps,
        "rope_theta": size.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": size.positions,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": ends,
        "pad_token_id": ends[1],
        "dtype": "bfloat16",
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
