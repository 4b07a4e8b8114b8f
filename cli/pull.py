"""`ws pull MODEL`: download what a server reads, and nothing else; a download that was cut goes on where it stopped."""

from __future__ import annotations

import os
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="Catalogue name or hub id.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    download_dir: Annotated[str | None, typer.Option(metavar="FOLDER", help="Hugging Face's cache unless given.")] = None,
    hf_token: Annotated[str | None, typer.Option(metavar="TOKEN", help="For gated models; HF_TOKEN is unseen by `ps`.")] = None,
) -> None:
    """Download a model without serving it. Sizes are compared with the free disk first; only safetensors are taken."""
    from workstation.catalog import load_catalogue
    from workstation.cli.plan import note, settle
    from workstation.hub import resolve_model

    flags = {"revision": revision, "download_dir": download_dir, "hf_token": hf_token}
    settings, _ = settle(model, flags, os.environ)
    found = resolve_model(
        model, load_catalogue(), revision=settings["revision"], download_dir=settings["download_dir"],
        token=settings["hf_token"], say=note,
    )  # fmt: skip
    typer.echo(str(found.folder))
