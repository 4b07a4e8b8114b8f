"""What dashboards cost a server: tokens a second without readers of `/stats/stream`, with one and with 50.

    PYTHONPATH=.:benchmarks python benchmarks/dashboard_load.py --port 8000

Against a server that runs. Each round sends the same streams once for every number of readers, by turns, so that all meet the
same machine; readers ask for frames of 1,000 cells ten times a second and read them whole, in a process of their own. One JSON
line: the medians, and each as a share of none's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import time
from multiprocessing.synchronize import Event

from http_load import all_at_once, connect, request

READERS = [0, 1, 50]


async def _read(port: int, stop: Event) -> int:
    """One reader; the bytes it was sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /stats/stream?cells=1000&hz=10 HTTP/1.1\r\nhost: localhost\r\n\r\n")
    read = 0
    while not stop.is_set():
        read += len(await reader.read(1 << 16))
    writer.close()
    return read


def _readers(port: int, count: int, stop: Event) -> None:
    async def run() -> None:
        await asyncio.gather(*(_read(port, stop) for _ in range(count)))

    asyncio.run(run())


def bodies(arguments: argparse.Namespace, seed: int) -> list[bytes]:
    rng = random.Random(seed)
    return [request("/v1/completions", {"prompt": [rng.randrange(5, arguments.vocabulary) for _ in range(arguments.prompt)],
                                        "max_tokens": arguments.tokens, "temperature": 0, "ignore_eos": True, "stream": True,
                                        "stream_options": {"include_usage": True}}) for _ in range(arguments.streams)]


async def measure(arguments: argparse.Namespace) -> dict[str, object]:
    streams = await connect(arguments.port, arguments.streams)
    await all_at_once(streams, bodies(arguments, -1))
    rates: dict[int, list[float]] = {count: [] for count in READERS}
    for turn in range(arguments.rounds):
        for count in READERS if turn % 2 else reversed(READERS):
            stop = multiprocessing.Event()
            watching = multiprocessing.Process(target=_readers, args=(arguments.port, count, stop), daemon=True)
            watching.start()
            await asyncio.sleep(0.5)
            began = time.perf_counter()
            seen = await all_at_once(streams, bodies(arguments, turn))
            rates[count].append(sum(one.tokens for one in seen) / (time.perf_counter() - began))
            stop.set()
            watching.join()
    medians = {count: statistics.median(found) for count, found in rates.items()}
    return {"streams": arguments.streams, "tokens_per_s": {count: round(rate, 1) for count, rate in medians.items()},
            "share": {count: round(rate / medians[0], 4) for count, rate in medians.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128, help="token ids of each prompt")
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--vocabulary", type=int, default=100_000, help="prompts are random ids below this")
    parser.add_argument("--rounds", type=int, default=5)
    print(json.dumps(asyncio.run(measure(parser.parse_args()))), flush=True)


if __name__ == "__main__":
    main()
