"""Made-up frames of a busy server for `benchmarks/dashboard.py`: a pool of any size whose blocks move, hundreds of requests."""

from __future__ import annotations

import random
import time
from typing import Any

import msgspec

from workstation.engine.request import EngineStats
from workstation.engine.snapshot import CACHED, FREE, OWNED, SHARED, Picture, RequestRow
from workstation.server.stats import block_stats, request_stats

TOKENS_A_BLOCK = 16
CLIENTS = ("claude-code", "continue", "open-webui", "openai-python", "aider", ":54321")


class Load:
    """Frames one after another; each differs from the last as a server's does in a quarter of a second.

    Args:
        blocks: of the pool.  requests: live at once.
    """

    def __init__(self, blocks: int, requests: int, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._states = bytearray(blocks)
        self._rows = [self._request(number) for number in range(requests)]
        self._made = self._most = requests
        self._second = 1000.0
        self._next = 0
        for _ in range(200):
            self.step()

    def _request(self, number: int) -> RequestRow:
        prompt = self._random.randrange(200, 40_000)
        return RequestRow(
            f"chatcmpl-{number:032x}", self._random.choice(CLIENTS), "decode", 1, prompt, prompt // 2, prompt, 0,
            prompt // TOKENS_A_BLOCK, 0, 1000.0, 1000.0, 1000.1, "chat")

    def step(self) -> None:
        """A quarter of a second: each request makes 12 tokens, some take a block; now and then one ends or another begins."""
        self._second += 0.25
        for row in self._rows:
            row.generated += 12
            row.computed += 12
            row.blocks = row.computed // TOKENS_A_BLOCK
            if self._random.random() < 12 / TOKENS_A_BLOCK:
                self._take(1, OWNED)
        if self._random.random() < 0.5:
            self._take(self._rows.pop(0).blocks, CACHED)
        if len(self._rows) < self._most and self._random.random() < 0.7:
            self._rows.append(self._request(self._made))
            self._take(self._rows[-1].blocks // 2, SHARED)
            self._take(self._rows[-1].blocks // 2, OWNED)
            self._made += 1

    def _take(self, count: int, state: int) -> None:
        """The next blocks in the order of eviction, which goes round the pool."""
        total = len(self._states)
        begin, end = self._next, min(total, self._next + count)
        self._states[begin:end] = bytes([state]) * (end - begin)
        self._next = end % total

    def frame(self, cells: int) -> dict[str, Any]:
        """The answer of `/stats?cells=N` at this moment."""
        states, total = bytes(self._states), len(self._states)
        held = states.count(OWNED) + states.count(SHARED)
        stats = EngineStats(self._second, len(self._rows), 0, states.count(FREE), states.count(CACHED), held, total,
                            kv_tokens_held=int(held * TOKENS_A_BLOCK * 0.98))
        spread = {"p50": 0.084, "p99": 0.31 + self._random.random() / 10}
        return {
            "version": 1, "time": time.time(), "process_bytes": 3 << 30, "look_seconds": 1e-4, "cards": [],
            "server": {"state": "ready", "uptime": self._second, "version": "0", "restarts": 0, "heartbeat_age": 0.1,
                       "cause": "", "loading": None},
            "model": {"name": "made-up-70b", "architecture": "llama", "dtype": "bfloat16", "kv_cache_dtype": "fp8",
                      "device": "cuda:0", "device_name": "H200", "max_model_len": 131_072, "max_num_seqs": 256,
                      "max_num_batched_tokens": 4096, "weight_bytes": 68 << 30, "kv_bytes": 54 << 30,
                      "plan": {"graphs": 1 << 30, "workspace": 2 << 30, "logits": 1 << 28, "sampler": 1 << 28}},
            "gpu": {"name": "H200", "total_bytes": 140 << 30, "used_bytes": 128 << 30,
                    "utilization": 0.9 + self._random.random() / 10, "power_watts": 600 + self._random.randrange(60),
                    "power_limit_watts": 700.0, "temperature_celsius": 60 + self._random.randrange(8),
                    "joules_per_token": 0.39, "memory_utilization": 0.8, "fan": None, "clock_mhz": 1755, "throttle": "",
                    "memory_clock_mhz": 3201, "pcie_read": 2e8, "pcie_write": 1e8, "own_bytes": None, "uuid": "GPU-0"},
            "blocks": msgspec.to_builtins(block_stats(Picture(0, stats, states, [], 0), TOKENS_A_BLOCK, cells)),
            "batch": {"running": len(self._rows), "waiting": 0, "preempted": 0, "steps": 9,
                      "step_seconds": 0.02 + self._random.random() / 100, "step_tokens": 300, "step_prompt_tokens": 266,
                      "budget": 4096},
            "speed": {"prompt_tokens": 9, "generated_tokens": 9, "cached_tokens": 4, "hit_rate": 0.83,
                      "prompt_rate": 6000.0 + self._random.randrange(500),
                      "generate_rate": 1500.0 + self._random.randrange(100), "eviction_rate": 12.0, "preemption_rate": 0.0,
                      "ttft": spread, "itl": spread, "e2e": spread},
            "requests": [msgspec.to_builtins(request_stats(row, self._second)) for row in self._rows],
            "requests_total": len(self._rows),
        }

    def log(self) -> dict[str, Any]:
        """The answer of `/stats/log?lines=200`: four lines more each second."""
        last = int(self._second * 4)
        return {"version": 1, "last": last, "lines": [
            {"number": n, "time": 1e9 + n / 4, "level": "info", "source": "server",
             "text": f"{n:08x} ended: stop, 512 tokens, 11.2 s"} for n in range(last - 199, last + 1)]}

    def details(self) -> dict[str, Any]:
        """The answer of `/stats/requests/{id}` for the oldest request: a block table of 2,500 entries."""
        row = request_stats(self._rows[0], self._second)
        return {"version": 1, "request": msgspec.to_builtins(row), "max_tokens": 512,
                "timeline": {"queue": 0.0, "prefill": 0.25, "decode": 4.0}, "sampling": {"temperature": 0.7, "seed": None},
                "samples": [{"index": 0, "tokens": 40_000, "computed": 40_000, "finished": None,
                             "tables": [list(range(1, len(self._states), max(1, len(self._states) // 2500)))]}],
                "diverged": None}
