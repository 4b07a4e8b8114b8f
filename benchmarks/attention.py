"""Attention kernels on one GPU: every candidate checked against a float32 oracle, then timed in CUDA graphs.

    PYTHONPATH=. python benchmarks/attention.py [--seconds 100] [--only prefill|decode]

Each candidate is compiled and checked in a process of its own, all at the same time, so that one which fails or hangs costs
itself only; those that pass are timed one by one. Prints JSON lines and, last, a table; "chosen" is what the
server runs. Prefill: TFLOP/s of the causal products; decode: GB/s of keys and values (at least 300 MB of them in rotation, past
the L2) and microseconds a layer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from attention_cases import Heads, Step, error, make_step, oracle
from attention_library import library_prefill

from workstation.kernels import launch_decode, launch_prefill
from workstation.kernels.launch_decode import DecodeConfig
from workstation.kernels.launch_prefill import PrefillConfig
from workstation.kernels.paging import FP8

MODELS = {"8B": Heads(32, 8, 128), "70B": Heads(64, 8, 128), "0.6B": Heads(16, 8, 128)}
PREFILLS: dict[str, PrefillConfig | str | None] = {
    "chosen": None,
    "hopper-128-2s": PrefillConfig("hopper", 128, 128, 4, 2),
    "hopper-64-4s": PrefillConfig("hopper", 128, 64, 4, 4),
    "tiled-128-8w-3s": PrefillConfig("tiled", 128, 128, 8, 3),
    "tiled-64-8w-3s": PrefillConfig("tiled", 128, 64, 8, 3),
    "exact": PrefillConfig("exact", 128, 64, 8, 3),
    "cudnn": "cudnn",
    "flash": "flash",
}
DECODES: dict[str, DecodeConfig | None] = {
    "chosen": None,
    "shares-64-3s": DecodeConfig("shares", 64, 4, 3, 3, 4, 8),
    "hopper-2s": DecodeConfig("hopper", 64, 4, 2, 2, 4, 8),
    "hopper-6s-1": DecodeConfig("hopper", 64, 4, 6, 1, 4, 8),
}
FP8_DECODES: dict[str, DecodeConfig | None] = {
    "fp8": None,
    "fp8-64-4w-3s": DecodeConfig("shares", 64, 4, 3, 3, 4, 8),
    "fp8-64-4w-4s": DecodeConfig("shares", 64, 4, 4, 3, 4, 8),
    "fp8-128-8w-3s": DecodeConfig("shares", 128, 8, 3, 2, 4, 8),
}
OTHERS = ("chosen", "hopper-128-2s", "hopper-64-4s")  # on the other models
OTHER_DECODES = ("chosen", "shares-64-3s", "fp8")
CHUNKS = [[(new, past + new)] for new in (2048, 8192) for past in (0, 8192, 24576)] + [[(512, 512)] * 16]
MIXES = [[(1, context)] * batch for context in (200, 1024, 8192) for batch in (1, 8, 32, 128, 256)]
MIXES += [[(1, 2048)], [(1, 4096)]]
MIXES.append([(1, 131072)] + [(1, 4096)] * 31)
RAGGED = [(3, 3), (17, 40), (64, 64), (5, 133), (90, 150), (300, 1001), (1025, 3000)]
LENGTHS = [(1, length) for length in (1, 16, 17, 300, 45, 46, 700, 9000, 2, 128, 5000, 513)]
GRAPH_BOUND = 131072  # max_context_len as a captured graph has it
DTYPE = torch.bfloat16
TOLERANCE = 1e-2


def run_prefill(candidate: str, step: Step, layer: int = 0) -> None:
    config = PREFILLS[candidate]
    if isinstance(config, str):
        library_prefill(step, layer, config)
    else:
        launch_prefill.attend_prefills(step.q, step.layer(layer), step.plan, step.scale, step.out, config)


def run_decode(candidate: str, step: Step, layer: int = 0) -> None:
    config = (DECODES | FP8_DECODES)[candidate]
    launch_decode.attend_decodes(step.q, step.layer(layer), step.plan, step.scale, step.out, config)


def memory(elements: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(elements, dtype=DTYPE, device="cuda").normal_().to(dtype)


def check(kind: str, candidate: str, models: list[str]) -> None:
    """In a process of its own: raises if any result is off; on success the kernels are in Triton's cache."""
    run, shapes = (run_prefill, RAGGED) if kind == "prefill" else (run_decode, LENGTHS)
    single = kind == "prefill" and isinstance(PREFILLS[candidate], str)
    worst = 0.0
    dtype = FP8 if candidate in FP8_DECODES else DTYPE
    for model in models:
        for case in ([[(700, 700)], [(300, 1001)]] if single else [shapes, shapes[-1:]]):
            bound = GRAPH_BOUND if kind == "decode" else None
            step = make_step(MODELS[model], case, memory(1 << 27, dtype), layers=2, poison=True, bound=bound, seed=len(case))
            for layer in (0, 1):  # the second reuses what the first left in the plan
                step.out.fill_(torch.nan)
                run(candidate, step, layer)
                found = error(step.out, oracle(step, layer))
                if not found < TOLERANCE:
                    raise SystemExit(f"{model} {case[:2]} layer {layer}: error {found}")
                worst = max(worst, found)
    print(f"error {worst:.2e}")


