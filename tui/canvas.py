"""The dashboard's widgets and how a frame is put on them. Knows no keys and no server."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from rich.style import Style
from rich.text import Text
from textual.containers import Horizontal, Vertical
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Input

from workstation.tui import gpu_panels, panels
from workstation.tui.details import cell_line, details, log_lines
from workstation.tui.drawing import AMBER, RED, Glyphs, clock, fitting
from workstation.tui.frame import Frame
from workstation.tui.map_view import MapView
from workstation.tui.panel import Panel
from workstation.tui.request_table import ORDERS, RequestTable, chosen

SLOW_SECONDS = 0.95
TALL, TINY, WIDE, WIDE_LINES = 32, 16, 160, 40
KEYS = ["? help", "q quit", "/ filter", "s sort", "Enter details", "x abort", "space freeze", "h heat", "g card", "l log",
        "t theme", "Tab next panel", "Ctrl+P commands"]


class Canvas:
    """All panels, and what decides how they look: filter, order, heat, the cell that is pointed at.

    Attributes:
        lit: cells of the chosen request.  pointed: the cell that is pointed at.  blocks: the answer about that cell.
        details: the answer about the chosen request.  lines: the log's newest.
    """

    def __init__(self, glyphs: Glyphs) -> None:
        self.glyphs = glyphs
        self.history = panels.History()
        self.order = ORDERS[0]
        self.words = ""
        self.heat = False
        self.lit: set[int] = set()
        self.pointed: int | None = None
        self.blocks: dict[str, Any] | None = None
        self.details: dict[str, Any] | None = None
        self.lines: list[dict[str, Any]] = []
        names = ("head", "memory", "gpu", "legend", "map-foot", "loading", "batch", "speed", "side", "log", "foot")
        self._panels = {name: Panel(name) for name in names}
        self.map = MapView(glyphs, "map")
        self.table = RequestTable("requests")
        self.filter = Input(placeholder="filter by id, client, route or state", id="filter")
        self._card = Horizontal(self._panels["memory"], self._panels["gpu"], id="card")
        self._map_box = Vertical(self.map, self._panels["loading"], self._panels["legend"], id="map-box")
        self._slowly_drawn = -SLOW_SECONDS
        self._state = ""

    def widgets(self) -> Iterable[Widget]:
        """In the order of the screen."""
        panel = self._panels
        yield panel["head"]
        yield self._card
        yield Vertical(self._map_box, panel["map-foot"], id="map-frame")
        yield Horizontal(panel["batch"], panel["speed"], id="figures")
        yield Horizontal(self.table, panel["side"], id="lower")
        yield panel["log"]
        yield self.filter
        yield panel["foot"]

    def title(self) -> None:
        """The borders' names, once the widgets are there."""
        titles = {"memory": "Memory", "gpu": "GPU", "batch": "Batch", "speed": "Speed", "side": "Request", "log": "Log"}
        for name, title in titles.items():
            self._panels[name].border_title = title
        self._map_box.border_title, self.table.border_title = "KV blocks", "Requests"

    def fit(self, screen: Screen[Any], width: int, height: int) -> None:
        """Choose what a screen of this size shows."""
        screen.set_class(height >= TALL and width >= 40, "tall")
        screen.set_class(height < TINY or width < 40, "tiny")
        screen.set_class(width >= WIDE and height >= WIDE_LINES, "wide")
        screen.set_class(self.glyphs.ascii, "ascii")

    # ── drawing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def hasten(self) -> None:
        """Draw everything next time: something that a key decides has changed."""
        self._slowly_drawn = -SLOW_SECONDS

    def due(self, within: float = 0.0) -> bool:
        """Whether the figures are to be drawn by then. within: seconds from now."""
        return time.monotonic() + within - self._slowly_drawn >= SLOW_SECONDS

    def draw(self, screen: Screen[Any], frame: Frame | None, url: str, trouble: str, frozen: bool,
             waiting: str = "") -> None:
        """Everything, from the newest frame; after a failure its last picture stays, with its age.

        waiting: what goes on before there is a frame.
        """
        screen.set_class(bool(trouble) and frame is not None, "down")
        if frame is None:
            self.place("head", panels.head(None, url, trouble or waiting, screen.size.width, 0.0))
            self.place("foot", self._foot(None, trouble, frozen, set()))
            self._draw_map_foot(None)
            return
        self._draw_map(screen, frame)
        before, self._state = self._state, trouble or frame.data["server"]["state"]
        due = self.due()
        if due:
            self._slowly_drawn = time.monotonic()
        if due or self._state != before or not frame.count:
            self.place("head", panels.head(frame, url, trouble, screen.size.width, panels.age_of(frame)))
            self._draw_slowly(screen, frame, trouble, frozen)

    def _draw_slowly(self, screen: Screen[Any], frame: Frame, trouble: str, frozen: bool) -> None:
        """What nobody reads faster than once a second. All of it at once: a refresh costs more than what is drawn in it."""
        lines = 3 if screen.has_class("tall") else 2
        for name, make in (("batch", panels.batch), ("speed", panels.speed)):
            self.place(name, make(frame, self.history, self.glyphs, self._width(name), lines))
        self._draw_card(frame, screen.has_class("tall"))
        self._draw_map_foot(frame)
        if frame.count:
            self.draw_legend(frame)
        stuck = self.history.stuck(frame)
        self._draw_requests(frame, stuck)
        self._draw_beside()
        self.place("foot", self._foot(frame, trouble, frozen, stuck))

    def _subtitle(self, widget: Widget, text: str) -> None:
        """Setting one draws the whole widget again."""
        if widget.border_subtitle != text:
            widget.border_subtitle = text

    def _width(self, name: str) -> int:
        return self._panels[name].content_size.width

    def place(self, name: str, text: Text) -> None:
        """Put text into a panel."""
        if self.glyphs.ascii:
            text.plain = self.glyphs.plain(text.plain)
        self._panels[name].show(text)

    def _draw_card(self, frame: Frame, tall: bool) -> None:
        wanted = gpu_panels.memory_lines(frame, tall) + (2 if tall else 0)
        for name in ("memory", "gpu"):
            style = self._panels[name].styles
            if style.height is None or style.height.value != wanted:
                style.height = wanted
        self.place("memory", gpu_panels.memory(frame, self._width("memory"), self.glyphs, tall))
        if tall:
            load, width = self.glyphs.spark(self.history.load, 12, 1.0), self._width("gpu")
            self.place("gpu", gpu_panels.readings(frame, load, width))
            self._subtitle(self._panels["gpu"], self.glyphs.plain(gpu_panels.bottom_line(frame, width)))

    def _draw_map(self, screen: Screen[Any], frame: Frame) -> None:
        empty = not frame.count
        screen.set_class(empty, "empty")
        if empty:
            self.place("loading", panels.loading_bar(frame, self._map_box.content_size.width, self.glyphs))
            self.place("legend", Text(""))
            return
        self.map.feed(frame, self.lit, self.heat)

    def _draw_map_foot(self, frame: Frame | None) -> None:
        border = Style(color=self._map_box.styles.border_top[1].rich_color)
        self.place("map-foot", panels.map_foot(frame, self._width("map-foot"), self.glyphs, border))

    def draw_legend(self, frame: Frame) -> None:
        """The map's last line: what the shapes mean, or what is in the cell that is pointed at."""
        shown = frame.fitted(self.map.room)
        if self.pointed is not None and self.pointed < shown.count:
            self.place("legend", cell_line(shown, self.pointed, self.blocks, self._width("legend")))
        else:
            heat = self.heat and frame.heat is not None
            self.place("legend", panels.legend(frame, self.glyphs, shown.count, heat, self._width("legend")))

    def _draw_requests(self, frame: Frame, stuck: set[str]) -> None:
        rows = chosen(frame.requests, self.words, self.order)
        self.table.feed(rows, stuck)
        total = frame.data["requests_total"]
        shown = f"{len(rows)} of {total}" if len(rows) < total else f"{total}"
        words = f" · filter: {unmarked(self.words)}" if self.words else ""
        self._subtitle(self.table, self.glyphs.plain(f"{shown} · by {self.order}{words}"))

    def _foot(self, frame: Frame | None, trouble: str, frozen: bool, stuck: set[str]) -> Text:
        if trouble:
            return Text(f" {trouble}; trying again", style=RED, no_wrap=True)
        if frame is not None and frozen:
            return Text(f" FROZEN at {clock(frame.data['server']['uptime'])}: space goes on", style=AMBER, no_wrap=True)
        advised = panels.advice(frame, self.history, stuck) if frame is not None else ""
        if advised:
            return Text(f" {advised}", style=AMBER, no_wrap=True)
        return Text(f" {fitting(KEYS, '  ', self._width('foot') - 1)}", no_wrap=True)

    def _draw_beside(self) -> None:
        """A wide screen's details of the chosen request; as many of the log's newest lines as there is room for."""
        answer = self.details
        self.place("side", Text("") if answer is None else details(answer, self.glyphs, self._width("side")))
        room = max(1, self._panels["log"].content_size.height)
        self.place("log", log_lines(self.lines[-room:]))


def unmarked(words: str) -> str:
    """A border's subtitle is markup; what was typed is not."""
    return words.replace("[", "\\[")


