"""NVML's readings, and the sentence for a card that is there and cannot be used."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from workstation import gpu
from workstation.errors import DeviceError
from workstation.memory import GIB


class FakeNvml:
    """One card. Queries named in `broken` fail as NVML's binding fails: with an exception."""

    NVML_TEMPERATURE_GPU = 0

    def __init__(self, cuda: int = 13000, broken: frozenset[str] = frozenset()) -> None:
        self.broken = broken
        self.answers: dict[str, Any] = {
            "nvmlDeviceGetCount": 1, "nvmlDeviceGetHandleByIndex": "card", "nvmlDeviceGetHandleByUUID": "card",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=96 * GIB, used=6 * GIB, free=90 * GIB),
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=37), "nvmlSystemGetCudaDriverVersion": cuda,
            "nvmlDeviceGetDisplayActive": 1, "nvmlDeviceGetIndex": 0, "nvmlDeviceGetName": b"NVIDIA Test",
            "nvmlDeviceGetUUID": "GPU-1", "nvmlSystemGetDriverVersion": "570.1", "nvmlDeviceGetPowerUsage": 250_000,
            "nvmlDeviceGetEnforcedPowerLimit": 600_000, "nvmlDeviceGetTotalEnergyConsumption": 5000,
            "nvmlDeviceGetTemperature": 61, "nvmlDeviceGetCudaComputeCapability": (9, 0),
        }  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        def query(*arguments: Any) -> Any:
            if name in self.broken:
                raise RuntimeError("Not Supported")
            return self.answers[name]

        return query


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setattr(gpu, "_library", lambda: fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_a_sample_is_in_plain_units(card: FakeNvml) -> None:
    sample = gpu.sample()
    assert sample is not None
    assert (sample.name, sample.cuda, sample.total_bytes, sample.utilization) == ("NVIDIA Test", (13, 0), 96 * GIB, 0.37)
    assert (sample.power_watts, sample.power_limit_watts, sample.energy_joules) == (250.0, 600.0, 5.0)
    assert (sample.temperature_celsius, sample.display, sample.compute_capability) == (61.0, True, (9, 0))


def test_a_reading_the_card_does_not_offer_is_none_and_the_rest_stays(card: FakeNvml) -> None:
    card.broken = frozenset({"nvmlDeviceGetMemoryInfo", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetDisplayActive"})
    sample = gpu.sample()
    assert sample is not None
    assert (sample.total_bytes, sample.power_watts, sample.display) == (None, None, None)
    assert sample.temperature_celsius == 61.0


def test_a_lost_card_is_none(card: FakeNvml) -> None:
    card.broken = frozenset({"nvmlDeviceGetHandleByIndex", "nvmlDeviceGetCount"})
    assert gpu.sample() is None
    assert gpu.count() == 0


def test_without_a_driver_there_is_nothing_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_library", lambda: None)
    assert (gpu.sample(), gpu.count(), gpu.has_usable_gpu()) == (None, 0, False)
    with pytest.raises(DeviceError, match="no NVIDIA GPU was found"):
        gpu.require_cuda("13.0", 0)


def test_an_old_driver_is_refused_with_the_one_that_is_needed(card: FakeNvml) -> None:
    card.answers["nvmlSystemGetCudaDriverVersion"] = 12080
    with pytest.raises(DeviceError, match=r"driver 570\.1 \(CUDA 12\.8 at most\).*driver 580\.65\.06 or newer"):
        gpu.require_cuda("13.0", 0)


def test_a_cpu_build_of_torch_is_named_as_the_cause(card: FakeNvml) -> None:
    with pytest.raises(DeviceError, match=r"NVIDIA Test is there.*CPU build"):
        gpu.require_cuda(None, 0)


def test_a_hidden_card_is_named_as_the_cause(card: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(DeviceError, match="CUDA_VISIBLE_DEVICES=''"):
        gpu.require_cuda("13.0", 0)


def test_a_device_number_beyond_the_cards_is_refused(card: FakeNvml) -> None:
    gpu.require_cuda("13.0", 2, index=1)
    with pytest.raises(DeviceError, match="cuda:2 does not exist"):
        gpu.require_cuda("13.0", 2, index=2)


@pytest.mark.parametrize(
    ("build", "cuda", "usable"), [("13.0", 13000, True), ("12.8", 13000, True), ("13.0", 12080, False), (None, 13000, False)]
)
def test_a_card_is_usable_when_its_driver_runs_torchs_cuda(
    card: FakeNvml, monkeypatch: pytest.MonkeyPatch, build: str | None, cuda: int, usable: bool
) -> None:
    monkeypatch.setattr(gpu, "torch_build", lambda: build)
    card.answers["nvmlSystemGetCudaDriverVersion"] = cuda
    assert gpu.has_usable_gpu() is usable


def test_the_build_read_from_torchs_files_is_the_one_torch_reports() -> None:
    import torch

    assert gpu.torch_build() == torch.version.cuda


def test_a_cuda_build_is_read_from_its_version_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "version.py").write_text("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip = None\n")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert gpu.torch_build() == "13.0"


def test_host_memory_is_what_the_kernel_says() -> None:
    memory = gpu.host_memory()
    assert memory.kind == "cpu"
    assert 0 < memory.free_bytes <= memory.total_bytes


def test_a_control_groups_limit_counts_when_it_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_cgroup", {"memory.max": GIB, "memory.current": GIB // 4}.get)
    memory = gpu.host_memory()
    assert memory.total_bytes == GIB
    assert memory.free_bytes <= GIB - GIB // 4
