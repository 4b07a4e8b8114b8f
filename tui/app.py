"""The dashboard: one frame after another, drawn. Everything it knows came over HTTP."""

from __future__ import annotations

import asyncio
import time
from typing import ClassVar

from rich.text import Text
from textual import events, work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.widgets import DataTable, Input, Static

from workstation.tui import panels
from workstation.tui.client import Client
from workstation.tui.drawing import Glyphs, block_map, clock
from workstation.tui.frame import BadAnswerError, Frame
from workstation.tui.screens import KEYS, Question, Sheet

RETRY_SECONDS = 1.0
DETAILS_SECONDS = 1.0
TABLE_SECONDS = 1.0
MAX_CELLS = 4096
TALL, TINY = 32, 16


class Dashboard(App[None]):
    """`ws top`.

    Args:
        client: of the server to watch.  rate: frames a second, 1 to 10.  first: a frame already fetched, drawn at once.
    """

    CSS_PATH = "app.tcss"
    TITLE = "ws"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit"), Binding("question_mark", "help", "help"), Binding("slash", "filter", "filter"),
        Binding("s", "sort", "sort"), Binding("x", "abort", "abort"), Binding("space", "freeze", "freeze", priority=False),
        Binding("escape", "clear", show=False),
    ]

    def __init__(self, client: Client, *, rate: float = 4.0, glyphs: Glyphs | None = None, first: Frame | None = None) -> None:
        super().__init__()
        self.client = client
        self.newest = first
        self.frozen = False
        self.trouble = ""
        self.order = panels.ORDERS[0]
        self.words = ""
        self._period = 1.0 / rate
        self._glyphs = glyphs or Glyphs()
        self._history = panels.History()
        self._lit: set[int] = set()
        self._panels = {name: Static(id=name, markup=False) for name in ("head", "memory", "map", "batch", "speed", "foot")}
        self._table: DataTable[Text] = DataTable(id="requests", cursor_type="row")
        self._placed: dict[str, Text] = {}
        self._table_drawn = 0.0
        self._shown: list[str] = []
        self._columns: list[str] = []

    # ── layout ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def compose(self) -> ComposeResult:
        panel = self._panels
        yield from (panel["head"], panel["memory"], panel["map"], Horizontal(panel["batch"], panel["speed"], id="figures"))
        yield self._table
        yield Input(placeholder="filter by id, client or state", id="filter")
        yield panel["foot"]

    def on_mount(self) -> None:
        self._panels["map"].border_title = "KV blocks"
        self._table.border_title = "Requests"
        self._table.focus()
        self._fit(self.size.width, self.size.height)
        if self.newest is not None:
            self._history.feed(self.newest)
        self.call_after_refresh(self._begin)

    def _begin(self) -> None:
        self.draw()
        self.watch_server()
        self.watch_chosen()

    def on_resize(self, event: events.Resize) -> None:
        self._fit(event.size.width, event.size.height)
        self.call_after_refresh(self.draw)

    def _fit(self, width: int, height: int) -> None:
        base = self.screen_stack[0]
        base.set_class(height >= TALL, "tall")
        base.set_class(height < TINY or width < 40, "tiny")
        base.set_class(self._glyphs.ascii, "ascii")
        names = panels.columns(width)
        if names != self._columns:
            self._columns = names
            table = self._table
            table.clear(columns=True)
            self._shown = []
            for name in names:
                table.add_column(Text(name), key=name)

    def map_cells(self) -> int:
        """As many cells as the map has room for, its legend's line left out; never more than the server folds."""
        size = self._panels["map"].content_size
        return max(1, min(MAX_CELLS, size.width * (size.height - 1)))

    # ── the server ──────────────────────────────────────────────────────────────────────────────────────────────────

    @work(exclusive=True, group="frames")
    async def watch_server(self) -> None:
        """Fetch and draw for ever; a failure is shown, and tried again a second later."""
        while True:
            began = time.monotonic()
            pause = self._period
            try:
                frame = await self.client.frame(self.map_cells())
            except BadAnswerError as error:
                self.trouble, pause = str(error), RETRY_SECONDS
            else:
                self.take(frame)
            if not self.frozen or self.trouble:
                self.draw()
            await asyncio.sleep(max(0.02, pause - (time.monotonic() - began)))

    def take(self, frame: Frame) -> None:
        """A frame has come. While frozen it is dropped."""
        self.trouble = ""
        if not self.frozen:
            self.newest = frame
            self._history.feed(frame)

    @work(exclusive=True, group="details")
    async def watch_chosen(self) -> None:
        """Once a second: which blocks the chosen request holds, to light them, and its details while they are open."""
        while True:
            chosen = self.chosen_id()
            self._lit = set()
            if chosen is not None and self.newest is not None and not self.frozen:
                try:
                    answer = await self.client.details(chosen)
                except BadAnswerError:
                    answer = None
                if answer is not None:
                    tables = [table for sample in answer["samples"] for table in sample["tables"]]
                    self._lit = self.newest.cells_of({block for table in tables for block in table})
            await asyncio.sleep(DETAILS_SECONDS)

    # ── drawing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def draw(self) -> None:
        """Everything, from the newest frame; after a failure its last picture stays, with its age."""
        frame, width = self.newest, self.size.width
        age = max(0.0, time.time() - frame.data["time"]) if frame is not None else 0.0
        self._place("head", panels.head(frame, self.client.url, self.trouble, width, age))
        self._place("foot", self._foot())
        if frame is None:
            return
        size = self._panels["memory"].content_size
        self._place("memory", panels.memory(frame, size.width, self._glyphs, size.height))
        self._draw_map(frame)
        for name, make in (("batch", panels.batch), ("speed", panels.speed)):
            self._place(name, make(frame, self._history, self._glyphs, self._panels[name].content_size.width))
        self._draw_requests(frame)

    def _place(self, name: str, text: Text) -> None:
        """Put text into a panel, if it says anything new."""
        if self._glyphs.ascii:
            text.plain = self._glyphs.plain(text.plain)
        if self._placed.get(name) != text:
            self._placed[name] = text
            self._panels[name].update(text, layout=False)  # panels keep their size

    def _draw_map(self, frame: Frame) -> None:
        widget = self._panels["map"]
        text = block_map(frame.cells, max(1, widget.content_size.width), self._glyphs, self._lit)
        self._place("map", text.append("\n").append_text(panels.legend(frame, self._glyphs)))
        widget.border_subtitle = self._glyphs.plain(panels.blocks_line(frame))

    def _draw_requests(self, frame: Frame) -> None:
        table = self._table
        rows = panels.chosen(frame.requests, self.words, self.order)
        names = [row["id"] for row in rows]
        width = self.size.width
        if names != self._shown:
            self._refill(table, rows, names, width)
        elif time.monotonic() - self._table_drawn >= TABLE_SECONDS:
            self._table_drawn = time.monotonic()
            for row in rows:
                for name, cell in zip(self._columns, panels.row_cells(row, width), strict=True):
                    if table.get_cell(row["id"], name) != cell:
                        table.update_cell(row["id"], name, cell)
        total = frame.data["requests_total"]
        shown = f"{len(rows)} of {total}" if len(rows) < total else f"{total}"
        words = f" · filter: {panels_safe(self.words)}" if self.words else ""
        table.border_subtitle = self._glyphs.plain(f"{shown} · by {self.order}{words}")

    def _refill(self, table: DataTable[Text], rows: list[dict[str, object]], names: list[str], width: int) -> None:
        """New rows, with the cursor on the request that it stood on."""
        before, line = self.chosen_id(), table.cursor_row
        table.clear()
        for row in rows:
            table.add_row(*panels.row_cells(row, width), key=str(row["id"]))
        self._shown = names
        if names:
            table.move_cursor(row=names.index(before) if before in names else min(line, len(names) - 1))

    def _foot(self) -> Text:
        keys = " ? help  q quit  / filter  s sort  Enter details  x abort  space freeze"
        if self.trouble:
            return Text(f" {self.trouble}; trying again", style="#D55E00", no_wrap=True)
        if self.frozen and self.newest is not None:
            return Text(f"{keys}   FROZEN at {clock(self.newest.data['server']['uptime'])}", style="#E69F00", no_wrap=True)
        return Text(keys, no_wrap=True)

    # ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def chosen_id(self) -> str | None:
        """The request under the cursor."""
        row = self._table.cursor_row
        return self._shown[row] if 0 <= row < len(self._shown) else None

    def action_help(self) -> None:
        self.push_screen(Sheet("Keys", Text(KEYS)))

    def action_freeze(self) -> None:
        self.frozen = not self.frozen
        self.draw()

    def action_sort(self) -> None:
        self.order = panels.ORDERS[(panels.ORDERS.index(self.order) + 1) % len(panels.ORDERS)]
        self.draw()

    def action_filter(self) -> None:
        box = self.query_one("#filter", Input)
        box.add_class("open")
        box.focus()

    def action_clear(self) -> None:
        """Close the filter and show all requests."""
        box = self.query_one("#filter", Input)
        box.value = self.words = ""
        box.remove_class("open")
        self._table.focus()
        self.draw()

    def on_input_changed(self, event: Input.Changed) -> None:
        self.words = event.value
        self.draw()

    def on_input_submitted(self) -> None:
        self.query_one("#filter").remove_class("open")
        self._table.focus()

    @work(exclusive=True, group="sheet")
    async def on_data_table_row_selected(self) -> None:
        chosen = self.chosen_id()
        if chosen is None:
            return
        try:
            text = panels.details(await self.client.details(chosen))
        except BadAnswerError as error:
            text = Text(str(error))
        self.push_screen(Sheet("Request", text))

    @work(exclusive=True, group="abort")
    async def action_abort(self) -> None:
        chosen = self.chosen_id()
        if chosen is None or not await self.push_screen_wait(Question(f"Abort {chosen}? Its client gets an error.")):
            return
        try:
            await self.client.abort(chosen)
        except BadAnswerError as error:
            self.notify(str(error), severity="error", markup=False)
        else:
            self.notify(f"aborted {chosen[-8:]}", markup=False, timeout=3)


def panels_safe(words: str) -> str:
    """A border's subtitle is markup; what was typed is not."""
    return words.replace("[", "\\[")
