"""What `ws bench` remembers for `ws estimate --measured`: the form that was served, decode steps, first tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from workstation.cli.bench_http import Outcome
from workstation.cli.bench_steps import WatchedEngine, decode_steps
from workstation.cli.bench_workload import Job, decode_context
from workstation.cli.plan import Launch, form_of, note
from workstation.measurements import Measurement, remember


def remember_offline(
    bench: str, launch: Launch, info: Any, jobs: Sequence[Job], watched: WatchedEngine, figures: Mapping[str, float],
    *, first_token_s: float | None = None,
) -> None:  # fmt: skip
    """Keep a run of the engine in this process.

    Args:
        info: the engine's.  watched: the engine that ran `jobs`.
        first_token_s: until all of them had their first token, where all began together and have the same length.
    """
    found = decode_steps(watched.steps)
    lengths = [(len(job.prompt), job.output_len) for job in jobs]
    _keep(
        launch.model.name, str(launch.model.folder.resolve()), form_of(launch), info.dtype, info.kv_cache_dtype,
        info.device_name or info.device, figures, bench=bench, requests=len(jobs), lengths=lengths,
        rows=found.rows if found else 0.0, decode_step_s=found.seconds if found else None,
        prompts=len(jobs) if first_token_s else 0, prompt_tokens=float(lengths[0][0]) if first_token_s else 0.0,
        first_token_s=first_token_s,
    )  # fmt: skip


async def remember_served(
    client: Any, url: str, outcomes: Sequence[Outcome], figures: Mapping[str, float], concurrency: int,
) -> None:  # fmt: skip
    """Keep a run over HTTP, when all of it succeeded on a server of this machine.

    A token's time there holds what the prompts of others take from it. First tokens count when requests came one by one.
    """
    import httpx

    from workstation.runtime import servers

    server = next((server for server in servers() if server.base_url == url), None)
    if server is None or any(outcome.error or not outcome.output_tokens for outcome in outcomes):
        note(f"the result is not remembered: {'requests failed' if server else f'no server of this machine is called {url}'}")
        return
    try:
        model = (await client.get("/stats?cells=1")).raise_for_status().json()["model"]
    except httpx.HTTPError as error:
        note(f"the result is not remembered: /stats did not answer: {error}")
        return
    lengths = [(outcome.prompt_tokens, outcome.output_tokens) for outcome in outcomes]
    decoding = [outcome for outcome in outcomes if outcome.output_tokens > 1]
    busy, steps = sum(o.total - o.first for o in decoding), sum(o.output_tokens - 1 for o in decoding)
    alone = concurrency == 1
    _keep(
        server.model, server.folder, server.form, model["dtype"], model["kv_cache_dtype"],
        model["device_name"] or model["device"], figures, bench="serve", requests=len(outcomes), lengths=lengths,
        concurrency=concurrency, rows=max(1.0, busy / figures["duration_s"]), decode_step_s=busy / steps if steps else None,
        prompts=1 if alone else 0, prompt_tokens=sum(into for into, _ in lengths) / len(lengths) if alone else 0.0,
        first_token_s=figures["ttft_mean_ms"] / 1e3 if alone else None,
    )  # fmt: skip


def _keep(
    model: str, folder: str, form: str, dtype: str, kv_cache_dtype: str, device: str, figures: Mapping[str, float], *,
    lengths: Sequence[tuple[int, int]], **rest: Any,
) -> None:  # fmt: skip
    """Write one result; what cannot be kept is a line of talk, since the benchmark itself succeeded."""
    if not form:
        note("the result is not remembered: it is not known in which form the weights are")
        return
    result = Measurement(
        model=model, folder=folder, form="32-bit" if (form, dtype) == ("16-bit", "float32") else form,
        kv_cache_dtype="fp8" if kv_cache_dtype == "fp8" else "auto", device=device, measured=time.time(),
        input_len=sum(into for into, _ in lengths) / len(lengths), output_len=sum(out for _, out in lengths) / len(lengths),
        context=decode_context(lengths),
        figures={name: None if math.isnan(value) else float(value) for name, value in figures.items()}, **rest,
    )  # fmt: skip
    try:
        remember(result)
    except OSError as error:
        note(f"the result is not remembered: {error.filename or 'its file'}: {error.strerror}")
