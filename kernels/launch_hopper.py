"""What launches of the Gluon kernels for Hopper share: where they run, and the cache as a tensor descriptor."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch


@cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)  # the interpreter


@cache
def is_hopper(device: torch.device) -> bool:
    """Compute capability 9.0, and a Triton that has what the kernels use: Gluon is young."""
    if capability(device) != (9, 0):
        return False
    try:
        for name in ("attention_prefill_hopper", "attention_decode_hopper", "gemm_hopper"):
            importlib.import_module(f"workstation.kernels.{name}")
    except (ImportError, AttributeError):
        return False
    return True


def lies_in_rows(kv_layer: torch.Tensor, keys: int) -> bool:
    """Whether the cache [blocks, 2, Hkv, BS, D] can be read as rows of D by TMA, `keys` tokens a tile of whole blocks."""
    block_size, head_dim = kv_layer.shape[3:]
    rows = kv_layer.shape[0] * kv_layer.stride(0) // head_dim
    by_rows = kv_layer.stride(3) == head_dim and all(stride % head_dim == 0 for stride in kv_layer.stride()[:3])
    return by_rows and keys % block_size == 0 and block_size >= 8 and rows < 2**31 and is_hopper(kv_layer.device)


def cache_rows(kv_layer: torch.Tensor) -> tuple[Any, list[int]]:
    """The cache's tensor descriptor [rows, D] in boxes of a block by 64 components; rows a block, a side, a head take."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block_size, head_dim = kv_layer.shape[3:]
    strides = [stride // head_dim for stride in kv_layer.stride()[:3]]
    span = 1 + sum((n - 1) * s for n, s in zip(kv_layer.shape[:3], strides, strict=True)) + block_size - 1
    rows = kv_layer.as_strided((span, head_dim), (head_dim, 1))
    return TensorDescriptor(rows, [span, head_dim], [head_dim, 1], [block_size, 64], gl.NVMMASharedLayout(128, 16, 2)), strides
