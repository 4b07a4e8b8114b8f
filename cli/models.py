"""`ws models`: the catalogue, and what of it is on this disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from workstation.catalog import ModelEntry, load_catalogue


def command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the models that have a name here; a folder or a hub id works as well."""
    entries = list(load_catalogue().values())
    states = [state(entry) for entry in entries]
    if as_json:
        rows = [
            {"name": entry.name, "model": entry.model, "context": entry.context, "quantization": entry.quantization or None,
             "state": found, "notes": entry.notes}
            for entry, found in zip(entries, states, strict=True)
        ]  # fmt: skip
        typer.echo(json.dumps(rows, indent=2))
        return
    header = ("NAME", "MODEL", "CONTEXT", "STATE", "NOTES")
    lines = [
        (entry.name, entry.model, str(entry.context or ""), found, entry.notes)
        for entry, found in zip(entries, states, strict=True)
    ]
    print_columns(header, lines)


def state(entry: ModelEntry, environment: Mapping[str, str] = os.environ) -> str:
    """ready (bundled or a folder), on disk (in the hub's cache), not downloaded, missing, or needs … ."""
    if entry.needs:
        return f"not yet: {entry.quantization or 'format'}"
    if entry.is_bundled:
        return "bundled"
    if Path(entry.model).is_absolute():
        return "folder" if (Path(entry.model) / "config.json").is_file() else "missing"
    return "on disk" if in_hub_cache(entry.model, environment) else "not downloaded"


def in_hub_cache(repo: str, environment: Mapping[str, str]) -> bool:
    """Whether the hub's cache holds weights of this id; looks at folders only, so that no client is imported."""
    home = Path(environment.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(environment.get("HF_HUB_CACHE") or home / "hub")
    snapshots = cache / f"models--{repo.replace('/', '--')}" / "snapshots"
    return any(snapshots.glob("*/*.safetensors"))


def print_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Left-aligned columns on stdout, two spaces apart."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
