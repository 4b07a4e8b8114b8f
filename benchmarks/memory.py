"""Memory, planned against measured, on a GPU: `PYTHONPATH=. python benchmarks/memory.py ROOT [--cases 1 2 …]`.

ROOT holds folders with a config.json: qwen3-0.6b, llama-8b, llama-8b-fp8, llama-8b-int4, llama-70b-fp8, llama-70b-int4 (weights
are random). Each case runs in a process of its own: start, then a full load with the planned batch and one prompt of the
planned context, sampled in every way. Weights, pool, logits, context and graphs: what the start took (`EngineInfo.measured`);
the workspace is the most that tensors took beside them at any time; the total is the card's (NVML, second form), from before
CUDA was opened to its highest reading, so run it on the machine's first card. Prints a JSON line a case, then a table in MiB,
planned and measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

SHORT = {"gpu_memory_utilization": "utilisation", "max_model_len": "context", "num_gpu_blocks_override": "blocks",
         "quantization": "weights", "kv_cache_dtype": "KV", "max_num_seqs": "rows"}


def case(name: str, utilisation: float, context: int, **settings: Any) -> tuple[str, dict[str, Any]]:
    return name, {"gpu_memory_utilization": utilisation, "max_model_len": context, **settings}


CASES = [
    case("qwen3-0.6b", 0.5, 8192),
    case("qwen3-0.6b", 0.9, 32768, num_gpu_blocks_override=24_000, max_num_seqs=512),
    case("llama-8b", 0.9, 8192),
    case("llama-8b", 0.9, 131072, num_gpu_blocks_override=16_000),
    case("llama-8b-fp8", 0.95, 131072),
    case("llama-8b-fp8", 0.9, 32768, num_gpu_blocks_override=20_000),
    case("llama-8b-fp8", 0.7, 32768, kv_cache_dtype="fp8"),
    case("llama-8b", 0.9, 16384, num_gpu_blocks_override=20_000, quantization="int8"),
    case("llama-8b-int4", 0.9, 32768, num_gpu_blocks_override=20_000),
    case("llama-8b", 0.8, 8192, quantization="nf4"),
    case("llama-70b-int4", 0.9, 32768, num_gpu_blocks_override=6_000),
    case("llama-70b-fp8", 0.95, 8192),
]
PARTS = ("weights", "kv", "workspace", "logits", "context", "graphs", "total")
MIB = 2**20


class Card:
    """The highest reading of the card's used bytes."""

    def __init__(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
        self.before = self.peak = self._used()
        self._over = False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._over = True
        self._thread.join()
        return self.peak - self.before

    def _used(self) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle, version=self._nvml.nvmlMemory_v2).used)

    def _watch(self) -> None:
        while not self._over:
            self.peak = max(self.peak, self._used())
            time.sleep(0.01)


def full_load(llm: Any) -> None:
    """Every row busy, sampled in every way, then one prompt of the whole context."""
    from workstation import SamplingParams

    info = llm.engine.info
    pool = info.num_blocks * info.block_size
    length = min(512, pool // (2 * info.max_num_seqs))
    common: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}
    ways: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.9, "top_k": 40},
                                  {"presence_penalty": 0.5}, {"temperature": 0.7, "min_p": 0.1, "logprobs": 5}]
    prompts = [{"prompt_token_ids": [5 + (number * 7 + at * 13) % 90_000 for at in range(length)]}
               for number in range(info.max_num_seqs)]
    params = [SamplingParams(**common, **ways[number % len(ways)]) for number in range(info.max_num_seqs)]
    llm.generate(prompts, params, use_tqdm=False)
    whole = min(info.max_model_len, pool - info.block_size) - 8
    llm.generate([{"prompt_token_ids": [5 + at * 13 % 90_000 for at in range(whole)]}],
                 [SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)], use_tqdm=False)


def measure(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    card = Card()
    import torch

    from workstation import LLM

    given = {"max_num_seqs": 256, **settings}
    llm = LLM(model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", **given)
    torch.cuda.reset_peak_memory_stats()
    full_load(llm)
    info = llm.engine.info
    plan, found = info.plan, dict(info.measured)
    beside = found["weights"] + found["kv"] + found["logits"]
    found["at_start"] = found["workspace"]
    found["workspace"] = max(found["workspace"], torch.cuda.max_memory_allocated() - beside)
    found["total"] = card.stop()
    planned = {name: plan[name] for name in PARTS[:-1]} | {"workspace": plan["workspace"] + plan["sampler"]}
    planned["total"] = sum(planned.values())
    return {"model": Path(folder).name, **settings, "card": torch.cuda.get_device_name(0), "context": info.max_model_len,
            "blocks": info.num_blocks, "planned": planned, "measured": found}


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| configuration | " + " | ".join(PARTS) + " |", "| --- |" + " --- |" * len(PARTS)]
    for result in results:
        words = [result["model"], *(f"{short} {result[name]}" for name, short in SHORT.items() if name in result)]
        cells = [f"{result['planned'][name] / MIB:,.0f} / {result['measured'][name] / MIB:,.0f}"
                 if name in result["measured"] else f"{result['planned'][name] / MIB:,.0f} / -" for name in PARTS]
        lines.append(f"| {', '.join(words)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(1, len(CASES) + 1)))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, settings = json.loads(arguments.one)
        print(json.dumps(measure(str(arguments.root / name), settings)), flush=True)
        return
    results = []
    for number in arguments.cases:
        command = [sys.executable, __file__, str(arguments.root), "--one", json.dumps(CASES[number - 1])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"case {number} failed: {CASES[number - 1]}", file=sys.stderr)
            continue
        print(done.stdout, end="", flush=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    print(table(results))


if __name__ == "__main__":
    main()
