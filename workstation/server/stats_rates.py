"""Rates from counters, and spreads from recent observations: the small arithmetic behind `/stats`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from workstation.engine.request import EngineStats

WINDOW_SECONDS = 3.0
KEPT = 512


class Rates:
    """Counters' growth a second over the last three seconds. Fed with snapshots; a restart (counters fall) begins anew."""

    def __init__(self) -> None:
        self._seen: deque[EngineStats] = deque(maxlen=64)

    def feed(self, stats: EngineStats) -> None:
        """Take a snapshot that is newer than the last one."""
        if self._seen and stats.generated_tokens < self._seen[-1].generated_tokens:
            self._seen.clear()
        if self._seen and stats.time <= self._seen[-1].time:
            return
        self._seen.append(stats)
        while len(self._seen) > 2 and stats.time - self._seen[1].time >= WINDOW_SECONDS:
            self._seen.popleft()

    def of(self, name: str) -> float | None:
        """Growth a second of an EngineStats counter, None before there are two snapshots."""
        if len(self._seen) < 2:
            return None
        first, last = self._seen[0], self._seen[-1]
        grown: float = getattr(last, name) - getattr(first, name)
        return round(grown / (last.time - first.time), 2)


class Recent:
    """The newest observations of one kind."""

    def __init__(self, kept: int = KEPT) -> None:
        self._values: deque[float] = deque(maxlen=kept)
        self.add = self._values.append

    def quantiles(self, shares: Iterable[float]) -> list[float | None]:
        """Nearest-rank quantiles in seconds, None without an observation."""
        values = sorted(self._values)
        if not values:
            return [None for _ in shares]
        return [round(values[min(len(values) - 1, int(share * len(values)))], 5) for share in shares]
