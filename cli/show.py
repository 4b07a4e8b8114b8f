"""`ws show NAME`: all the catalogue knows of one model, and what of it is on this disk."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from workstation.catalog import ModelEntry, find, load_catalogue


def command(
    name: Annotated[str, typer.Argument(help="A name from `ws models`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show one model of the catalogue: where its weights are, its shape, its defaults."""
    row = described(find(name, load_catalogue()))
    if as_json:
        typer.echo(json.dumps(row, indent=2))
        return
    width = max(map(len, row))
    for key, value in row.items():
        if value not in (None, "", {}):
            typer.echo(f"{key.ljust(width)}  {_text(value)}")


def described(entry: ModelEntry) -> dict[str, Any]:
    """The entry as names and values; sizes in bytes follow from its shape."""
    from workstation.cli.models import state

    row: dict[str, Any] = {
        "name": entry.name, "model": entry.model, "revision": entry.revision, "state": state(entry),
        "quantization": entry.quantization or None, "context": entry.context, "licence": entry.licence or None,
        "tools": entry.tools or None,
    }  # fmt: skip
    if entry.shape:
        row |= _sizes(entry)
    return row | {
        "sampling": entry.sampling, "serve": entry.serve, "needs": entry.needs or None, "notes": entry.notes or None,
        "source": entry.source,
    }  # fmt: skip


def _sizes(entry: ModelEntry) -> dict[str, Any]:
    from workstation.estimate import KV_BYTES, kv_bytes_per_token
    from workstation.estimate_model import find_model

    model = find_model(entry.name, {entry.name: entry})
    width = KV_BYTES[model.kv_cache_dtype(str(entry.serve.get("kv_cache_dtype", "auto")))]
    return {"architecture": model.shape.architecture, "parameters": model.shape.num_parameters,
            "weight_bytes": model.own.nbytes, "kv_bytes_per_token": kv_bytes_per_token(model.shape, width)}  # fmt: skip


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} = {item}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
