"""Quantised folders loaded and run, and what transformers makes of their twins; shared by the tests of quantisation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from paged import PagedModel
from quantised import FORMATS, SINGLE, Weights
from safetensors.torch import load_file, save_file

from workstation.architecture import ModelShape, read_shape
from workstation.errors import ModelFolderError
from workstation.model.loader import load_model, read_forms
from workstation.model.transformer import Decoder
from workstation.quant.forms import WeightForms

CPU = torch.device("cpu")
PROMPT = torch.randint(3, 128, (40,), generator=torch.Generator().manual_seed(3)).tolist()
EVERY_FORMAT = pytest.mark.parametrize("name", FORMATS)
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "dtype": "bfloat16"}


def load(folder: Path, dtype: torch.dtype = torch.float32, *, quantization: str | None = None, **options: Any) -> Decoder:
    shape = read_shape(folder)
    forms = read_forms(folder, shape, load_format=options.get("load_format", "auto"), quantization=quantization)
    return load_model(folder, shape, dtype=dtype, device=CPU, max_model_len=64, forms=forms, **options)


def logits(decoder: Decoder, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return PagedModel(decoder, 1, 64, dtype=dtype).step({0: PROMPT})[0].log_softmax(-1)


def transformers_logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0].float().log_softmax(-1)


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ModelFolderError) as caught:
        load(folder, **options)
    return caught.value.message


def rewrite(folder: Path, change: Callable[[Weights], object]) -> Path:
    weights = load_file(folder / SINGLE)
    change(weights)
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})
    return folder


def large(description: dict[str, Any], **more: Any) -> tuple[ModelShape, WeightForms]:
    shape = read_shape({**LLAMA_8B, **more, "quantization_config": description})
    return shape, read_forms("/nowhere", shape, load_format="dummy")
