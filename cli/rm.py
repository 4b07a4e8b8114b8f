"""`ws rm MODEL`: take a downloaded model off this disk. Only the hub's cache is touched, never a folder of the person's own."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from workstation.errors import ConfigError, ModelNotFoundError, StartupError


def command(
    model: Annotated[str, typer.Argument(help="Catalogue name or hub id.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    download_dir: Annotated[str | None, typer.Option(metavar="FOLDER", help="Where it was downloaded to.")] = None,
) -> None:
    """Delete a downloaded model from this disk; its catalogue entry stays."""
    from workstation.memory import gib
    from workstation.runtime import servers

    repo = repository(model)
    folder = downloaded(repo, download_dir)
    if folder is None:
        raise StartupError(f"nothing of {repo} is on this disk", param="model")
    if any(server.model in (model, repo) for server in servers()):
        raise StartupError(f"{model} is being served; end that with `ws stop` first", param="model")
    size = disk_bytes(folder)
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"this would delete {gib(size)} of {repo}; give --yes", param="yes")
        if not typer.confirm(f"delete {gib(size)} of {repo}?"):
            return
    shutil.rmtree(folder)
    typer.echo(f"{gib(size)} of {repo} deleted")


def repository(model: str) -> str:
    """The hub id behind a name. Raises ConfigError for what did not come from the hub, ModelNotFoundError."""
    from workstation.catalog import find, load_catalogue
    from workstation.hub import HUB_ID

    entries = load_catalogue()
    if model not in entries and HUB_ID.fullmatch(model) and ".." not in model:
        return model
    if model not in entries and "/" in model:
        raise ModelNotFoundError(f"{model!r} is neither a catalogue name nor a hub id; delete a folder yourself", param="model")
    entry = find(model, entries)
    if entry.is_bundled or not HUB_ID.fullmatch(entry.model):
        raise ConfigError(f"{model} was not downloaded: {entry.model} is left as it is", param="model")
    return entry.model


def downloaded(repo: str, download_dir: str | None) -> Path | None:
    """The repository's folder in the cache, None when it is not there (a link is not followed)."""
    from workstation.hub import cache_of

    environment = {"HF_HUB_CACHE": download_dir} if download_dir else os.environ
    folder = cache_of(repo, environment)
    return folder if folder.is_dir() and not folder.is_symlink() else None


def disk_bytes(folder: Path) -> int:
    """Bytes of the files below a folder; links count nothing, so that a blob counts once."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
