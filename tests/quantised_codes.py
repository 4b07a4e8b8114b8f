"""Turns a tiny plain checkpoint into one of 4-bit codes, in every packing, by loops that share nothing with the loader.

A writer stores codes and scales; a naive decoder, one for each packing, reads the stored bytes one by one as the format defines
them; the plain twin holds what it finds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantised import SINGLE, compressed, linears
from safetensors.torch import load_file, save_file
from tiny import edit_config, write_tiny

# Rows that end inside a chunk of 128 columns, and inside none; q, k and v differ in rows.
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2, "head_dim": 32}
Stored = dict[str, torch.Tensor]
NF4 = (-1, -.6961928, -.52507305, -.39491749, -.28444138, -.18477343, -.09105004, 0,
       .0795803, .1609302, .2461123, .33791524, .44070983, .562617, .72295684, 1)  # fmt: skip
TWELFTHS = (0, 1 / 16, 8, 12, 4, 6, 2, 3)
FP4 = tuple(value / 12 for value in TWELFTHS) + tuple(-value / 12 for value in TWELFTHS)
E2M1 = (0, .5, 1, 1.5, 2, 3, 4, 6, -0.0, -.5, -1, -1.5, -2, -3, -4, -6)
STORAGES = {"uint8": torch.uint8, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class CodeFormat:
    """How a folder is written. kind: bnb, mx, nv (compressed-tensors) or modelopt."""

    kind: str
    description: dict[str, Any]
    table: tuple[float, ...] = E2M1
    block: int = 64
    nested: bool = False
    storage: str = "uint8"
    inputs: tuple[str, ...] = field(default=())


def bnb(kind: str = "nf4", nested: bool = False, storage: str = "uint8", **more: Any) -> dict[str, Any]:
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "load_in_8bit": False,
            "_load_in_8bit": False, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested,
            "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": storage, "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": None, "llm_int8_has_fp16_weight": False, "llm_int8_enable_fp32_cpu_offload": False, **more}


def four_bit_floats(strategy: str, size: int, inputs: bool, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": strategy, "group_size": size, "dynamic": False,
               "scale_dtype": "torch.float8_e4m3fn" if size == 16 else "torch.uint8", "zp_dtype": None, "actorder": None,
               "block_structure": None, "observer": "minmax", "observer_kwargs": {}, **more}
    activations = {**weights, "dynamic": "local"} if inputs else None
    return compressed(weights, activations, format=f"{'nv' if size == 16 else 'mx'}fp4-pack-quantized")


def modelopt(algorithm: str = "NVFP4", **more: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "group_size": 16, "ignore": ["lm_head"],
            "producer": {"name": "modelopt", "version": "0.40"}, **more}


CODE_FORMATS: dict[str, CodeFormat] = {
    "nf4": CodeFormat("bnb", bnb(), NF4),
    "nf4_nested": CodeFormat("bnb", bnb(nested=True), NF4, nested=True),
    "nf4_bf16": CodeFormat("bnb", bnb(nested=True, storage="bfloat16"), NF4, nested=True, storage="bfloat16"),
    "fp4": CodeFormat("bnb", bnb("fp4"), FP4),
    "fp4_nested_128": CodeFormat("bnb", bnb("fp4", True), FP4, block=128, nested=True),
    "mxfp4": CodeFormat("mx", four_bit_floats("group", 32, False), block=32),
    "nvfp4": CodeFormat("nv", four_bit_floats("tensor_group", 16, True), block=16, inputs=("input_global_scale",)),
    "nvfp4_weight_only": CodeFormat("nv", four_bit_floats("tensor_group", 16, False), block=16),
    "modelopt": CodeFormat("modelopt", modelopt(), block=16, inputs=("input_scale", "k_scale", "v_scale")),
    "modelopt_weight_only": CodeFormat("modelopt", modelopt("W4A16_NVFP4"), block=16),
}


def nearest(scaled: np.ndarray, table: tuple[float, ...]) -> np.ndarray:
    """The code of the value that is nearest to each number."""
    return np.abs(scaled[..., None] - np.array(table)).argmin(-1).astype(np.uint8)


def blocks_of(weight: torch.Tensor, size: int) -> np.ndarray:
    """[blocks, size], the last filled up with zeros."""
    flat = weight.double().numpy().ravel()
    return np.pad(flat, (0, -len(flat) % size)).reshape(-1, size)


def store_bnb(weight: torch.Tensor, form: CodeFormat) -> Stored:
    blocks = blocks_of(weight, form.block)
    absmax = np.abs(blocks).max(1).astype(np.float32)
    kept: Stored = {"weight.absmax": torch.from_numpy(absmax)}
    state: dict[str, Any] = {"quant_type": form.description["bnb_4bit_quant_type"], "blocksize": form.block,
                             "dtype": "bfloat16", "shape": list(weight.shape)}
    if form.nested:
        map8 = np.sort(np.random.default_rng(0).uniform(-1, 1, 256)).astype(np.float32)
        offset = np.float32(absmax.mean())
        groups = blocks_of(torch.from_numpy(absmax - offset), 256)
        largest = np.abs(groups).max(1).astype(np.float32)
        bytes8 = np.abs((groups / largest[:, None])[..., None] - map8).argmin(-1).astype(np.uint8).ravel()[:len(absmax)]
        kept = {"weight.absmax": torch.from_numpy(bytes8), "weight.nested_absmax": torch.from_numpy(largest),
                "weight.nested_quant_map": torch.from_numpy(map8)}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
    codes = nearest(blocks / np.where(absmax == 0, 1, absmax)[:, None], form.table).ravel()[:weight.numel()]
    packed = torch.from_numpy(codes[0::2] << 4 | codes[1::2]).view(STORAGES[form.storage])
    text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return {"weight": packed[:, None], "weight.quant_map": torch.tensor(form.table), **kept,
            f"weight.quant_state.bitsandbytes__{state['quant_type']}": text}


def store_floats(weight: torch.Tensor, form: CodeFormat) -> Stored:
    rows = weight.shape[0]
    blocks = blocks_of(weight, form.block)
    largest = np.abs(blocks).max(1) / 6
    if form.kind == "mx":
        exponent = np.ceil(np.log2(largest))
        scale, factor = torch.from_numpy(exponent + 127).to(torch.uint8), {}
        wide = 2.0 ** exponent
    else:
        one = np.abs(blocks).max() / (6 * 448)
        scale = torch.from_numpy(largest / one).to(torch.float8_e4m3fn)
        wide = scale.double().numpy() * one
        name, value = ("weight_global_scale", [1 / one]) if form.kind == "nv" else ("weight_scale_2", one)
        factor = {name: torch.tensor(value, dtype=torch.float32)}
    codes = nearest(blocks / np.where(wide == 0, 1, wide)[:, None], E2M1).reshape(rows, -1)
    packed = torch.from_numpy(codes[:, 0::2] | codes[:, 1::2] << 4)
    return {"weight" if form.kind == "modelopt" else "weight_packed": packed, "weight_scale": scale.view(rows, -1), **factor}


def decode(stored: Stored, form: CodeFormat, rows: int, columns: int) -> torch.Tensor:
    """[N, K] float32: every stored byte read on its own."""
    wide = np.zeros((rows, columns), dtype=np.float32)
    if form.kind == "bnb":
        packed = stored["weight"].flatten().view(torch.uint8).numpy()
        table, absmax = stored["weight.quant_map"].numpy(), stored["weight.absmax"].numpy()
        if form.nested:
            state = json.loads(bytes(next(v for k, v in stored.items() if "quant_state" in k).tolist()))
            scale = stored["weight.nested_absmax"].numpy()[np.arange(len(absmax)) // 256]
            absmax = stored["weight.nested_quant_map"].numpy()[absmax] * scale + np.float32(state["nested_offset"])
        for k in range(columns):
            i = np.arange(rows) * columns + k
            code = np.where(i % 2 == 0, packed[i // 2] >> 4, packed[i // 2] & 15)
            wide[:, k] = table[code] * absmax[i // form.block]
        return torch.from_numpy(wide)
    packed = stored.get("weight", stored.get("weight_packed"))
    if form.kind == "mx":
        scale = np.float32(2.0) ** (stored["weight_scale"].numpy().astype(np.float32) - 127)
    elif form.kind == "nv":
        scale = stored["weight_scale"].float().numpy() / stored["weight_global_scale"].numpy()
    else:
        scale = stored["weight_scale"].float().numpy() * stored["weight_scale_2"].numpy()
    for k in range(columns):
        code = packed.numpy()[:, k // 2] >> 4 * (k % 2) & 15
        wide[:, k] = np.array(E2M1, dtype=np.float32)[code] * scale[:, k // form.block]
    return torch.from_numpy(wide)


def write_codes(folder: Path, name: str, kind: str = "llama", *, skip: Callable[[str], bool] = lambda module: False,
                **overrides: Any) -> tuple[Path, Path]:
    """Writes `folder/codes` in the format `name` and `folder/plain`, its dequantised twin; returns both.

    skip: layers that stay as they are.
    """
    form = CODE_FORMATS[name]
    ours, plain = folder / "codes", write_tiny(folder / "plain", kind, **{**SIZES, **overrides})
    stored, meaning = load_file(plain / SINGLE), load_file(plain / SINGLE)
    for module in linears(stored):
        if skip(module):
            continue
        weight = stored.pop(f"{module}.weight")
        tensors = store_bnb(weight, form) if form.kind == "bnb" else store_floats(weight, form)
        stored.update({f"{module}.{part}": value for part, value in tensors.items()})
        stored.update({f"{module}.{extra}": torch.tensor(0.02) for extra in form.inputs
                       if extra not in ("k_scale", "v_scale") or module.endswith(f"{extra[0]}_proj")})
        meaning[f"{module}.weight"] = decode(tensors, form, *weight.shape)
    shutil.copytree(plain, ours)
    save_file({key: value.contiguous() for key, value in stored.items()}, ours / SINGLE, metadata={"format": "pt"})
    save_file(meaning, plain / SINGLE, metadata={"format": "pt"})
    edit_config(ours, quantization_config=form.description)
    return ours, plain
