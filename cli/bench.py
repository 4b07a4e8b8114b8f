"""`ws bench throughput | latency | serve`: the names and the meanings of vLLM's benchmarks."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import typer

from workstation.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Measure: throughput and latency in this process, serve over HTTP."
)

Model = Annotated[str, typer.Argument(help="Catalogue name, folder or hub id.")]
Device = Annotated[str | None, typer.Option(help="auto, cuda, cuda:N or cpu.")]
Dtype = Annotated[str | None, typer.Option(help="auto, bfloat16, float16 or float32.")]
LoadFormat = Annotated[str | None, typer.Option(help="dummy: random weights.")]
Length = Annotated[str | None, typer.Option(metavar="N", help="Tokens of prompt and output a sequence may hold.")]
Count = Annotated[str | None, typer.Option(metavar="N", help="Sequences that run at once.")]
Share = Annotated[str | None, typer.Option(metavar="X", help="Share of the card the engine may use.")]
Threads = Annotated[str | None, typer.Option(metavar="N", help="CPU threads, on both sides of a comparison.")]
Seed = Annotated[int, typer.Option(help="Of lengths and prompts.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def throughput(
    model: Model,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt (the mean with --lognormal).")] = 161,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of an answer (the mean with --lognormal).")] = 338,
    num_prompts: Annotated[int, typer.Option(min=1, help="How many requests.")] = 64,
    lognormal: Annotated[bool, typer.Option(help="Draw lengths from a lognormal distribution.")] = False,
    against: Annotated[str | None, typer.Option(metavar="transformers", help="Compare with its generate().")] = None,
    device: Device = None,
    dtype: Dtype = None,
    load_format: LoadFormat = None,
    max_model_len: Length = None,
    max_num_seqs: Count = None,
    gpu_memory_utilization: Share = None,
    num_threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Tokens per second of many requests at once, and how much of the KV pool they waste."""
    flags = {
        "device": device, "dtype": dtype, "load_format": load_format, "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs, "gpu_memory_utilization": gpu_memory_utilization, "num_threads": num_threads,
    }  # fmt: skip
    from workstation.cli import bench_offline

    if against not in (None, "transformers"):
        raise ConfigError(f"--against knows transformers only, got {against!r}", param="against")
    if against:
        _refuse_typed(flags, ("load_format", "max_model_len"), "--against transformers compares real weights as they are")
        bench_offline.against_transformers(model, flags, seed, as_json=as_json)
        return
    shape = bench_offline.Shape(num_prompts, input_len, output_len, lognormal, seed)
    _show(bench_offline.throughput(model, flags, shape), "throughput", as_json)


@app.command()
def latency(
    model: Model,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 32,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    num_iters_warmup: Annotated[int, typer.Option(min=0, help="Runs that do not count.")] = 2,
    num_iters: Annotated[int, typer.Option(min=1, help="Runs that count.")] = 10,
    device: Device = None,
    dtype: Dtype = None,
    load_format: LoadFormat = None,
    max_model_len: Length = None,
    gpu_memory_utilization: Share = None,
    num_threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Seconds one batch takes, from its start to its last token."""
    flags = {
        "device": device, "dtype": dtype, "load_format": load_format, "max_model_len": max_model_len,
        "gpu_memory_utilization": gpu_memory_utilization, "num_threads": num_threads,
    }  # fmt: skip
    from workstation.cli import bench_offline

    shape = bench_offline.Shape(batch_size, input_len, output_len, False, seed)
    _show(bench_offline.latency(model, flags, shape, num_iters_warmup, num_iters), "latency of a batch", as_json)


@app.command()
def serve(
    url: Annotated[str | None, typer.Option("--url", "--base-url", help="The running server unless given.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="WS_API_KEY", show_envvar=True, help="Key of the server.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="How many requests.")] = 100,
    input_len: Annotated[int, typer.Option("--input-len", "--random-input-len", min=1, help="Tokens of a prompt.")] = 161,
    output_len: Annotated[int, typer.Option("--output-len", "--random-output-len", min=1, help="Tokens of an answer.")] = 338,
    lognormal: Annotated[bool, typer.Option(help="Draw lengths from a lognormal distribution.")] = False,
    request_rate: Annotated[float, typer.Option(min=0, help="Requests a second, Poisson; 0 or inf: all at once.")] = 0.0,
    max_concurrency: Annotated[int, typer.Option(min=0, help="Requests at a time; 0: no limit.")] = 0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Streaming load on a running server: time to first token, per token, between tokens."""
    import asyncio

    from workstation.cli import bench_http
    from workstation.cli.servers import find_server

    rate = 0.0 if request_rate == float("inf") else request_rate
    outcomes, figures = asyncio.run(
        bench_http.bench(
            find_server(url).url, api_key, count=num_prompts, input_len=input_len, output_len=output_len,
            lognormal=lognormal, rate=rate, concurrency=max_concurrency, seed=seed,
        )
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(figures))
    else:
        bench_http.report(outcomes, figures)
    if figures["failed"]:
        raise typer.Exit(1)


def _refuse_typed(flags: dict[str, Any], names: tuple[str, ...], why: str) -> None:
    for name in names:
        if flags[name] is not None or os.environ.get("WS_" + name.upper()):
            raise ConfigError(f"--{name.replace('_', '-')} cannot be given here: {why}", param=name)


def _show(figures: dict[str, float], title: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(figures))
        return
    from workstation.cli.bench_workload import print_rows

    print_rows(title, [(name, f"{value:.0f}" if float(value).is_integer() else f"{value:.3f}")
                       for name, value in figures.items()])  # fmt: skip
