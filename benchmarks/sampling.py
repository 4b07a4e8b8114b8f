"""Times a step's sampling on this GPU: `PYTHONPATH=. python benchmarks/sampling.py [--vocabulary V] [--rows 1 32 128 512]`.

For each number of rows and kind of row: microseconds by our kernels on bfloat16 logits, the GB/s that reading the logits
once makes of it, and microseconds by torch on the same logits (with its float32 copy). Both run in CUDA graphs of several
calls; the logits stay where the caches have them, as behind the head. CPU time is that of one call outside a graph,
launches included.
"""

from __future__ import annotations

import argparse
import time
from typing import Any
from unittest import mock

import torch
from gemm_measure import time_graph

from workstation.engine.request import SamplingParams
from workstation.engine.sampler import Sampler
from workstation.engine.sampling_state import SamplingState
from workstation.kernels import ops

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "random": {"temperature": 0.8},
    "min_p": {"temperature": 0.8, "min_p": 0.05},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "top_k, top_p": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "flat top_p": {"temperature": 8.0, "top_p": 0.95},  # a head that is not gathered: the slow path
}
CALLS = 20  # a graph
REPEATS = 10


class Case:
    """Rows of one kind over random logits of a spread that language models have."""

    def __init__(self, rows: int, vocabulary: int, fields: dict[str, Any]) -> None:
        state = SamplingState(rows, vocabulary, "cuda")
        for row in range(rows):
            state.set_row(row, SamplingParams(**fields), seed=row)
        state.flush()
        self.sampler = Sampler(state)
        self.logits = (torch.randn(rows, vocabulary, device="cuda") * 2.5).to(torch.bfloat16)
        self.rows = list(range(rows))
        self.rows_t = torch.arange(rows, device="cuda")
        self.last = torch.zeros(rows, dtype=torch.int64, device="cuda")

    def sample(self) -> torch.Tensor:
        steps = [0] * len(self.rows)
        return self.sampler.sample(self.logits, self.rows, self.rows_t, self.rows_t, steps, self.last).tokens


def measure(case: Case) -> tuple[float, float, float, float]:
    """→ (µs by our kernels, µs by torch, CPU µs of a call by our kernels, share of equal tokens)."""
    mine = case.sample()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(CALLS):
        case.sample()
    cpu = (time.perf_counter() - begun) / CALLS * 1e6
    kernels = time_graph([case.sample] * CALLS, REPEATS) / CALLS
    with mock.patch.object(ops, "samples", lambda logits: False):
        equal = (case.sample() == mine).float().mean().item()
        by_torch = time_graph([case.sample] * CALLS, REPEATS) / CALLS
    return kernels, by_torch, cpu, equal


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 128, 512])
    given = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, V = {given.vocabulary}, bfloat16")
    print(f"{'rows':>5} {'kind':<14} {'µs':>9} {'GB/s':>7} {'torch µs':>9} {'CPU µs':>7} {'equal':>6}")
    for rows in given.rows:
        for kind, fields in KINDS.items():
            case = Case(rows, given.vocabulary, fields)
            kernels, by_torch, cpu, equal = measure(case)
            speed = case.logits.nbytes / kernels / 1e3
            print(f"{rows:>5} {kind:<14} {kernels:>9.1f} {speed:>7.0f} {by_torch:>9.1f} {cpu:>7.1f} {equal:>6.3f}", flush=True)


if __name__ == "__main__":
    main()
