"""The benchmarks' arithmetic, and one small run of each against the real engine. No figure of speed is asserted."""

from __future__ import annotations

import asyncio
import json
import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
import torch
from tiny import write_tiny

from workstation.cli import bench_offline, bench_transformers
from workstation.cli.bench_http import Load, Outcome, run_load, stream_one, summary
from workstation.cli.bench_workload import Job, kv_waste, lognormal_length, make_jobs, percentile, uniform_jobs
from workstation.cli.main import main
from workstation.errors import ConfigError


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_percentiles_agree_with_numpy(share: float) -> None:
    values = [random.Random(1).gauss(0, 1) for _ in range(101)]
    assert percentile(values, share) == pytest.approx(numpy.quantile(values, share))


def test_a_percentile_of_nothing_is_not_a_number() -> None:
    assert math.isnan(percentile([], 0.5))


def test_waste_is_averaged_over_the_steps_that_held_blocks() -> None:
    assert kv_waste([(16, 1), (8, 1), (0, 0), (24, 2)], 16) == pytest.approx((0 + 0.5 + 0.25) / 3)


@pytest.mark.parametrize("mean", [161, 338])
def test_lognormal_lengths_have_the_mean_that_was_asked_for(mean: int) -> None:
    rng = random.Random(0)
    drawn = [lognormal_length(rng, mean, 10**6) for _ in range(50_000)]
    assert sum(drawn) / len(drawn) == pytest.approx(mean, rel=0.02)


def test_the_same_seed_gives_the_same_jobs_and_another_seed_others() -> None:
    one, same, other = (make_jobs(8, 20, 30, range(100), 512, seed=seed, lognormal=True) for seed in (1, 1, 2))
    assert one == same != other
    assert all(len(job.prompt) + job.output_len <= 512 for job in one)


def test_jobs_that_cannot_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="do not fit the window of 64"):
        make_jobs(1, 40, 30, range(10), 64, seed=0, lognormal=False)


def test_mixed_jobs_stay_in_their_ranges() -> None:
    jobs = uniform_jobs(200, (20, 300), (20, 200), range(50), 0)
    assert {min(len(job.prompt) for job in jobs) >= 20, max(len(job.prompt) for job in jobs) <= 300} == {True}
    assert {min(job.output_len for job in jobs) >= 20, max(job.output_len for job in jobs) <= 200} == {True}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("bench") / "tiny", "llama", vocab_size=160)


FLAGS: dict[str, Any] = {"device": "cpu", "num_threads": "1", "max_num_seqs": "8", "kv_cache_memory_bytes": "16M"}


def test_throughput_counts_what_was_asked_for(tiny: Path) -> None:
    figures = bench_offline.throughput(str(tiny), FLAGS, bench_offline.Shape(6, 20, 12, False, 0))
    assert (figures["requests"], figures["mean_input_len"], figures["mean_output_len"]) == (6, 20, 12)
    assert figures["steps"] >= 12
    assert 0 <= figures["kv_waste_percent"] < 50


def test_latency_runs_as_often_as_asked(tiny: Path) -> None:
    figures = bench_offline.latency(str(tiny), FLAGS, bench_offline.Shape(2, 8, 4, False, 0), 1, 3)
    assert figures["runs"] == 3
    assert 0 < figures["p10_s"] <= figures["p50_s"] <= figures["p99_s"]


def test_the_comparison_gives_both_sides_the_same_work(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_transformers, "INPUTS", (3, 30))
    monkeypatch.setattr(bench_transformers, "OUTPUTS", (2, 9))
    monkeypatch.setattr(bench_transformers, "BATCH", 5)
    monkeypatch.setattr(bench_transformers, "REPEATS", 1)
    threads = torch.get_num_threads()
    bench_offline.against_transformers(str(tiny), FLAGS, 0, as_json=True)
    torch.set_num_threads(threads)
    result = json.loads(capsys.readouterr().out)
    assert result["equal"] == result["compared"] == 6
    assert min(value for name, value in result.items() if name not in ("equal", "compared")) > 0


def test_the_report_of_the_comparison_shows_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    bench_transformers.report(bench_transformers.Comparison(30.0, 20.0, 100.0, 40.0, 10.0, 32, 33), 2)
    text = capsys.readouterr().out
    assert "1.50x" in text and "2.50x" in text and "10.00x" in text and "32 of 33" in text


def test_the_bench_command_prints_json(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WS_NUM_GPU_BLOCKS_OVERRIDE", "64")
    arguments = ["--input-len", "8", "--output-len", "4", "--num-prompts", "2", "--device", "cpu", "--json"]
    with pytest.raises(SystemExit) as caught:
        main(["bench", "throughput", str(tiny), *arguments])
    assert not caught.value.code
    assert json.loads(capsys.readouterr().out)["requests"] == 2


def stream(tokens: int, usage: dict[str, int]) -> bytes:
    chunks: list[dict[str, Any]] = [{"choices": [{"text": "x"}]} for _ in range(tokens)]
    chunks.append({"choices": [], "usage": usage})
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b": ping\n\ndata: [DONE]\n\n"


def answer(request: httpx.Request) -> httpx.Response:
    body = json.loads(request.content)
    if len(body["prompt"]) > 5:
        return httpx.Response(503, text="full")
    assert body["ignore_eos"] and body["temperature"] == 0 and body["stream_options"] == {"include_usage": True}
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    return httpx.Response(200, content=stream(body["max_tokens"], usage))


def client() -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://test")


def test_a_stream_gives_its_usage_and_one_gap_less_than_its_chunks() -> None:
    outcome = asyncio.run(stream_one(client(), "m", Job([1, 2, 3], 4)))
    assert (outcome.prompt_tokens, outcome.output_tokens, len(outcome.gaps), outcome.error) == (3, 4, 3, "")
    assert 0 < outcome.first <= outcome.total


def test_a_refused_request_is_counted_and_does_not_stop_the_others() -> None:
    jobs = [Job([1], 2), Job([1] * 6, 2), Job([1, 2], 3)]
    outcomes, seconds = asyncio.run(run_load(client(), "m", Load(jobs, rate=1e4, concurrency=2)))
    figures = summary(outcomes, seconds)
    assert (figures["completed"], figures["failed"], figures["input_tokens"], figures["output_tokens"]) == (2, 1, 3, 5)
    assert outcomes[1].error == "503: full"


def test_times_per_token_leave_the_first_one_out() -> None:
    outcome = Outcome(prompt_tokens=3, output_tokens=5, first=1.0, total=3.0, gaps=[0.5, 0.5, 0.5, 0.5])
    figures = summary([outcome], 2.0)
    assert (figures["ttft_p50_ms"], figures["tpot_p50_ms"], figures["itl_p99_ms"]) == (1000.0, 500.0, 500.0)
    assert (figures["output_tokens_per_s"], figures["requests_per_s"]) == (2.5, 0.5)


def test_a_comparison_can_be_printed_as_json() -> None:
    result = bench_transformers.Comparison(1.0, 1.0, 1.0, 1.0, 1.0, 1, 1)
    assert json.loads(json.dumps(asdict(result)))["compared"] == 1
