"""Tunes and measures the small matrix products on this GPU: `python benchmarks/gemm.py --seconds 330 --out results`.

For every weight shape of the models, scheme and number of rows: the library's time, then the candidates, each checked
against a float32 oracle first. Writes `gemm.json` (every point: configuration, microseconds, GB/s, error, the library's
time), the tuned file for `kernels/tuned/`, and prints a table. The kernels are compiled beforehand, in parallel. What did
not fit into the time is left out and counted. Needs torch, Triton and a GPU; nothing else may run on it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import time
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from gemm_candidates import KINDS, candidates
from gemm_measure import Bench, Weights, error_of, make_bench, time_config, time_library

from workstation.kernels import tuning
from workstation.kernels.gemm_compile import compile_for, fingerprint
from workstation.kernels.gemm_launch import device_of, split_count
from workstation.kernels.offline import resources
from workstation.kernels.tuning import (
    LIBRARY,
    Device,
    GemmConfig,
    Problem,
    Scheme,
)

SHAPES: dict[str, list[tuple[int, int]]] = {
    "8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "70b": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
    "0.6b": [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)],
}
HEADS = {"8b": (128256, 4096), "70b": (128256, 8192), "0.6b": (151936, 1024)}  # 16-bit in every checkpoint format
GATE_UP = {(28672, 4096), (57344, 8192), (6144, 1024)}  # 6144 x 4096 is a QKV, so the pair decides
ROWS = [1, 8, 32, 128, 16, 64, 256, 2, 4]  # the most telling first, for when time runs out
SCHEMES: list[Scheme] = ["fp8", "16bit", "fp8_weight", "int4", "int4_halves", "int8_weight", "nf4", "mxfp4", "nvfp4"]
TOLERANCE = 4e-3  # of bfloat16 results, SiLU's included
FP8_TOLERANCE = 1e-2  # of FP8 sums inside the tensor cores
VERIFIED = 50  # runs of a winner, none of which may be wrong
KEEP_OWN = 0.98  # the library must be this much faster to be chosen


@dataclass
class Point:
    """One problem's outcome: microseconds by the library, and of the best configuration."""

    problem: Problem
    library_us: float | None = None
    config: GemmConfig | None = None
    us: float = float("inf")
    error: float = float("inf")
    tried: int = 0
    wrong: list[Any] = field(default_factory=list)

    def gigabytes_per_second(self, microseconds: float) -> float:
        weight = self.problem.n * self.problem.k * self.problem.weight_bytes
        return round(weight / microseconds / 1e3)


def problems(models: list[str], schemes: list[Scheme], rows: list[int]) -> list[Problem]:
    """In the order of interest."""
    found = []
    for m, scheme in itertools.product(rows, schemes):
        if scheme == "int4_halves":
            found += [problem for model in models for problem in halved(model, m)]
            continue
        for model in models:
            for n, k in SHAPES[model]:
                found.append(Problem(scheme, "linear", m, n, k))
                if (n, k) in GATE_UP:
                    found.append(Problem(scheme, "silu_mul", m, n, k))
            if scheme == "16bit":
                found.append(Problem(scheme, "linear", m, *HEADS[model]))
    return found


def halved(model: str, m: int) -> list[Problem]:
    """The products behind a norm, QKV and gate-up, where it may take few rows apart."""
    shapes = (SHAPES[model][0], SHAPES[model][2]) if m <= tuning.FEW_ROWS else ()
    return [Problem("int4_halves", "silu_mul" if shape in GATE_UP else "linear", m, *shape) for shape in shapes]


def _compile(problem: Problem, config: GemmConfig, capability: int) -> dict[str, Any]:
    """In a worker: fills Triton's cache, and says what the kernel takes."""
    try:
        return asdict(resources(compile_for(problem, config, capability)))
    except Exception as error:  # any configuration may be beyond the compiler; it is left out and listed
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


