"""The kernels over an FP8 cache, interpreted on the CPU; `test_interpreted.py` runs this file in a process apart.

float32 and float16 only. "bytes": as on a GPU without FP8.
"""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import Heads, paged_case
from kv8_checks import (
    SCALES,
    check_attention,
    check_broken_keys_stay_with_their_sequence,
    check_copy_blocks,
    check_decode,
    check_prefill,
    check_rope_and_cache,
    check_saturation,
)
from products import some_of

from workstation.kernels import launch_decode, launch_fp8, ops
from workstation.kernels.fp8_codes import round_to_codes, widen_cached
from workstation.kernels.launch_decode import DecodeConfig
from workstation.kernels.launch_prefill import PrefillConfig
from workstation.kernels.reference_fp8 import to_codes

assert os.environ["TRITON_INTERPRET"] == "1" and ops.FORCE_TRITON

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
DECODES = [(1, 1), (1, 16), (1, 17), (1, 300), (1, 0), (1, 45)]
PREFILLS = [(3, 3), (17, 40), (64, 64), (5, 133)]
STEPS = {"decode": DECODES, "prefill": PREFILLS, "mixed": DECODES[1:3] + PREFILLS[1::2]}
DEVICES = ["fp8", "bytes"]
SHARINGS = {  # (keys a turn, processors, units a share has, units never cut)
    "half units": (32, 7, 1, 0), "one program": (128, 1, 1, 0), "seven": (128, 7, 1, 0), "as on a GPU": (128, 40, 4, 8),
}  # fmt: skip


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(launch_fp8, "has_fp8", lambda _: request.param == "fp8")
    return "cpu"


@triton.jit
def round_kernel(values, codes, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(codes + at, round_to_codes(tl.load(values + at, mask=at < count, other=0.0)), mask=at < count)


@triton.jit
def widen_kernel(codes, values, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(values + at, widen_cached(tl.load(codes + at), values.dtype.element_ty))


def every_code() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def test_rounding_to_codes_is_to_nearest_even_for_any_float32() -> None:
    gen = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (50_000,), generator=gen).to(torch.int32).view(torch.float32)
    ends = every_code()[every_code().isfinite()].sort().values
    ties = (ends[1:] + ends[:-1]) / 2
    edges = [torch.nextafter(ties, torch.full_like(ties, side)) for side in (-1e9, 1e9)]
    extreme = torch.tensor([464.0, 465.0, 480.0, torch.inf, -torch.inf, torch.nan])
    values = torch.cat((bits, ends, ties, *edges, extreme, torch.randn(20_000, generator=gen)))
    codes = torch.empty(values.numel(), dtype=torch.uint8)
    round_kernel[(triton.cdiv(values.numel(), 4096),)](values, codes, values.numel(), BLOCK=4096)
    number = ~values.isnan()
    assert torch.equal(codes[number], to_codes(values, 1.0)[number])
    assert ((codes[~number] & 0x7F) == 0x7F).all()


@DTYPES
def test_bytes_are_widened_exactly_and_nan_stays_nan(dtype: torch.dtype) -> None:
    out = torch.empty(256, dtype=dtype)
    widen_kernel[(1,)](torch.arange(256, dtype=torch.uint8), out, BLOCK=256)
    torch.testing.assert_close(out.float(), every_code(), rtol=0.0, atol=0.0, equal_nan=True)


@some_of(rotated=[(1, Heads(4, 2, 64), 64), (17, Heads(9, 3, 80), 32)], normed=[False, True],
         dtype=[torch.float32, torch.float16])
def test_rope_and_cache(rotated: tuple[int, Heads, int], normed: bool, dtype: torch.dtype) -> None:
    tokens, heads, rotary_dim = rotated
    check_rope_and_cache(tokens, heads, rotary_dim, normed, dtype, "cpu")


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # infinity through RoPE, which values are not
def test_saturation_and_copies() -> None:
    check_saturation("cpu")
    check_copy_blocks("cpu")


@some_of(indirect=["device"], heads=[Heads(4, 1, 128), Heads(7, 1, 80)], shapes=STEPS, window=[0, 70], device=DEVICES)
def test_attention(heads: Heads, shapes: list[tuple[int, int]], window: int, device: str) -> None:
    check_attention(heads, shapes, window, torch.float16, device)


@some_of(1, indirect=["device"], shapes=STEPS, device=DEVICES)
def test_attention_in_full_precision(shapes: list[tuple[int, int]], device: str) -> None:
    check_attention(Heads(8, 2, 16), shapes, 5, torch.float32, device)


@some_of(indirect=["device"], kind=["exact", "tiled"], window=[0, 70], device=DEVICES)
def test_every_portable_prefill_kernel(kind: str, window: int, device: str) -> None:
    case = paged_case(Heads(4, 2, 64), [(3, 3), (17, 40), (70, 133)], window=window, dtype=torch.float16,
                      device=device, scales=SCALES)
    check_prefill(case, PrefillConfig(kind, 32, 32, 4, 2))


@some_of(1, sharing=SHARINGS, window=[0, 33])
def test_decode_however_the_keys_are_shared(
    monkeypatch: pytest.MonkeyPatch, sharing: tuple[int, int, int, int], window: int
) -> None:
    """128 keys a turn are two units: a share may end within a turn."""
    keys, processors, least, whole = sharing
    monkeypatch.setattr(launch_decode, "_multiprocessors", lambda device: processors)
    case = paged_case(Heads(8, 2, 64), [(1, length) for length in (1, 17, 150, 0, 46, 520)], window=window, scales=SCALES)
    for _ in range(2):
        check_decode(case, DecodeConfig("shares", keys, 4, 2, 2, least, whole))


def test_broken_keys_stay_with_their_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bytes: the interpreter takes the NaN of its own FP8 type for 480."""
    monkeypatch.setattr(launch_fp8, "has_fp8", lambda _: False)
    check_broken_keys_stay_with_their_sequence("cpu", torch.float32)
