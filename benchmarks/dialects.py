"""The three dialects against each other, over HTTP: `PYTHONPATH=.:benchmarks python benchmarks/dialects.py --port P`.

Against a server that runs: `ws serve MODEL --port P`. In each round the same prompts go to /v1/chat/completions, /v1/responses
and /v1/messages by turns, streaming, greedy, to `max_tokens`. A JSON line: tokens a second of each (medians), and the spread,
(fastest - slowest) / fastest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import string
import time
from typing import Any

from http_load import all_at_once, connect, request

PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}


def body(dialect: str, model: str, text: str, tokens: int) -> dict[str, Any]:
    common = {"model": model, "temperature": 0, "stream": True}
    if dialect == "responses":
        return {**common, "input": text, "max_output_tokens": tokens, "store": False}
    talk = {**common, "messages": [{"role": "user", "content": text}], "max_tokens": tokens}
    return talk if dialect == "messages" else {**talk, "stream_options": {"include_usage": True}}


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    streams = await connect(arguments.port, arguments.streams)
    rates: dict[str, list[float]] = {dialect: [] for dialect in PATHS}
    for turn in range(arguments.rounds + 1):  # the first warms up
        rng = random.Random(turn)
        texts = ["".join(rng.choices(string.ascii_letters, k=arguments.prompt)) for _ in range(arguments.streams)]
        for dialect, path in PATHS.items():
            asked = [request(path, body(dialect, arguments.model, f"{dialect}{text}", arguments.tokens)) for text in texts]
            began = time.perf_counter()
            seen = await all_at_once(streams, asked)
            if turn:
                rates[dialect].append(sum(one.tokens for one in seen) / (time.perf_counter() - began))
    medians = {dialect: round(statistics.median(found), 1) for dialect, found in rates.items()}
    best = max(medians.values())
    return {"streams": arguments.streams, **medians, "spread": round((best - min(medians.values())) / best, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True, help="the name that the server answers to")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=512, help="letters of each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    print(json.dumps(asyncio.run(measure(parser.parse_args()))))


if __name__ == "__main__":
    main()