class Compiler:
    """Worker processes, forked before this process touches the GPU."""

    def __init__(self, workers: int) -> None:
        self.pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"))
        wait([self.pool.submit(os.getpid) for _ in range(workers)])
        self.known: dict[Any, dict[str, Any]] = {}

    def compile(self, wanted: list[tuple[Problem, GemmConfig]], capability: int, seconds: float) -> None:
        """Each kernel once, in the order given, for at most this long."""
        jobs: dict[Any, Future[dict[str, Any]]] = {}
        for problem, config in wanted:
            key = fingerprint(problem, config, capability)
            if key not in jobs and key not in self.known:
                jobs[key] = self.pool.submit(_compile, problem, config, capability)
        wait(jobs.values(), timeout=seconds)
        for key, job in jobs.items():
            if not job.cancel() and job.done():
                self.known[key] = job.result()
        failed = [found for found in self.known.values() if "failed" in found or found.get("stack")]
        print(f"compiled {len(self.known)} kernels, {len(jobs)} asked for now, {len(failed)} fail or spill", flush=True)

    def ready(self, problem: Problem, config: GemmConfig, capability: int) -> bool:
        return self.known.get(fingerprint(problem, config, capability), {"stack": 1}).get("stack") == 0


def search(point: Point, bench: Bench, configs: list[GemmConfig], deadline: float) -> None:
    """Every configuration once, shortly; the three best again, longer; the winner on fresh inputs by the caller."""
    point.library_us = time_library(bench, 7)
    times: list[tuple[float, GemmConfig]] = []
    for config in configs:
        if time.monotonic() > deadline and point.tried >= 4:
            break
        _try(point, bench, config, times)
    finals = sorted(times, key=lambda pair: pair[0])[:3]
    for _, config in finals:
        took = time_config(bench, config, 9)
        if took < point.us:
            point.us, point.config = took, config


def _try(point: Point, bench: Bench, config: GemmConfig, times: list[tuple[float, GemmConfig]]) -> None:
    try:
        error = error_of(bench, config)
        if not error < tolerance(point.problem):
            point.wrong.append([asdict(config), error])
            return
        split = split_count(point.problem.k, config) > 1 and config.kind != "hopper"
        took = time_config(bench, config, 3, parts_only=split)
        if split and took < min([known for known, _ in times], default=float("inf")):
            took = time_config(bench, config, 3)
        elif split:
            return  # slower than the best even without its sum
        times.append((took, config))
        point.tried += 1
    except (RuntimeError, triton.runtime.errors.OutOfResources) as failure:
        point.wrong.append([asdict(config), str(failure)[:200]])


def tolerance(problem: Problem) -> float:
    """What ‖out - expected‖ / ‖expected‖ must stay below."""
    return FP8_TOLERANCE if problem.scheme == "fp8" else TOLERANCE


def verify(point: Point, weights: Weights) -> None:
    """The winner on fresh activations and another weight, many times; a wrong one is thrown away."""
    if point.config is None:
        return
    bench = make_bench(point.problem, weights, first=1)
    point.error = max(error_of(bench, point.config) for _ in range(VERIFIED))
    if not point.error < tolerance(point.problem):
        point.wrong.append([asdict(point.config), point.error])
        point.config, point.us = None, float("inf")


def try_dependent_launch(points: list[Point], weights: Weights, compiler: Compiler, capability: int, end: float) -> None:
    """Each winner once more with programmatic dependent launch, as long as time lasts."""
    winners = [(p.problem, replace(p.config, pdl=True)) for p in points if p.config and p.config.kind != "hopper"]
    compiler.compile(winners, capability, max(0.0, (end - time.monotonic()) / 2))
    for point in points:
        if time.monotonic() > end or point.config is None or point.config.kind == "hopper":
            continue
        config = replace(point.config, pdl=True)
        if not compiler.ready(point.problem, config, capability):
            continue
        bench = make_bench(point.problem, weights)
        plain = time_config(bench, point.config, 9)
        try:
            took = time_config(bench, config, 9)
            right = error_of(bench, config) < tolerance(point.problem)
        except RuntimeError as failure:
            print(f"dependent launch failed: {failure}", flush=True)
            return
        point.us = plain
        if right and took < 0.99 * plain:
            point.us, point.config = took, config


def tuned_rows(points: list[Point]) -> list[list[Any]]:
    """Rows of a tuned file: ours unless the library is clearly faster."""
    rows = []
    for point in points:
        library = point.library_us or float("inf")
        if point.config is not None or point.library_us:
            best = point.config if point.config is not None and point.us * KEEP_OWN <= library else LIBRARY
            rows.append(tuning.make_row(point.problem, best))
    return sorted(rows, key=lambda row: row[:5])


