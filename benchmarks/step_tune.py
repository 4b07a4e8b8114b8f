"""Tunes a decode step's products where they run.

    PYTHONPATH=.:benchmarks python benchmarks/step_tune.py FOLDER 8b fp8 --rows 1 8

`gemm.py` measures a product alone. In a step its weights are fetched while the kernel in front still runs, and what is
fastest alone need not be so there. Here each weight shape's best candidates alone are put into the step one after another: it
is captured with the candidate, and replayed by turns with the step as it was. What wins by KEEP in most turns stays.

FOLDER holds the config.json of the model whose shapes are named next (weights are random), then comes the scheme that its
layers will have. Prints a JSON line a product, and writes the rows that changed as a tuned
file, to be put into the one in `kernels/tuned/`. What seems to gain 1 % is near the noise: measure whole steps with and
without the rows afterwards. Needs a GPU of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch
from gemm import GATE_UP, HEADS, SHAPES, Compiler, halved, tolerance, write_rows
from gemm_candidates import KINDS, candidates
from gemm_measure import Weights, error_of, make_bench, time_config

from workstation import LLM, SamplingParams
from workstation.engine.engine import Engine
from workstation.engine.graphs import Shape
from workstation.engine.request import EngineRequest
from workstation.kernels import gemm_launch, launch_codes, launch_int, tuning
from workstation.kernels.gemm_launch import device_of
from workstation.kernels.tuning import CODE_SCHEMES, FUSED_ROWS, HALVED_ROWS, INTEGER_BITS, Device, GemmConfig, Problem, Scheme

KEEP = 0.997  # of the step's time, at most, for another configuration to be taken
TURNS = 8
CONTEXT, OUTPUT = 256, 1500
CHAINED_ROWS = 64  # as `gemm_launch.chosen` has it
FINALISTS, SLOWER = 8, 1.25  # candidates of a product that get into the step, and how much slower alone than the best


def problems(model: str, scheme: Scheme, m: int) -> list[Problem]:
    """A step's products, the largest first."""
    fused = m <= FUSED_ROWS or scheme not in (*INTEGER_BITS, *CODE_SCHEMES)
    found = [Problem(scheme, "silu_mul" if fused and shape in GATE_UP else "linear", m, *shape) for shape in SHAPES[model]]
    if scheme == "int4" and m <= HALVED_ROWS:
        apart = halved(model, m)
        taken = {(problem.n, problem.k) for problem in apart}
        found = apart + [problem for problem in found if (problem.n, problem.k) not in taken]
    found.append(Problem("16bit", "linear", m, *HEADS[model]))
    return sorted(found, key=lambda problem: -problem.n * problem.k * problem.weight_bytes)


def chained(problem: Problem, configs: list[GemmConfig]) -> list[GemmConfig]:
    """As a step would launch them: with few rows, dependent on the kernel in front, whatever a configuration says."""
    return list(dict.fromkeys(replace(config, pdl=config.pdl or problem.m <= CHAINED_ROWS) for config in configs))


