"""Every op's plain-torch twin against a naive float32 oracle, and what the doors refuse."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Heads, cos_sin_table, naive_rope, paged_case
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
)

from workstation.kernels import ops
from workstation.kernels.quantized import Halving

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
TOKENS = pytest.mark.parametrize("tokens", [1, 3, 17])


@DTYPES
@TOKENS
@pytest.mark.parametrize("width", [96, 3000])
def test_rms_norm_divides_by_the_root_mean_square(tokens: int, width: int, dtype: torch.dtype) -> None:
    check_rms_norm(tokens, width, dtype, "cpu")


def test_rms_norm_of_heads_normalises_the_last_dimension() -> None:
    x, weight = torch.randn(5, 3, 64), torch.randn(64)
    assert torch.equal(ops.rms_norm(x, weight, 1e-5), ops.rms_norm(x.view(15, 64), weight, 1e-5).view(5, 3, 64))


def test_rms_norm_keeps_its_epsilon_for_tiny_inputs() -> None:
    x = torch.full((1, 64), 1e-4)
    torch.testing.assert_close(ops.rms_norm(x, torch.ones(64), 1e-5), torch.full((1, 64), 1e-4 / (1e-8 + 1e-5) ** 0.5))


@DTYPES
@TOKENS
def test_add_rms_norm_returns_the_sum_as_residual(tokens: int, dtype: torch.dtype) -> None:
    check_add_rms_norm(tokens, 160, dtype, "cpu")


@pytest.mark.parametrize(("tokens", "width"), [(1, 128), (1, 640), (2, 256), (4, 384)])
def test_the_norm_that_takes_apart_equals_the_norm(tokens: int, width: int) -> None:
    check_norm_that_takes_apart(tokens, width, "cpu")


@pytest.mark.parametrize(("shape", "dtype"), [
    ((5, 128), torch.bfloat16), ((1, 192), torch.bfloat16), ((1, 128), torch.float16)])
def test_only_few_rows_of_whole_groups_of_bfloat16_are_taken_apart(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = torch.ones(shape, dtype=dtype), torch.ones(shape[1], dtype=dtype)
    with pytest.raises(ValueError, match=r"bfloat16 \[T, 128 n\], T at most 4"):
        ops.add_rms_norm(x, x.clone(), weight, 1e-5, Halving())


@pytest.mark.parametrize("tokens", [0, 1, 5, 200])
def test_step_inputs_come_from_the_rows(tokens: int) -> None:
    check_step_inputs(tokens, "cpu")


@DTYPES
@TOKENS
def test_silu_mul_gates_the_second_half(tokens: int, dtype: torch.dtype) -> None:
    check_silu_mul(tokens, 72, dtype, "cpu")


@DTYPES
@TOKENS
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "rotary_dim"), [(Heads(4, 2, 64), 64), (Heads(3, 1, 128), 32)])
def test_rope_turns_pairs_and_writes_only_the_steps_slots(
    tokens: int, heads: Heads, rotary_dim: int, normed: bool, dtype: torch.dtype
) -> None:
    check_rope_and_cache(tokens, heads, rotary_dim, normed, dtype, "cpu")


def test_rope_of_a_long_chunk_is_rope() -> None:
    check_rope_and_cache(100, Heads(6, 2, 64), 64, False, torch.float32, "cpu")


def test_buffers_refilled_in_place_are_seen_by_the_next_step() -> None:
    table = cos_sin_table(50, 16)
    positions, slots = torch.tensor([3, 4]), torch.tensor([16, 17])
    for shift in range(3):
        qkv, pool = torch.randn(2, 4 * 16), torch.zeros(4, 1, 2, 1, 16, 16)
        q = ops.rope_and_cache(qkv, positions, table, None, None, 0.0, pool[:, 0], slots, 2, 1)
        torch.testing.assert_close(q, naive_rope(qkv.view(2, 4, 16)[:, :2], positions, table))
        assert pool[:, 0, 1].any(-1).nonzero().tolist() == [[1, 0, shift], [1, 0, shift + 1]]
        positions += 1
        slots += 1


@pytest.mark.parametrize("window", [0, 5, 40])
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("shapes", [DECODES, PREFILLS, DECODES[1:4] + PREFILLS[1:]], ids=["decode", "prefill", "mixed"])
def test_attention_over_shuffled_blocks_is_attention(shapes: list[tuple[int, int]], dim: int, group: int, window: int) -> None:
    check_attention(Heads(2 * group, 2, dim), shapes, window, torch.float32, "cpu")


@DTYPES
def test_attention_keeps_the_dtype(dtype: torch.dtype) -> None:
    check_attention(Heads(8, 2, 64), DECODES + PREFILLS, 0, dtype, "cpu")


@pytest.mark.parametrize("lengths", [[33], [50, 50, 50], [20 * i + 3 for i in range(40)], [5, 3000, 5, 2900, 2, 700]])
@pytest.mark.parametrize("window", [0, 64])
def test_decodes_of_any_mix_of_lengths_come_back_in_their_order(lengths: list[int], window: int) -> None:
    check_attention(Heads(4, 2, 64), [(1, length) for length in lengths], window, torch.float32, "cpu")


@pytest.mark.parametrize("window", [0, 100, 600])
def test_a_chunk_longer_than_a_tile_sees_its_past(window: int) -> None:
    check_attention(Heads(4, 2, 32), [(600, 600), (700, 1500), (1, 900), (256, 257)], window, torch.float32, "cpu")


def test_attention_reads_a_cache_of_another_dtype() -> None:
    case = paged_case(Heads(4, 2, 64), [(1, 40), (9, 20)], dtype=torch.bfloat16)
    out = ops.attention(case.q.float(), case.kv_layer, case.plan, case.scale)
    torch.testing.assert_close(out, case.expected(), atol=2e-5, rtol=2e-5)


def test_a_poisoned_sequence_does_not_touch_its_neighbours() -> None:
    case = paged_case(Heads(4, 2, 64), [(1, 40), (1, 41), (1, 90), (9, 20), (12, 70)])
    clean = ops.attention(case.q, case.kv_layer, case.plan, case.scale)
    case.q[1] = torch.nan
    case.q[5] = torch.inf
    out = ops.attention(case.q, case.kv_layer, case.plan, case.scale)
    healthy = [0, 2, *range(12, 24)]
    assert torch.equal(out[healthy], clean[healthy])
    assert not out[1].isfinite().any()


@DTYPES
def test_copy_blocks_copies_whole_blocks(dtype: torch.dtype) -> None:
    check_copy_blocks(dtype, "cpu")


def test_copying_no_blocks_is_allowed() -> None:
    pool = torch.ones(3, 1, 2, 1, 16, 16)
    ops.copy_blocks(pool, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    assert pool.eq(1).all()


def test_a_misshapen_argument_is_refused_by_name() -> None:
    case = paged_case(Heads(4, 2, 64), [(1, 4)])
    with pytest.raises(ValueError, match=r"q .*cache's D"):
        ops.attention(torch.zeros(1, 4, 32), case.kv_layer, case.plan, 1.0)
    with pytest.raises(ValueError, match=r"q .*multiple of the cache's heads"):
        ops.attention(torch.zeros(1, 3, 64), case.kv_layer, case.plan, 1.0)
    with pytest.raises(ValueError, match="weight"):
        ops.rms_norm(torch.zeros(1, 8), torch.zeros(4), 1e-5)
    with pytest.raises(ValueError, match="residual"):
        ops.add_rms_norm(torch.zeros(1, 8), torch.zeros(2, 8), torch.zeros(8), 1e-5)
    with pytest.raises(ValueError, match="gate_up"):
        ops.silu_mul(torch.zeros(1, 7))


def test_a_context_longer_than_its_block_table_is_refused() -> None:
    case = paged_case(Heads(4, 2, 64), [(1, 4)])
    case.plan.context_lens[0] = 1000
    with pytest.raises(ValueError, match="context_lens"):
        ops.attention(case.q, case.kv_layer, case.plan, 1.0)
