"""An FP8 cache: the plain-torch twins, and the compiled kernels on a GPU."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Heads, paged_case
from kernel_checks import DECODES, PREFILLS
from kv8_checks import (
    SCALES,
    check_attention,
    check_broken_keys_stay_with_their_sequence,
    check_copy_blocks,
    check_decode,
    check_prefill,
    check_rope_and_cache,
    check_saturation,
    relative_error,
)

from workstation.kernels import launch_prefill, ops
from workstation.kernels.launch_decode import DecodeConfig
from workstation.kernels.launch_prefill import PrefillConfig
from workstation.kernels.paging import KVScales
from workstation.kernels.reference_fp8 import from_codes, to_codes

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
SHAPES = pytest.mark.parametrize("shapes", [DECODES, PREFILLS, DECODES[1:4] + PREFILLS[1:]], ids=["decode", "prefill", "mixed"])


@DTYPES
def test_every_code_is_widened_exactly_and_nan_stays_nan(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(from_codes(codes, dtype).float(), expected, rtol=0.0, atol=0.0, equal_nan=True)
    number = expected.isfinite()
    assert torch.equal(to_codes(expected, 1.0)[number], codes[number])


@pytest.mark.parametrize("scale", [1.0, 0.01, 7.3])
def test_a_round_trip_loses_at_most_a_sixteenth(scale: float) -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * scale
    back = from_codes(to_codes(values, scale), torch.float32) * scale
    assert ((back - values).abs() <= torch.maximum(values.abs() / 16, torch.tensor(scale * 2.0**-10)) * 1.0001).all()
    assert relative_error(back, values) < 0.03


@DTYPES
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "rotary_dim"), [(1, Heads(4, 2, 64), 64), (17, Heads(3, 1, 128), 32)])
def test_keys_and_values_are_stored_as_codes_of_this_steps_slots(
    tokens: int, heads: Heads, rotary_dim: int, normed: bool, dtype: torch.dtype
) -> None:
    check_rope_and_cache(tokens, heads, rotary_dim, normed, dtype, "cpu")


def test_what_is_too_large_saturates_and_nan_stays_nan() -> None:
    check_saturation("cpu")


def test_blocks_are_copied_bit_for_bit() -> None:
    check_copy_blocks("cpu")


@SHAPES
@pytest.mark.parametrize("window", [0, 5, 40])
@pytest.mark.parametrize(("group", "dim"), [(1, 16), (4, 64), (7, 80)])
def test_attention_over_codes_is_attention_over_what_they_mean(
    shapes: list[tuple[int, int]], group: int, dim: int, window: int
) -> None:
    check_attention(Heads(2 * group, 2, dim), shapes, window, torch.float32, "cpu")


@DTYPES
@pytest.mark.parametrize("scales", [KVScales(), KVScales(0.01, 1.0), KVScales(1.0, 30.0)], ids=str)
def test_scales_of_keys_and_values_are_independent(scales: KVScales, dtype: torch.dtype) -> None:
    check_attention(Heads(8, 2, 64), DECODES + PREFILLS, 0, dtype, "cpu", scales)


def test_fp8_costs_attention_a_few_percent() -> None:
    exact = paged_case(Heads(8, 2, 64), [(1, 300), (64, 200)])
    coarse = paged_case(Heads(8, 2, 64), [(1, 300), (64, 200)], scales=KVScales())
    assert relative_error(ops.attention(coarse.q, coarse.kv_layer, coarse.plan, coarse.scale), exact.expected()) < 0.05


def test_broken_keys_stay_with_their_sequence() -> None:
    check_broken_keys_stay_with_their_sequence("cpu", torch.float32)


def test_scales_of_a_cache_that_is_not_fp8_are_refused() -> None:
    case = paged_case(Heads(4, 2, 64), [(1, 4)])
    with pytest.raises(ValueError, match=r"kv_layer .* scales only in FP8"):
        ops.attention(case.q, case.kv_layer, case.plan, 1.0, SCALES)


def test_the_hopper_kernel_declines_an_fp8_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_prefill, "capability", lambda _: (9, 0))
    monkeypatch.setattr(launch_prefill, "lies_in_rows", lambda *_: True)
    case = paged_case(Heads(4, 2, 64), [(300, 300)], dtype=torch.float16, scales=SCALES)
    assert launch_prefill.choose(case.q, case.kv_layer, case.plan).kind == "tiled"
    with pytest.raises(ValueError, match="a cache of torch"):
        check_prefill(case, PrefillConfig("hopper", 128, 64, 4, 2))


# ── on a GPU ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "rotary_dim"), [(1, Heads(4, 2, 64), 64), (17, Heads(9, 3, 80), 32), (40, Heads(32, 8, 128), 128)]
)
def test_rope_and_cache_on_a_gpu(tokens: int, heads: Heads, rotary_dim: int, normed: bool, dtype: torch.dtype) -> None:
    check_rope_and_cache(tokens, heads, rotary_dim, normed, dtype, "cuda")


@pytest.mark.gpu
@DTYPES
def test_saturation_and_copies_on_a_gpu(dtype: torch.dtype) -> None:
    check_saturation("cuda", dtype)
    check_copy_blocks("cuda")


@pytest.mark.gpu
@DTYPES
@SHAPES
@pytest.mark.parametrize("window", [0, 5, 70])
@pytest.mark.parametrize(("group", "dim"), [(1, 64), (4, 128), (4, 256), (7, 80), (8, 64), (2, 16)])
def test_attention_on_a_gpu(shapes: list[tuple[int, int]], group: int, dim: int, window: int, dtype: torch.dtype) -> None:
    check_attention(Heads(2 * group, 2, dim), shapes, window, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 1000])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("keys", "warps"), [(32, 4), (64, 4), (128, 4), (64, 8), (128, 8)])
def test_decode_in_other_tiles_on_a_gpu(keys: int, warps: int, dim: int, window: int) -> None:
    lengths = [(1, length) for length in (1, 17, 300, 0, 46, 5000, 129)]
    case = paged_case(Heads(8, 2, dim), lengths, window=window, dtype=torch.bfloat16, device="cuda", scales=SCALES)
    check_decode(case, DecodeConfig("shares", keys, warps, 2, 1, 4, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["exact", "tiled"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("window", [0, 700])
def test_prefill_on_a_gpu(kind: str, dim: int, window: int) -> None:
    case = paged_case(Heads(8, 2, dim), [(3, 3), (64, 64), (300, 1001), (1025, 3000)], window=window, dtype=torch.bfloat16,
                      device="cuda", scales=SCALES)
    check_prefill(case, PrefillConfig(kind, 64, 32, 8, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 4096])
@pytest.mark.parametrize(
    "shapes",
    [[(1, 20_000), *((1, 37 * i + 1) for i in range(100))], [(1, 9000), (2048, 9000), (1000, 1000)]],
    ids=["one long among many", "chunks"],
)
def test_attention_at_length_on_a_gpu(shapes: list[tuple[int, int]], window: int) -> None:
    check_attention(Heads(8, 2, 128), shapes, window, torch.bfloat16, "cuda")


@pytest.mark.gpu
@DTYPES
def test_broken_keys_stay_with_their_sequence_on_a_gpu(dtype: torch.dtype) -> None:
    check_broken_keys_stay_with_their_sequence("cuda", dtype)
