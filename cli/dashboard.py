"""The dashboard from the command line: on a terminal, as text, as a picture, from a server or a recording.

Imports no parser of arguments: `ws top` shows its first frame sooner without.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from workstation.errors import StartupError

if TYPE_CHECKING:
    from workstation.tui.app import Dashboard
    from workstation.tui.client import Client
    from workstation.tui.drawing import Glyphs
    from workstation.tui.frame import Frame
    from workstation.tui.recording import Replay

FIRST_CELLS = 400


def watch(url: str | None = None, api_key: str | None = None, record: Path | None = None, replay: Path | None = None, *,
          rate: int = 4, glyphs: Glyphs | None = None) -> None:
    """Draw on this terminal until q.

    Args:
        url: of a server; the one that runs here unless given.  api_key: for it.  record: a new file for all frames.
        replay: a recording to show instead.  rate: frames a second.
    Raises:
        StartupError: there is no terminal, no server, no recording, or they are not what they should be.
    """
    check_terminal()
    with opened(url, api_key, record, replay) as source:
        asyncio.run(_watch(source, rate, glyphs))


def print_frame(as_json: bool, glyphs: Glyphs, url: str | None = None, api_key: str | None = None, record: Path | None = None,
                replay: Path | None = None) -> None:
    """Print one frame, as text or as it came. Arguments and errors as for `watch`."""
    import json

    with opened(url, api_key, record, replay) as source:
        frame = asyncio.run(_one(source))
        # Decoded and encoded anew, so that nothing in it is a terminal's escape code.
        print(json.dumps(json.loads(frame.body)) if as_json else plain(frame, source.url, glyphs))


def draw_picture(path: Path, size: tuple[int, int], glyphs: Glyphs, url: str | None = None, api_key: str | None = None,
                 record: Path | None = None, replay: Path | None = None) -> None:
    """Write the screen as an SVG picture. Arguments and errors as for `watch`."""
    with opened(url, api_key, record, replay) as source:
        asyncio.run(_picture(source, glyphs, path, size))


@contextmanager
def opened(url: str | None, api_key: str | None, record: Path | None, replay: Path | None) -> Iterator[Client | Replay]:
    """Where frames come from. What it complains about while it is open is the command's error."""
    from workstation.tui.frame import BadAnswerError

    try:
        with ExitStack() as stack:
            if replay is not None:
                from workstation.tui.recording import Replay

                yield Replay(replay)
                return
            from workstation.cli.servers import find_server
            from workstation.tui.client import Client
            from workstation.tui.recording import FrameFile

            recorder = stack.enter_context(FrameFile(record)) if record is not None else None
            key = api_key.split(",")[0].strip() if api_key else None
            yield Client(find_server(url, loading=True).url, key, recorder=recorder)
    except BadAnswerError as error:
        raise StartupError(str(error)) from None


def check_terminal() -> None:
    """Raise StartupError where a screen cannot be drawn."""
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        raise StartupError("the dashboard draws on a terminal; `ws top --once` or --json prints a frame")
    if os.environ.get("TERM") == "dumb":
        raise StartupError("this terminal (TERM=dumb) cannot be drawn on; use `ws top --once` or --json")


async def _one(source: Client | Replay) -> Frame:
    try:
        return await source.frame(FIRST_CELLS)
    finally:
        await source.close()


async def _watch(source: Client | Replay, rate: int, glyphs: Glyphs | None) -> None:
    """Fetch one frame, which proves that there is something to watch; then show it and all that follow."""
    try:
        first = await source.frame(FIRST_CELLS)
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
            path.write_text(picture(app), encoding="utf-8")
    except OSError as error:
        raise StartupError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        await source.close()


def picture(app: Dashboard) -> str:
    """The screen as SVG. It fetches nothing: fonts are the reader's."""
    text = re.sub(r"@font-face \{.*?\}", "", app.export_screenshot(title="ws top", simplify=True), flags=re.DOTALL)
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip()) + "\n"


def plain(frame: Frame, url: str, glyphs: Glyphs, width: int = 100) -> str:
    """The whole dashboard as lines of text."""
    from workstation.tui import gpu_panels, panels, request_table
    from workstation.tui.drawing import block_rows

    history = panels.History()
    history.feed(frame)
    parts: list[object] = [panels.head(frame, url, "", width, 0.0), gpu_panels.memory(frame, width, glyphs),
             gpu_panels.readings(frame, "", width)]  # fmt: skip
    if frame.data["gpu"] is not None:
        parts.append(f" {gpu_panels.bottom_line(frame, width)}")
    parts += [
        block_rows(frame, width, glyphs) if frame.count else panels.loading_bar(frame, width, glyphs),
        panels.legend(frame, glyphs, frame.count, False, width), f" {panels.blocks_line(frame, width - 1)}",
        panels.batch(frame, history, glyphs, width), panels.speed(frame, history, glyphs, width), "",
    ]  # fmt: skip
    shown = request_table.columns(width)
    rows = [{name: name for name, _, _ in shown},
            *(request_table.values(row) for row in request_table.chosen(frame.requests, "", "age"))]
    lines = [*(str(part) for part in parts), *(request_table.line(row, shown) for row in rows)]
    return glyphs.plain("\n".join(line.rstrip() for line in "\n".join(lines).splitlines()))
