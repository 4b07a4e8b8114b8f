"""The Triton kernels, interpreted on the CPU; `test_kernels.py` runs this file in a process apart.

float32 and float16 only: the interpreter's bfloat16 dot is wrong.
"""

from __future__ import annotations

import os

import pytest
import torch
from kernel_cases import Heads, paged_case
from kernel_checks import (
    check_add_rms_norm,
    check_attention,
    check_copy_blocks,
    check_rms_norm,
    check_rope_and_cache,
    check_silu_mul,
)

from workstation.kernels import launch, ops, reference

assert os.environ["TRITON_INTERPRET"] == "1" and ops.FORCE_TRITON

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
TOKENS = pytest.mark.parametrize("tokens", [1, 3, 17])
DECODES = [(1, 1), (1, 16), (1, 17), (1, 300), (1, 0), (1, 45)]
PREFILLS = [(3, 3), (17, 40), (64, 64), (5, 133)]
SHAPES = pytest.mark.parametrize(
    "shapes", [DECODES, PREFILLS, DECODES[1:3] + PREFILLS[1::2]], ids=["decode", "prefill", "mixed"]
)


@DTYPES
@TOKENS
def test_rms_norm(tokens: int, dtype: torch.dtype) -> None:
    check_rms_norm(tokens, 96, dtype, "cpu")


def test_rms_norm_reads_strided_rows() -> None:
    x, weight = torch.randn(5, 200)[:, :72], torch.randn(72)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x.contiguous(), weight, 1e-5))


@DTYPES
@TOKENS
def test_add_rms_norm(tokens: int, dtype: torch.dtype) -> None:
    check_add_rms_norm(tokens, 160, dtype, "cpu")


@DTYPES
@TOKENS
def test_silu_mul(tokens: int, dtype: torch.dtype) -> None:
    check_silu_mul(tokens, 72, dtype, "cpu")
    check_silu_mul(tokens, 1100, dtype, "cpu")


@DTYPES
@TOKENS
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "rotary_dim"), [(Heads(4, 2, 64), 64), (Heads(9, 3, 80), 32)])
def test_rope_and_cache(tokens: int, heads: Heads, rotary_dim: int, normed: bool, dtype: torch.dtype) -> None:
    check_rope_and_cache(tokens, heads, rotary_dim, normed, dtype, "cpu")


@SHAPES
@pytest.mark.parametrize("window", [0, 5, 70])
@pytest.mark.parametrize(("group", "dim"), [(1, 64), (4, 128), (7, 80), (8, 64)])
def test_attention(shapes: list[tuple[int, int]], group: int, dim: int, window: int) -> None:
    check_attention(Heads(group, 1, dim), shapes, window, torch.float16, "cpu")


@SHAPES
@pytest.mark.parametrize("window", [0, 70])
def test_attention_in_full_precision(shapes: list[tuple[int, int]], window: int) -> None:
    check_attention(Heads(8, 2, 64), shapes, window, torch.float32, "cpu")


def test_attention_with_a_head_dim_of_256() -> None:
    check_attention(Heads(4, 1, 256), [(1, 90), (1, 200), (20, 70)], 0, torch.float16, "cpu")


def test_tiles_grow_until_they_fit_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles a sequence are always allowed: 400 and 20 keys then need tiles of twice the shortest length."""
    monkeypatch.setattr(launch, "TILE_HEADS", 1)
    case = paged_case(Heads(4, 2, 16), [(1, 400), (1, 20)])
    out = ops.attention(case.q, case.kv_layer, case.plan, case.scale)
    tiles = case.plan.scratch["decode_tiles"]
    assert tiles.header.tolist() == [3, 2 * launch.SHORTEST_TILE]
    assert tiles.first.tolist() == [0, 2, 3]
    assert tiles.tile_sequence[:3].tolist() == [0, 0, 1]
    torch.testing.assert_close(out, case.expected())


@pytest.mark.parametrize("window", [0, 33])
def test_both_sides_of_the_door_agree(window: int) -> None:
    case = paged_case(Heads(6, 2, 48), [(1, 77), (1, 130), (1, 3), (11, 11), (8, 50)], window=window)
    mine = ops.attention(case.q, case.kv_layer, case.plan, case.scale)
    torch.testing.assert_close(mine, reference.attention(case.q, case.kv_layer, case.plan, case.scale))


@DTYPES
def test_copy_blocks(dtype: torch.dtype) -> None:
    check_copy_blocks(dtype, "cpu")
