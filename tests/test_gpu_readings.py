"""NVML's readings, and the sentence for a card that is there and cannot be used."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import FakeEngine, api_client, served_model, write_byte_level_folder

from workstation import gpu, gpu_live
from workstation.engine.request import EngineInfo, EngineStats
from workstation.errors import DeviceError
from workstation.memory import GIB
from workstation.server import card as server_card
from workstation.server.app import create_app
from workstation.server.card import Energy


class FakeNvml:
    """One card. Queries named in `broken` fail as NVML's binding fails: with an exception."""

    NVML_TEMPERATURE_GPU = NVML_PCIE_UTIL_TX_BYTES = 0
    NVML_PCIE_UTIL_RX_BYTES = NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2

    def __init__(self, cuda: int = 13000, broken: frozenset[str] = frozenset()) -> None:
        self.broken = broken
        self.answers: dict[str, Any] = {
            "nvmlDeviceGetCount": 1, "nvmlDeviceGetHandleByIndex": "card", "nvmlDeviceGetHandleByUUID": "card",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=96 * GIB, used=6 * GIB, free=90 * GIB),
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=37, memory=21), "nvmlSystemGetCudaDriverVersion": cuda,
            "nvmlDeviceGetDisplayActive": 1, "nvmlDeviceGetIndex": 0, "nvmlDeviceGetName": b"NVIDIA Test",
            "nvmlDeviceGetUUID": "GPU-1", "nvmlSystemGetDriverVersion": "570.1", "nvmlDeviceGetPowerUsage": 250_000,
            "nvmlDeviceGetEnforcedPowerLimit": 600_000, "nvmlDeviceGetTotalEnergyConsumption": 5000,
            "nvmlDeviceGetTemperature": 61, "nvmlDeviceGetCudaComputeCapability": (9, 0),
            "nvmlDeviceGetFanSpeed": 40, "nvmlDeviceGetCurrentClocksThrottleReasons": 0x4 | 0x1,
            "nvmlDeviceGetClockInfo": lambda card, kind: {1: 1755, 2: 2619}[kind],
            "nvmlDeviceGetPcieThroughput": lambda card, kind: {0: 1, 1: 2}[kind],
            "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=os.getpid(), usedGpuMemory=GIB)],
            "nvmlDeviceGetGraphicsRunningProcesses": [SimpleNamespace(pid=2**22 + 5, usedGpuMemory=None)],
        }  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        def query(*arguments: Any) -> Any:
            if name in self.broken:
                raise RuntimeError("Not Supported")
            answer = self.answers[name]
            return answer(*arguments) if callable(answer) else answer

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


def test_what_is_taken_of_each_card_is_told_by_its_uuid(card: FakeNvml) -> None:
    assert gpu.used_bytes() == {"GPU-1": 6 * GIB}
    card.broken = frozenset({"nvmlDeviceGetMemoryInfo"})
    assert gpu.used_bytes() == {}


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


def test_a_live_reading_holds_load_clocks_pcie_and_who_is_on_the_card(card: FakeNvml) -> None:
    reading = gpu_live.live("GPU-1")
    assert reading is not None
    assert (reading.memory_utilization, reading.fan, reading.clock_mhz, reading.memory_clock_mhz) == (0.21, 0.4, 1755, 2619)
    assert (reading.throttle, reading.pcie_read, reading.pcie_write) == ("power cap", 2048.0, 1024.0)
    mine, other = sorted(reading.processes, key=lambda row: row.pid != os.getpid())
    assert mine.bytes == GIB and mine.user and mine.command
    assert (other.pid, other.user, other.command, other.bytes) == (2**22 + 5, None, None, None)


LIVE_QUERIES = ["nvmlDeviceGetUtilizationRates", "nvmlDeviceGetFanSpeed", "nvmlDeviceGetClockInfo",
                "nvmlDeviceGetPcieThroughput", "nvmlDeviceGetCurrentClocksThrottleReasons",
                "nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"]


