"""The Triton kernels, interpreted on the CPU; `test_interpreted.py` runs this file in a process apart.

float32 and float16 only: the interpreter's bfloat16 dot is wrong.
"""

from __future__ import annotations

import os

import pytest
import torch
from kernel_cases import Heads, paged_case
from kernel_checks import (
    TOLERANCE,
    check_add_rms_norm,
    check_attention,
    check_copy_blocks,
    check_norm_that_takes_apart,
    check_rms_norm,
    check_rope_and_cache,
    check_silu_mul,
    check_step_inputs,
)
from products import some_of

from workstation.kernels import launch_decode, launch_prefill, ops, reference
from workstation.kernels.launch_decode import DecodeConfig
from workstation.kernels.launch_prefill import PrefillConfig

assert os.environ["TRITON_INTERPRET"] == "1" and ops.FORCE_TRITON

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
TOKENS = pytest.mark.parametrize("tokens", [1, 3, 17])
DECODES = [(1, 1), (1, 16), (1, 17), (1, 300), (1, 0), (1, 45)]
PREFILLS = [(3, 3), (17, 40), (64, 64), (5, 133)]
STEPS = {"decode": DECODES, "prefill": PREFILLS, "mixed": DECODES[1:3] + PREFILLS[1::2]}
SHARINGS = {  # (processors, units a share has, units never cut)
    "one": (1, 1, 0), "three": (3, 2, 3), "seven": (7, 1, 0), "a unit each": (40, 1, 0), "as on a GPU": (40, 4, 8),
}  # fmt: skip


@DTYPES
@TOKENS
def test_rms_norm(tokens: int, dtype: torch.dtype) -> None:
    check_rms_norm(tokens, 96, dtype, "cpu")


def test_rms_norm_reads_strided_rows() -> None:
    x, weight = torch.randn(5, 200)[:, :72], torch.randn(72)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x.contiguous(), weight, 1e-5))


@pytest.mark.parametrize("tokens", [0, 1, 5, 200])
def test_step_inputs(tokens: int) -> None:
    check_step_inputs(tokens, "cpu")


@DTYPES
@TOKENS
def test_add_rms_norm(tokens: int, dtype: torch.dtype) -> None:
    check_add_rms_norm(tokens, 160, dtype, "cpu")


@pytest.mark.parametrize(("tokens", "width"), [(1, 128), (1, 640), (2, 256), (4, 384)])
def test_the_norm_that_takes_apart_equals_the_norm(tokens: int, width: int) -> None:
    check_norm_that_takes_apart(tokens, width, "cpu")


@DTYPES
@TOKENS
def test_silu_mul(tokens: int, dtype: torch.dtype) -> None:
    check_silu_mul(tokens, 72, dtype, "cpu")
    check_silu_mul(tokens, 1100, dtype, "cpu")


@some_of(tokens=[1, 3, 17], dtype=[torch.float32, torch.float16], normed=[False, True],
         rotated=[(Heads(4, 2, 64), 64), (Heads(9, 3, 80), 32)])
def test_rope_and_cache(tokens: int, rotated: tuple[Heads, int], normed: bool, dtype: torch.dtype) -> None:
    heads, rotary_dim = rotated
    check_rope_and_cache(tokens, heads, rotary_dim, normed, dtype, "cpu")


@some_of(shapes=STEPS, window=[0, 5, 70], heads=[Heads(1, 1, 64), Heads(4, 1, 128), Heads(7, 1, 80), Heads(8, 1, 64)])
def test_attention(shapes: list[tuple[int, int]], heads: Heads, window: int) -> None:
    check_attention(heads, shapes, window, torch.float16, "cpu")


@some_of(1, shapes=STEPS, window=[0, 70])
def test_attention_in_full_precision(shapes: list[tuple[int, int]], window: int) -> None:
    check_attention(Heads(8, 2, 64), shapes, window, torch.float32, "cpu")


def test_attention_with_a_head_dim_of_256() -> None:
    check_attention(Heads(4, 1, 256), [(1, 90), (1, 200), (20, 70)], 0, torch.float16, "cpu")


@pytest.mark.parametrize("kind", ["exact", "tiled"])
@pytest.mark.parametrize(
    ("heads", "rows", "keys"), [(Heads(4, 1, 128), 64, 32), (Heads(6, 2, 64), 32, 64), (Heads(2, 2, 64), 32, 32)]
)
def test_every_prefill_kernel_is_attention(kind: str, heads: Heads, rows: int, keys: int) -> None:
    """Behind a decode, at lengths that end within blocks and tiles; slots behind an end hold NaN, and so does the output."""
    case = paged_case(heads, [(1, 20), (3, 3), (17, 40), (70, 133)], dtype=torch.float16)
    out = torch.full_like(case.q, torch.nan)
    config = PrefillConfig(kind, rows, keys, 4, 2)
    launch_prefill.attend_prefills(case.q, case.kv_layer, case.plan, case.scale, out, config)
    torch.testing.assert_close(out[1:].float(), case.expected()[1:], atol=TOLERANCE[out.dtype], rtol=TOLERANCE[out.dtype])


