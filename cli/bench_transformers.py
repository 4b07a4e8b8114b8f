"""`ws bench throughput MODEL --against transformers`: the same folder, float32, threads and tokens on both sides.

Three workloads, greedy, end-of-sequence ignored: one request; 32 of mixed length, which transformers runs as one static
left-padded batch to the longest output; and the same 32 one by one. Only tokens that were asked for count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workstation.cli.bench_workload import Job, print_rows, uniform_jobs

Generated = list[list[int]]
REPEATS = 3
INPUTS, OUTPUTS, BATCH = (20, 300), (20, 200), 32


@dataclass(frozen=True, slots=True)
class Comparison:
    """Best tokens per second of each side on each workload, and how many greedy sequences were equal.

    `batch` is the 32 together; `one_by_one` is transformers' only: ours is compared with `batch`.
    """

    ours_single: float
    theirs_single: float
    ours_batch: float
    theirs_batch: float
    theirs_one_by_one: float
    equal: int
    compared: int


class TransformersRunner:
    """transformers' own generate() over a folder, in float32 on the CPU or a GPU."""

    def __init__(self, folder: Path, device: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.torch, self.device = torch, device
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.to(device).eval()
        config = self.model.generation_config
        config.eos_token_id = None  # ignore_eos: both sides generate exactly what was asked for
        config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None

    def generate(self, jobs: Sequence[Job]) -> Generated:
        """One static batch: left-padded to the longest prompt, run to the longest output."""
        torch = self.torch
        longest, steps = max(len(job.prompt) for job in jobs), max(job.output_len for job in jobs)
        ids = torch.tensor([[0] * (longest - len(job.prompt)) + job.prompt for job in jobs], device=self.device)
        mask = torch.tensor(
            [[0] * (longest - len(job.prompt)) + [1] * len(job.prompt) for job in jobs], device=self.device
        )
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, pad_token_id=0)
        return [row[longest : longest + job.output_len].tolist() for row, job in zip(out, jobs, strict=True)]


class Race:
    """Several contenders on the same jobs, in turns, so that a machine that slows down slows all of them."""

    def __init__(self, jobs: Sequence[Job], **contenders: Callable[[], Generated]) -> None:
        self._asked = sum(job.output_len for job in jobs)
        self._contenders = contenders
        self.rates = dict.fromkeys(contenders, 0.0)
        self.tokens: dict[str, Generated] = {}

    def run(self, rounds: int) -> Race:
        """Each contender `rounds` times; keeps its best tokens asked for per second, and its last tokens."""
        for _ in range(rounds):
            for name, generate in self._contenders.items():
                begun = time.perf_counter()
                self.tokens[name] = generate()
                self.rates[name] = max(self.rates[name], self._asked / (time.perf_counter() - begun))
        return self


def compare(
    ours: Callable[[Sequence[Job]], Generated], theirs: TransformersRunner, vocabulary: Sequence[int], seed: int,
    say: Callable[[str], None],
) -> Comparison:  # fmt: skip
    """Run the three workloads on both sides; each side warms up first. `say` is told what begins."""
    jobs = uniform_jobs(BATCH, INPUTS, OUTPUTS, vocabulary, seed)
    single = uniform_jobs(1, (128, 128), (128, 128), vocabulary, seed + 1)
    warm = uniform_jobs(2, (16, 32), (4, 8), vocabulary, seed + 2)
    ours(warm)
    theirs.generate(warm)
    say("one request")
    one = Race(single, ws=lambda: ours(single), transformers=lambda: theirs.generate(single)).run(REPEATS)
    say(f"{len(jobs)} requests together")
    many = Race(jobs, ws=lambda: ours(jobs), transformers=lambda: theirs.generate(jobs)).run(REPEATS)
    say(f"the {len(jobs)} requests one by one, transformers only: the longest part")
    alone = Race(jobs, transformers=lambda: [theirs.generate([job])[0] for job in jobs]).run(1)
    mine = [*one.tokens["ws"], *many.tokens["ws"]]
    others = [*one.tokens["transformers"], *alone.tokens["transformers"]]
    return Comparison(
        ours_single=one.rates["ws"], theirs_single=one.rates["transformers"], ours_batch=many.rates["ws"],
        theirs_batch=many.rates["transformers"], theirs_one_by_one=alone.rates["transformers"],
        equal=sum(a == b for a, b in zip(mine, others, strict=True)), compared=len(mine),
    )  # fmt: skip


def report(result: Comparison, threads: int) -> None:
    """The comparison as three small tables."""
    print(f"float32, {threads} threads, greedy, tokens/s (best of {REPEATS}, in turns; one by one: once)")
    for title, ours, theirs in (
        ("one request, 128 tokens in, 128 out", result.ours_single, result.theirs_single),
        (f"{BATCH} requests of 20-300 in, 20-200 out; transformers: one padded batch", result.ours_batch,
         result.theirs_batch),
        (f"the {BATCH} requests; transformers: one by one", result.ours_batch, result.theirs_one_by_one),
    ):  # fmt: skip
        print_rows(title, [("ws", f"{ours:.1f}"), ("transformers", f"{theirs:.1f}"), ("ratio", f"{ours / theirs:.2f}x")])
    why = "" if result.equal == result.compared else "; others part from a token on, as they may where two logits nearly tie"
    print(f"equal greedy outputs: {result.equal} of {result.compared}{why}")
