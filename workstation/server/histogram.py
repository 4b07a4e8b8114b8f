"""A Prometheus histogram for one thread: an observation is one bisection, because every token brings one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class Histogram(Collector):
    """Counts of observations up to each bound. Not locked: observed and scraped on the event loop's thread.

    Args:
        labels: names and values, both fixed.  bounds: upper bounds, rising; +Inf follows by itself.
    """

    def __init__(self, name: str, text: str, labels: tuple[Sequence[str], Sequence[str]], bounds: Iterable[float]) -> None:
        self._name = name
        self._text = text
        self._labels = labels
        self._bounds = [float(bound) for bound in bounds]
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        names, values = self._labels
        buckets, total = [], 0
        for bound, count in zip([*self._bounds, float("inf")], self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
        family = HistogramMetricFamily(self._name, self._text, labels=list(names))
        family.add_metric(list(values), buckets, self._sum)
        yield family