@pytest.mark.parametrize("window", [5, 70])
def test_the_tiled_prefill_kernel_keeps_its_window(window: int) -> None:
    case = paged_case(Heads(4, 2, 64), [(3, 3), (17, 40), (70, 133)], window=window, dtype=torch.float16)
    out = torch.full_like(case.q, torch.nan)
    config = PrefillConfig("tiled", 32, 32, 4, 2)
    launch_prefill.attend_prefills(case.q, case.kv_layer, case.plan, case.scale, out, config)
    torch.testing.assert_close(out.float(), case.expected(), atol=TOLERANCE[out.dtype], rtol=TOLERANCE[out.dtype])


def test_a_prefill_kernel_declines_what_it_cannot_serve() -> None:
    case = paged_case(Heads(4, 2, 48), [(3, 3)], dtype=torch.float16)
    out = torch.empty_like(case.q)
    for kind in ("tiled", "hopper"):
        with pytest.raises(ValueError, match=r"does not serve q \[3, 4, 48\]"):
            launch_prefill.attend_prefills(
                case.q, case.kv_layer, case.plan, case.scale, out, PrefillConfig(kind, 32, 32, 4, 2)
            )


@some_of(1, sharing=SHARINGS, window=[0, 33, 200])
def test_decode_is_attention_however_the_keys_are_shared(
    monkeypatch: pytest.MonkeyPatch, sharing: tuple[int, int, int], window: int
) -> None:
    """Twice, as two layers: the second finds the arrival counters as the first left them."""
    processors, least, whole = sharing
    monkeypatch.setattr(launch_decode, "_multiprocessors", lambda device: processors)
    lengths = [(1, length) for length in (1, 16, 17, 150, 0, 46, 520)]
    case = paged_case(Heads(8, 2, 64), lengths, window=window)
    for _ in range(2):
        out = torch.full_like(case.q, torch.nan)
        config = DecodeConfig("shares", 32, 4, 2, 2, least, whole)
        launch_decode.attend_decodes(case.q, case.kv_layer, case.plan, case.scale, out, config)
        torch.testing.assert_close(out, case.expected(), atol=2e-5, rtol=2e-5)


def test_shares_are_equal_and_leave_short_sequences_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units: 3, 3, 16. Five shares of five units: the border at 5 lies in a short sequence and moves to its end, 6."""
    monkeypatch.setattr(launch_decode, "_multiprocessors", lambda device: 5)
    case = paged_case(Heads(2, 1, 16), [(1, 180), (1, 192), (1, 1024)])
    out = torch.empty_like(case.q)
    launch_decode.attend_decodes(case.q, case.kv_layer, case.plan, case.scale, out, DecodeConfig("shares", 32, 4, 2, 1, 1, 3))
    shares = case.plan.scratch["decode_shares"]
    assert shares.number == 5
    assert shares.first.tolist() == [0, 3, 6, 22]
    assert shares.start[:6].tolist() == [0, 6, 10, 15, 20, 22]
    assert shares.sequence[:5].tolist() == [0, 2, 2, 2, 2]
    assert shares.arrivals.tolist() == [0, 0, 0]
    torch.testing.assert_close(out, case.expected())


LAYOUTS = pytest.mark.parametrize(
    ("lengths", "processors", "units"),
    [
        ([1024], 40, 2),  # 16 units: eight shares of two rather than four of four
        ([100], 40, 1),
        ([8192], 40, 8),  # 128 units: sixteen pieces rather than 32
        ([4096], 40, 4),
        ([200] * 8, 40, 4),  # short sequences: a share each
        ([2048] * 8, 10, 26),  # as many shares as there are programs
    ],
)
AS_ON_A_GPU = DecodeConfig("shares", 64, 4, 2, 1, 4, 8)


@LAYOUTS
def test_shares_are_neither_tiny_nor_too_many(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], processors: int, units: int
) -> None:
    monkeypatch.setattr(launch_decode, "_multiprocessors", lambda device: processors)
    case = paged_case(Heads(1, 1, 16), [(1, length) for length in lengths])
    shares = launch_decode.make_room(case.q, case.kv_layer, case.plan, AS_ON_A_GPU)
    launch_decode.plan_call(case.kv_layer, case.plan, AS_ON_A_GPU, shares).launch()
    assert int(shares.header[0]) == units


@pytest.mark.long
@LAYOUTS
def test_long_contexts_in_many_shares_are_attention(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], processors: int, units: int
) -> None:
    monkeypatch.setattr(launch_decode, "_multiprocessors", lambda device: processors)
    case = paged_case(Heads(1, 1, 16), [(1, length) for length in lengths])
    out = torch.empty_like(case.q)
    launch_decode.attend_decodes(case.q, case.kv_layer, case.plan, case.scale, out, AS_ON_A_GPU)
    torch.testing.assert_close(out, case.expected(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("window", [0, 33])
def test_both_sides_of_the_door_agree(window: int) -> None:
    case = paged_case(Heads(6, 2, 48), [(1, 77), (1, 130), (1, 3), (11, 11), (8, 50)], window=window)
    mine = ops.attention(case.q, case.kv_layer, case.plan, case.scale)
    torch.testing.assert_close(mine, reference.attention(case.q, case.kv_layer, case.plan, case.scale))


@DTYPES
def test_copy_blocks(dtype: torch.dtype) -> None:
    check_copy_blocks(dtype, "cpu")
