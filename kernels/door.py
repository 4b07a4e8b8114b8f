"""What the doors to the kernels share: where CPU tensors go, and the check of an argument."""

from __future__ import annotations

import os

import torch

# `WS_KERNELS=triton` sends CPU tensors to the Triton kernels too; that needs Triton's interpreter (TRITON_INTERPRET=1).
FORCE_TRITON = os.environ.get("WS_KERNELS") == "triton"


def check(ok: bool, name: str, tensor: torch.Tensor | None, message: str) -> None:
    """Raises ValueError naming the argument with its shape and dtype."""
    if not ok:
        shape = "None" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
        raise ValueError(f"{name} ({shape}) {message}")