def write(folder: Path, points: list[Point], device: Device, compiler: Compiler) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    records = [{name: None if value == float("inf") else value for name, value in asdict(p).items()} for p in points]
    kernels = [[list(map(str, key)), found] for key, found in compiler.known.items()]
    results = {"device": asdict(device), "versions": versions, "points": records, "kernels": kernels}
    (folder / "gemm.json").write_text(json.dumps(results, indent=1))
    write_rows(folder, tuned_rows(points), device)


def write_rows(folder: Path, rows: list[list[Any]], device: Device, by: str = "gemm.py") -> None:
    """A tuned file of these rows, named after the device. by: the benchmark that chose them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    origin = f"Measured by benchmarks/{by} on one {device.name} on {time.strftime('%Y-%m-%d')} with {versions}."
    text = f' "device": {json.dumps(asdict(device))},\n "origin": {json.dumps(origin)},\n "rows": [\n{lines}\n ]'
    (folder / (device.name.replace(" ", "_") + ".json")).write_text("{\n" + text + "\n}\n")


def table(points: list[Point]) -> None:
    print("scheme     output    n x k            m  library us  GB/s | ours us   GB/s  error    configuration")
    for point in sorted(points, key=lambda p: (p.problem.scheme, p.problem.n * p.problem.k, p.problem.output, p.problem.m)):
        p, c, library = point.problem, point.config, point.library_us
        theirs = f"{library:10.1f} {point.gigabytes_per_second(library):5.0f}" if library else " " * 16
        ours = f"{point.us:8.1f} {point.gigabytes_per_second(point.us):6.0f} {point.error:.1e}"
        tile = f"{c.kind} {c.block_n},{c.block_m},{c.block_k} s{c.splits} w{c.warps} st{c.stages} {'pdl' * c.pdl}" if c else "-"
        print(f"{p.scheme:10} {p.output:8} {p.n:6} x {p.k:5} {p.m:5} {theirs} | {ours}  {tile}")


def main() -> None:
    options = _options()
    start = time.monotonic()
    end = start + options.seconds
    torch.manual_seed(options.seed)
    compiler = Compiler(options.workers)  # before the first CUDA call
    device = device_of(torch.device("cuda", 0))
    todo = problems(options.models, options.schemes, options.rows)
    if options.weights:
        todo = [problem for problem in todo if f"{problem.n}x{problem.k}" in options.weights]
    plans = {problem: found for problem in todo if (found := candidates(problem, device, options.kinds))}
    todo = list(plans)
    shuffled = random.Random(options.seed)
    for configs in plans.values():
        tail = configs[1:]
        shuffled.shuffle(tail)
        configs[1:] = tail
    kernels = [(problem, config) for problem, configs in plans.items() for config in configs]
    print(f"{device}: {len(todo)} problems, {len(kernels)} candidates", flush=True)
    compiler.compile(kernels, device.capability, options.seconds * 0.4)
    weights = Weights(torch.cuda.get_device_properties(0).L2_cache_size, max(p.n * p.k for p in todo))
    print(f"{time.monotonic() - start:.0f} s: measuring", flush=True)
    points: list[Point] = []
    stop = end - options.seconds * 0.15
    for position, problem in enumerate(todo):
        now = time.monotonic()
        if now > stop or not weights.fits(problem):
            continue
        point = Point(problem)
        ready = [config for config in plans[problem] if compiler.ready(problem, config, device.capability)]
        search(point, make_bench(problem, weights), ready, now + 2 * (stop - now) / (len(todo) - position))
        verify(point, weights)
        points.append(point)
    print(f"{time.monotonic() - start:.0f} s: {len(points)} of {len(todo)} problems measured", flush=True)
    write(options.out, points, device, compiler)
    if device.capability >= 90 and options.pdl:
        try_dependent_launch(points, weights, compiler, device.capability, end)
        write(options.out, points, device, compiler)
    table(points)
    compiler.pool.shutdown(wait=False, cancel_futures=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=330, help="stop after about this long")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for gemm.json and the tuned file")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--weights", nargs="+", metavar="NxK", help="only these weight shapes")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-pdl", dest="pdl", action="store_false", help="do not try programmatic dependent launch")
    return parser.parse_args()


if __name__ == "__main__":
    main()
