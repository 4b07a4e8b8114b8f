"""What NVML and the kernel say about the machine: readings or None, never an exception, never torch.

NVML knows cards that PyTorch cannot use (a driver too old, a CPU build, a hidden device): `require_cuda` turns that
difference into one sentence with the cure.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workstation.errors import DeviceError
from workstation.memory import DeviceMemory

# First Linux driver of each CUDA major release; later minor releases run on it too (NVIDIA, "CUDA Compatibility").
FIRST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One reading of one card. A value NVML does not offer here (MIG, unified memory, laptops) is None.

    Attributes:
        index: NVML's.  uuid: as in CUDA_VISIBLE_DEVICES.  driver: such as "580.65.06".  cuda: newest the driver runs.
        total_bytes, used_bytes, free_bytes: NVML's view (CUDA sees a little less).  utilization: 0…1.
        energy_joules: since the driver was loaded.  display: a screen hangs on the card.
        compute_capability: such as (9, 0).
    """

    index: int
    name: str
    uuid: str
    driver: str
    cuda: tuple[int, int] | None
    compute_capability: tuple[int, int] | None
    total_bytes: int | None
    used_bytes: int | None
    free_bytes: int | None
    utilization: float | None
    power_watts: float | None
    power_limit_watts: float | None
    energy_joules: float | None
    temperature_celsius: float | None
    display: bool | None


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _read(query: Callable[..., Any], *arguments: Any) -> Any:
    """The query's answer, or None when NVML has none. NVML's Python binding raises one class for every failure."""
    try:
        return query(*arguments)
    except Exception:  # NVMLError, and AttributeError of an older library
        return None


def _scaled(value: Any, factor: float) -> float | None:
    return None if value is None else float(value) * factor


def _library() -> Any | None:
    """pynvml after nvmlInit (which counts references, so calling it again is cheap), or None without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return None
    return pynvml


def count() -> int:
    """Cards NVML sees; 0 without a driver."""
    nvml = _library()
    return 0 if nvml is None else int(_read(nvml.nvmlDeviceGetCount) or 0)


def sample(index: int = 0, *, uuid: str | None = None) -> GpuSample | None:
    """Read one card, by NVML index or by UUID (CUDA may number cards differently). None when there is none."""
    nvml = _library()
    if nvml is None:
        return None
    if uuid is not None:
        handle = _read(nvml.nvmlDeviceGetHandleByUUID, uuid)
    else:
        handle = _read(nvml.nvmlDeviceGetHandleByIndex, index)
    if handle is None:
        return None
    return _sample(nvml, handle, index)


def used_bytes() -> dict[str, int]:
    """What is taken of each card by everybody, by UUID; nothing for a card that does not tell, or without a driver."""
    found = (sample(index) for index in range(count()))
    return {card.uuid: card.used_bytes for card in found if card is not None and card.used_bytes is not None}


def _sample(nvml: Any, handle: Any, index: int) -> GpuSample:
    memory = _read(nvml.nvmlDeviceGetMemoryInfo, handle)
    rates = _read(nvml.nvmlDeviceGetUtilizationRates, handle)
    cuda = _read(nvml.nvmlSystemGetCudaDriverVersion)
    display = _read(nvml.nvmlDeviceGetDisplayActive, handle)
    found = _read(nvml.nvmlDeviceGetIndex, handle)
    return GpuSample(
        index=index if found is None else int(found),
        name=_text(_read(nvml.nvmlDeviceGetName, handle) or "NVIDIA GPU"),
        uuid=_text(_read(nvml.nvmlDeviceGetUUID, handle) or ""),
        driver=_text(_read(nvml.nvmlSystemGetDriverVersion) or ""),
        cuda=None if not cuda else (cuda // 1000, cuda % 1000 // 10),
        compute_capability=_read(nvml.nvmlDeviceGetCudaComputeCapability, handle),
        total_bytes=None if memory is None else int(memory.total),
        used_bytes=None if memory is None else int(memory.used),
        free_bytes=None if memory is None else int(memory.free),
        utilization=None if rates is None else rates.gpu / 100.0,
        power_watts=_scaled(_read(nvml.nvmlDeviceGetPowerUsage, handle), 1e-3),
        power_limit_watts=_scaled(_read(nvml.nvmlDeviceGetEnforcedPowerLimit, handle), 1e-3),
        energy_joules=_scaled(_read(nvml.nvmlDeviceGetTotalEnergyConsumption, handle), 1e-3),
        temperature_celsius=_scaled(_read(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU), 1.0),
        display=None if display is None else bool(display),
    )


def require_cuda(torch_cuda: str | None, torch_devices: int, *, index: int = 0) -> None:
    """Refuse a GPU that cannot be used, naming the cure.

    Args:
        torch_cuda: torch.version.cuda, None for a CPU build.  torch_devices: what PyTorch counts, 0 when CUDA failed.
        index: the CUDA device wanted.
    Raises:
        DeviceError
    """
    if torch_cuda is not None and index < torch_devices:
        return
    card = sample(0)
    if torch_cuda is not None and torch_devices > 0:
        raise DeviceError(
            f"--device cuda:{index} does not exist: PyTorch sees {torch_devices} GPU(s), numbered from 0",
            param="device",
        )
    if card is None:
        raise DeviceError(
            "no NVIDIA GPU was found (no driver answers); use --device cpu, or `ws serve demo`, which runs without one",
            param="device",
        )
    raise DeviceError(_why_unusable(card, torch_cuda), param="device")


def _why_unusable(card: GpuSample, torch_cuda: str | None) -> str:
    newest = f"CUDA {card.cuda[0]}.{card.cuda[1]}" if card.cuda else "an unknown CUDA version"
    seen = f"{card.name} is there, with driver {card.driver} ({newest} at most)"
    if torch_cuda is None:
        return f"{seen}, but the PyTorch installed here is a CPU build; install a CUDA build of torch for that driver"
    major = int(torch_cuda.split(".")[0])
    if card.cuda is not None and card.cuda[0] < major:
        needed = FIRST_DRIVER.get(major)
        cure = f"driver {needed} or newer" if needed else "a newer driver"
        return f"{seen}, but this PyTorch is built for CUDA {torch_cuda}: it needs {cure}, or torch for {newest}"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        hidden = os.environ["CUDA_VISIBLE_DEVICES"]
        return f"{seen}, but CUDA_VISIBLE_DEVICES={hidden!r} hides it from PyTorch"
    return f"{seen}, but PyTorch (CUDA {torch_cuda}) cannot open it; `nvidia-smi` and the kernel log may say why"


def torch_build() -> str | None:
    """The CUDA release the installed PyTorch is built for, such as "13.0"; None for a CPU build. Does not import it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text()
    except OSError:
        return None
    found = re.search(r"^cuda(?:: [^=]+)? = ['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def has_usable_gpu() -> bool:
    """Whether PyTorch will probably be able to use a card: NVML sees one and its driver runs PyTorch's CUDA."""
    build, card = torch_build(), sample(0)
    if build is None or card is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return card.cuda is None or card.cuda[0] >= int(build.split(".")[0])


def host_memory() -> DeviceMemory:
    """RAM this process may use, in bytes: the machine's, or its control group's when that is smaller."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _available() or total
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and limit < total:
        total, free = limit, min(free, limit - (used or 0))
    return DeviceMemory("cpu", total_bytes=total, free_bytes=max(free, 0))


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup(name: str) -> int | None:
    try:
        text = (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
