"""The HTTP path without a model: `PYTHONPATH=.:benchmarks python benchmarks/http_path.py [--streams 1 16 64 256]`.

Three processes, as in service: a streaming client, the real API process, and the real engine loop whose runner only waits a
step time and makes up tokens. For each number of streams a JSON line: tokens a second, CPU of the API process a token (its main
thread alone, and all threads with the requests' share), and a request of one token (all threads), CPU of the engine process a
step, and what the path adds to the step time: TTFT and TPOT in excess. CPU is the processes' own time, which a busy machine
spoils less than the latencies.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pstats
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from http_load import Stream, all_at_once, connect, request

VOCABULARY = 128_256
STEP_MS = {1: 2.5, 16: 4.0, 64: 8.0, 256: 15.0}
ROWS, WINDOW = 512, 4096
DEMO = Path(__file__).parent.parent / "workstation" / "demo" / "model"


# ── the two processes under measurement ─────────────────────────────────────────────────────────────────────────────


def serve_api(folder: str, step_ms: str, profile: str) -> None:
    """The API process, with the engine's command exchanged for ours."""
    from workstation.config import EngineConfig
    from workstation.server import serve, supervisor
    from workstation.server.options import ServerOptions
    from workstation.server.served_model import load_served_model

    supervisor.ENGINE_COMMAND = (sys.executable, __file__, "--engine", step_ms, folder)  # type: ignore[assignment]
    engine = supervisor.EngineProcess(EngineConfig(folder))

    def ready(server: object) -> None:
        print(json.dumps({"port": server.port, "engine": engine.pid}), flush=True)  # type: ignore[attr-defined]

    def run() -> None:
        serve.run(ServerOptions(port=0), engine, lambda: load_served_model(folder, ("fake",)), on_ready=ready)

    if not profile:
        run()
        return
    watcher = cProfile.Profile()
    watcher.runcall(run)
    pstats.Stats(watcher, stream=sys.stderr).sort_stats("tottime").print_stats(45)


def serve_engine(step_ms: str, folder: str, directory: str, parent: str) -> int:
    """The engine process, with a runner that computes nothing."""
    from fake_runner import fake_engine

    from workstation.config import EngineConfig
    from workstation.engine import process, start

    vocabulary = vocabulary_of(folder)
    start.build_engine = lambda *_: fake_engine(
        vocabulary=vocabulary, rows=ROWS, max_len=WINDOW, budget=1 << 20, step_seconds=float(step_ms) / 1e3)
    process.die_with_parent(int(parent))
    return process.EngineLoop(directory, replace(EngineConfig(folder), device="cpu")).run()


def vocabulary_of(folder: str) -> int:
    return len(json.loads((Path(folder) / "tokenizer.json").read_text())["model"]["vocab"])


def write_words(folder: Path) -> Path:
    """A tokenizer of whole words without a decoder, as large as Llama 3's."""
    vocabulary = {f"t{index}": index for index in range(VOCABULARY)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}
    parts: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
             "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    (folder / "tokenizer_config.json").write_text(json.dumps({"unk_token": "t0", "eos_token": "t2"}))
    return folder


# ── measuring ───────────────────────────────────────────────────────────────────────────────────────────────────────


def cpu_seconds(pid: int, *, main_thread: bool = False) -> float:
    """CPU a process has used, from the kernel's scheduler statistics."""
    tasks = Path(f"/proc/{pid}/task")
    threads = [tasks / str(pid)] if main_thread else list(tasks.iterdir())
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


class Server:
    """The API process and its engine, for one step time."""

    def __init__(self, folder: Path, step_ms: float, profile: bool) -> None:
        command = [sys.executable, __file__, "--api", str(folder), str(step_ms), "profile" if profile else ""]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        said = json.loads(self._process.stdout.readline())
        self.port, self.pid, self.engine_pid = said["port"], self._process.pid, said["engine"]

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)

    def cpu(self) -> tuple[float, float, float]:
        return (cpu_seconds(self.pid, main_thread=True), cpu_seconds(self.pid),
                cpu_seconds(self.engine_pid, main_thread=True))


