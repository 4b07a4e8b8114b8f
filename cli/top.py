"""`ws top`: the dashboard of a running server or of a recording, one frame as text or as a picture, or the frame itself."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workstation.errors import ConfigError, StartupError

if TYPE_CHECKING:
    from workstation.tui.client import Client
    from workstation.tui.drawing import Glyphs
    from workstation.tui.frame import Frame
    from workstation.tui.recording import Replay

FIRST_CELLS = 400


def command(
    url: Annotated[str | None, typer.Argument(help="Such as http://127.0.0.1:8000; the running server unless given.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="WS_API_KEY", show_envvar=True, help="Key of the server.")] = None,
    rate: Annotated[int, typer.Option(min=1, max=10, help="Frames a second.")] = 4,
    ascii_only: Annotated[bool, typer.Option("--ascii", help="Draw with ASCII characters only.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Print one frame as plain text and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one frame as JSON and exit.")] = False,
    record: Annotated[Path | None, typer.Option(help="Write every frame to this new file as well.")] = None,
    replay: Annotated[Path | None, typer.Option(help="Show a recording instead of a server.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write the screen as an SVG picture and exit.")] = None,
    size: Annotated[str, typer.Option(help="Columns and lines of the picture.")] = "120x40",
) -> None:
    """Watch a running server: memory, KV blocks, batch, speed, requests, log."""
    from workstation.tui.drawing import Glyphs
    from workstation.tui.frame import BadAnswerError
    from workstation.tui.recording import FrameFile

    if replay is not None and (url is not None or record is not None):
        raise ConfigError("--replay shows a recording; it goes with neither a URL nor --record", param="replay")
    draws = not (once or as_json or svg)
    if draws:
        check_terminal()
    glyphs, columns_and_lines = Glyphs(ascii=ascii_only), _size(size)
    try:
        with ExitStack() as stack:
            recorder = stack.enter_context(FrameFile(record)) if record is not None else None
            source = _source(url, api_key, replay, recorder)
            if svg is not None:
                asyncio.run(_picture(source, glyphs, svg, columns_and_lines))
                return
            asyncio.run(_watch(source, rate, glyphs, once, as_json))
    except BadAnswerError as error:
        raise StartupError(str(error)) from None


def _source(url: str | None, api_key: str | None, replay: Path | None, recorder: object) -> Client | Replay:
    if replay is not None:
        from workstation.tui.recording import Replay

        return Replay(replay)
    from workstation.cli.servers import find_server
    from workstation.tui.client import Client
    from workstation.tui.recording import FrameFile

    key = api_key.split(",")[0].strip() if api_key else None
    return Client(find_server(url, loading=True).url, key, recorder=recorder if isinstance(recorder, FrameFile) else None)


def check_terminal() -> None:
    """Raise StartupError where a screen cannot be drawn."""
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        raise StartupError("the dashboard draws on a terminal; `ws top --once` or --json prints a frame")
    if os.environ.get("TERM") == "dumb":
        raise StartupError("this terminal (TERM=dumb) cannot be drawn on; use `ws top --once` or --json")


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and 1 <= int(width) <= 500 and 1 <= int(height) <= 200):
        raise ConfigError(f"--size must be such as 120x40, at most 500x200, got {text!r}", param="size")
    return int(width), int(height)


async def _watch(source: Client | Replay, rate: int, glyphs: Glyphs, once: bool, as_json: bool) -> None:
    """Fetch one frame, which proves that there is something to watch; then show it, or all that follow."""
    try:
        first = await source.frame(FIRST_CELLS)
        if as_json:
            import json

            typer.echo(json.dumps(first.data))
        elif once:
            typer.echo(plain(first, source.url, glyphs))
        else:
            from workstation.tui.app import Dashboard

            await Dashboard(source, rate=rate, glyphs=glyphs, first=first).run_async()
    finally:
        await source.close()


async def _picture(source: Client | Replay, glyphs: Glyphs, path: Path, size: tuple[int, int]) -> None:
    """Draw without a terminal until frames of the screen's own size and the log have come, then write the picture."""
    from workstation.tui.app import Dashboard

    try:
        first = await source.frame(FIRST_CELLS)
        app = Dashboard(source, rate=10, glyphs=glyphs, first=first)
        async with app.run_test(size=size) as pilot:
            await pilot.pause(2.5)
            text = app.export_screenshot(title="ws top", simplify=True)
        text = re.sub(r"@font-face \{.*?\}", "", text, flags=re.DOTALL)  # a picture fetches nothing: fonts are the reader's
        path.write_text("\n".join(line.rstrip() for line in text.splitlines() if line.strip()) + "\n", encoding="utf-8")
    except OSError as error:
        raise StartupError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        await source.close()


def plain(frame: Frame, url: str, glyphs: Glyphs, width: int = 100) -> str:
    """The whole dashboard as lines of text."""
    from workstation.tui import gpu_panels, panels, request_table
    from workstation.tui.drawing import block_rows

    history = panels.History()
    history.feed(frame)
    parts = [
        panels.head(frame, url, "", width, 0.0), gpu_panels.memory(frame, width, glyphs, 2),
        gpu_panels.readings(frame, "", width),
        block_rows(frame, width, glyphs) if frame.count else panels.loading_bar(frame, width, glyphs),
        panels.legend(frame, glyphs, frame.count, False, width), f" {panels.blocks_line(frame, width - 1)}",
        panels.batch(frame, history, glyphs, width), panels.speed(frame, history, glyphs, width), "",
    ]  # fmt: skip
    shown = request_table.columns(width)
    rows = [{name: name for name, _, _ in shown},
            *(request_table.values(row) for row in request_table.chosen(frame.requests, "", "age"))]
    lines = [*(str(part) for part in parts), *(request_table.line(row, shown) for row in rows)]
    return glyphs.plain("\n".join(line.rstrip() for line in "\n".join(lines).splitlines()))
