"""MemoryLedger: what a start took of the GPU, part by part, to hold against the plan."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from workstation import gpu
from workstation.memory import MemoryPlan, gib

log = logging.getLogger("ws.engine")


class MemoryLedger:
    """Opened before CUDA is: what the cards hold then is others'.

    torch's own allocator says what tensors take; the card, what the driver takes beside them: for itself (context) and for
    captured steps (graphs, with the activations that these keep). What other processes take or give back meanwhile counts as
    the context's.

    Attributes:
        parts: bytes by name, as in the plan. Empty without a GPU; the context is left out where NVML does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.parts: dict[str, int] = {}
        self._device = device
        self._on = device.type == "cuda"
        self._before = gpu.used_bytes() if self._on else {}
        self._nodes = 0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What stays allocated of the work within; a second part of a name is added to the first."""
        before = self._allocated()
        yield
        self._add(name, self._allocated() - before)

    def move(self, source: str, target: str, count: int) -> None:
        """Bytes that were allocated with one part, and are another's in the plan."""
        self._add(source, -count)
        self._add(target, count)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Within: the largest step. The most that it holds beside what is there counts as workspace."""
        before = self._allocated()
        if self._on:
            torch.cuda.reset_peak_memory_stats(self._device)
        yield
        if self._on:
            self._add("workspace", torch.cuda.max_memory_allocated(self._device) - before)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Within: graphs are captured, and nothing else is kept."""
        used, reserved = self._taken()
        yield
        used_now, reserved_now = self._taken()
        self._add("graphs", used_now - used)
        self._nodes = used_now - used - (reserved_now - reserved)

    def close(self, plan: MemoryPlan) -> dict[str, int]:
        """The parts; the log gets a line that holds them against the plan."""
        if self._on:
            uuid = f"GPU-{torch.cuda.get_device_properties(self._device).uuid}"
            now = gpu.used_bytes()
            if uuid in self._before and uuid in now:
                self._add("context", now[uuid] - self._before[uuid] - torch.cuda.memory_reserved(self._device) - self._nodes)
            planned = plan.as_dict()
            log.info("memory, planned and measured: %s", "; ".join(
                f"{name} {gib(planned[name])}, {gib(count)}" for name, count in self.parts.items()))
        return self.parts

    def _add(self, name: str, count: int) -> None:
        if self._on:
            self.parts[name] = self.parts.get(name, 0) + count

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._on else 0

    def _taken(self) -> tuple[int, int]:
        """Bytes taken of the card by everybody, and those that torch keeps, spare ones given back."""
        if not self._on:
            return 0, 0
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free, torch.cuda.memory_reserved(self._device)