def bodies(arguments: argparse.Namespace, folder: Path, count: int, tokens: int) -> list[bytes]:
    rng, vocabulary = random.Random(count), vocabulary_of(str(folder))
    common = {"model": "fake", "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
              "stream_options": {"include_usage": True}}
    if arguments.chat:
        messages = [{"role": "user", "content": "hello " * 64}]
        return [request("/v1/chat/completions", {**common, "messages": messages}) for _ in range(count)]
    return [request("/v1/completions", {**common, "prompt": [rng.randrange(5, vocabulary) for _ in range(arguments.prompt)]})
            for _ in range(count)]


async def measure(arguments: argparse.Namespace, folder: Path, server: Server, count: int, step_ms: float) -> dict[str, object]:
    """Rounds of `count` streams at once; then requests of one token, for the price of a request."""
    loop = asyncio.get_running_loop()
    streams: list[Stream] = await connect(server.port, count)
    texts = bodies(arguments, folder, count, arguments.tokens)
    await all_at_once(streams, bodies(arguments, folder, count, 4))
    rounds = max(1, arguments.total // (count * arguments.tokens))
    before, began, seen = server.cpu(), loop.time(), []
    for _ in range(rounds):
        seen += await all_at_once(streams, texts)
    wall, after = loop.time() - began, server.cpu()
    tokens, steps = sum(one.tokens for one in seen), rounds * arguments.tokens
    single, single_rounds = bodies(arguments, folder, count, 1), max(1, 256 // count)
    begun = server.cpu()
    for _ in range(single_rounds):
        await all_at_once(streams, single)
    a_request, a_request_everything = ((later - earlier) / (single_rounds * count)
                                       for later, earlier in zip(server.cpu()[:2], begun[:2], strict=True))
    main, everything, engine = (later - earlier for later, earlier in zip(after, before, strict=True))
    gaps = sorted(gap for one in seen for gap in one.gaps) or [0.0]
    tpot = statistics.median((one.last - one.first) / (one.tokens - 1) for one in seen)
    return {
        "streams": count, "step_ms": step_ms, "tokens_per_s": round(tokens / wall),
        "events_per_token": round(sum(one.events for one in seen) / tokens, 3),
        "api_us_per_token": round((main - a_request * len(seen)) / tokens * 1e6, 1),
        "api_us_per_request": round(a_request_everything * 1e6),
        "api_us_per_token_all_in": round(everything / tokens * 1e6, 1), "engine_us_per_step": round(engine / steps * 1e6),
        "ttft_over_ms": round(statistics.median(one.first for one in seen) * 1e3 - step_ms, 2),
        "tpot_over_ms": round(tpot * 1e3 - step_ms, 3), "itl_p99_ms": round(gaps[int(len(gaps) * 0.99)] * 1e3, 2),
    }


def main() -> int:
    if sys.argv[1:2] == ["--api"]:
        serve_api(*sys.argv[2:5])
        return 0
    if sys.argv[1:2] == ["--engine"]:
        return serve_engine(*sys.argv[2:6])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--step-ms", type=float, default=None, help="for all numbers of streams; 0 is as fast as it goes")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--total", type=int, default=65_536, help="tokens to measure for each number of streams, about")
    parser.add_argument("--prompt", type=int, default=1024, help="token ids of each prompt")
    parser.add_argument("--tokenizer", choices=["words", "bytes"], default="words")
    parser.add_argument("--chat", action="store_true", help="/v1/chat/completions (takes the byte-level tokenizer)")
    parser.add_argument("--profile", action="store_true", help="print the API process's profile")
    arguments = parser.parse_args()
    import uvloop

    with tempfile.TemporaryDirectory() as place:
        folder = DEMO if arguments.chat or arguments.tokenizer == "bytes" else write_words(Path(place))
        for count in arguments.streams:
            step_ms = STEP_MS.get(count, 10.0) if arguments.step_ms is None else arguments.step_ms
            server = Server(folder, step_ms, arguments.profile)
            try:
                print(json.dumps(uvloop.run(measure(arguments, folder, server, count, step_ms))), flush=True)
            finally:
                server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
