"""`ws bench throughput` and `latency`: the engine in this process, token ids in and out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from workstation.cli import bench_transformers
from workstation.cli.bench_memory import remember_offline
from workstation.cli.bench_steps import WatchedEngine
from workstation.cli.bench_workload import Job, kv_waste, make_jobs, percentile
from workstation.cli.offline import start
from workstation.cli.plan import Launch, note, plan_launch


@dataclass(frozen=True, slots=True)
class Shape:
    """How many requests of which lengths, in tokens."""

    count: int
    input_len: int
    output_len: int
    lognormal: bool
    seed: int


def run_jobs(llm: Any, jobs: Sequence[Job]) -> list[list[int]]:
    """Greedy tokens of all jobs at once, exactly as many as asked for."""
    from workstation import SamplingParams

    prompts = [{"prompt_token_ids": job.prompt} for job in jobs]
    sampling = [
        SamplingParams(temperature=0.0, max_tokens=job.output_len, ignore_eos=True, detokenize=False) for job in jobs
    ]
    return [output.outputs[0].token_ids for output in llm.generate(prompts, sampling, use_tqdm=False)]


def ordinary_ids(llm: Any) -> range:
    """Token ids away from both ends of the vocabulary, where control tokens and padding rows are."""
    width = llm.engine.info.logits_width
    return range(width // 8, width * 3 // 4)


def throughput(model: str, flags: dict[str, Any], shape: Shape) -> dict[str, float]:
    """Requests and tokens per second of one batch of requests, and the KV pool's waste over its steps."""
    launch = plan_launch(model, flags, os.environ)
    llm = start(launch, skip_tokenizer_init=True)
    window = llm.engine.info.max_model_len
    jobs = make_jobs(shape.count, shape.input_len, shape.output_len, ordinary_ids(llm), window, seed=shape.seed,
                     lognormal=shape.lognormal)  # fmt: skip
    run_jobs(llm, [Job(jobs[0].prompt[:8], 2)] * 2)
    watched = llm.engine = WatchedEngine(llm.engine)
    begun = time.perf_counter()
    run_jobs(llm, jobs)
    seconds = time.perf_counter() - begun
    samples = [(step.kv_tokens, step.blocks) for step in watched.steps]
    tokens_in, tokens_out = sum(len(job.prompt) for job in jobs), sum(job.output_len for job in jobs)
    figures = {
        "requests": len(jobs), "mean_input_len": tokens_in / len(jobs), "mean_output_len": tokens_out / len(jobs),
        "seconds": seconds, "requests_per_s": len(jobs) / seconds, "output_tokens_per_s": tokens_out / seconds,
        "total_tokens_per_s": (tokens_in + tokens_out) / seconds, "steps": len(samples),
        "kv_waste_percent": 100 * kv_waste(samples, llm.engine.info.block_size),
    }  # fmt: skip
    remember_offline("throughput", launch, llm.engine.info, jobs, watched, figures)
    return figures


def latency(model: str, flags: dict[str, Any], shape: Shape, warmups: int, runs: int) -> dict[str, float]:
    """Seconds of one batch over several runs. Each run has prompts of its own, so that no prefix is found cached.

    One run more, which does not count, tells the first token from the decode steps.
    """
    launch = plan_launch(model, flags, os.environ)
    llm = start(launch, skip_tokenizer_init=True)
    ids, window = ordinary_ids(llm), llm.engine.info.max_model_len

    def jobs_of(run: int) -> list[Job]:
        return make_jobs(shape.count, shape.input_len, shape.output_len, ids, window, seed=shape.seed + run, lognormal=False)

    times = []
    for run in range(warmups + runs):
        jobs = jobs_of(run)
        begun = time.perf_counter()
        run_jobs(llm, jobs)
        times.append(time.perf_counter() - begun)
    counted = times[warmups:]
    figures = {"runs": float(runs), "batch_size": float(shape.count), "mean_s": sum(counted) / runs}
    figures |= {f"p{share}_s": percentile(counted, share / 100) for share in (10, 50, 90, 99)}
    watched, jobs = WatchedEngine(llm.engine), jobs_of(warmups + runs)  # a run more, since watching costs time
    llm.engine, begun = watched, time.perf_counter()
    run_jobs(llm, jobs)
    together = shape.count <= launch.config.max_num_seqs
    first = max(watched.first_tokens.values()) - begun if together else None
    remember_offline("latency", launch, llm.engine.info, jobs, watched, figures, first_token_s=first)
    return figures


def against_transformers(model: str, flags: dict[str, Any], seed: int, *, as_json: bool) -> None:
    """Run and print the comparison of `bench_transformers`: float32 and the same threads on both sides."""
    launch: Launch = plan_launch(model, flags | {"dtype": "float32"}, os.environ)
    llm = start(launch, skip_tokenizer_init=True)
    import torch

    threads = torch.get_num_threads()
    theirs = bench_transformers.TransformersRunner(launch.model.folder, launch.config.device)
    torch.set_num_threads(threads)

    def ours(jobs: Sequence[Job]) -> list[list[int]]:
        llm.reset_prefix_cache()  # a repeated run must not find the run before in the cache
        return run_jobs(llm, jobs)

    result = bench_transformers.compare(ours, theirs, ordinary_ids(llm), seed, note)
    if as_json:
        print(json.dumps(asdict(result)))
    else:
        bench_transformers.report(result, threads)
