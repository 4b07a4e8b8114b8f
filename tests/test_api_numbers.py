"""Figures in answers and in /metrics, under the names that clients and dashboards look for."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from fakes import FakeEngine, api_client, post, served_model, sse_events, write_byte_level_folder
from prometheus_client.parser import text_string_to_metric_families

from workstation.server.app import create_app
from workstation.server.metrics import ITL_BUCKETS, LATENCY_BUCKETS, TTFT_BUCKETS
from workstation.server.options import ServedModel, ServerOptions

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6}
COMPLETION = {"prompt": "hello", "max_tokens": 6}
ROUTES = [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)]
TIMINGS = {"cache_n", "prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second", "predicted_n", "predicted_ms",
           "predicted_per_token_ms", "predicted_per_second"}
# Every series that vLLM's Grafana dashboard (examples/observability/prometheus_grafana) draws.
DASHBOARD = (
    "e2e_request_latency_seconds_bucket", "e2e_request_latency_seconds_sum", "e2e_request_latency_seconds_count",
    "prompt_tokens_total", "generation_tokens_total", "inter_token_latency_seconds_bucket",
    "inter_token_latency_seconds_sum", "inter_token_latency_seconds_count", "num_requests_running", "num_requests_waiting",
    "time_to_first_token_seconds_bucket", "time_to_first_token_seconds_sum", "time_to_first_token_seconds_count",
    "kv_cache_usage_perc", "request_prompt_tokens_bucket", "request_generation_tokens_bucket", "request_success_total",
    "request_queue_time_seconds_sum", "request_prefill_time_seconds_sum", "request_decode_time_seconds_sum",
    "request_max_num_generation_tokens_sum",
)
# The others that vLLM exports without an option, and a name that older dashboards ask for.
OTHERS = (
    "request_time_per_output_token_seconds_bucket", "request_inference_time_seconds_bucket",
    "num_requests_waiting_by_reason", "engine_sleep_state", "cache_config_info", "prefix_cache_queries_total",
    "prefix_cache_hits_total", "external_prefix_cache_queries_total", "external_prefix_cache_hits_total",
    "mm_cache_queries_total", "mm_cache_hits_total", "num_preemptions_total", "prompt_tokens_by_source_total",
    "prompt_tokens_cached_total", "prompt_tokens_cached_by_source_total", "admission_rejections_total",
    "request_params_n_bucket", "request_params_max_tokens_bucket", "request_num_preemptions_bucket",
    "request_prefill_kv_computed_tokens_bucket", "iteration_tokens_total_bucket", "gpu_cache_usage_perc",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served_model(write_byte_level_folder(tmp_path_factory.mktemp("numbers")))


def engine() -> FakeEngine:
    return FakeEngine(delay=0.002, num_cached_tokens=1)


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_whole_answer_carries_llama_cpps_timings(model: ServedModel, path: str, body: dict[str, Any]) -> None:
    answer = post(path, engine(), model, body).json()
    timings, usage = answer["timings"], answer["usage"]
    assert set(timings) == TIMINGS
    assert timings["cache_n"] == 1 and timings["prompt_n"] == usage["prompt_tokens"] - 1
    assert timings["predicted_n"] == usage["completion_tokens"] == 6 and timings["predicted_ms"] > 0
    assert timings["predicted_per_second"] == pytest.approx(6e3 / timings["predicted_ms"], rel=0.01)
    assert timings["predicted_per_token_ms"] == pytest.approx(timings["predicted_ms"] / 6, abs=0.01)


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize("usage", [False, True])
def test_a_streams_last_chunk_alone_carries_timings(model: ServedModel, path: str, body: dict[str, Any], usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    events = sse_events(post(path, engine(), model, {**body, "n": 2, "stream": True, **options}).text)
    assert [event for event in events if "timings" in event] == events[-1:]
    assert events[-1]["timings"]["predicted_n"] == 12 and bool(events[-1]["choices"]) is not usage


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_timings_come_with_every_chunk_on_request(model: ServedModel, path: str, body: dict[str, Any]) -> None:
    events = sse_events(post(path, engine(), model, {**body, "stream": True, "timings_per_token": True}).text)
    counts = [event["timings"]["predicted_n"] for event in events]
    assert len(counts) == len(events) > 3 and counts == sorted(counts) and counts[-1] == 6


def scraped(model: ServedModel, prefix: str, *, overloaded: bool = False) -> str:
    """/metrics after a request."""
    async def go() -> str:
        app = create_app(FakeEngine(overloaded=overloaded), model, ServerOptions(metrics_prefix=prefix))  # type: ignore[arg-type]
        async with api_client(app) as client:
            await client.post("/v1/completions", json={**COMPLETION, "n": 2})
            return (await client.get("/metrics")).text

    return asyncio.run(go())


def test_vllms_dashboard_finds_every_series_by_the_models_name(model: ServedModel) -> None:
    text = scraped(model, "vllm")
    for name in DASHBOARD:
        assert re.search(rf'^vllm:{name}\{{[^}}]*model_name="fake"', text, re.MULTILINE), name
    assert 'vllm:request_success_total{engine="0",finished_reason="length",model_name="fake"} 1.0' in text
    assert 'vllm:request_max_num_generation_tokens_sum{engine="0",model_name="fake"} 6.0' in text


def test_what_vllm_exports_besides_is_there_and_the_rest_keeps_our_prefix(model: ServedModel) -> None:
    text = scraped(model, "vllm")
    assert [name for name in OTHERS if not re.search(rf"^vllm:{name}(\{{| )", text, re.MULTILINE)] == []
    ours = set(re.findall(r"^(ws:\w+)", text, re.MULTILINE))
    assert {"ws:kv_blocks", "ws:engine_restarts", "ws:engine_heartbeat_age_seconds"} <= ours
    assert not {name.removeprefix("ws:") for name in ours} & {*DASHBOARD}


def test_histograms_have_vllms_buckets(model: ServedModel) -> None:
    families = {family.name: family for family in text_string_to_metric_families(scraped(model, "vllm"))}

    def bounds(name: str) -> list[float]:
        return [float(sample.labels["le"]) for sample in families[f"vllm:{name}"].samples if "le" in sample.labels]

    end = float("inf")
    assert bounds("time_to_first_token_seconds") == [*TTFT_BUCKETS, end]
    assert bounds("inter_token_latency_seconds") == bounds("request_time_per_output_token_seconds") == [*ITL_BUCKETS, end]
    assert bounds("e2e_request_latency_seconds") == bounds("request_queue_time_seconds") == [*LATENCY_BUCKETS, end]
    assert bounds("request_prompt_tokens") == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, end]
    assert bounds("iteration_tokens_total") == [1, *(2**power for power in range(3, 15)), end]


def test_a_full_queue_counts_under_vllms_reason(model: ServedModel) -> None:
    text = scraped(model, "vllm", overloaded=True)
    assert 'vllm:admission_rejections_total{model_name="fake",reason="max_num_queued_reqs"} 1.0' in text


def test_without_the_prefix_nothing_is_called_vllm(model: ServedModel) -> None:
    assert "vllm:" not in scraped(model, "ws") and "ws:iteration_tokens_total_bucket" in scraped(model, "ws")


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_vllms_per_request_metrics_come_when_the_server_was_told_so(
        model: ServedModel, path: str, body: dict[str, Any]) -> None:
    options = ServerOptions(request_metrics=True)
    found = post(path, engine(), model, body, options).json()["metrics"]
    assert set(found) == {"time_to_first_token_ms", "generation_time_ms", "queue_time_ms", "mean_itl_ms", "tokens_per_second"}
    assert found["mean_itl_ms"] == pytest.approx(found["generation_time_ms"] / 5, abs=0.01)
    spans = found["time_to_first_token_ms"] + found["generation_time_ms"]
    assert found["tokens_per_second"] == pytest.approx(6e3 / spans, rel=0.01)
    stream = {**body, "stream": True, "stream_options": {"include_usage": True}}
    events = sse_events(post(path, engine(), model, stream, options).text)
    assert [event for event in events if "metrics" in event] == events[-1:]
    assert post(path, engine(), model, {**body, "n": 2}, options).json()["metrics"] is None
    assert "metrics" not in post(path, engine(), model, body).json()
