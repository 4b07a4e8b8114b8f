"""What `ws bench` measured on this machine: one small file, the newest results last. No torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import msgspec

KEPT = 64  # results, about 1 kB each


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One benchmark's result.

    Attributes:
        bench: throughput, latency or serve.  model: as it was named.  folder: where its config.json lies, resolved.
        form: of the weights, as `ws estimate` names it.  kv_cache_dtype: "auto" (the weights' 16 or 32 bits) or "fp8".
        device: as the driver names it.  measured: Unix seconds.
        requests, input_len, output_len: what was run, lengths in tokens (means where they are drawn); concurrency: of serve.
        rows, context, decode_step_s: mean sequences of a decode step, tokens each held, and seconds it took; None when no
            step was a decode step alone.
        prompts, prompt_tokens, first_token_s: seconds until each of so many prompts of that length, begun together on an
            idle engine, had its first token; None when the benchmark does not tell.
        figures: what the command printed.
    """

    bench: str
    model: str
    folder: str
    form: str
    kv_cache_dtype: str
    device: str
    measured: float
    requests: int
    input_len: float
    output_len: float
    concurrency: int = 0
    rows: float = 0.0
    context: float = 0.0
    decode_step_s: float | None = None
    prompts: int = 0
    prompt_tokens: float = 0.0
    first_token_s: float | None = None
    figures: dict[str, float | None] = {}

    @property
    def when(self) -> str:
        """ISO 8601, UTC."""
        return datetime.fromtimestamp(self.measured, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def repeats(self, other: Measurement) -> bool:
        """Whether both ran the same on the same; the later one then takes the other's place."""
        same = ("bench", "folder", "form", "kv_cache_dtype", "device", "requests", "input_len", "output_len", "concurrency")
        return all(getattr(self, name) == getattr(other, name) for name in same)


@dataclass(frozen=True, slots=True)
class Basis:
    """The measurements a prediction stands on: of decode steps, and of a first token (None: none was measured)."""

    decode: Measurement
    first_token: Measurement | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON, documented in docs/estimate.md."""
        return {"decode": _decode(self.decode), "first_token": _first_token(self.first_token) if self.first_token else None}


def _decode(found: Measurement) -> dict[str, Any]:
    return {**_common(found), "rows": found.rows, "context": found.context, "decode_step_s": found.decode_step_s}


def _first_token(found: Measurement) -> dict[str, Any]:
    return {**_common(found), "prompts": found.prompts, "prompt_tokens": found.prompt_tokens,
            "first_token_s": found.first_token_s}  # fmt: skip


def _common(found: Measurement) -> dict[str, Any]:
    return {"bench": found.bench, "measured": found.when, "model": found.model, "form": found.form,
            "kv_cache_dtype": found.kv_cache_dtype, "device": found.device}  # fmt: skip


def place() -> Path:
    """`$XDG_CACHE_HOME/ws/measurements.json`, else the same below `~/.cache`."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "ws" / "measurements.json"


def read() -> list[Measurement]:
    """All results, oldest first; a file that is missing or damaged holds none."""
    try:
        return msgspec.json.decode(place().read_bytes(), type=list[Measurement])
    except (OSError, msgspec.MsgspecError):
        return []


def remember(result: Measurement) -> None:
    """Add a result, in place of an earlier run of the same; the oldest beyond `KEPT` go. Raises OSError."""
    path = place()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    kept = [*(old for old in read() if not result.repeats(old)), result][-KEPT:]
    with NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as draft:
        try:
            draft.write(msgspec.json.format(msgspec.json.encode(kept), indent=1))
            draft.close()
            Path(draft.name).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(draft.name).unlink()
            raise


def on_device(results: Iterable[Measurement], device: str) -> list[Measurement]:
    """Those of one device, by the driver's name, oldest first."""
    wanted = device.strip().casefold()
    return sorted((found for found in results if found.device.strip().casefold() == wanted), key=lambda found: found.measured)
