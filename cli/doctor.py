"""`ws doctor`: what a server needs, looked at one by one; each finding that matters comes with a cure."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import util
from pathlib import Path
from typing import Annotated, Literal

import typer

# Compiles and runs one kernel on the GPU, and compares it with the formula: RMSNorm of a row of equal values is 1.
KERNEL_CHECK = """
import torch
from workstation.kernels import ops
device = {device!r}
rows = torch.full((4, 256), 3.0, device=device, dtype=torch.bfloat16)
ones = torch.ones(256, device=device, dtype=torch.bfloat16)
assert (ops.rms_norm(rows, ones, 1e-6).float() - 1).abs().max().item() < 0.02
"""
KERNEL_SECONDS = 120
LOW_DISK_GIB, LOW_RAM_GIB = 20, 8


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `cure` is empty when nothing needs doing."""

    name: str
    state: Literal["ok", "warn", "fail"]
    says: str
    cure: str = ""


def command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Look at driver, CUDA, torch, Triton, memory, disk, port and proxy; exit code 1 when a server could not run here."""
    findings = [check() for check in CHECKS]
    if as_json:
        typer.echo(json.dumps([asdict(found) for found in findings], indent=2))
    else:
        for found in findings:
            typer.echo(f"{found.state:4}  {found.name:8}  {found.says}" + (f"\n{'':16}-> {found.cure}" if found.cure else ""))
    if any(found.state == "fail" for found in findings):
        raise typer.Exit(1)


def torch_check() -> Finding:
    from workstation import gpu

    if util.find_spec("torch") is None:
        return Finding("torch", "fail", "PyTorch is not installed", "install workstation-llm again: it brings torch")
    build = gpu.torch_build()
    return Finding("torch", "ok", f"installed, built for CUDA {build}" if build else "installed, a CPU build")


def driver_check() -> Finding:
    from workstation import gpu

    card = gpu.sample(0)
    if card is None:
        return Finding("driver", "warn", "no NVIDIA driver answers, so models run on the CPU only when told to",
                       "install NVIDIA's driver; in a container, start it with the GPUs (--gpus all)")  # fmt: skip
    cuda = f", CUDA {card.cuda[0]}.{card.cuda[1]} at most" if card.cuda else ""
    return Finding("driver", "ok", f"{gpu.count()} GPU(s), the first a {card.name}, driver {card.driver}{cuda}")


def cuda_check() -> Finding:
    from workstation import gpu
    from workstation.errors import DeviceError

    if gpu.sample(0) is None:
        return Finding("CUDA", "warn", "not looked at: no GPU")
    if gpu.has_usable_gpu():
        return Finding("CUDA", "ok", "the driver runs the CUDA that PyTorch is built for")
    try:
        gpu.require_cuda(gpu.torch_build(), 0)
    except DeviceError as error:
        return Finding("CUDA", "fail", error.message, "the sentence above names the version that is missing")
    return Finding("CUDA", "ok", "PyTorch can open the GPU")


def triton_check(device: str = "cuda") -> Finding:
    """Compile and run a kernel in a process of its own, so that a crash is a finding."""
    from workstation import gpu

    if util.find_spec("triton") is None:
        return Finding("Triton", "fail", "Triton is not installed", "install a CUDA build of torch, which brings it")
    if device == "cuda" and not gpu.has_usable_gpu():
        return Finding("Triton", "warn", "installed; not tried: no usable GPU")
    try:
        done = subprocess.run([sys.executable, "-c", KERNEL_CHECK.format(device=device)], capture_output=True, text=True,
                              timeout=KERNEL_SECONDS, check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return Finding("Triton", "fail", f"a kernel was not ready after {KERNEL_SECONDS} s", "is the disk of ~/.triton slow?")
    if done.returncode == 0:
        return Finding("Triton", "ok", "a kernel was compiled, ran, and computed what it should")
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Finding("Triton", "fail", f"a kernel failed: {last[:200]}",
                   "a C compiler (gcc) and Python's headers must be installed; then empty ~/.triton/cache")  # fmt: skip


def memory_check() -> Finding:
    from workstation import gpu
    from workstation.memory import GIB, gib

    card, host = gpu.sample(0), gpu.host_memory()
    text = f"{gib(host.free_bytes)} of {gib(host.total_bytes)} RAM free"
    if card is not None and card.total_bytes and card.free_bytes is not None:
        text = f"{gib(card.free_bytes)} of {gib(card.total_bytes)} GPU memory free, " + text
        if card.free_bytes < card.total_bytes // 2:
            return Finding("memory", "warn", text, "another program holds the GPU: `nvidia-smi` names it")
    if host.free_bytes < LOW_RAM_GIB * GIB:
        return Finding("memory", "warn", text, f"loading wants {LOW_RAM_GIB} GiB of RAM free; end another program")
    return Finding("memory", "ok", text)


def disk_check(environment: Mapping[str, str] = os.environ) -> Finding:
    from workstation.hub import hub_cache
    from workstation.memory import GIB, gib

    place = hub_cache(environment)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        return Finding("disk", "fail", f"downloads go to {place}, which cannot be written to",
                       "set HF_HUB_CACHE to a folder of yours")  # fmt: skip
    if free < LOW_DISK_GIB * GIB:
        return Finding("disk", "warn", f"{gib(free)} free for downloads in {place}",
                       "delete models with `ws rm`, or set HF_HUB_CACHE to a larger disk")  # fmt: skip
    return Finding("disk", "ok", f"{gib(free)} free for downloads in {place}")


def port_check(port: int = 8000) -> Finding:
    from workstation.runtime import servers

    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            ours = [server for server in servers() if server.port == port]
            if ours:
                return Finding("port", "ok", f"{port} is held by ws itself, serving {ours[0].model}")
            return Finding("port", "warn", f"{port} is taken by another program", "give `ws serve` another --port")
    return Finding("port", "ok", f"{port} is free")


def proxy_check(environment: Mapping[str, str] = os.environ) -> Finding:
    """A proxy that also catches loopback makes every local client fail, and looks like a broken server."""
    names = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
    proxy = next((name for name in names if environment.get(name)), None)
    if proxy is None:
        return Finding("proxy", "ok", "none is set")
    excepted = {part.strip().lower() for name in ("no_proxy", "NO_PROXY") for part in environment.get(name, "").split(",")}
    if "*" in excepted or {"localhost", "127.0.0.1"} <= excepted:
        return Finding("proxy", "ok", f"{proxy} is set, and loopback is excepted")
    return Finding("proxy", "warn", f"{proxy} is set and catches loopback as well",
                   "export NO_PROXY=localhost,127.0.0.1 for clients of this server")  # fmt: skip


def catalogue_check() -> Finding:
    from workstation.catalog import catalogue_files, load_catalogue
    from workstation.errors import ConfigError

    try:
        count = len(load_catalogue())
    except ConfigError as error:
        return Finding("models", "fail", error.message, "correct that line, or move the file away")
    return Finding("models", "ok", f"{count} names from {' and '.join(str(Path(path)) for path in catalogue_files())}")


CHECKS: tuple[Callable[[], Finding], ...] = (
    torch_check, driver_check, cuda_check, triton_check, memory_check, disk_check, port_check, proxy_check, catalogue_check,
)  # fmt: skip
