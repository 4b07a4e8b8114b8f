"""What vLLM exports besides: figures of things this server has in another form or never does, for dashboards made for vLLM."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from workstation.engine.client import EngineClient

_NEVER = ("external_prefix_cache_queries", "external_prefix_cache_hits", "mm_cache_queries", "mm_cache_hits")


class VllmExtras(Collector):
    """Args:
        labels: (names, values) of every series.
    """

    def __init__(self, engine: EngineClient, labels: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
        self._engine = engine
        self._names, self._values = labels

    def collect(self) -> Iterator[Metric]:
        stats, health = self._engine.stats(), self._engine.health()
        used = stats.blocks_held / stats.blocks_total if stats.blocks_total else 0.0
        computed = stats.prompt_tokens - stats.cached_tokens
        yield self._gauge("gpu_cache_usage_perc", "The old name of kv_cache_usage_perc.", "", {"": used})
        yield self._gauge("num_requests_waiting_by_reason", "Requests in the queue, by why.", "reason",
                          {"capacity": stats.waiting, "deferred": 0})
        yield self._gauge("engine_sleep_state", "1 for the state the engine is in; this one never sleeps.", "sleep_state",
                          {"awake": int(health.state == "ready"), "weights_offloaded": 0, "discard_all": 0})
        yield self._counter("prompt_tokens_by_source", "Prompt tokens, by where their keys and values came from.", "source",
                            {"local_compute": computed, "local_cache_hit": stats.cached_tokens, "external_kv_transfer": 0})
        yield self._counter("prompt_tokens_cached_by_source", "Cached prompt tokens, by where they lay.", "source",
                            {"device": stats.cached_tokens, "host": 0, "disk": 0, "p2p": 0, "external_unspecified": 0})
        for name in _NEVER:
            yield self._counter(name, "Always 0: there is no such cache.", "", {"": 0})

    def _gauge(self, name: str, text: str, label: str, values: dict[str, float]) -> Metric:
        return self._fill(GaugeMetricFamily(f"vllm:{name}", text, labels=self._labelled(label)), label, values)

    def _counter(self, name: str, text: str, label: str, values: dict[str, float]) -> Metric:
        return self._fill(CounterMetricFamily(f"vllm:{name}", text, labels=self._labelled(label)), label, values)

    def _labelled(self, label: str) -> tuple[str, ...]:
        return (*self._names, label) if label else self._names

    def _fill(self, family: GaugeMetricFamily | CounterMetricFamily, label: str, values: dict[str, float]) -> Metric:
        for value, number in values.items():
            family.add_metric((*self._values, value) if label else self._values, number)
        return family
