"""The engine's card for frames and metrics: read once a second at most, off the event loop; joules a token from its counter."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from workstation import gpu_live
from workstation.engine.client import EngineClient
from workstation.gpu import GpuSample
from workstation.gpu_live import GpuLive
from workstation.server.stats import CardStats, GpuAnswer, GpuProcessStats, GpuStats

PERIOD = 1.0
ENERGY_WINDOW = 10.0
ENERGY_FORGOTTEN = 60.0


class Energy:
    """Joules a generated token over the last ten seconds, or since the last reading where readings come more rarely."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float, int]] = deque()  # (when, joules, tokens), the first just outside the window

    def feed(self, now: float, joules: float | None, tokens: int) -> float | None:
        """None without a counter, while idle, and before there are two readings."""
        if joules is None:
            return None
        if self._seen and (tokens < self._seen[-1][2] or now - self._seen[-1][0] > ENERGY_FORGOTTEN):
            self._seen.clear()  # the engine was restarted, or nobody asked for long
        self._seen.append((now, joules, tokens))
        while len(self._seen) > 2 and now - self._seen[1][0] >= ENERGY_WINDOW:
            self._seen.popleft()
        _, began, before = self._seen[0]
        return round((joules - began) / (tokens - before), 3) if tokens > before else None


class Card:
    """One for a server; nothing is read while nobody asks."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._energy = Energy()
        self._read = -PERIOD
        self._gpu: GpuStats | None = None
        self._others: list[CardStats] = []
        self._processes: list[GpuProcessStats] = []

    @property
    def in_use(self) -> bool:
        return self._engine.info.device.startswith("cuda")

    async def stats(self) -> tuple[GpuStats | None, list[CardStats]]:
        """NVML's reading of the engine's card, and of all cards; None and nothing without a card in use."""
        if not self.in_use:
            return None, []
        now = time.monotonic()
        if now - self._read >= PERIOD:
            self._read = now
            reading, cards = await asyncio.to_thread(_readings, self._engine.info.device_uuid)
            self._take(reading, cards, now)
        return self._gpu, self._others

    async def answer(self, version: int) -> GpuAnswer:
        """All cards and who is on the engine's."""
        _, cards = await self.stats()
        return GpuAnswer(version, cards, self._processes if self.in_use else [])

    def joules_per_token(self) -> float | None:
        """For a scrape: one quick query of the energy counter."""
        if not self.in_use:
            return None
        return self._joules(time.monotonic(), gpu_live.energy(self._engine.info.device_uuid))

    def _joules(self, now: float, energy: float | None) -> float | None:
        """Tokens come from the engine's beats alone: pictures are newer, and two clocks would make tokens seem to go back."""
        return self._energy.feed(now, energy, self._engine.stats().generated_tokens)

    def _take(self, reading: GpuLive | None, cards: list[GpuSample], now: float) -> None:
        uuid = self._engine.info.device_uuid
        self._others = [CardStats(card.index, card.name, card.total_bytes, card.used_bytes, card.utilization, card.uuid == uuid)
                        for card in cards]
        if reading is None:
            self._gpu, self._processes = None, []
            return
        own = getattr(self._engine, "pid", None)
        self._processes = [GpuProcessStats(row.pid, row.user, row.command, row.bytes, row.pid == own)
                           for row in reading.processes]
        card = reading.sample
        self._gpu = GpuStats(
            card.name, card.total_bytes, card.used_bytes, card.utilization, card.power_watts, card.power_limit_watts,
            card.temperature_celsius, self._joules(now, card.energy_joules), card.uuid,
            reading.memory_utilization, reading.fan, reading.clock_mhz, reading.memory_clock_mhz, reading.throttle,
            reading.pcie_read, reading.pcie_write, next((row.bytes for row in self._processes if row.own), None))


def _readings(uuid: str) -> tuple[GpuLive | None, list[GpuSample]]:
    return gpu_live.live(uuid), gpu_live.samples()
