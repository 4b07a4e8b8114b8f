"""What the FP8 operations must hold on any device: the twins, the interpreted and the compiled kernels all pass these."""

from __future__ import annotations

import torch

from workstation.kernels import ops
from workstation.kernels.quantized import Rounding

# Of ‖out − exact‖ / ‖exact‖: the rounding of the output's type, and of e4m3 activations where those are quantised.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
QUANTISED_TOLERANCE = 0.04
SHAPES = [(1, 64, 96), (3, 48, 200), (17, 320, 128), (40, 130, 336), (70, 256, 144)]  # tokens, N, K


def random_layer(rows: int, columns: int, blocked: bool, device: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Every finite e4m3 code, with scales that differ by a factor of eight."""
    gen = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns), generator=gen, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    shape = (-(-rows // 128), -(-columns // 128)) if blocked else (rows,)
    scale = 2.0 ** (torch.rand(shape, generator=gen) * 3) * columns**-0.5 / 100
    return codes.view(torch.float8_e4m3fn).to(device), scale.to(device)


def exact(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """In float64 on the CPU, one block of one row at a time."""
    x, wide, scale = x.double().cpu(), weight.cpu().double(), scale.double().cpu()
    for row in range(wide.shape[0]):
        for start in range(0, wide.shape[1], 128):
            wide[row, start:start + 128] *= scale[row] if scale.dim() == 1 else scale[row // 128, start // 128]
    return x @ wide.T + (0.0 if bias is None else bias.double().cpu())


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double().cpu() - expected).norm() / expected.norm())


def check_linear(tokens: int, rows: int, columns: int, *, blocked: bool, bias: bool, dtype: torch.dtype, device: str,
                 quantized: bool = False) -> None:
    gen = torch.Generator().manual_seed(tokens)
    weight, scale = random_layer(rows, columns, blocked, device, seed=tokens)
    x = torch.randn(tokens, columns, generator=gen).to(dtype).to(device)
    added = torch.randn(rows, generator=gen).to(dtype).to(device) if bias else None
    out = ops.linear_fp8(ops.quantize_fp8(x, Rounding()) if quantized else x, weight, scale, added)
    assert out.dtype == dtype and out.shape == (tokens, rows)
    limit = QUANTISED_TOLERANCE if quantized else TOLERANCE[dtype]
    assert relative_error(out, exact(x, weight, scale, added)) < limit


def check_quantize(tokens: int, width: int, dtype: torch.dtype, device: str, *, share: float = 1.0) -> None:
    """share: of the values that must be rounded to nearest; Triton's interpreter casts some to FP8 wrongly."""
    x = (torch.randn(tokens, width, generator=torch.Generator().manual_seed(width)) * 3).to(dtype).to(device)
    x[-1] = 0
    x8, scale, _ = ops.quantize_fp8(x, Rounding())
    assert x8.dtype == torch.float8_e4m3fn and scale.shape == (tokens,) and scale.dtype == torch.float32
    largest = x.float().abs().amax(1)
    torch.testing.assert_close(scale[:-1], largest[:-1] / 448)
    # Half a step of e4m3: a 16th of the value, or half of the smallest number, 2⁻⁹.
    error = (x8.float() * scale[:, None] - x.float()).abs()
    nearest = error <= torch.maximum(x.float().abs() / 16, scale[:, None] * 2.0**-10) * 1.001
    assert nearest.float().mean() >= share
    assert not x8[-1].float().any()


def check_bound(device: str) -> None:
    x = torch.tensor([[1.0, -2.0, 4000.0, 0.5]], device=device)
    x8, scale, _ = ops.quantize_fp8(x, Rounding(1000.0))
    torch.testing.assert_close(scale.cpu(), torch.tensor([1000.0 / 448]))
    assert x8.float()[0, 2] == 448.0


def check_nan_stays(device: str) -> None:
    x = torch.ones(3, 32, device=device)
    x[1, 5] = torch.nan
    x8, scale, _ = ops.quantize_fp8(x, Rounding())
    values = x8.float() * scale[:, None]
    assert values[1].isnan().any() and values[[0, 2]].isfinite().all()


def check_nan_reaches_the_result(device: str) -> None:
    x = torch.ones(3, 32, device=device)
    x[1, 5] = torch.nan
    weight, scales = random_layer(48, 32, False, device)
    out = ops.linear_fp8(x, weight, scales)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def check_strided_rows(device: str) -> None:
    x = torch.randn(5, 200, device=device)[:, :96]
    weight, scale = random_layer(64, 96, False, device)
    torch.testing.assert_close(ops.linear_fp8(x, weight, scale),
                               ops.linear_fp8(x.contiguous(), weight, scale))
    x8, row, _ = ops.quantize_fp8(x, Rounding())
    again, _, _ = ops.quantize_fp8(x.contiguous(), Rounding())
    assert torch.equal(x8.view(torch.uint8), again.view(torch.uint8)) and row.shape == (5,)


def check_norm_that_rounds(tokens: int, width: int, dtype: torch.dtype, device: str) -> None:
    """add_rms_norm with rounding gives bit for bit what add_rms_norm and quantize_fp8 give one after the other."""
    generator = torch.Generator().manual_seed(tokens * width)
    x, residual = (torch.randn(tokens, width, generator=generator).to(dtype).to(device) for _ in range(2))
    weight = torch.rand(width, generator=generator).to(dtype).to(device)
    fused, kept = ops.add_rms_norm(x, residual.clone(), weight, 1e-5, Rounding())
    normed, expected = ops.add_rms_norm(x, residual.clone(), weight, 1e-5)
    values, scale, _ = ops.quantize_fp8(normed, Rounding())
    assert torch.equal(kept, expected) and torch.equal(fused.scale, scale) and fused.dtype == dtype
    assert torch.equal(fused.values.view(torch.uint8), values.view(torch.uint8))


def check_silu_mul_that_rounds(tokens: int, width: int, dtype: torch.dtype, device: str) -> None:
    """silu_mul with rounding gives bit for bit what silu_mul and quantize_fp8 give one after the other."""
    gate_up = torch.randn(tokens, 2 * width, generator=torch.Generator().manual_seed(width)).to(dtype).to(device)
    fused = ops.silu_mul(gate_up, Rounding(3.0))
    values, scale, kept = ops.quantize_fp8(ops.silu_mul(gate_up), Rounding(3.0))
    assert torch.equal(fused.scale, scale) and fused.dtype == kept == dtype
    assert torch.equal(fused.values.view(torch.uint8), values.view(torch.uint8))


def check_writing_into_a_buffer(tokens: int, device: str, dtype: torch.dtype, *, quantized: bool) -> None:
    weight, scale = random_layer(64, 96, False, device)
    x = torch.randn(tokens, 96, device=device).to(dtype)
    bias = torch.randn(64, device=device).to(dtype)
    given = ops.quantize_fp8(x, Rounding()) if quantized else x
    out = torch.full((tokens, 64), torch.nan, dtype=dtype, device=device)
    assert ops.linear_fp8(given, weight, scale, bias, out) is out
    torch.testing.assert_close(out, ops.linear_fp8(given, weight, scale, bias))
