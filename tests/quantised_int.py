"""Turns a tiny plain checkpoint into one of integer weights, in every packing, by loops that share nothing with the loader.

A writer stores codes, scales and zero points; a naive decoder, one for each packing, reads the stored words bit by bit as the
format defines them; the plain twin holds what it finds.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantised import SINGLE, compressed, linears
from safetensors.torch import load_file, save_file
from tiny import edit_config, write_tiny

# Two groups of 128 in some layers, five of 64 in others; q, k and v differ in rows.
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "head_dim": 32}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Stored = dict[str, torch.Tensor]


@dataclass(frozen=True)
class IntFormat:
    """How a folder is written. size: of a group, 0 for whole rows; ordered: columns belong to groups in a random order."""

    packing: str
    description: dict[str, Any]
    bits: int = 4
    size: int = 128
    symmetric: bool = True
    ordered: bool = False
    scale: torch.dtype = torch.float16


def ct(bits: int, size: int, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if size else "channel",
               "group_size": size or None, "dynamic": False, "actorder": None, "observer": "minmax", **more}
    return compressed(weights, None, format="pack-quantized")


def gptq(bits: int = 4, size: int = 128, sym: bool = True, desc_act: bool = False, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": sym, "desc_act": desc_act, "lm_head": False,
            "damp_percent": 0.1, "true_sequential": True, **more}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
       "modules_to_not_convert": None}
BF16 = torch.bfloat16
INT_FORMATS: dict[str, IntFormat] = {
    "ct_w4a16": IntFormat("ct", ct(4, 128), scale=BF16),
    "ct_w4a16_asym": IntFormat("ct", ct(4, 64, False), size=64, symmetric=False, scale=BF16),
    "ct_w4a16_32": IntFormat("ct", ct(4, 32), size=32, scale=torch.float32),
    "ct_w4a16_channel": IntFormat("ct", ct(4, 0), size=0, scale=BF16),
    "ct_w4a16_order": IntFormat("ct", ct(4, 128, actorder="group"), ordered=True, scale=BF16),
    "ct_w8a16": IntFormat("ct", ct(8, 0), bits=8, size=0, scale=BF16),
    "ct_w8a16_group": IntFormat("ct", ct(8, 128, False), bits=8, symmetric=False),
    "gptq": IntFormat("gptq", gptq()),
    "gptq_asym": IntFormat("gptq", gptq(sym=False, size=64), size=64, symmetric=False),
    "gptq_order": IntFormat("gptq", gptq(desc_act=True), ordered=True),
    "gptq_order_asym": IntFormat("gptq", gptq(desc_act=True, sym=False, size=32), size=32, symmetric=False, ordered=True),
    "gptq_row": IntFormat("gptq", gptq(size=-1), size=0),
    "gptq_v2": IntFormat("gptq_v2", gptq(sym=False, checkpoint_format="gptq_v2"), symmetric=False, scale=BF16),
    "gptq_8": IntFormat("gptq", gptq(bits=8), bits=8),
    "gptq_8_asym": IntFormat("gptq", gptq(bits=8, sym=False), bits=8, symmetric=False),
    "awq": IntFormat("awq", AWQ, symmetric=False),
    "awq_64": IntFormat("awq", {**AWQ, "group_size": 64}, size=64, symmetric=False),
}


def pack_words(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """[R, C] numbers → [R, ⌈C·bits/32⌉] int32: `order[i]` says which of a word's columns field i holds."""
    per = 32 // bits
    rows, columns = values.shape
    found = np.zeros((rows, -(-columns // per)), dtype=np.uint32)
    for column in range(columns):
        word, place = divmod(column, per)
        field = place if order is None else order.index(place)
        found[:, word] |= values[:, column].astype(np.uint32) << np.uint32(bits * field)
    return found.view(np.int32)


def field(words: np.ndarray, index: int | np.ndarray, bits: int, *, awq: bool = False) -> np.ndarray:
    """Column `index` of packed rows [R, W] (or several of them, of one row)."""
    word, place = np.divmod(index, 32 // bits)
    nibble = np.argsort(AWQ_ORDER)[place] if awq else place
    shift = np.asarray(bits * nibble, dtype=np.uint32)
    return ((words.view(np.uint32)[..., word] >> shift) & np.uint32((1 << bits) - 1)).astype(np.int64)


def tensor(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(words))


def store(weight: torch.Tensor, form: IntFormat, group_of: np.ndarray) -> Stored:
    """Round to nearest within the groups that `group_of` [K] tells, and pack."""
    rows, groups = weight.shape[0], int(group_of.max()) + 1
    wide, top = weight.double().numpy(), (1 << form.bits) - 1
    scale, zero = np.zeros((rows, groups)), np.full((rows, groups), 1 << form.bits - 1)
    for group in range(groups):
        part = wide[:, group_of == group]
        if form.symmetric:
            scale[:, group] = np.abs(part).max(1) / (top // 2)
        else:
            scale[:, group] = (part.max(1) - part.min(1)) / top
    scales = torch.from_numpy(scale).to(form.scale)
    if not form.symmetric:
        for group in range(groups):
            zero[:, group] = np.clip(np.round(-wide[:, group_of == group].min(1) / scales[:, group].double().numpy()), 0, top)
    codes = np.round(wide / scales.double().numpy()[:, group_of]) + zero[:, group_of]
    return lay_out(np.clip(codes, 0, top).astype(np.int64), scales, zero.astype(np.int64), form, group_of)


def lay_out(codes: np.ndarray, scales: torch.Tensor, zero: np.ndarray, form: IntFormat, group_of: np.ndarray) -> Stored:
    """codes [N, K], scales and zero [N, G] → the packing's tensors."""
    bits = form.bits
    if form.packing == "ct":
        found = {"weight_packed": tensor(pack_words(codes, bits)), "weight_scale": scales,
                 "weight_shape": torch.tensor(codes.shape)}
        if not form.symmetric:
            found["weight_zero_point"] = tensor(pack_words(zero.T, bits).T)
        if form.ordered:
            found["weight_g_idx"] = tensor(group_of.astype(np.int32))
        return found
    order = AWQ_ORDER if form.packing == "awq" else None
    stored_zero = zero - 1 & (1 << bits) - 1 if form.packing == "gptq" else zero
    found = {"qzeros": tensor(pack_words(stored_zero.T, bits, order)), "scales": scales.t().contiguous()}
    if form.packing == "awq":
        return {**found, "qweight": tensor(pack_words(codes.T, bits, order))}
    return {**found, "qweight": tensor(pack_words(codes, bits).T), "g_idx": tensor(group_of.astype(np.int32))}


def decode(stored: Stored, form: IntFormat, rows: int, columns: int) -> torch.Tensor:
    """[N, K] float32: every stored column read on its own, (q − z) · scale."""
    bits, middle = form.bits, 1 << form.bits - 1
    is_ct, awq = form.packing == "ct", form.packing == "awq"
    group_of = stored.get("weight_g_idx" if is_ct else "g_idx")
    every = np.arange(rows)
    words = stored["weight_packed"] if is_ct else stored["qweight"] if awq else stored["qweight"].t().contiguous()
    packed, scales = words.numpy(), (stored["weight_scale"].t() if is_ct else stored["scales"]).float().numpy()
    zeros = [np.zeros(rows, dtype=np.int64)] * len(scales)
    if is_ct and "weight_zero_point" in stored:
        zeros = [field(row, every, bits) - middle for row in stored["weight_zero_point"].t().contiguous().numpy()]
    elif not is_ct:
        zeros = [field(row, every, bits, awq=awq) for row in stored["qzeros"].numpy()]
        if form.packing == "gptq":
            zeros = [(z + 1) % (1 << bits) for z in zeros]
    wide = np.zeros((rows, columns), dtype=np.float32)
    for k in range(columns):
        group = int(group_of[k]) if group_of is not None else k // form.size if form.size else 0
        q = field(packed[k], every, bits, awq=True) if awq else field(packed, k, bits) - (middle if is_ct else 0)
        wide[:, k] = (q - zeros[group]).astype(np.float32) * scales[group]
    return torch.from_numpy(wide)


def grouping(columns: int, form: IntFormat, seed: int) -> np.ndarray:
    size = form.size or columns
    found = np.arange(columns) // size
    return np.random.default_rng(seed).permutation(found) if form.ordered else found


def write_integers(folder: Path, name: str, kind: str = "llama", *, skip: Callable[[str], bool] = lambda module: False,
                   alone: Callable[[str], bool] = lambda module: False, **overrides: Any) -> tuple[Path, Path]:
    """Writes `folder/int` in the format `name` and `folder/plain`, its dequantised twin; returns both.

    skip: layers that stay as they are.  alone: layers with an order of groups that no other layer has.
    """
    form = INT_FORMATS[name]
    ours, plain = folder / "int", write_tiny(folder / "plain", kind, **{**SIZES, **overrides})
    stored, meaning = load_file(plain / SINGLE), load_file(plain / SINGLE)
    for number, module in enumerate(linears(stored)):
        if skip(module):
            continue
        weight = stored.pop(f"{module}.weight")
        group_of = grouping(weight.shape[1], form, seed=number if alone(module) else weight.shape[1])
        tensors = store(weight, form, group_of)
        stored.update({f"{module}.{part}": value for part, value in tensors.items()})
        meaning[f"{module}.weight"] = decode(tensors, form, *weight.shape)
    shutil.copytree(plain, ours)
    save_file({key: value.contiguous() for key, value in stored.items()}, ours / SINGLE, metadata={"format": "pt"})
    save_file(meaning, plain / SINGLE, metadata={"format": "pt"})
    edit_config(ours, quantization_config=form.description)
    return ours, plain
