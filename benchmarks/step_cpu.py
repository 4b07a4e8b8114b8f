"""CPU time of a decode step outside the model: `PYTHONPATH=.:benchmarks python benchmarks/step_cpu.py [--rows 1 32 256 512]`.

The real Scheduler, Committer and message encoder on a runner that does nothing. Prints a JSON line a batch size: microseconds
of the thread's CPU time a step takes for planning (schedule), the commit, packing the runner's inputs, and the step's message;
medians over many steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from fake_runner import fake_engine

from workstation.collector import calm_collector
from workstation.engine import wire
from workstation.engine.engine import Engine
from workstation.engine.inputs import pack
from workstation.engine.request import EngineRequest, SamplingParams

VOCABULARY = 128_256
WARM_STEPS, TIMED_STEPS = 8, 400


class Stopwatch:
    """Microseconds of calls, by name."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def watch(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        kept = self.times.setdefault(name, [])

        def timed(*args: Any) -> Any:
            began = time.thread_time_ns()
            found = work(*args)
            kept.append((time.thread_time_ns() - began) / 1e3)
            return found

        return timed

    def medians(self) -> dict[str, float]:
        return {name: round(statistics.median(times), 1) for name, times in self.times.items()}


def running(rows: int, prompt: int) -> Engine:
    """An engine whose `rows` sequences all decode, greedily, far from their end."""
    steps = WARM_STEPS + TIMED_STEPS + 16
    engine = fake_engine(vocabulary=VOCABULARY, rows=rows, max_len=prompt + steps + 16, budget=1 << 20)
    params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)
    for number in range(rows):
        ids = [(number * 7919 + place * 31) % VOCABULARY for place in range(prompt)]
        engine.submit(EngineRequest(f"cmpl-{number:032x}", ids, params))
    for _ in range(WARM_STEPS):
        engine.step()
    return engine


def measure(rows: int, prompt: int) -> dict[str, float]:
    """Medians of the parts of a step; `total` is the step without the idle runner's own time."""
    engine, clock = running(rows, prompt), Stopwatch()
    scheduler: Any = engine._scheduler
    committer: Any = engine._committer
    scheduler.schedule = clock.watch("schedule", scheduler.schedule)
    committer.commit = clock.watch("commit", committer.commit)
    runner: Any = engine._runner
    launch, packed = runner.launch, clock.watch("pack", pack)

    def launch_packed(batch: Any) -> Any:
        packed(batch)
        return launch(batch)

    runner.launch = launch_packed
    encode = clock.watch("encode", lambda events: wire.encode(wire.step(events)))
    message = b""
    for _ in range(TIMED_STEPS):
        message = encode(engine.step())
    found = clock.medians()
    return {"rows": rows, **found, "total": round(sum(found.values()), 1), "message_bytes": len(message)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256, 512])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    arguments = parser.parse_args()
    with calm_collector(freeze=True):
        for rows in arguments.rows:
            print(json.dumps(measure(rows, arguments.prompt)), flush=True)


if __name__ == "__main__":
    main()