def check_all(jobs: list[tuple[str, str, list[str]]], limit: float) -> dict[tuple[str, str], str]:
    """→ what went wrong, by (kind, candidate)."""
    end = time.monotonic() + limit
    command = [sys.executable, str(Path(__file__).resolve()), "--check"]
    running = {
        (kind, name): subprocess.Popen(
            [*command, kind, name, *models], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for kind, name, models in jobs
    }
    failed: dict[tuple[str, str], str] = {}
    for (kind, name), process in running.items():
        try:
            text, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
            text += f" no answer within {limit} s"
        last = text.strip().splitlines()[-1] if text.strip() else "nothing said"
        emit(kind=kind, candidate=name, check=last[:300], passed=process.returncode == 0)
        if process.returncode != 0:
            failed[kind, name] = last
    return failed


def time_graph(work: Callable[[], object], seconds: float = 0.05) -> float:
    """Median seconds of one replay of `work`, captured."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    spans: list[float] = []
    begun = time.monotonic()
    while len(spans) < 5 or (time.monotonic() - begun < seconds and len(spans) < 50):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        spans.append(start.elapsed_time(end) / 1e3)
    return statistics.median(spans)


def prefill_rows(models: list[str], failed: dict[tuple[str, str], str], pool: torch.Tensor) -> Iterator[dict[str, object]]:
    for model in models:
        for shapes in CHUNKS:
            step = make_step(MODELS[model], shapes, pool)
            for name in PREFILLS if model == "8B" else OTHERS:
                if ("prefill", name) in failed or (isinstance(PREFILLS[name], str) and len(shapes) > 1):
                    continue
                spent = time_graph(partial(run_prefill, name, step))
                case = f"{len(shapes)}x{shapes[0][0]}+{shapes[0][1] - shapes[0][0]}"
                yield {"kind": "prefill", "model": model, "case": case, "candidate": name, "us": round(spent * 1e6, 1),
                       "value": round(step.flops() / spent / 1e12, 1)}  # fmt: skip


def decode_step(heads: Heads, shapes: list[tuple[int, int]], pool: torch.Tensor) -> tuple[Step, int]:
    """→ (a step, the layers it rotates through: 300 MB of keys and values where the pool has them)."""
    read = heads.token_bytes(pool) * sum(length for _, length in shapes)
    layers = max(2, min(32, -(-300_000_000 // read)))
    while layers > 1 and read * layers * 1.1 > pool.nbytes:
        layers -= 1
    return make_step(heads, shapes, pool, layers=layers, bound=GRAPH_BOUND), layers


def decode_rows(models: list[str], failed: dict[tuple[str, str], str], pool: torch.Tensor) -> Iterator[dict[str, object]]:
    pool8 = memory(pool.numel(), FP8)
    for model in models:
        for shapes in MIXES:
            steps: dict[torch.dtype, tuple[Step, int]] = {}
            for name in [*DECODES, *FP8_DECODES] if model == "8B" else OTHER_DECODES:
                if ("decode", name) in failed:
                    continue
                stored = pool8 if name in FP8_DECODES else pool
                if stored.dtype not in steps:
                    steps[stored.dtype] = decode_step(MODELS[model], shapes, stored)
                step, layers = steps[stored.dtype]
                step.plan.scratch.clear()
                run_decode(name, step)  # the plan is made once a step: not in the layers' time

                def every_layer(name: str = name, step: Step = step, layers: int = layers) -> None:
                    for layer in range(layers):
                        run_decode(name, step, layer)

                spent = time_graph(every_layer, 0.02) / layers
                case = "1x131072+31x4096" if shapes[0] != shapes[-1] else f"{len(shapes)}x{shapes[0][1]}"
                yield {"kind": "decode", "model": model, "case": case, "candidate": name, "us": round(spent * 1e6, 2),
                       "value": round(step.bytes_read() / spent / 1e9, 1)}  # fmt: skip


def emit(**row: object) -> None:
    line = json.dumps(row)
    print(line, flush=True)
    folder = os.environ.get("OUT")
    if folder:
        with (Path(folder) / "attention.jsonl").open("a") as file:
            file.write(line + "\n")


def print_tables(rows: list[dict[str, object]]) -> None:
    for kind, model in dict.fromkeys((row["kind"], row["model"]) for row in rows):
        mine = [row for row in rows if (row["kind"], row["model"]) == (kind, model)]
        cases = list(dict.fromkeys(str(row["case"]) for row in mine))
        unit = "TFLOP/s" if kind == "prefill" else "GB/s (us a layer)"
        print(f"\n{kind} {model}, {unit}: " + " | ".join(cases))
        for name in dict.fromkeys(str(row["candidate"]) for row in mine):
            cells = {str(row["case"]): row for row in mine if row["candidate"] == name}
            texts = []
            for case in cases:
                row = cells.get(case)
                shown = "-" if row is None else f"{row['value']}" + ("" if kind == "prefill" else f" ({row['us']})")
                texts.append(shown)
            print(f"{name:18s} " + " | ".join(texts))


def main() -> None:
    if sys.argv[1:2] == ["--check"]:
        check(sys.argv[2], sys.argv[3], sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=100.0, help="stop timing after this long")
    parser.add_argument("--only", choices=["prefill", "decode"], help="one kind only")
    arguments = parser.parse_args()
    begun = time.monotonic()
    kinds = [arguments.only] if arguments.only else ["prefill", "decode"]
    jobs = []
    for kind in kinds:
        names, others = (list(PREFILLS), OTHERS) if kind == "prefill" else ([*DECODES, *FP8_DECODES], OTHER_DECODES)
        jobs += [(kind, name, list(MODELS) if name in others else ["8B"]) for name in names]
    failed = check_all(jobs, limit=min(60.0, arguments.seconds / 2))
    emit(checked_after=round(time.monotonic() - begun, 1))
    rows: list[dict[str, object]] = []
    pool = memory(5 << 30)
    makers = {"prefill": prefill_rows, "decode": decode_rows}
    order = [(kind, [model]) for model in MODELS for kind in kinds]
    for kind, models in order:
        for row in makers[kind](models, failed, pool):
            rows.append(row)
            emit(**row)
            if time.monotonic() - begun > arguments.seconds - 3:
                break
    print_tables(rows)
    print(f"\ndevice: {torch.cuda.get_device_name()}; torch {torch.__version__}; {time.monotonic() - begun:.0f} s")
    for key, text in failed.items():
        print("failed:", *key, text[:200])


if __name__ == "__main__":
    main()
