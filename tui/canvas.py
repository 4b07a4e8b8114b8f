"""The dashboard's widgets and how a frame is put on them. Knows no keys and no server."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from rich.text import Text
from textual.containers import Horizontal, Vertical
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Input, Static

from workstation.tui import gpu_panels, panels
from workstation.tui.details import cell_line, details, log_lines
from workstation.tui.drawing import AMBER, RED, Glyphs, clock
from workstation.tui.frame import Frame
from workstation.tui.map_view import MapView
from workstation.tui.request_table import ORDERS, RequestTable, chosen

SLOW_SECONDS = 0.95
TALL, TINY, WIDE, WIDE_LINES = 32, 16, 160, 40
KEYS = ["? help", "q quit", "/ filter", "s sort", "Enter details", "x abort", "space freeze", "h heat", "g card", "l log",
        "t theme", "Tab next panel", "Ctrl+P commands"]


class Canvas:
    """All panels, and what decides how they look: filter, order, heat, the cell that is pointed at."""

    def __init__(self, glyphs: Glyphs) -> None:
        self.glyphs = glyphs
        self.history = panels.History()
        self.order = ORDERS[0]
        self.words = ""
        self.heat = False
        self.lit: set[int] = set()
        self.pointed: int | None = None
        self.blocks: dict[str, Any] | None = None
        names = ("head", "memory", "gpu", "legend", "loading", "batch", "speed", "side", "log", "foot")
        self._statics = {name: Static(id=name, markup=False) for name in names}
        self.map = MapView(glyphs, "map")
        self.table = RequestTable("requests")
        self.filter = Input(placeholder="filter by id, client, route or state", id="filter")
        self._card = Horizontal(self._statics["memory"], self._statics["gpu"], id="card")
        self._map_box = Vertical(self.map, self._statics["loading"], self._statics["legend"], id="map-box")
        self._placed: dict[str, Text] = {}
        self._slowly_drawn = -SLOW_SECONDS

    def widgets(self) -> Iterable[Widget]:
        """In the order of the screen."""
        static = self._statics
        yield static["head"]
        yield self._card
        yield self._map_box
        yield Horizontal(static["batch"], static["speed"], id="figures")
        yield Horizontal(self.table, static["side"], id="lower")
        yield static["log"]
        yield self.filter
        yield static["foot"]

    def title(self) -> None:
        """The borders' names, once the widgets are there."""
        titles = {"memory": "Memory", "gpu": "GPU", "batch": "Batch", "speed": "Speed", "side": "Request", "log": "Log"}
        for name, title in titles.items():
            self._statics[name].border_title = title
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

    def draw(self, screen: Screen[Any], frame: Frame | None, url: str, trouble: str, frozen: bool,
             waiting: str = "") -> None:
        """Everything, from the newest frame; after a failure its last picture stays, with its age.

        waiting: what goes on before there is a frame.
        """
        width = screen.size.width
        self.place("head", panels.head(frame, url, trouble or waiting, width, panels.age_of(frame)))
        screen.set_class(bool(trouble) and frame is not None, "down")
        if frame is None:
            self.place("foot", self._foot(None, trouble, frozen, set()))
            return
        self._draw_map(screen, frame)
        if trouble or time.monotonic() - self._slowly_drawn >= SLOW_SECONDS:
            self._slowly_drawn = time.monotonic()
            self._draw_slowly(screen, frame, trouble, frozen)

    def _draw_slowly(self, screen: Screen[Any], frame: Frame, trouble: str, frozen: bool) -> None:
        """Figures: nobody reads them faster than once a second, and drawing them is most of what a dashboard costs."""
        for name, make in (("batch", panels.batch), ("speed", panels.speed)):
            self.place(name, make(frame, self.history, self.glyphs, self._width(name)))
        self._draw_card(frame, screen.has_class("tall"))
        subtitle = self.glyphs.plain(panels.blocks_line(frame, self._map_box.size.width - 6)) if frame.count else ""
        self._subtitle(self._map_box, subtitle)
        if frame.count:
            self.draw_legend(frame)
        stuck = self.history.stuck(frame)
        self._draw_requests(frame, stuck)
        self.place("foot", self._foot(frame, trouble, frozen, stuck))

    def _subtitle(self, widget: Widget, text: str) -> None:
        """Setting one draws the whole widget again."""
        if widget.border_subtitle != text:
            widget.border_subtitle = text

    def _width(self, name: str) -> int:
        return self._statics[name].content_size.width

    def place(self, name: str, text: Text) -> None:
        """Put text into a panel, if it says anything new."""
        if self.glyphs.ascii:
            text.plain = self.glyphs.plain(text.plain)
        if self._placed.get(name) != text:
            self._placed[name] = text
            self._statics[name].update(text, layout=False)  # panels keep their size

    def _draw_card(self, frame: Frame, tall: bool) -> None:
        lines = gpu_panels.memory_lines(frame) if tall else 1
        for name in ("memory", "gpu"):
            style = self._statics[name].styles
            wanted = lines + 2 if tall else 1
            if style.height is None or style.height.value != wanted:
                style.height = wanted
        self.place("memory", gpu_panels.memory(frame, self._width("memory"), self.glyphs, lines))
        if tall:
            load = self.glyphs.spark(self.history.load, 12)
            self.place("gpu", gpu_panels.readings(frame, load, self._width("gpu")))
            self._subtitle(self._statics["gpu"], gpu_panels.throttling(frame))

    def _draw_map(self, screen: Screen[Any], frame: Frame) -> None:
        empty = not frame.count
        screen.set_class(empty, "empty")
        if empty:
            self.place("loading", panels.loading_bar(frame, self._map_box.content_size.width, self.glyphs))
            self.place("legend", Text(""))
            return
        self.map.feed(frame, self.lit, self.heat)

    def draw_legend(self, frame: Frame) -> None:
        """The map's last line: what the shapes mean, or what is in the cell that is pointed at."""
        shown = frame.fitted(self.map.room)
        if self.pointed is not None and self.pointed < shown.count:
            self.place("legend", cell_line(shown, self.pointed, self.blocks))
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
        return Text(f" {panels.fitting(KEYS, '  ', self._width('foot') - 1)}", no_wrap=True)

    def draw_side(self, answer: dict[str, Any] | None) -> None:
        """A wide screen's details of the chosen request."""
        self.place("side", Text("") if answer is None else details(answer, self.glyphs, self._width("side")))

    def draw_log(self, lines: list[dict[str, Any]]) -> None:
        """As many of the newest lines as there is room for."""
        room = max(1, self._statics["log"].content_size.height)
        self.place("log", log_lines(lines[-room:]))


def unmarked(words: str) -> str:
    """A border's subtitle is markup; what was typed is not."""
    return words.replace("[", "\\[")


