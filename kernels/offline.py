"""Compiling Triton kernels for a GPU that is not here: to check what a configuration needs, and to fill the kernel cache.

Triton asks its driver for the target only; a driver that knows nothing but a target is enough to compile. The result
lands in Triton's cache under the key that a launch on such a GPU looks up.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

RESERVED = 1024  # bytes of shared memory that the system takes of each program, from compute capability 9.0 on


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers and stack bytes (spills) a thread, shared memory bytes a program, Triton's and
    those that assembly allots."""

    registers: int
    stack: int
    shared: int


class _Target:
    """As much of a Triton driver as the compiler asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels remember what they compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def targeting(capability: int) -> Iterator[None]:
    """Within: `kernel.warmup(...)` compiles for this compute capability (90 for 9.0), and nothing can be launched."""
    before = driver._active
    driver.set_active(_Target(capability))
    try:
        yield
    finally:
        driver._active = before


def resources(compiled: Any) -> Resources:
    """Read off the machine code by cuobjdump, which Triton brings along. RuntimeError if it says nothing."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=False).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", report)
    if not found:
        raise RuntimeError(f"cuobjdump gave no resource usage: {report[:500]!r}")
    system = RESERVED if compiled.metadata.target.arch >= 90 else 0
    return Resources(int(found[1]), int(found[2]), int(compiled.metadata.shared) + max(0, int(found[3]) - system))
