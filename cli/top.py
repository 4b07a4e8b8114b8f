"""`ws top`: the dashboard of a running server, one frame as text, or the frame itself."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from workstation.errors import StartupError

if TYPE_CHECKING:
    from workstation.tui.client import Client
    from workstation.tui.drawing import Glyphs
    from workstation.tui.frame import Frame


def command(
    url: Annotated[str | None, typer.Argument(help="Such as http://127.0.0.1:8000; the running server unless given.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="WS_API_KEY", show_envvar=True, help="Key of the server.")] = None,
    rate: Annotated[int, typer.Option(min=1, max=10, help="Frames a second.")] = 4,
    ascii_only: Annotated[bool, typer.Option("--ascii", help="Draw with ASCII characters only.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Print one frame as plain text and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one frame as JSON and exit.")] = False,
) -> None:
    """Watch a running server: memory, KV blocks, batch, speed, requests."""
    import os

    from workstation.cli.servers import find_server
    from workstation.tui.client import Client
    from workstation.tui.drawing import Glyphs
    from workstation.tui.frame import BadAnswerError

    target = find_server(url).url
    key = api_key.split(",")[0].strip() if api_key else None
    try:
        first = asyncio.run(_first(Client(target, key)))
    except BadAnswerError as error:
        raise StartupError(str(error)) from None
    if as_json:
        import json

        typer.echo(json.dumps(first.data))
        return
    glyphs = Glyphs(ascii=ascii_only)
    if once:
        typer.echo(plain(first, target, glyphs))
        return
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        raise StartupError("ws top draws on a terminal; use --once or --json to print a frame")
    if os.environ.get("TERM") == "dumb":
        raise StartupError("this terminal (TERM=dumb) cannot be drawn on; use --once or --json")
    asyncio.run(_show(Client(target, key), rate, glyphs, first))


async def _first(client: Client) -> Frame:
    """One frame. Raises BadAnswerError with its cause in one line."""
    try:
        return await client.frame(400)
    finally:
        await client.close()


async def _show(client: Client, rate: int, glyphs: Glyphs, first: Frame) -> None:
    from workstation.tui.app import Dashboard

    try:
        await Dashboard(client, rate=rate, glyphs=glyphs, first=first).run_async()
    finally:
        await client.close()


def plain(frame: Frame, url: str, glyphs: Glyphs, width: int = 100) -> str:
    """The whole dashboard as lines of text."""
    from workstation.tui import panels
    from workstation.tui.drawing import block_map

    history = panels.History()
    history.feed(frame)
    parts = [
        panels.head(frame, url, "", width, 0.0), panels.memory(frame, width, glyphs, 2),
        block_map(frame.cells, width, glyphs, set()), panels.legend(frame, glyphs), panels.blocks_line(frame),
        panels.batch(frame, history, glyphs, width), panels.speed(frame, history, glyphs, width), "",
    ]  # fmt: skip
    lines = [str(part) for part in parts]
    names = panels.columns(width)
    widths = [24 if name == "client" else 10 for name in names]
    lines.append("  ".join(name.ljust(size) for name, size in zip(names, widths, strict=True)))
    for row in panels.chosen(frame.requests, "", "age"):
        cells = panels.row_cells(row, width)
        lines.append("  ".join(str(cell).ljust(size) for cell, size in zip(cells, widths, strict=True)))
    return "\n".join(line.rstrip() for line in lines)
