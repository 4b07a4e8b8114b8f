"""The compiled Triton kernels on an NVIDIA GPU: the same checks as the twins', in every dtype, and sizes only a GPU can do."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Heads, paged_case
from kernel_checks import (
    DECODES,
    PREFILLS,
    check_add_rms_norm,
    check_attention,
    check_copy_blocks,
    check_norm_that_takes_apart,
    check_rms_norm,
    check_rope_and_cache,
    check_silu_mul,
    check_step_inputs,
    close,
)

from workstation.kernels import ops
from workstation.kernels.paging import AttentionPlan

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
TOKENS = pytest.mark.parametrize("tokens", [1, 3, 17])
SHAPES = pytest.mark.parametrize("shapes", [DECODES, PREFILLS, DECODES[1:4] + PREFILLS[1:]], ids=["decode", "prefill", "mixed"])


@DTYPES
@TOKENS
def test_norms_and_swiglu(tokens: int, dtype: torch.dtype) -> None:
    check_rms_norm(tokens, 96, dtype, "cuda")
    check_rms_norm(tokens, 8192, dtype, "cuda")
    check_add_rms_norm(tokens, 4096, dtype, "cuda")
    check_silu_mul(tokens, 1100, dtype, "cuda")
    check_step_inputs(tokens, "cuda")


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_the_norm_that_takes_apart_equals_the_norm(tokens: int) -> None:
    for width in (128, 640, 4096, 5120, 8192):
        check_norm_that_takes_apart(tokens, width, "cuda")


@DTYPES
@TOKENS
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "rotary_dim"), [(Heads(4, 2, 64), 64), (Heads(9, 3, 80), 32), (Heads(32, 8, 128), 128)])
def test_rope_and_cache(tokens: int, heads: Heads, rotary_dim: int, normed: bool, dtype: torch.dtype) -> None:
    check_rope_and_cache(tokens, heads, rotary_dim, normed, dtype, "cuda")


@DTYPES
@SHAPES
@pytest.mark.parametrize("window", [0, 5, 70])
@pytest.mark.parametrize(("group", "dim"), [(1, 64), (4, 128), (7, 80), (8, 64), (4, 256)])
def test_attention(shapes: list[tuple[int, int]], group: int, dim: int, window: int, dtype: torch.dtype) -> None:
    check_attention(Heads(2 * group, 2, dim), shapes, window, dtype, "cuda")


@pytest.mark.parametrize("window", [0, 4096])
@pytest.mark.parametrize(
    "shapes",
    [[(1, 60_000)], [(1, 20_000), *((1, 37 * i + 1) for i in range(100))], [(1, 9000), (2048, 9000), (1000, 1000)]],
    ids=["one long", "one long among many", "chunks"],
)
def test_attention_at_length(shapes: list[tuple[int, int]], window: int) -> None:
    check_attention(Heads(8, 2, 128), shapes, window, torch.bfloat16, "cuda")


def test_offsets_beyond_two_gigabytes_are_reached() -> None:
    """Block 140,000 of this pool starts 4.6e9 elements in."""
    heads = Heads(4, 2, 128)
    case = paged_case(heads, [(1, 100)], dtype=torch.bfloat16, device="cuda")
    blocks = 140_010
    pool = torch.zeros(blocks, 4, 2, heads.kv, 16, heads.dim, dtype=torch.bfloat16, device="cuda")
    moved = torch.arange(blocks - 7, blocks, device="cuda")
    used = case.plan.tables[case.plan.rows[0].long(), :7].long()
    pool[moved, 3] = case.kv_layer[used]
    case.plan.tables[case.plan.rows[0].long(), :7] = moved.to(torch.int32)
    close(ops.attention(case.q, pool[:, 3], case.plan, case.scale), case.expected(), torch.bfloat16)


def test_decode_is_deterministic_and_a_graph_serves_other_lengths() -> None:
    heads = Heads(8, 2, 128)
    case = paged_case(heads, [(1, 3000), (1, 700), (1, 20)], dtype=torch.bfloat16, device="cuda")
    plan = case.plan

    def fresh() -> AttentionPlan:
        return AttentionPlan(plan.query_start, plan.context_lens, plan.tables, plan.rows, 3, 1, plan.tables.shape[1] * 16)

    first = ops.attention(case.q, case.kv_layer, fresh(), case.scale)
    assert torch.equal(first, ops.attention(case.q, case.kv_layer, fresh(), case.scale))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attention(case.q, case.kv_layer, fresh(), case.scale)
    graph.replay()
    assert torch.equal(out, first)
    plan.context_lens.copy_(torch.tensor([1500, 0, 20], dtype=torch.int32))
    graph.replay()
    assert torch.equal(out[2], first[2])
    assert out[1].eq(0).all()
    assert torch.equal(out, ops.attention(case.q, case.kv_layer, fresh(), case.scale))


@DTYPES
def test_copy_blocks(dtype: torch.dtype) -> None:
    check_copy_blocks(dtype, "cuda")
