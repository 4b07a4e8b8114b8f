"""The dashboard: one frame after another, drawn. Everything it knows came from a Source, which is HTTP or a recording."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import ExitStack
from typing import Any, ClassVar, TypeVar

from rich.text import Text
from textual import events, work
from textual.app import App, ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Input

from workstation.tui import gpu_panels
from workstation.tui.canvas import Canvas
from workstation.tui.client import Source
from workstation.tui.details import details, log_lines
from workstation.tui.drawing import Glyphs
from workstation.tui.frame import BadAnswerError, Frame, clean
from workstation.tui.map_view import MapView
from workstation.tui.request_table import ORDERS, RequestTable
from workstation.tui.screens import Choice, LogSheet, Question, Sheet, keys

RETRY_SECONDS = 1.0
MAX_BLOCKS = 1024
LOG_LINES = 200
THEMES = ("textual-dark", "textual-light", "nord", "gruvbox", "solarized-light", "ansi-dark")
STOP, LEAVE = "stop", "leave"
Answer = TypeVar("Answer")


class Dashboard(App[str]):
    """`ws top`; its result says what is to become of a server that it was started with: STOP or LEAVE.

    Args:
        source: of the frames.  rate: frames a second, 1 to 10.  first: a frame already fetched, drawn at once.
        owns_server: the server was started for this dashboard, so that leaving asks what becomes of it.
        waiting: says what goes on before the first frame.
    """

    CSS_PATH = "app.tcss"
    TITLE = "ws"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+c", "leave", "quit", priority=False), Binding("question_mark", "help", "help"),
        Binding("slash", "filter", "filter"), Binding("s", "sort", "sort"), Binding("x", "abort", "abort"),
        Binding("space", "freeze", "freeze"), Binding("h", "heat", "heat"), Binding("t", "theme", "theme"),
        Binding("g", "card", "the card"), Binding("l", "log", "log"), Binding("escape", "clear", show=False),
        Binding("ctrl+q", "leave", show=False),
    ]

    def __init__(self, source: Source, *, rate: float = 4.0, glyphs: Glyphs | None = None, first: Frame | None = None,
                 owns_server: bool = False, waiting: Callable[[], str] | None = None) -> None:
        super().__init__()
        self.source = source
        self.newest = first
        self.frozen = False
        self.trouble = ""
        self.canvas = Canvas(glyphs or Glyphs())
        self._owns_server = owns_server
        self._waiting = waiting or (lambda: "connecting")
        self._period = 1.0 / rate
        self._look, self._hurry = asyncio.Event(), asyncio.Event()
        self._moved = True
        self._held = ExitStack()

    # ── layout ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def compose(self) -> ComposeResult:
        yield from self.canvas.widgets()

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """What the palette (Ctrl+P) lists: Textual's own, save the quit that asks nothing, and every key of ours."""
        yield from (command for command in super().get_system_commands(screen) if command.title != "Quit")
        for binding in self.BINDINGS:
            if isinstance(binding, Binding) and binding.description:
                name = {"question_mark": "?", "slash": "/"}.get(binding.key, binding.key.partition(",")[0])
                yield SystemCommand(binding.description, f"key {name}", getattr(self, f"action_{binding.action}"))

    def on_mount(self) -> None:
        self._held.enter_context(self.batch_update())  # the first picture has its numbers; an empty one before it costs as much
        self.canvas.title()
        self.canvas.table.focus()
        self.canvas.fit(self.screen_stack[0], self.size.width, self.size.height)
        if self.newest is not None:
            self.canvas.history.feed(self.newest)
        self.call_after_refresh(self._begin)

    def _begin(self) -> None:
        self.draw_now()
        self._held.close()
        self.watch_server()
        self.watch_slowly()
        self.watch_cell()

    def on_resize(self, event: events.Resize) -> None:
        self.canvas.fit(self.screen_stack[0], event.size.width, event.size.height)
        self.call_after_refresh(self.draw_now)

    def draw_now(self) -> None:
        """Draw what a key or the screen's size has changed."""
        self.canvas.hasten()
        self.draw()

    def draw(self) -> None:
        base = next(iter(self.screen_stack), None)
        if base is None:  # a frame came while the dashboard was closing
            return
        waiting = clean(self._waiting()) if self.newest is None else ""
        self.canvas.draw(base, self.newest, self.source.url, self.trouble, self.frozen, waiting)

    # ── the server ──────────────────────────────────────────────────────────────────────────────────────────────────

    @work(exclusive=True, group="frames")
    async def watch_server(self) -> None:
        """Fetch and draw for ever; a failure is shown, and tried again a second later."""
        while True:
            began = time.monotonic()
            pause = self._period
            try:
                frame = await self.source.frame(self.canvas.map.room, self.canvas.heat)
            except BadAnswerError as error:
                self.canvas.hasten()
                # A server of our own has not opened its port yet: no trouble before the first frame.
                waits = self._owns_server and self.newest is None
                self.trouble, pause = ("" if waits else str(error)), (self._period if waits else RETRY_SECONDS)
            else:
                self.take(frame)
            if not self.frozen or self.trouble:
                self.draw()
            if self.canvas.due(within=self._period):
                self._hurry.set()
            await asyncio.sleep(max(0.02, pause - (time.monotonic() - began)))

    def take(self, frame: Frame) -> None:
        """A frame has come. While frozen it is dropped."""
        self.trouble = ""
        if not self.frozen:
            self.newest = frame
            self.canvas.history.feed(frame)

    @work(exclusive=True, group="slow")
    async def watch_slowly(self) -> None:
        """Before figures are drawn, and when another request was chosen: that request (its blocks are lit) and the log."""
        while True:
            if not (self.frozen or self.trouble or self.newest is None):
                moved, self._moved = self._moved, False
                await self._show_chosen(self.newest)
                self.canvas.lines = await self._or_none(self.source.log(LOG_LINES)) or self.canvas.lines
                if moved:
                    self.draw_now()
            await self._hurry.wait()
            self._hurry.clear()

    async def _show_chosen(self, frame: Frame) -> None:
        chosen = self.canvas.table.chosen_id
        answer = None if chosen is None else await self._or_none(self.source.details(chosen))
        blocks: set[int] = set()
        if answer is not None:
            blocks = {block for sample in answer["samples"] for table in sample["tables"] for block in table}
        self.canvas.lit, self.canvas.details = frame.cells_of(blocks), answer
        sheet = self.screen_stack[-1] if self.screen_stack else None
        if isinstance(sheet, Sheet) and answer is not None and sheet.subject == chosen:
            sheet.show(details(answer, self.canvas.glyphs))

    def on_request_table_moved(self) -> None:
        self._moved = True
        self._hurry.set()

    async def _or_none(self, asked: Awaitable[Answer]) -> Answer | None:
        """For what only adorns the picture: a failure leaves it out."""
        try:
            return await asked
        except BadAnswerError:
            return None

    @work(exclusive=True, group="cell")
    async def watch_cell(self) -> None:
        """Ask for the blocks of the cell that is pointed at; a mouse that moves on makes one question, not many."""
        while True:
            await self._look.wait()
            self._look.clear()
            cell, frame = self.canvas.pointed, self.newest
            if cell is not None and frame is not None and cell < frame.count:
                first, last = frame.span(cell)
                self.canvas.blocks = await self._or_none(self.source.blocks(first, min(last, first + MAX_BLOCKS - 1)))
                self.canvas.draw_legend(frame)
            await asyncio.sleep(0.1)

    def on_map_view_pointed(self, event: MapView.Pointed) -> None:
        self.canvas.pointed, self.canvas.blocks = event.cell, None
        self._look.set()
        if self.newest is not None and self.newest.count:
            self.canvas.draw_legend(self.newest)

    # ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def action_help(self) -> None:
        self._open("Keys", keys(self.canvas.glyphs, self.size.width * 9 // 10 - 4))  # the sheet's, see app.tcss

    def action_freeze(self) -> None:
        self.frozen = not self.frozen
        self.draw_now()

    def action_heat(self) -> None:
        self.canvas.heat = not self.canvas.heat
        self.draw_now()

    def action_theme(self) -> None:
        """The next theme; all meaning stays in the palette of drawing.py."""
        themes = [name for name in THEMES if name in self.available_themes]
        at = themes.index(self.theme) if self.theme in themes else -1
        self.theme = themes[(at + 1) % len(themes)]
        self.call_after_refresh(self.draw_now)

    def on_descendant_focus(self) -> None:
        """The lower border of the map's box follows the others."""
        self.call_after_refresh(self.draw_now)

    def action_sort(self) -> None:
        self.canvas.order = ORDERS[(ORDERS.index(self.canvas.order) + 1) % len(ORDERS)]
        self.draw_now()

    def action_filter(self) -> None:
        self.canvas.filter.add_class("open")
        self.canvas.filter.focus()

    def action_clear(self) -> None:
        """Close the filter and show all requests."""
        self.canvas.filter.value = self.canvas.words = ""
        self.canvas.filter.remove_class("open")
        self.canvas.table.focus()
        self.draw_now()

    def on_input_changed(self, event: Input.Changed) -> None:
        self.canvas.words = event.value
        self.draw_now()

    def on_input_submitted(self) -> None:
        self.canvas.filter.remove_class("open")
        self.canvas.table.focus()

    def action_log(self) -> None:
        self._push(LogSheet(self._read_log))

    async def _read_log(self, level: str) -> Text:
        try:
            lines = await self.source.log(LOG_LINES, level)
        except BadAnswerError as error:
            return Text(str(error))
        return log_lines(lines) if lines else Text("nothing was said yet")

    def _open(self, title: str, text: Text, subject: str = "") -> None:
        self._push(Sheet(title, text, subject))

    def _push(self, sheet: Sheet) -> None:
        sheet.set_class(self.canvas.glyphs.ascii, "ascii")
        self.push_screen(sheet)

    @work(exclusive=True, group="sheet")
    async def action_card(self) -> None:
        try:
            text = gpu_panels.processes(await self.source.cards(), self.newest)
        except BadAnswerError as error:
            text = Text(str(error))
        self._open("The card", text)

    @work(exclusive=True, group="sheet")
    async def on_request_table_opened(self, event: RequestTable.Opened) -> None:
        try:
            text = details(await self.source.details(event.request_id), self.canvas.glyphs)
        except BadAnswerError as error:
            text = Text(str(error))
        self._open("Request", text, event.request_id)

    @work(exclusive=True, group="abort")
    async def action_abort(self) -> None:
        chosen = self.canvas.table.chosen_id
        if chosen is None or await self.push_screen_wait(Question(f"Abort {chosen}? Its client gets an error.")) != "y":
            return
        try:
            await self.source.abort(chosen)
        except BadAnswerError as error:
            self.notify(str(error), severity="error", markup=False)
        else:
            self.notify(f"aborted {chosen[-8:]}", markup=False, timeout=3)

    @work(exclusive=True, group="leave")
    async def action_leave(self) -> None:
        """Go; when the server was started with the dashboard, ask what becomes of it."""
        if not self._owns_server:
            self.exit(LEAVE)
            return
        question = Choice("Leave the dashboard. What about the server?",
                          {"s": "stop it (requests in flight finish)", "d": "let it go on, detached", "n": "stay here"}, "n")
        answer = await self.push_screen_wait(question)
        if answer != "n":
            self.exit(STOP if answer == "s" else LEAVE)
