"""Free text against a JSON schema, over HTTP: `PYTHONPATH=.:benchmarks python benchmarks/structured.py --port P`.

Against a server that runs: `ws serve MODEL --port P`. Each round sends the same prompts twice, free (greedy, `ignore_eos`) and
by a schema whose answers are as long: a list of objects that goes on to `max_tokens`. Of plain types, as tools have them, or
(`--schema limits`) with lengths, a range and an e-mail address, whose masks cost the host three times as much. Rounds
alternate, so that both meet the same machine. JSON lines: tokens a second of each kind, the ratio of the medians, times to the
first token, and gaps.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from typing import Any

from http_load import Seen, Stream, all_at_once, connect, request

TEXT = {"type": "string"}
PLAIN = {"name": TEXT, "age": {"type": "integer"}, "email": TEXT, "tags": {"type": "array", "items": TEXT}}
LIMITS = {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
          "email": {"type": "string", "format": "email"}, "tags": {"type": "array", "items": TEXT, "maxItems": 4}}
SCHEMAS = {"plain": PLAIN, "limits": LIMITS}


def endless(properties: dict[str, Any]) -> dict[str, Any]:
    person = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "array", "items": person, "minItems": 10_000}


def bodies(arguments: argparse.Namespace, seed: int, extra: dict[str, Any]) -> list[bytes]:
    rng = random.Random(seed)
    common = {"max_tokens": arguments.tokens, "temperature": 0, "ignore_eos": True, "stream": True,
              "stream_options": {"include_usage": True}, **extra}
    return [request("/v1/completions", {**common, "prompt": [rng.randrange(1000, arguments.vocabulary)
                                                             for _ in range(arguments.prompt)]})
            for _ in range(arguments.streams)]


async def timed(streams: list[Stream], texts: list[bytes]) -> tuple[float, list[Seen]]:
    """Tokens a second of all streams together, and what each saw."""
    began = time.perf_counter()
    seen = await all_at_once(streams, texts)
    return sum(one.tokens for one in seen) / (time.perf_counter() - began), seen


def summary(rates: list[float], seen: list[Seen]) -> dict[str, float]:
    gaps = sorted(gap for one in seen for gap in one.gaps) or [0.0]
    first = statistics.median(one.first for one in seen)
    return {"tokens_per_s": round(statistics.median(rates), 1), "ttft_p50_ms": round(first * 1e3, 1),
            "gap_p50_ms": round(gaps[len(gaps) // 2] * 1e3, 2), "gap_p99_ms": round(gaps[int(len(gaps) * 0.99)] * 1e3, 2),
            "tokens": sum(one.tokens for one in seen)}


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    streams = await connect(arguments.port, arguments.streams)
    wanted = {"json": endless(SCHEMAS[arguments.schema])}
    kinds: dict[str, dict[str, Any]] = {"free": {}, "schema": {"structured_outputs": wanted}}
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    seen: dict[str, list[Seen]] = {kind: [] for kind in kinds}
    for turn in range(arguments.rounds + 1):  # the first warms up: the grammar is compiled, the kernels are there
        for kind, extra in kinds.items():
            rate, found = await timed(streams, bodies(arguments, turn, extra))
            if turn:
                rates[kind].append(rate)
                seen[kind] += found
    out: dict[str, Any] = {kind: summary(rates[kind], seen[kind]) for kind in kinds}
    out["ratio"] = round(statistics.median(rates["schema"]) / statistics.median(rates["free"]), 3)
    return {"schema": arguments.schema, "streams": arguments.streams,
            "prompt": arguments.prompt, "max_tokens": arguments.tokens, **out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--streams", type=int, nargs="+", default=[64])
    parser.add_argument("--schema", choices=sorted(SCHEMAS), default="plain")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=512, help="token ids of each prompt")
    parser.add_argument("--vocabulary", type=int, default=100_000, help="prompts are random ids below this")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for count in arguments.streams:
        print(json.dumps(asyncio.run(measure(argparse.Namespace(**{**vars(arguments), "streams": count})))), flush=True)


if __name__ == "__main__":
    main()
