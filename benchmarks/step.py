"""Where a decode step's time goes on a GPU: `python benchmarks/step.py FOLDER [--batch 1 32] [--context 128]`.

FOLDER holds a config.json; weights are random. For each batch size: wall time a step, CPU time spent launching it, the sum of
its kernels and what is left between them (the gap), and the kernels by time. Prints JSON lines, then a table a batch size.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from workstation import LLM, SamplingParams
from workstation.engine.engine import Engine
from workstation.engine.request import EngineRequest

WARM_STEPS, TIMED_STEPS, PROFILED_STEPS = 40, 50, 10
ROWS_SHOWN = 14


def fill(engine: Engine, batch: int, context: int, vocabulary: int) -> None:
    """Queue `batch` requests that decode long enough for every measurement."""
    rng = random.Random(batch)
    params = SamplingParams(temperature=0.0, max_tokens=WARM_STEPS + TIMED_STEPS + PROFILED_STEPS + 50, ignore_eos=True)
    for number in range(batch):
        prompt = [rng.randrange(vocabulary) for _ in range(context)]
        engine.submit(EngineRequest(f"{batch}-{number}", prompt, params))


def timed(engine: Engine) -> dict[str, float]:
    """Milliseconds a step: wall, and CPU inside `launch`."""
    launching = 0.0
    launch = engine._runner.launch

    def watched(batch: Any) -> Any:
        nonlocal launching
        begun = time.perf_counter()
        step = launch(batch)
        launching += time.perf_counter() - begun
        return step

    engine._runner.launch = watched  # type: ignore[method-assign, assignment]
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(TIMED_STEPS):
        engine.step()
    torch.cuda.synchronize()
    wall = time.perf_counter() - begun
    engine._runner.launch = launch  # type: ignore[method-assign]
    return {"wall_ms": wall / TIMED_STEPS * 1e3, "launch_ms": launching / TIMED_STEPS * 1e3}


def profiled(engine: Engine) -> dict[str, float]:
    """Milliseconds a step by kernel, largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED_STEPS):
            engine.step()
        torch.cuda.synchronize()
    found = {item.key: item.device_time_total / PROFILED_STEPS / 1e3 for item in profile.key_averages()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a model folder; only its config.json is read")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--context", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--quantization", choices=["fp8", "int8", "int4", "nf4"], default=None)
    arguments = parser.parse_args()
    llm = LLM(str(arguments.folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
              max_model_len=arguments.context + 1024, max_num_seqs=max(arguments.batch), enable_prefix_caching=False,
              quantization=arguments.quantization)
    for batch in arguments.batch:
        fill(llm.engine, batch, arguments.context, llm.engine.info.logits_width)
        for _ in range(WARM_STEPS):
            llm.engine.step()
        result = timed(llm.engine)
        kernels = profiled(llm.engine)
        result |= {"kernels_ms": sum(kernels.values()), "gap_ms": result["wall_ms"] - sum(kernels.values())}
        print(json.dumps({"batch": batch, **{name: round(value, 3) for name, value in result.items()}}), flush=True)
        for name, value in list(kernels.items())[:ROWS_SHOWN]:
            print(f"  {value:8.3f} ms  {name[:90]}")
        while llm.engine.has_work:
            llm.engine.step()


if __name__ == "__main__":
    main()
