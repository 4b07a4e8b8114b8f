"""Inputs, oracles and clocks for `gemm.py`: fresh random inputs, poisoned outputs, CUDA graphs over rotating weights."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from workstation.kernels import gemm_launch, launch_codes, ops, reference_codes
from workstation.kernels.code_tables import E2M1, NF4, ScaleKind, kept_groups
from workstation.kernels.code_weights import CodeWeight
from workstation.kernels.gemm_compile import GROUP
from workstation.kernels.gemm_launch import FP8, Operands
from workstation.kernels.int_weights import IntWeight
from workstation.kernels.launch_int import widened
from workstation.kernels.reference_int import take_apart, widen
from workstation.kernels.tuning import CODE_SCHEMES, GROUPED, INTEGER_BITS, GemmConfig, Problem

Launch = Callable[[], object]


class Weights:
    """One long random buffer a dtype; a weight matrix is a window into it, and successive windows outrun the L2."""

    def __init__(self, l2_bytes: int, most_elements: int) -> None:
        self.l2_bytes = l2_bytes
        room = torch.cuda.mem_get_info()[0] // 6
        elements = min(most_elements + most_elements // 8, room)
        self.wide = torch.empty(elements, dtype=torch.bfloat16, device="cuda")
        self.narrow = torch.empty(elements, dtype=FP8, device="cuda")
        for at in range(0, elements, 1 << 27):
            part = torch.randn(min(1 << 27, elements - at), device="cuda")
            self.wide[at : at + part.numel()] = part.to(torch.bfloat16)
            self.narrow[at : at + part.numel()] = part.to(FP8)
        self.scales = torch.rand(1 << 18, device="cuda") + 0.5

    def fits(self, problem: Problem) -> bool:
        return problem.n * problem.k <= self.wide.numel()

    def windows(self, problem: Problem) -> list[Any]:
        """Different [n, k] matrices, together at least three times the L2 where the buffer is long enough."""
        size = problem.n * problem.k
        if problem.scheme in INTEGER_BITS:
            return self._integers(problem)
        if problem.scheme in CODE_SCHEMES:
            return self._codes(problem)
        buffer = self.wide if problem.scheme == "16bit" else self.narrow
        wanted = max(2, int(-(-3 * self.l2_bytes // (size * problem.weight_bytes))))
        count = min(wanted, buffer.numel() // size)
        return [buffer[i * size : (i + 1) * size].view(problem.n, problem.k) for i in range(count)]

    def _integers(self, problem: Problem) -> list[IntWeight]:
        """Symmetric, with a scale a group of 128; codes are the wide buffer's bits, which are as random as need be."""
        bits, words = INTEGER_BITS[problem.scheme], self.wide.view(torch.int16)
        width = problem.k * bits // 16
        size = problem.n * width
        wanted = max(2, -(-3 * self.l2_bytes // (2 * size)))
        count = min(wanted, words.numel() // size)
        scale = self.scales[: problem.n].to(torch.bfloat16).repeat(problem.k // GROUP, 1) / (1 << bits - 1)
        return [IntWeight(words[i * size : (i + 1) * size].view(problem.n, width), scale, None, bits, GROUP, problem.k)
                for i in range(count)]  # fmt: skip

    def _codes(self, problem: Problem) -> list[CodeWeight]:
        """NF4 in groups of 64, MXFP4, or NVFP4 with a multiplier; codes as `_integers` has them, scales of their own."""
        words = self.wide.view(torch.int16)
        width = problem.k // 4
        size = problem.n * width
        count = min(max(2, -(-3 * self.l2_bytes // (2 * size))), words.numel() // size)
        numbers = self.scales[: problem.n]
        group, kind, values = {"nf4": (64, ScaleKind.F32, NF4), "mxfp4": (32, ScaleKind.E8M0, E2M1),
                               "nvfp4": (16, ScaleKind.E4M3, E2M1)}[problem.scheme]  # fmt: skip
        groups = kept_groups(group, problem.k)

        def scale() -> torch.Tensor:
            if kind is ScaleKind.F32:
                return numbers.repeat(groups, 1)
            low, high = (124, 128) if kind is ScaleKind.E8M0 else (0x30, 0x40)
            stored = torch.randint(low, high, (groups // 4, problem.n, 4), dtype=torch.uint8, device="cuda")
            return stored.view(torch.int32)[..., 0]

        factor = numbers if kind is ScaleKind.E4M3 else None
        table = torch.tensor(values, device="cuda")
        return [CodeWeight(words[i * size : (i + 1) * size].view(problem.n, width), scale(), factor, table, values, kind,
                           group, problem.k) for i in range(count)]  # fmt: skip


@dataclass
class Bench:
    """One problem's inputs and what they must give, `expected` being for the first of the weights."""

    problem: Problem
    inputs: list[Operands]
    expected: torch.Tensor

    @property
    def silu(self) -> bool:
        return self.problem.output == "silu_mul"


def make_bench(problem: Problem, weights: Weights, first: int = 0) -> Bench:
    """Fresh random activations, scaled for results of about 1; `first` picks the weight that is checked."""
    windows = weights.windows(problem)
    first %= len(windows)
    windows = windows[first:] + windows[:first]
    x = torch.randn(problem.m, problem.k, device="cuda")
    shrink = problem.k**-0.5
    x_scale = None
    if problem.scheme == "fp8":
        x, x_scale = x.to(FP8), (torch.rand(problem.m, device="cuda") + 0.5) * shrink
    else:
        x = (x * shrink).to(torch.bfloat16)
    scale = weights.scales[: problem.n] if problem.scheme.startswith("fp8") else None
    inputs = [Operands(x, weight, scale, x_scale) for weight in windows]
    expected = _expected(inputs[0], problem)
    if problem.scheme == "int4_halves":
        inputs = [replace(operands, x=take_apart(x)) for operands in inputs]
    return Bench(problem, inputs, expected)


def _expected(operands: Operands, problem: Problem) -> torch.Tensor:
    """float32 products without TF32, a slice of the channels at a time."""
    weight = operands.weight
    starts = range(0, problem.n, 1 << 14)
    if isinstance(weight, CodeWeight):
        slices = [reference_codes.widen(weight.part(at, min(at + (1 << 14), problem.n)), torch.float32) for at in starts]
    elif isinstance(weight, IntWeight):
        slices = [widen(weight.part(at, min(at + (1 << 14), problem.n)), torch.float32) for at in starts]
    else:
        slices = [weight[at : at + (1 << 14)].float() for at in starts]
    parts = [operands.x.float() @ part.t() for part in slices]
    y = torch.cat(parts, 1)
    if operands.weight_scale is not None:
        y = y * operands.weight_scale
    if operands.x_scale is not None:
        y = y * operands.x_scale[:, None]
    if problem.output != "silu_mul":
        return y
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((out.float() - expected).norm() / expected.norm()).nan_to_num(torch.inf))


def error_of(bench: Bench, config: GemmConfig) -> float:
    """||out - expected|| / ||expected|| with every buffer the kernels write poisoned before."""
    launches, out = launches_of(bench, bench.inputs[0], config)
    for launch in launches:
        launch.launch()
    return relative_error(out, bench.expected)


def launches_of(bench: Bench, operands: Operands, config: GemmConfig) -> tuple[list[gemm_launch.Call], torch.Tensor]:
    """The product's kernels into buffers full of NaN: the product itself, then the sum of its parts if K is split."""
    m, k = bench.problem.m, bench.problem.k
    width = bench.problem.n // 2 if bench.silu else bench.problem.n
    out = torch.full((m, width), torch.nan, dtype=torch.bfloat16, device="cuda")
    splits = gemm_launch.split_count(k, config)
    if splits == 1 or config.kind == "hopper":
        return [gemm_launch.gemm_call(operands, config, out, m, width, k, silu=bench.silu)], out
    partial = torch.full((splits, m, bench.problem.n), torch.nan, device="cuda")
    product = gemm_launch.gemm_call(operands, config, partial, m, bench.problem.n, k, silu=False)
    return [product, gemm_launch.reduce_call(partial, out, None, silu=bench.silu, pdl=config.pdl)], out


def time_config(bench: Bench, config: GemmConfig, repeats: int, *, parts_only: bool = False) -> float:
    """Microseconds a product, its reduction included unless `parts_only`; outputs are shared, weights rotate, and with them the
    scales of a ring."""
    calls: list[Launch] = []
    shared, _ = launches_of(bench, bench.inputs[0], config)
    own = 3 if config.kind == "hopper" and bench.problem.scheme in GROUPED else 2  # x, the weight, its scales
    for operands in bench.inputs:
        product = launches_of(bench, operands, config)[0][0]
        product = product._replace(arguments=(*product.arguments[:own], *shared[0].arguments[own:]))
        calls += [product.launch] + [call.launch for call in shared[1:] if not parts_only]
    return time_graph(calls, repeats) / len(bench.inputs)


def time_library(bench: Bench, repeats: int) -> float | None:
    """Microseconds of torch's own product (and our SiLU·mul behind it); None where torch has none for the dtypes."""
    if bench.problem.scheme in ("fp8_weight", "int4_halves"):
        return None

    def product(operands: Operands) -> object:
        if isinstance(operands.weight, IntWeight):
            y = widened(operands.x, operands.weight, None, None)
        elif isinstance(operands.weight, CodeWeight):
            y = widened(operands.x, operands.weight, None, None, launch_codes.widen_call)
        else:
            inputs = (operands.x, operands.weight, operands.weight_scale, operands.x_scale)
            y = gemm_launch.library_linear(*inputs, None, None, torch.bfloat16)
        return ops.silu_mul(y) if bench.silu else y

    calls: list[Launch] = [partial(product, operands) for operands in bench.inputs]
    return time_graph(calls, repeats) / len(calls)


def time_graph(calls: list[Launch], repeats: int) -> float:
    """Median microseconds of one replay of all calls, captured as a CUDA graph, after a warm-up outside and inside it."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
        calls[-1]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return float(statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))) * 1e3
