"""What NVML says about cards while they work: load, clocks, throttling, PCIe, and who else is on them. No torch.

A query that the card, the driver or the container does not allow is None, and the rest stays.
"""

from __future__ import annotations

import pwd
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workstation import gpu
from workstation.gpu import GpuSample

# NVML's bits for why clocks are below what they could be; being idle and application clocks are no throttling.
THROTTLE_REASONS = {
    0x4: "power cap", 0x8: "hardware slowdown", 0x10: "sync boost", 0x20: "thermal (software)", 0x40: "thermal (hardware)",
    0x80: "power brake",
}  # fmt: skip
KILOBYTE = 1024


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process on a card. user, command: None where the system hides them.  bytes: None where NVML does."""

    pid: int
    user: str | None
    command: str | None
    bytes: int | None


@dataclass(frozen=True, slots=True)
class GpuLive:
    """One reading of one card at work.

    Attributes:
        memory_utilization: share of time in which memory was read or written, 0…1.  fan: 0…1.
        clock_mhz: of the multiprocessors.  throttle: why clocks are lowered, "" when they are not.
        pcie_read, pcie_write: bytes a second into and out of the card.  processes: who is on it.
    """

    sample: GpuSample
    memory_utilization: float | None
    fan: float | None
    clock_mhz: int | None
    memory_clock_mhz: int | None
    throttle: str | None
    pcie_read: float | None
    pcie_write: float | None
    processes: tuple[GpuProcess, ...]


def live(uuid: str) -> GpuLive | None:
    """Read the card with this UUID (CUDA's and NVML's numbers may differ); about 40 ms for PCIe. None when it is not there."""
    nvml = gpu._library()
    handle = None if nvml is None else gpu._read(nvml.nvmlDeviceGetHandleByUUID, uuid)
    sample = None if handle is None else gpu.sample(uuid=uuid)
    if nvml is None or sample is None:
        return None
    read = gpu._read
    rates = read(nvml.nvmlDeviceGetUtilizationRates, handle)
    memory = None if rates is None else getattr(rates, "memory", None)
    fan = read(nvml.nvmlDeviceGetFanSpeed, handle)
    return GpuLive(
        sample=sample, memory_utilization=None if memory is None else memory / 100.0, fan=None if fan is None else fan / 100.0,
        clock_mhz=_clock(nvml, handle, "NVML_CLOCK_SM"), memory_clock_mhz=_clock(nvml, handle, "NVML_CLOCK_MEM"),
        throttle=_throttle(read(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)),
        pcie_read=_pcie(nvml, handle, "NVML_PCIE_UTIL_RX_BYTES"), pcie_write=_pcie(nvml, handle, "NVML_PCIE_UTIL_TX_BYTES"),
        processes=_processes(nvml, handle))


def samples() -> list[GpuSample]:
    """Every card NVML sees, in its order."""
    found = (gpu.sample(index) for index in range(gpu.count()))
    return [sample for sample in found if sample is not None]


def energy(uuid: str) -> float | None:
    """Joules the card has used since its driver was loaded: one quick query. None where it does not count."""
    nvml = gpu._library()
    handle = None if nvml is None else gpu._read(nvml.nvmlDeviceGetHandleByUUID, uuid)
    if nvml is None or handle is None:
        return None
    return gpu._scaled(gpu._read(nvml.nvmlDeviceGetTotalEnergyConsumption, handle), 1e-3)


def _clock(nvml: Any, handle: Any, kind: str) -> int | None:
    value = gpu._read(lambda: nvml.nvmlDeviceGetClockInfo(handle, getattr(nvml, kind)))
    return None if value is None else int(value)


def _pcie(nvml: Any, handle: Any, kind: str) -> float | None:
    """NVML counts KB/s over 20 ms."""
    value = gpu._read(lambda: nvml.nvmlDeviceGetPcieThroughput(handle, getattr(nvml, kind)))
    return None if value is None else float(value) * KILOBYTE


def _throttle(bits: int | None) -> str | None:
    if bits is None:
        return None
    return ", ".join(name for bit, name in THROTTLE_REASONS.items() if bits & bit)


def _processes(nvml: Any, handle: Any) -> tuple[GpuProcess, ...]:
    """Computing and drawing ones, largest first, each once."""
    found: dict[int, int | None] = {}
    for query in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
        for process in gpu._read(lambda name=query: getattr(nvml, name)(handle)) or ():
            found[int(process.pid)] = None if process.usedGpuMemory is None else int(process.usedGpuMemory)
    rows = [GpuProcess(pid, _user(pid), _command(pid), size) for pid, size in found.items()]
    return tuple(sorted(rows, key=lambda row: -(row.bytes or 0)))


def _user(pid: int) -> str | None:
    try:
        return pwd.getpwuid(Path(f"/proc/{pid}").stat().st_uid).pw_name
    except (OSError, KeyError):
        return None


def _command(pid: int) -> str | None:
    """The command's name; its arguments may hold keys."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() or None
    except OSError:
        return None
