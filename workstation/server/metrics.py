"""Prometheus metrics under vLLM's names, with the prefix `ws:` or vLLM's own; every label's values are a closed set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from workstation.engine.client import EngineClient
from workstation.engine.request import STEP_TOKEN_BOUNDS, EngineRequest, EngineStats, TokenEvent
from workstation.errors import EngineDeadError, InvalidRequestError, OverloadedError, WorkstationError
from workstation.server.card import Card
from workstation.server.histogram import Histogram
from workstation.server.job import Job
from workstation.server.metrics_vllm import VllmExtras
from workstation.server.stats_rates import Recent

LABELS = ("model_name", "engine")
TTFT_BUCKETS = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
ITL_BUCKETS = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LATENCY_BUCKETS = (.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
COUNT_BUCKETS = (1, 2, 5, 10, 20)
FINISH_REASONS = ("stop", "length", "abort", "error")
OURS = ("engine_restarts", "engine_heartbeat_age_seconds", "joules_per_token")  # vLLM has nothing like them
Prefix = Literal["ws", "vllm"]
REJECTIONS = ("invalid", "overloaded", "engine_dead", "other")


def _token_buckets(window: int) -> list[float]:
    """1, 2, 5, 10, 20, 50 … up to the window."""
    values = [mantissa * 10**power for power in range(8) for mantissa in (1, 2, 5)]
    return [value for value in values if value <= max(window, 1)]


class Metrics:
    """The server's own registry: histograms and counters of requests, and the engine's snapshot read at scrape time.

    prefix: "ws" or "vllm". With the second everything that vLLM exports has vLLM's name and labels, and the rest keeps ours.
    """

    def __init__(self, engine: EngineClient, model_name: str, window: int, card: Card | None = None, *,
                 prefix: Prefix = "ws") -> None:
        self.registry = CollectorRegistry()
        labels = (model_name, "0")
        tokens = _token_buckets(window)

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            made = Histogram(f"{prefix}:{name}", text, (LABELS, labels), buckets)
            self.registry.register(made)
            return made

        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS)
        self._itl = histogram("inter_token_latency_seconds", "Between two token events of a sample.", ITL_BUCKETS)
        self._tpot = histogram("request_time_per_output_token_seconds", "Mean time a token after the first.", ITL_BUCKETS)
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", LATENCY_BUCKETS)
        self._queue = histogram("request_queue_time_seconds", "Arrival to first scheduling.", LATENCY_BUCKETS)
        self._inference = histogram("request_inference_time_seconds", "First scheduling to last token.", LATENCY_BUCKETS)
        self._prefill = histogram("request_prefill_time_seconds", "First scheduling to first token.", LATENCY_BUCKETS)
        self._decode = histogram("request_decode_time_seconds", "First token to last token.", LATENCY_BUCKETS)
        self._prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", tokens)
        self._output = histogram("request_generation_tokens", "Tokens generated for a request.", tokens)
        self._longest = histogram("request_max_num_generation_tokens", "Tokens of a request's longest sample.", tokens)
        self._max_tokens = histogram("request_params_max_tokens", "max_tokens asked for.", tokens)
        self._n = histogram("request_params_n", "n asked for.", COUNT_BUCKETS)
        self._preemptions = histogram("request_num_preemptions", "Preemptions of a request.", (0, *COUNT_BUCKETS))
        self._computed = histogram("request_prefill_kv_computed_tokens", "Prompt tokens not read from the cache.", tokens)
        success = Counter(f"{prefix}:request_success", "Requests that ended, by how.", (*LABELS, "finished_reason"),
                          registry=self.registry)
        rejections = Counter("ws:admission_rejections", "Requests refused, by why.", (*LABELS, "reason"),
                             registry=self.registry)
        self._ended = {reason: success.labels(*labels, reason) for reason in FINISH_REASONS}
        self._rejected = {reason: rejections.labels(*labels, reason) for reason in REJECTIONS}
        self._queue_full: Counter | None = None
        if prefix == "vllm":
            success.labels(*labels, "repetition")
            refused = Counter("vllm:admission_rejections", "Requests refused, by why.", ("model_name", "reason"),
                              registry=self.registry)
            refused.labels(model_name, "max_num_queued_tokens")
            self._queue_full = refused.labels(model_name, "max_num_queued_reqs")
            self.registry.register(VllmExtras(engine, (LABELS, labels)))
        self.ttft, self.itl, self.e2e = Recent(), Recent(4096), Recent()  # the dashboard's spreads
        self.registry.register(_EngineCollector(engine, labels, card or Card(engine), prefix))

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def reject(self, error: WorkstationError) -> None:
        kinds = ((InvalidRequestError, "invalid"), (OverloadedError, "overloaded"), (EngineDeadError, "engine_dead"))
        self._rejected[next((name for kind, name in kinds if isinstance(error, kind)), "other")].inc()
        if self._queue_full is not None and isinstance(error, OverloadedError):
            self._queue_full.inc()

    def first_token(self, request: EngineRequest, event: TokenEvent, now: float) -> None:
        """Record a request's first event."""
        self._ttft.observe(now - request.arrival)
        self.ttft.add(now - request.arrival)
        self._computed.observe(len(request.prompt_token_ids) - event.num_cached_tokens)

    def gap(self, seconds: float) -> None:
        """Record the time between two events of a sample."""
        self._itl.observe(seconds)
        self.itl.add(seconds)

    def last_token(self, event: TokenEvent) -> None:
        """Record what a request's last event says about its way through the engine."""
        self._preemptions.observe(event.num_preemptions)
        times = event.times
        if times is None or not times.scheduled or not times.finished:
            return
        self._queue.observe(times.scheduled - times.arrival)
        self._inference.observe(times.finished - times.scheduled)
        if times.first_token:
            self._prefill.observe(times.first_token - times.scheduled)
            self._decode.observe(times.finished - times.first_token)

    def finish(self, job: Job, outcome: str, output_tokens: int, spans: Iterable[tuple[float, float]],
               longest: int = 0) -> None:
        """Record a request's end.

        Args:
            outcome: one of FINISH_REASONS.  spans: when first and last event of each request came, of those that had any.
            longest: tokens of the longest sample.
        """
        self._ended[outcome].inc()
        for request in job.requests:
            self._prompt.observe(len(request.prompt_token_ids))
            self._n.observe(job.samples)
            if request.params.max_tokens is not None:
                self._max_tokens.observe(request.params.max_tokens)
        each = output_tokens / (job.samples * len(job.requests))
        for first, last in spans:
            self._e2e.observe(last - job.requests[0].arrival)
            self.e2e.add(last - job.requests[0].arrival)
            if each > 1:
                self._tpot.observe((last - first) / (each - 1))
        self._output.observe(output_tokens)
        self._longest.observe(longest)


