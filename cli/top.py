"""`ws top`: the dashboard of a running server or of a recording, one frame as text or as a picture, or the frame itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workstation.errors import ConfigError


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
    size: Annotated[str | None, typer.Option(help="Columns and lines of the picture; 120x40 unless given.")] = None,
) -> None:
    """Watch a running server: memory, KV blocks, batch, speed, requests, log."""
    from workstation.cli import dashboard
    from workstation.tui.drawing import Glyphs

    if replay is not None and (url is not None or record is not None):
        raise ConfigError("--replay shows a recording; it goes with neither a URL nor --record", param="replay")
    if once + as_json + (svg is not None) > 1:
        raise ConfigError("--once, --json and --svg are three ways to show one frame; give one of them", param="once")
    if size is not None and svg is None:
        raise ConfigError("--size is the size of a picture; it goes with --svg", param="size")
    columns_and_lines = _size(size or "120x40")
    glyphs = Glyphs(ascii=ascii_only)
    if svg is not None:
        dashboard.draw_picture(svg, columns_and_lines, glyphs, url, api_key, record, replay)
    elif once or as_json:
        dashboard.print_frame(as_json, glyphs, url, api_key, record, replay)
    else:
        dashboard.watch(url, api_key, record, replay, rate=rate, glyphs=glyphs)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and 1 <= int(width) <= 500 and 1 <= int(height) <= 200):
        raise ConfigError(f"--size must be such as 120x40, at most 500x200, got {text!r}", param="size")
    return int(width), int(height)
