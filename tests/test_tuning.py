"""Which configuration a matrix product gets: the measured one, the next larger number of rows, or a computed one."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from workstation.kernels import launch_int, tuning
from workstation.kernels.gemm_compile import int_types
from workstation.kernels.int_weights import IntWeight
from workstation.kernels.tuning import KIB, LIBRARY, Device, GemmConfig, Output, Problem, Scheme, choose, default_config

A100 = Device("NVIDIA A100-SXM4-80GB", 108, 163 * KIB, 80)
L40S = Device("NVIDIA L40S", 142, 99 * KIB, 89)
L4 = Device("NVIDIA L4", 58, 99 * KIB, 89)
H200 = Device("NVIDIA H200", 132, 227 * KIB, 90)
B200 = Device("NVIDIA B200", 148, 227 * KIB, 100)
PRO_6000 = Device("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 188, 99 * KIB, 120)
DEVICES = [A100, L40S, L4, H200, B200, PRO_6000]
SCHEMES: list[Scheme] = ["16bit", "fp8", "fp8_weight", "int4", "int8_weight"]
EVERY_SCHEME = [*SCHEMES, *tuning.CODE_SCHEMES]
OUTPUTS: list[Output] = ["linear", "silu_mul"]
WEIGHTS = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (57344, 8192), (8192, 28672), (128256, 4096)]
WEIGHTS += [(4096, 1024), (1024, 2048), (1024, 3072), (32, 16), (96, 80)]
ROWS = [1, 2, 5, 16, 17, 32, 64, 100, 128, 200, 256]

ROW = ["fp8", "linear", 512, 1024]


@pytest.fixture
def tuned_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Device:
    """A GPU with measured configurations for 1 row, up to 8 and up to 64."""
    rows = [[*ROW, m, kind, 16 * m, 16, 128, 1, 4, 3, False] for m, kind in ((64, "dot"), (1, "gemv"), (8, "dot"))]
    (tmp_path / "Some_GPU.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    tuning.tuned.cache_clear()
    yield Device("Some GPU", 100, 99 * KIB, 89)
    tuning.tuned.cache_clear()


@pytest.mark.parametrize(("m", "block_n"), [(1, 16), (2, 128), (8, 128), (9, 1024), (64, 1024)])
def test_the_next_larger_measured_number_of_rows_decides(tuned_gpu: Device, m: int, block_n: int) -> None:
    assert choose(Problem("fp8", "linear", m, 512, 1024), tuned_gpu).block_n == block_n


def test_what_was_not_measured_is_computed(tuned_gpu: Device) -> None:
    measured = Problem("fp8", "linear", 8, 512, 1024)
    for other in (
        Problem("fp8", "linear", 65, 512, 1024),
        Problem("fp8", "linear", 8, 512, 2048),
        Problem("fp8_weight", "linear", 8, 512, 1024),
    ):
        assert choose(other, tuned_gpu) == default_config(other, tuned_gpu)
    assert choose(measured, L40S) == default_config(measured, L40S)


def test_the_library_gets_many_rows(tuned_gpu: Device) -> None:
    assert choose(Problem("fp8_weight", "linear", 257, 512, 1024), tuned_gpu) == LIBRARY
    assert choose(Problem("16bit", "linear", 65, 512, 1024), tuned_gpu) == LIBRARY
    assert choose(Problem("fp8_weight", "linear", 256, 512, 1024), tuned_gpu) != LIBRARY


def test_codes_of_gate_and_up_are_multiplied_apart_for_many_rows_on_hopper_unless_measured(
        monkeypatch: pytest.MonkeyPatch) -> None:
    many, few = Problem("nf4", "silu_mul", 33, 1024, 1024), Problem("nf4", "silu_mul", 32, 1024, 1024)
    assert choose(many, H200) == LIBRARY and choose(few, H200).kind == "hopper"
    assert choose(many, H200, rings=False).kind == choose(many, L40S).kind == "dot"
    config = GemmConfig("hopper", 64, 64, 256, 1, 8, 3)
    monkeypatch.setattr(tuning, "tuned", lambda gpu: {("nf4", "silu_mul", 1024, 1024): ((64, config),)})
    assert choose(many, H200) == config


def test_more_rows_of_grouped_weights_than_256_have_a_kernel_only_where_one_was_measured(
        monkeypatch: pytest.MonkeyPatch) -> None:
    config = GemmConfig("dot", 128, 128, 128, 1, 8, 3)
    measured = {("nf4", "linear", 512, 1024): ((512, config),), ("16bit", "linear", 512, 1024): ((512, config),)}
    monkeypatch.setattr(tuning, "tuned", lambda gpu: measured)
    assert choose(Problem("nf4", "linear", 257, 512, 1024), H200) == config
    assert choose(Problem("nf4", "linear", 513, 512, 1024), H200) == LIBRARY
    assert choose(Problem("nf4", "linear", 257, 1024, 1024), H200) == LIBRARY
    assert choose(Problem("16bit", "linear", 257, 512, 1024), H200) == LIBRARY


@pytest.mark.parametrize(("output", "share"), [("linear", 1), ("silu_mul", 2)])
def test_any_number_of_rows_of_four_bit_integers_is_a_ring_on_hopper_where_there_are_channels_enough(
        output: Output, share: int) -> None:
    for m, channels in ((257, 128), (512, 128), (513, 256), (8192, 256)):
        config = choose(Problem("int4", output, m, 34816, 5120), H200)
        assert (config.kind, config.block_n, config.block_m, config.warps) == ("hopper", channels // share, 128, 8)
    for narrow, rings, device in ((2048, True, H200), (34880, True, H200), (34816, False, H200), (34816, True, L40S)):
        assert choose(Problem("int4", output, 1024, narrow, 5120), device, rings=rings) == LIBRARY


@pytest.mark.parametrize("scheme", tuning.BYTE_SCALES)
def test_more_rows_of_e2m1_codes_than_256_are_a_ring_on_hopper(scheme: Scheme) -> None:
    for m in (257, 512):
        config = choose(Problem(scheme, "linear", m, 34816, 5120), H200)
        assert (config.kind, config.block_n, config.block_m, config.warps) == ("hopper", 128, 128, 8)
    assert choose(Problem(scheme, "linear", tuning.NARROW_ROWS + 1, 34816, 5120), H200) == LIBRARY


@pytest.mark.parametrize(("weight", "dtype", "served"), [
    (int_types(4, 128, 4096), torch.bfloat16, True), (int_types(4, 64, 4096), torch.bfloat16, False),
    (int_types(4, 4096, 4096), torch.bfloat16, False), (int_types(4, 128, 4096), torch.float16, False),
    (int_types(4, 128, 4096, zeros=True), torch.bfloat16, False)])
def test_programs_of_256_channels_are_for_groups_of_128_columns_whose_weights_are_scaled_first(
        weight: IntWeight, dtype: torch.dtype, served: bool) -> None:
    assert launch_int._serves_wide(weight, dtype) == served


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("scheme", EVERY_SCHEME)
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_computed_configuration_fits_any_device(device: Device, scheme: Scheme, output: Output) -> None:
    for m, (n, k) in itertools.product(ROWS, WEIGHTS):
        problem = Problem(scheme, output, m, n, k)
        config = default_config(problem, device)
        assert tuning.shared_bytes(problem, config, device.capability) <= device.shared_bytes, problem
        assert config.block_n * config.block_m <= config.warps * 32 * 128, problem  # accumulators leave room in registers
        least = 16 if config.kind != "hopper" else 4 if tuning.is_few(config) else 8  # rows of x are a wgmma's columns there
        assert config.block_m >= least and config.block_k >= 32 and config.stages >= 2, problem
        assert config.splits == 1 or config.splits * 4 * config.block_k <= k, problem
        if config.kind != "hopper":  # whose splits are summed inside
            assert config.splits * m * 8 <= max(k * problem.weight_bytes, 8 * m), problem


def test_few_channels_are_split_until_every_multiprocessor_has_work() -> None:
    for n, k in ((4096, 4096), (6144, 4096), (8192, 28672), (10240, 8192)):
        for device in (B200, PRO_6000):
            config = default_config(Problem("fp8", "linear", 8, n, k), device)
            assert n // config.block_n * config.splits >= 1.35 * device.processors


def test_few_rows_on_hopper_get_a_ring_and_long_products_of_few_tiles_are_split() -> None:
    h100 = Device("NVIDIA H100 80GB HBM3", 132, 227 * KIB, 90)
    for scheme, output, m, n, k, splits in (("fp8", "linear", 1, 5120, 5120, 1), ("fp8", "linear", 8, 4096, 12288, 4),
                                            ("16bit", "linear", 32, 5120, 17408, 1), ("fp8", "silu_mul", 16, 34816, 5120, 1)):
        config = default_config(Problem(scheme, output, m, n, k), h100)
        assert (config.kind, config.splits) == ("hopper", splits)
    for problem in (Problem("fp8", "linear", 1, 4112, 4096), Problem("fp8", "linear", 65, 4096, 4096),
                    Problem("fp8_weight", "linear", 1, 4096, 4096)):
        assert default_config(problem, h100).kind == "dot"


def test_an_h100_takes_what_was_measured_on_an_h200() -> None:
    problem = Problem("fp8", "linear", 8, 4096, 14336)
    assert choose(problem, replace(H200, name="NVIDIA H100 80GB HBM3")) == choose(problem, H200)


def test_without_gluon_nothing_measured_or_computed_is_a_ring() -> None:
    for m, (n, k) in itertools.product((1, 8, 64), WEIGHTS):
        for scheme in EVERY_SCHEME:
            assert choose(Problem(scheme, "linear", m, n, k), H200, rings=False).kind != "hopper"


@pytest.mark.parametrize("path", sorted(tuning.TUNED.glob("*.json")), ids=lambda path: path.stem)
def test_a_shipped_file_is_whole(path: Path) -> None:
    """Found under its GPU's name, says where it comes from, holds no row twice, and every row can be launched."""
    content = json.loads(path.read_text())
    device = Device(**content["device"])
    assert content["origin"] and path.stem == device.name.replace(" ", "_")
    seen = set()
    for row in content["rows"]:
        problem, config = tuning.parse_row(row)
        assert tuning.make_row(problem, config) == row
        assert problem not in seen
        seen.add(problem)
        assert choose(problem, device) == config
        assert tuning.shared_bytes(problem, config, device.capability) <= device.shared_bytes
        assert problem.n % 16 == 0 and problem.k % 16 == 0 and problem.m <= tuning.most_rows(problem.scheme)


def test_a_broken_row_is_refused_by_its_value() -> None:
    with pytest.raises(ValueError, match="scheme 'int3'"):
        tuning.parse_row(["int3", "linear", 16, 16, 1, "dot", 64, 16, 128, 1, 4, 3, False])
    with pytest.raises(ValueError, match="block_k is 96"):
        tuning.parse_row([*ROW, 1, "dot", 64, 16, 96, 1, 4, 3, False])
    with pytest.raises(ValueError, match="kind is 'magic'"):
        tuning.parse_row([*ROW, 1, "magic", 64, 16, 128, 1, 4, 3, False])
    with pytest.raises(ValueError, match="splits is 0"):
        GemmConfig("dot", splits=0)
    with pytest.raises(ValueError, match="m=2 rows to the gemv"):
        tuning.parse_row([*ROW, 2, "gemv", 64, 1, 128, 1, 4, 3, False])
