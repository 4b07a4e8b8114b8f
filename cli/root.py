"""What `ws` takes before a command."""

from __future__ import annotations

from typing import Annotated

import typer

from workstation import __version__


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ws {__version__}")
        raise typer.Exit


def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """The LLM server for one big GPU."""