class Table:
    """The tuned table that the engine reads, a row of it exchanged."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._rows = tuning.tuned(device.name)

    def config(self, problem: Problem) -> GemmConfig:
        return tuning.choose(problem, self._device)

    def put(self, problem: Problem, config: GemmConfig) -> None:
        key = (problem.scheme, problem.output, problem.n, problem.k)
        rows = dict(self._rows.get(key, ())) | {problem.m: config}
        self._rows[key] = tuple(sorted(rows.items()))
        for module in (gemm_launch, launch_int, launch_codes):
            module._cached_choice.cache_clear()


class Bed:
    """An engine in the middle of a decode of m rows; its step is captured anew for every configuration."""

    def __init__(self, engine: Engine, m: int, steps: int) -> None:
        self._engine, self._m, self._steps, self._left, self._made = engine, m, steps, 0, 0
        self._graphs = engine._runner._graphs

    @torch.inference_mode()
    def captured(self) -> Any:
        """The step's graph with the table as it is."""
        torch.cuda.synchronize()
        self._graphs.capture([Shape(self._m)], self._engine._runner.logits_room, lambda done, total: None)
        return self._graphs._captured

    def turn(self, graph: Any) -> float:
        """Milliseconds a step with this graph."""
        if self._left < self._steps + 1:
            self._refill()
        torch.cuda.synchronize()
        self._graphs._captured = graph
        self._engine.step()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(self._steps):
            self._engine.step()
        torch.cuda.synchronize()
        self._left -= self._steps + 1
        return (time.perf_counter() - begun) / self._steps * 1e3

    def _refill(self) -> None:
        while self._engine.has_work:
            self._engine.step()
        rng = random.Random(self._made)
        params = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)
        for _ in range(self._m):
            self._made += 1
            prompt = [rng.randrange(self._engine.info.logits_width) for _ in range(CONTEXT)]
            self._engine.submit(EngineRequest(str(self._made), prompt, params))
        for _ in range(self._m * CONTEXT // self._engine.info.max_num_batched_tokens + 10):
            self._engine.step()
        self._left = OUTPUT - 60


def finalists(problem: Problem, today: GemmConfig, configs: list[GemmConfig], weights: Weights) -> list[GemmConfig]:
    """The right ones that are fast alone, the fastest first, without today's."""
    bench = make_bench(problem, weights)
    times: list[tuple[float, GemmConfig]] = []
    for config in configs:
        try:
            if error_of(bench, config) < tolerance(problem):
                times.append((time_config(bench, config, 3), config))
        except RuntimeError as failure:
            print(f"left out {config}: {str(failure)[:120]}", flush=True)
    times.sort(key=lambda pair: pair[0])
    return [config for took, config in times if took < SLOWER * times[0][0] and config != today][:FINALISTS]


def settle(bed: Bed, table: Table, problem: Problem, configs: list[GemmConfig], deadline: float) -> dict[str, Any]:
    """Try every candidate in the step; the table keeps the best. → what came of it."""
    best = table.config(problem)
    graph, first, tried = bed.captured(), None, 0
    for config in configs:
        if time.monotonic() > deadline:
            break
        table.put(problem, config)
        other = bed.captured()
        pairs = [(bed.turn(graph), bed.turn(other)) for _ in range(TURNS)]
        before, after = (statistics.median(side) for side in zip(*pairs, strict=True))
        first, tried = first or before, tried + 1
        if after < KEEP * before and sum(b < a for a, b in pairs) > TURNS * 3 // 4:
            best, graph = config, other
            print(json.dumps({"better": astuple(config), "ms": [round(before, 4), round(after, 4)]}), flush=True)
    table.put(problem, best)
    return {"m": problem.m, "n": problem.n, "k": problem.k, "output": problem.output, "tried": tried,
            "config": astuple(best), "ms_before": first, "ms_now": statistics.median(bed.turn(graph) for _ in range(TURNS))}


def main() -> None:
    options = _options()
    begun = time.monotonic()
    compiler = Compiler(options.workers)  # before the first CUDA call
    device = device_of(torch.device("cuda", 0))
    table = Table(device)
    plans = {problem: chained(problem, candidates(problem, device, options.kinds)) for m in options.rows
             for problem in problems(options.model, options.scheme, m)}
    compiler.compile([(problem, config) for problem, configs in plans.items() for config in configs], device.capability,
                     options.seconds * 0.3)
    weights = Weights(torch.cuda.get_device_properties(0).L2_cache_size, max(problem.n * problem.k for problem in plans))
    chosen: dict[Problem, list[GemmConfig]] = {}
    for problem, configs in plans.items():
        ready = [config for config in configs if compiler.ready(problem, config, device.capability)]
        today = chained(problem, [table.config(problem)])[0]
        chosen[problem] = finalists(problem, today, ready, weights)
    del weights
    torch.cuda.empty_cache()
    print(f"{time.monotonic() - begun:.0f} s: {sum(map(len, chosen.values()))} finalists", flush=True)
    llm = LLM(str(options.folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True,
              max_model_len=CONTEXT + OUTPUT, max_num_seqs=max(options.rows), enable_prefix_caching=False,
              quantization=options.quantization)
    changed: list[tuple[Problem, GemmConfig]] = []
    beds = {m: Bed(llm.engine, m, options.steps) for m in options.rows}
    end, left = begun + options.seconds, len(chosen)
    for problem, configs in chosen.items():
        today = table.config(problem)
        share = (end - time.monotonic()) / left
        found = settle(beds[problem.m], table, problem, configs, time.monotonic() + share)
        left -= 1
        print(json.dumps(found), flush=True)
        if table.config(problem) != today:
            changed.append((problem, table.config(problem)))
        write_rows(options.out, [tuning.make_row(problem, config) for problem, config in changed], device, "step_tune.py")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", choices=list(SHAPES))
    parser.add_argument("scheme")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--quantization", choices=["fp8", "int8", "int4", "nf4"], default=None)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--seconds", type=float, default=120, help="stop after about this long")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the tuned file")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


if __name__ == "__main__":
    main()
