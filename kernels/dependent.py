"""Programmatic dependent launch: a kernel's CTAs start while the kernel before it still ends (compute capability 9.0 and up).

A chained kernel may read nothing that earlier kernels of the step wrote until `await_previous`: before that it fetches what
no step changes, such as weights. The kernels before the previous one need no wait of their own, as long as every chained
kernel waits. `allow_next` lets the next kernel's CTAs take the room that is left; where a kernel calls it before it waits,
two kernels' beginnings may run beside a third one's end.
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

FIRST_WITH_CHAINS = (9, 0)
# WS_CHAIN_KERNELS=0 launches every kernel behind the whole of the one before it: to tell a race from a wrong sum.
WANTED = os.environ.get("WS_CHAIN_KERNELS", "1") != "0"


@triton.jit
def allow_next(PDL: tl.constexpr):
    """The next kernel may start as soon as all CTAs of this one have come here or ended."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def await_previous(PDL: tl.constexpr):
    """Until here nothing of this step may be read or written."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@cache
def chained(device: torch.device) -> dict[str, Any]:
    """Options of a launch: the flag that kernels take, and Triton's own."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST_WITH_CHAINS
    return {"PDL": True, "launch_pdl": True} if able and WANTED else {"PDL": False}
