"""What an answer must look like before anything is drawn from it: names and kinds, as docs/stats.md promises them."""

from __future__ import annotations

import json
import math
from typing import Any

TEXT = (str,)
NUMBER = (int, float)
MAYBE = (int, float, type(None))
WORD = (str, type(None))
SPREAD = {"p50": MAYBE, "p99": MAYBE}
REQUEST = {
    "id": TEXT, "client": TEXT, "state": TEXT, "prompt": NUMBER, "cached": NUMBER, "computed": NUMBER, "generated": NUMBER,
    "rate": MAYBE, "ttft": MAYBE, "blocks": NUMBER, "age": NUMBER, "samples": NUMBER, "preemptions": NUMBER,
}  # fmt: skip
CARD = {"index": NUMBER, "name": TEXT, "total_bytes": MAYBE, "used_bytes": MAYBE, "utilization": MAYBE, "own": (bool,)}
FRAME = {
    "time": NUMBER, "process_bytes": MAYBE, "requests_total": NUMBER, "requests": [REQUEST],
    "server": {"state": TEXT, "uptime": NUMBER},
    "model": {"name": TEXT, "dtype": TEXT, "device_name": TEXT, "max_num_seqs": NUMBER, "weight_bytes": NUMBER,
              "kv_bytes": NUMBER, "plan": {}},
    "blocks": {"total": (int,), "size": (int,), "free": NUMBER, "held": NUMBER, "shared": NUMBER, "cached": NUMBER,
               "waste": NUMBER, "cells": {"count": (int,), "width": (int,), "owned": TEXT, "shared": TEXT, "cached": TEXT}},
    "batch": {"running": NUMBER, "waiting": NUMBER, "preempted": NUMBER, "step_seconds": NUMBER, "step_tokens": NUMBER,
              "budget": NUMBER},
    "speed": {"prompt_rate": MAYBE, "generate_rate": MAYBE, "eviction_rate": MAYBE, "preemption_rate": MAYBE,
              "hit_rate": MAYBE, "ttft": SPREAD, "itl": SPREAD, "e2e": SPREAD},
}  # fmt: skip
LOADING = {"done_bytes": NUMBER, "total_bytes": NUMBER, "seconds_left": MAYBE}
GPU = {"name": TEXT, "total_bytes": MAYBE, "used_bytes": MAYBE, "utilization": MAYBE, "power_watts": MAYBE,
       "power_limit_watts": MAYBE, "temperature_celsius": MAYBE, "joules_per_token": MAYBE}  # fmt: skip
GPU_MAYBE = {"memory_utilization": MAYBE, "fan": MAYBE, "clock_mhz": MAYBE, "memory_clock_mhz": MAYBE, "throttle": WORD,
             "pcie_read": MAYBE, "pcie_write": MAYBE, "own_bytes": MAYBE}  # fmt: skip
DETAILS = {
    "request": REQUEST, "max_tokens": NUMBER, "timeline": {"queue": MAYBE, "prefill": MAYBE, "decode": MAYBE}, "sampling": {},
    "samples": [{"index": NUMBER, "tables": [[(int,)]]}],
}  # fmt: skip
DIVERGED = {"token": NUMBER, "message": MAYBE, "earlier_tokens": NUMBER}
BLOCKS = {"blocks": [{"state": (int,), "refs": NUMBER, "owners": [{"request_id": TEXT, "begin": NUMBER, "end": NUMBER}]}]}
CARDS = {"cards": [CARD], "processes": [{"pid": NUMBER, "user": WORD, "command": WORD, "bytes": MAYBE, "own": (bool,)}]}
LOG = {"lines": [{"time": NUMBER, "level": TEXT, "text": TEXT}]}


def fits(value: Any, shape: Any) -> bool:
    """Whether a value has the names of a dict, the items of a one-item list, or one of a tuple's kinds; numbers are finite."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(name in value and fits(value[name], inner) for name, inner in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    return isinstance(value, shape) and (not isinstance(value, float) or math.isfinite(value))


def fits_details(value: Any) -> bool:
    return fits(value, DETAILS) and (value.get("diverged") is None or fits(value["diverged"], DIVERGED))


def fits_frame(value: Any) -> bool:
    """FRAME, and what may be null or absent where it is there."""
    if not fits(value, FRAME):
        return False
    gpu, loading = value.get("gpu"), value["server"].get("loading")
    if gpu is not None and not (fits(gpu, GPU) and _fits_where_given(gpu, GPU_MAYBE)):
        return False
    if loading is not None and not fits(loading, LOADING):
        return False
    return fits(list(value["model"]["plan"].values()), [NUMBER]) and fits(value.get("cards", []), [CARD])


def _fits_where_given(value: dict[str, Any], shape: dict[str, Any]) -> bool:
    return all(fits(value[name], inner) for name, inner in shape.items() if name in value)


def read(body: bytes) -> Any:
    """JSON without NaN and Infinity, which no arithmetic of ours expects. Raises ValueError."""
    try:
        return json.loads(body, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
