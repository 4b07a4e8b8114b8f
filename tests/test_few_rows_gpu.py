"""4-bit products of one to four rows on Hopper, whose codes are e4m3 numbers and whose x is taken apart into two."""

from __future__ import annotations

import pytest
import torch

from workstation.kernels.gemm_launch import Operands, run_linear
from workstation.kernels.int_weights import IntWeight, pack
from workstation.kernels.launch_hopper import is_hopper
from workstation.kernels.launch_int import fitted
from workstation.kernels.reference_int import take_apart, widen
from workstation.kernels.tuning import FEW_ROWS, GemmConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and is_hopper(torch.device("cuda", 0))), reason="needs a Hopper GPU"),
]
N, K = 384, 1024
ONE_SPLIT = GemmConfig("hopper", 64, FEW_ROWS, 256, 1, 4, 3, True)
CONFIGS = {
    "one tile": ONE_SPLIT,
    "two tiles": GemmConfig("hopper", 128, FEW_ROWS, 256, 1, 4, 2, True),
    "four parts of K": GemmConfig("hopper", 128, FEW_ROWS, 256, 4, 4, 2, True),
    "long steps": GemmConfig("hopper", 64, FEW_ROWS, 512, 2, 4, 2, True),
}


def weight(rows: int = N, columns: int = K, size: int = 128) -> IntWeight:
    torch.manual_seed(rows + columns)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    scale = (torch.rand(columns // size, rows, device="cuda") + 0.5).to(torch.bfloat16)
    return IntWeight(pack(codes, 4).cuda(), scale, None, 4, size, columns)


def activations(rows: int, columns: int = K) -> torch.Tensor:
    return (torch.randn(rows, columns, device="cuda") * columns**-0.5).to(torch.bfloat16)


class Product:
    """Products with x as it is, or taken apart."""

    def __init__(self, apart: bool) -> None:
        self.apart = apart

    def __call__(
        self, x: torch.Tensor, w: IntWeight, config: GemmConfig, bias: torch.Tensor | None = None, *, silu: bool = False
    ) -> torch.Tensor:
        given = take_apart(x) if self.apart else x
        torch.cuda.synchronize()  # a ring reads its weights before the kernel in front has ended
        return run_linear(Operands(given, w, bias=bias), config, torch.bfloat16, silu=silu)


@pytest.fixture(params=[False, True], ids=["plain", "apart"])
def product(request: pytest.FixtureRequest) -> Product:
    return Product(request.param)


def exact(x: torch.Tensor, w: IntWeight) -> torch.Tensor:
    return x.double() @ widen(w, torch.float32).double().t()


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_a_product_of_few_rows_is_exact_but_for_the_results_rounding(
    product: Product, rows: int, config: GemmConfig
) -> None:
    x, w, bias = activations(rows), weight(), torch.randn(N, device="cuda").to(torch.bfloat16)
    expected = exact(x, w) + bias.double()
    assert error(product(x, w, config, bias), expected) < 2e-3  # bfloat16 alone makes 1.7e-3


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("splits", [1, 2])
def test_gate_and_up_meet_in_one_product(product: Product, rows: int, splits: int) -> None:
    x, w = activations(rows), weight(2 * N)
    gate, up = exact(x, w).chunk(2, -1)
    config = GemmConfig("hopper", 64, FEW_ROWS, 256, splits, 4, 2, True)
    assert error(product(x, w, config, silu=True), gate * gate.sigmoid() * up) < 3e-3


@pytest.mark.parametrize(("columns", "size"), [(1152, 128), (1024, 256), (1024, 1024), (512, 512)])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_any_whole_chunks_make_a_row_and_a_group(
    product: Product, columns: int, size: int, config: GemmConfig
) -> None:
    x, w = activations(2, columns), weight(N, columns, size)
    assert error(product(x, w, config), exact(x, w)) < 2e-3


@pytest.mark.parametrize("column", range(0, K, 37))
def test_a_column_alone_gives_the_weights_own_numbers(product: Product, column: int) -> None:
    x = torch.zeros(1, K, device="cuda", dtype=torch.bfloat16)
    x[0, column] = 1
    w = weight()._replace(scale=torch.ones(K // 128, N, device="cuda", dtype=torch.bfloat16))
    assert torch.equal(product(x, w, ONE_SPLIT), exact(x, w).to(torch.bfloat16))


def test_an_outlier_costs_its_neighbours_no_precision_that_bfloat16_had(product: Product) -> None:
    x, w = activations(1), weight()
    x[0, ::128] *= 500
    small = x.clone()
    small[0, ::128] = 0
    difference = product(x, w, ONE_SPLIT).double() - product(x - small, w, ONE_SPLIT).double()
    assert float((difference - exact(small, w)).norm() / exact(x, w).norm()) < 4e-3


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30])
def test_very_small_and_very_large_rows_keep_their_size(product: Product, size: float) -> None:
    x, w = (activations(2).float() * size).to(torch.bfloat16), weight()
    y = product(x, w, ONE_SPLIT)
    if size > 1e-38:
        assert error(y, exact(x, w)) < 2e-3
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(product: Product, value: float) -> None:
    x, w = activations(3), weight()
    expected = product(x, w, ONE_SPLIT)
    x[1, 77] = value
    y = product(x, w, ONE_SPLIT)
    assert torch.equal(y[[0, 2]], expected[[0, 2]])
    assert not torch.isfinite(y[1]).any()


def test_a_row_of_zeros_gives_zeros(product: Product) -> None:
    assert not product(torch.zeros(2, K, device="cuda", dtype=torch.bfloat16), weight(), ONE_SPLIT).any()


def test_a_row_has_the_same_bits_whatever_is_beside_it(product: Product) -> None:
    x, w = activations(4), weight()
    whole = product(x, w, ONE_SPLIT)
    for row in range(4):
        assert torch.equal(product(x[row : row + 1], w, ONE_SPLIT)[0], whole[row])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_taking_apart_beforehand_changes_no_bit(rows: int, config: GemmConfig) -> None:
    x, w = activations(rows), weight()
    assert torch.equal(Product(True)(x, w, config), Product(False)(x, w, config))


def test_weights_that_the_kernel_cannot_read_get_another_ring() -> None:
    narrow = weight(size=64)
    zeros = weight()._replace(zero=torch.full((K // 128, N // 2), 0x77, dtype=torch.uint8, device="cuda"))
    for w in (narrow, zeros):
        x = activations(2)
        assert error(Product(False)(x, w, fitted(ONE_SPLIT, w, torch.bfloat16)), exact(x, w)) < 2e-3