class _EngineCollector(Collector):
    """The engine's newest snapshot as gauges and counters."""

    def __init__(self, engine: EngineClient, labels: tuple[str, str], card: Card, prefix: Prefix) -> None:
        self._prefix = prefix
        self._engine = engine
        self._card = card
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        stats, info, health = self._engine.stats(), self._engine.info, self._engine.health()
        used = stats.blocks_held / stats.blocks_total if stats.blocks_total else 0.0
        gauges = {
            "num_requests_running": ("Requests in the batch.", stats.running),
            "num_requests_waiting": ("Requests in the queue.", stats.waiting),
            "kv_cache_usage_perc": ("Share of KV blocks held by live sequences, 0 to 1.", used),
            "engine_restarts": ("Deaths of the engine process survived so far.", health.restarts),
            "engine_heartbeat_age_seconds": ("Seconds since the engine last said it lives.", health.heartbeat_age),
        }
        counters = {
            "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
            "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", stats.prefix_hits),
            "num_preemptions": ("Preemptions.", stats.preemptions),
            "prompt_tokens": ("Prompt tokens of admitted requests.", stats.prompt_tokens),
            "prompt_tokens_cached": ("Prompt tokens read from the prefix cache.", stats.cached_tokens),
            "generation_tokens": ("Tokens generated.", stats.generated_tokens),
        }
        joules = self._card.joules_per_token()
        if joules is not None:
            gauges["joules_per_token"] = ("The card's energy over the tokens generated in the last ten seconds.", joules)
        for name, (text, value) in gauges.items():
            prefix = "ws" if name in OURS else self._prefix
            gauge = GaugeMetricFamily(f"{prefix}:{name}", text, labels=LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"{self._prefix}:{name}", text, labels=LABELS)
            counter.add_metric(self._labels, value)
            yield counter
        states = {"free": stats.blocks_free, "cached": stats.blocks_cached, "held": stats.blocks_held}
        blocks = GaugeMetricFamily("ws:kv_blocks", "KV blocks by state; the states add up to the pool.",
                                   labels=(*LABELS, "state"))
        for state, count in states.items():
            blocks.add_metric((*self._labels, state), count)
        yield blocks
        yield self._steps(stats)
        config: dict[str, int | str] = {"block_size": info.block_size, "num_gpu_blocks": info.num_blocks,
                                        "max_model_len": info.max_model_len, "cache_dtype": info.kv_cache_dtype}
        fixed = GaugeMetricFamily(f"{self._prefix}:cache_config_info", "The KV cache's fixed figures, as labels.",
                                  labels=(*LABELS, *config))
        fixed.add_metric((*self._labels, *map(str, config.values())), 1)
        yield fixed

    def _steps(self, stats: EngineStats) -> Metric:
        """vLLM's histogram of a step's tokens; its name ends like a counter's."""
        family = HistogramMetricFamily(f"{self._prefix}:iteration_tokens_total", "Tokens computed in a step.", labels=LABELS)
        counts = zip([*map(float, STEP_TOKEN_BOUNDS), "+Inf"], accumulate(stats.steps_by_tokens), strict=True)
        family.add_metric(self._labels, [(str(bound), float(count)) for bound, count in counts], stats.tokens_of_steps)
        return family
