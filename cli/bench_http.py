"""`ws bench serve`: streaming load on a running server. Time to first token, per token, between tokens."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from workstation.cli.bench_workload import Job, make_jobs, percentile, print_rows
from workstation.errors import StartupError

_SAMPLE_TEXT = (
    "The quick brown fox counts 0 1 2 3 4 5 6 7 8 9 blocks of memory while seven clients wait for their turn; "
    "a scheduler decides which rows run, and every step moves each of them forward by one token."
)
_TIMEOUT_S = 600.0


@dataclass(slots=True)
class Outcome:
    """What one request saw. Times in seconds; `gaps` are between chunks that carry text."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    first: float = 0.0
    total: float = 0.0
    gaps: list[float] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    """What to send: `rate` requests a second (0: all at once), at most `concurrency` at a time (0: no limit)."""

    jobs: Sequence[Job]
    rate: float = 0.0
    concurrency: int = 0
    seed: int = 0


async def vocabulary(client: Any, model: str) -> list[int]:
    """Token ids that are ordinary text for this model, from /tokenize."""
    answer = await client.post("/tokenize", json={"model": model, "prompt": _SAMPLE_TEXT, "add_special_tokens": False})
    if answer.status_code != 200:
        raise StartupError(f"the server's /tokenize answered {answer.status_code}: {answer.text[:200]}")
    return sorted(set(answer.json()["tokens"]))


async def served_model(client: Any) -> tuple[str, int]:
    """Name and window of the model the server serves."""
    answer = await client.get("/v1/models")
    if answer.status_code != 200:
        raise StartupError(f"the server's /v1/models answered {answer.status_code}: {answer.text[:200]}")
    entry = answer.json()["data"][0]
    return entry["id"], int(entry.get("max_model_len") or 4096)


async def stream_one(client: Any, model: str, job: Job) -> Outcome:
    """One streaming completion, timed at the client."""
    body = {
        "model": model, "prompt": job.prompt, "max_tokens": job.output_len, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    outcome, start = Outcome(), time.perf_counter()
    last = start
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                text = (await answer.aread()).decode(errors="replace")
                outcome.error = f"{answer.status_code}: {text[:200]}"
                return outcome
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                now = time.perf_counter()
                last = _note(outcome, json.loads(line[6:]), now, last, start)
    except Exception as error:  # a broken connection is a result of the benchmark, not its end
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.total = time.perf_counter() - start
    return outcome


def _note(outcome: Outcome, chunk: dict[str, Any], now: float, last: float, start: float) -> float:
    """Take one chunk into account; returns the time of the latest token."""
    if "error" in chunk:
        outcome.error = str(chunk["error"])[:200]
        return last
    if chunk.get("usage"):
        outcome.prompt_tokens = chunk["usage"]["prompt_tokens"]
        outcome.output_tokens = chunk["usage"]["completion_tokens"]
    if not chunk.get("choices"):
        return last
    if outcome.first:
        outcome.gaps.append(now - last)
    else:
        outcome.first = now - start
    return now


async def run_load(client: Any, model: str, load: Load) -> tuple[list[Outcome], float]:
    """Send everything; returns what each request saw and the seconds it all took."""
    gate = asyncio.Semaphore(load.concurrency or len(load.jobs))
    rng = random.Random(load.seed)

    async def send(job: Job, delay: float) -> Outcome:
        await asyncio.sleep(delay)
        async with gate:
            return await stream_one(client, model, job)

    start, delays, clock = time.perf_counter(), [], 0.0
    for _ in load.jobs:
        delays.append(clock)
        clock += rng.expovariate(load.rate) if load.rate else 0.0
    outcomes = await asyncio.gather(*(send(job, delay) for job, delay in zip(load.jobs, delays, strict=True)))
    return list(outcomes), time.perf_counter() - start


def summary(outcomes: Sequence[Outcome], seconds: float) -> dict[str, float]:
    """Throughput, and TTFT, TPOT and ITL in milliseconds as mean, p50 and p99."""
    good = [outcome for outcome in outcomes if not outcome.error]
    tokens = sum(outcome.output_tokens for outcome in good)
    figures: dict[str, float] = {
        "completed": len(good), "failed": len(outcomes) - len(good), "duration_s": seconds,
        "input_tokens": sum(outcome.prompt_tokens for outcome in good), "output_tokens": tokens,
        "requests_per_s": len(good) / seconds, "output_tokens_per_s": tokens / seconds,
    }  # fmt: skip
    series = {
        "ttft": [outcome.first for outcome in good],
        "tpot": [(o.total - o.first) / (o.output_tokens - 1) for o in good if o.output_tokens > 1],
        "itl": [gap for outcome in good for gap in outcome.gaps],
    }
    for name, values in series.items():
        figures[f"{name}_mean_ms"] = 1e3 * sum(values) / len(values) if values else float("nan")
        figures[f"{name}_p50_ms"] = 1e3 * percentile(values, 0.5)
        figures[f"{name}_p99_ms"] = 1e3 * percentile(values, 0.99)
    return figures


async def bench(
    url: str, key: str | None, *, count: int, input_len: int, output_len: int, lognormal: bool, rate: float,
    concurrency: int, seed: int,
) -> tuple[list[Outcome], dict[str, float]]:  # fmt: skip
    """The whole benchmark against the server at `url`."""
    import httpx

    from workstation.cli.bench_memory import remember_served
    from workstation.cli.servers import bearer

    headers = bearer(key)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=_TIMEOUT_S, limits=limits) as client:
        model, window = await served_model(client)
        ids = await vocabulary(client, model)
        jobs = make_jobs(count, input_len, output_len, ids, window, seed=seed, lognormal=lognormal)
        await stream_one(client, model, Job(jobs[0].prompt[:8], 2))
        outcomes, seconds = await run_load(client, model, Load(jobs, rate, concurrency, seed))
        figures = summary(outcomes, seconds)
        await remember_served(client, url, outcomes, figures, concurrency)
    return outcomes, figures


def report(outcomes: Sequence[Outcome], figures: dict[str, float]) -> None:
    """The figures as a table; the first error, if any, below it."""
    counts = ("completed", "failed", "input_tokens", "output_tokens")
    print_rows("streaming load", [(k, f"{v:.0f}" if k in counts else f"{v:.2f}") for k, v in figures.items()])
    errors = [outcome.error for outcome in outcomes if outcome.error]
    if errors:
        print(f"first error of {len(errors)}: {errors[0]}")