@pytest.mark.parametrize("query", LIVE_QUERIES)
def test_a_live_query_that_fails_leaves_the_others(card: FakeNvml, query: str) -> None:
    whole = gpu_live.live("GPU-1")
    card.broken = frozenset({query})
    part = gpu_live.live("GPU-1")
    assert whole is not None and part is not None and part != whole and part.sample.name == "NVIDIA Test"


def test_a_card_without_throttling_says_so_and_one_that_tells_nothing_does_not(card: FakeNvml) -> None:
    card.answers["nvmlDeviceGetCurrentClocksThrottleReasons"] = 1  # idle
    assert getattr(gpu_live.live("GPU-1"), "throttle", None) == ""
    card.broken = frozenset({"nvmlDeviceGetCurrentClocksThrottleReasons"})
    assert getattr(gpu_live.live("GPU-1"), "throttle", "") is None


def test_a_card_that_was_lost_is_none(card: FakeNvml) -> None:
    card.broken = frozenset({"nvmlDeviceGetHandleByUUID"})
    assert gpu_live.live("GPU-1") is None and gpu_live.energy("GPU-1") is None


def test_every_card_of_the_machine_is_listed(card: FakeNvml) -> None:
    card.answers["nvmlDeviceGetCount"] = 3
    assert len(gpu_live.samples()) == 3


def test_joules_a_token_are_energy_over_tokens_of_the_last_ten_seconds() -> None:
    energy = Energy()
    assert energy.feed(0.0, 1000.0, 0) is None
    assert energy.feed(1.0, 1300.0, 100) == 3.0
    for second in range(2, 30):
        last = energy.feed(float(second), 1300.0 + 50 * (second - 1), 100 + 100 * (second - 1))
    assert last == 0.5


def test_an_idle_card_an_old_reading_and_a_restart_give_no_joules() -> None:
    energy = Energy()
    energy.feed(0.0, 1000.0, 10)
    assert energy.feed(1.0, 1100.0, 10) is None
    assert energy.feed(2.0, 1200.0, 4) is None
    assert energy.feed(500.0, 9000.0, 40) is None
    assert energy.feed(501.0, None, 40) is None


class EngineOnTheCard(FakeEngine):
    """Says that it runs on the fake's card; 100 tokens more each time it is asked."""

    made = 0

    @property
    def info(self) -> EngineInfo:
        return replace(super().info, device="cuda:1", device_uuid="GPU-1")

    def stats(self) -> EngineStats:
        self.made += 100
        return replace(super().stats(), generated_tokens=self.made)


def test_a_frame_the_gpu_page_and_the_metrics_hold_the_engines_card_found_by_uuid(
    card: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_card, "PERIOD", 0.0)
    app = create_app(EngineOnTheCard(), served_model(write_byte_level_folder(tmp_path)))

    async def main() -> tuple[Any, Any, str]:
        async with api_client(app) as client:
            await client.get("/stats")
            card.answers["nvmlDeviceGetTotalEnergyConsumption"] += 40_000
            return ((await client.get("/stats")).json(), (await client.get("/stats/gpu")).json(),
                    (await client.get("/metrics")).text)

    frame, page, metrics = asyncio.run(main())
    assert (frame["gpu"]["uuid"], frame["gpu"]["clock_mhz"], frame["gpu"]["throttle"]) == ("GPU-1", 1755, "power cap")
    assert 0 < frame["gpu"]["joules_per_token"] <= 0.4
    assert frame["cards"] == page["cards"] and frame["cards"][0]["own"] is True
    assert {row["pid"] for row in page["processes"]} == {os.getpid(), 2**22 + 5}
    assert 'ws:joules_per_token{engine="0",model_name="fake"} 0.' in metrics


def test_without_a_card_in_use_the_gpu_page_is_empty(tmp_path: Path) -> None:
    app = create_app(FakeEngine(), served_model(write_byte_level_folder(tmp_path)))

    async def main() -> Any:
        async with api_client(app) as client:
            return (await client.get("/stats/gpu")).json(), (await client.get("/metrics")).text

    page, metrics = asyncio.run(main())
    assert page == {"version": 1, "cards": [], "processes": []} and "joules" not in metrics
