"""Turns a tiny plain checkpoint into a quantised folder of every format, by a few lines that share nothing with the loader.

Each writer stores FP8 weights and their scales, describes them in config.json, and returns the folder of a plain float32
checkpoint that holds the dequantised weights: what the quantised folder must behave like.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import edit_config, write_tiny

Weights = dict[str, torch.Tensor]
SINGLE = "model.safetensors"
# Widths that are not multiples of 128, so that the last blocks of a grid are partial: 3 rows by 2 columns of blocks.
SIZES: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 2, "head_dim": 32}
_LINEAR = re.compile(r"model\.layers\.\d+\.\w+\.\w+_proj")


def linears(weights: Weights) -> list[str]:
    return [name.removesuffix(".weight") for name in weights
            if name.endswith(".weight") and _LINEAR.fullmatch(name.removesuffix(".weight"))]


def to_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def block_scales(weight: torch.Tensor) -> torch.Tensor:
    rows, columns = weight.shape
    grid = torch.empty((rows + 127) // 128, (columns + 127) // 128)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            grid[i, j] = weight[128 * i:128 * i + 128, 128 * j:128 * j + 128].abs().max() / 448
    return grid


def spread(grid: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    row, column = torch.arange(rows) // 128, torch.arange(columns) // 128
    return grid[row][:, column]


def per_tensor(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(stored weight, stored scale, what they mean)."""
    scale = weight.abs().max() / 448
    stored = to_fp8(weight, scale)
    return stored, scale, stored.float() * scale


def per_channel(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = weight.abs().max(1, keepdim=True).values / 448
    stored = to_fp8(weight, scale)
    return stored, scale, stored.float() * scale


def per_block(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grid = block_scales(weight)
    full = spread(grid, *weight.shape)
    stored = to_fp8(weight, full)
    return stored, grid, stored.float() * full


def power_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales that are powers of two, stored as their exponents + 127."""
    exponent = block_scales(weight).log2().ceil()
    full = spread(2.0**exponent, *weight.shape)
    stored = to_fp8(weight, full)
    return stored, (exponent + 127).to(torch.uint8), stored.float() * full


def ct_args(strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False, **more}


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
            "ignore": ["lm_head"], "kv_cache_scheme": None, "config_groups": {"group_0": group},
            "version": "0.12.0", "global_compression_ratio": None, **more}


Quantise = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
TOKEN = ct_args("token", dynamic=True)
BLOCK = {"weight_block_size": [128, 128]}

# name: (description, how a weight is stored, name of the scale, shape of the stored scale or None, further tensors)
FORMATS: dict[str, tuple[dict[str, Any], Quantise, str, Callable[[torch.Tensor], torch.Tensor] | None, tuple[str, ...]]] = {
    "ct_tensor_static": (compressed(ct_args("tensor"), ct_args("tensor")), per_tensor, "weight_scale",
                         lambda s: s.reshape(1), ("input_scale",)),
    "ct_channel": (compressed(ct_args("channel"), TOKEN), per_channel, "weight_scale", None, ()),
    "ct_channel_bf16_scales": (compressed(ct_args("channel"), TOKEN), per_channel, "weight_scale",
                               lambda s: s.to(torch.bfloat16), ()),
    "ct_weight_only": (compressed(ct_args("channel"), None, format="naive-quantized"), per_channel, "weight_scale", None, ()),
    "ct_block": (compressed(ct_args("block", block_structure=[128, 128]), ct_args("group", group_size=128, dynamic=True)),
                 per_block, "weight_scale", None, ()),
    "hf_block": ({"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"], **BLOCK},
                 per_block, "weight_scale_inv", None, ()),
    "hf_block_powers": ({"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", **BLOCK}, power_blocks,
                        "weight_scale_inv", None, ()),
    "hf_tensor": ({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, per_tensor,
                  "weight_scale", None, ("input_scale",)),
    "hf_tensor_mistral": ({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}, per_tensor,
                          "weight_scale_inv", None, ("activation_scale",)),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
               per_channel, "weight_scale", None, ()),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"],
                  "producer": {"name": "modelopt", "version": "0.40"}}, per_tensor, "weight_scale", None,
                 ("input_scale", "k_scale", "v_scale")),
    "modelopt_channel": ({"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, per_channel,
                         "weight_scale", lambda s: s.squeeze(1), ()),
    "modelopt_block": ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO", "exclude_modules": ["lm_head"]}, per_block,
                       "weight_scale", lambda s: s[:, None, :, None].contiguous(), ()),
}


def write_quantised(folder: Path, name: str, kind: str = "llama", *, skip: Callable[[str], bool] = lambda module: False,
                    **overrides: Any) -> tuple[Path, Path]:
    """Writes `folder/fp8` in the format `name` and `folder/plain`, its dequantised twin; returns both.

    skip: layers (by checkpoint name) that stay in 16 or 32 bits.
    """
    description, quantise, scale_name, stored_as, more = FORMATS[name]
    fp8, plain = folder / "fp8", write_tiny(folder / "plain", kind, **{**SIZES, **overrides})
    stored, meaning = load_file(plain / SINGLE), load_file(plain / SINGLE)
    for module in linears(stored):
        if skip(module):
            continue
        weight, scale, _ = quantise(stored[f"{module}.weight"])
        kept = scale if stored_as is None else stored_as(scale)
        stored[f"{module}.weight"], stored[f"{module}.{scale_name}"] = weight, kept
        meaning[f"{module}.weight"] = dequantised(weight, kept)
        for extra in more:
            if extra not in ("k_scale", "v_scale") or module.endswith(f"{extra[0]}_proj"):
                stored[f"{module}.{extra}"] = torch.tensor(0.02)
    shutil.copytree(plain, fp8)
    save_file(stored, fp8 / SINGLE, metadata={"format": "pt"})
    save_file(meaning, plain / SINGLE, metadata={"format": "pt"})
    edit_config(fp8, quantization_config=description)
    return fp8, plain


def dequantised(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What stored numbers mean, read from the scale's shape alone."""
    wide = weight.float()
    if scale.dtype == torch.uint8:
        scale = 2.0 ** (scale.float() - 127)
    scale = scale.float()
    if scale.dim() == 4:
        scale = scale[:, 0, :, 0]
    if scale.dim() == 2 and scale.shape != (len(weight), 1):
        return wide * spread(scale, *weight.shape)
    return wide * (scale if scale.numel() == 1 else scale.reshape(-1, 1))


def describe(folder: Path) -> dict[str, Any]:
    """The folder's description, for a test to change and put back with `edit_config`."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found
