"""The table of requests: its columns for a width, and a widget that draws only the lines that are seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from rich.cells import set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from workstation.tui.drawing import AMBER, DASH, count, percent, seconds

ORDERS = ("age", "client", "state", "prompt", "generated", "rate", "blocks")
STUCK_SECONDS = 10.0
# Name, width, to the left.
COLUMNS = (("id", 8, True), ("client", 12, True), ("route", 11, True), ("state", 9, True), ("prompt", 8, False),
           ("cached", 6, False), ("made", 7, False), ("tok/s", 5, False), ("TTFT", 7, False), ("blocks", 7, False),
           ("age", 7, False))  # fmt: skip
LEAVING = ("route", "TTFT", "cached", "blocks")  # in this order, while there is too little room
WIDEST_CLIENT = 28
GAP = 2


def columns(width: int) -> list[tuple[str, int, bool]]:
    """The columns for lines this wide; the client's takes what is left."""
    shown = list(COLUMNS)
    for leaving in LEAVING:
        if sum(size + GAP for _, size, _ in shown) <= width:
            break
        shown = [column for column in shown if column[0] != leaving]
    spare = width - sum(size + GAP for _, size, _ in shown)
    return [(name, min(WIDEST_CLIENT, max(6, size + spare)) if name == "client" else size, left) for name, size, left in shown]


def chosen(rows: list[dict[str, Any]], words: str, order: str) -> list[dict[str, Any]]:
    """The rows whose id, client, route or state holds `words`, largest of `order` first (names in alphabetical order)."""
    wanted = words.lower()
    found = [row for row in rows if wanted in _words(row)] if wanted else rows
    if order in ("client", "state"):
        return sorted(found, key=lambda row: (row[order], -row["age"]))
    return sorted(found, key=lambda row: -(row[order] or 0))


def _words(row: dict[str, Any]) -> str:
    return f"{row['id']} {row['client']} {row.get('route', '')} {row['state']}".lower()


def values(row: dict[str, Any]) -> dict[str, str]:
    """A row's cells by column."""
    cached = percent(row["cached"] / row["prompt"]) if row["ttft"] is not None and row["prompt"] else DASH
    return {
        "id": row["id"][-8:], "client": row["client"] or DASH, "route": row.get("route") or DASH, "state": row["state"],
        "prompt": count(row["prompt"]), "cached": cached, "made": count(row["generated"]), "tok/s": count(row["rate"]),
        "TTFT": seconds(row["ttft"]), "blocks": count(row["blocks"]), "age": seconds(row["age"]),
    }


def line(cells: dict[str, str], shown: list[tuple[str, int, bool]]) -> str:
    """Cells set in their columns; wide characters count as two."""
    parts = []
    for name, width, left in shown:
        text = cells[name]
        parts.append(set_cell_size(text, width) if left or len(text) > width else text.rjust(width))
    return (" " * GAP).join(parts)


def is_stuck(row: dict[str, Any], quiet: float) -> bool:
    """Waits for long, or has made no token for long. quiet: seconds since its last token."""
    waits = row["state"] in ("waiting", "preempted") and row["age"] > STUCK_SECONDS
    return bool(waits or (row["state"] in ("prefill", "decode") and quiet > STUCK_SECONDS))


class RequestTable(ScrollView, can_focus=True):
    """A heading and a line a request; the cursor stays on its request when others come and go."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", show=False), Binding("down", "move(1)", show=False),
        Binding("pageup", "page(-1)", show=False), Binding("pagedown", "page(1)", show=False),
        Binding("home", "move(-1000000)", show=False), Binding("end", "move(1000000)", show=False),
        Binding("enter", "open", show=False),
    ]

    @dataclass
    class Opened(Message):
        """Enter, or a click on the chosen line."""

        request_id: str

    @dataclass
    class Moved(Message):
        """Another request was chosen."""

        request_id: str | None

    def __init__(self, widget_id: str) -> None:
        super().__init__(id=widget_id)
        self._rows: list[dict[str, Any]] = []
        self._stuck: set[str] = set()
        self._lines: list[str] = []
        self._line = 0
        self._amber = Style.parse(AMBER)

    def feed(self, rows: list[dict[str, Any]], stuck: set[str]) -> None:
        """Show these rows in this order."""
        chosen_before = self.chosen_id
        self._rows, self._stuck = rows, stuck
        names = [row["id"] for row in rows]
        at = names.index(chosen_before) if chosen_before in names else min(self._line, len(rows) - 1)
        self._line = max(0, at)
        self._fit()
        if self.chosen_id != chosen_before:
            self.post_message(self.Moved(self.chosen_id))

    def on_resize(self) -> None:
        self._fit()

    def _fit(self) -> None:
        size = Size(self.scrollable_content_region.width, len(self._rows) + 1)
        if size != self.virtual_size:
            self.virtual_size = size
        self.refresh()

    @property
    def ids(self) -> list[str]:
        """Of all rows, in their order."""
        return [row["id"] for row in self._rows]

    @property
    def chosen_id(self) -> str | None:
        return self._rows[self._line]["id"] if self._line < len(self._rows) else None

    def render_line(self, y: int) -> Strip:
        width = self.scrollable_content_region.width
        shown, base = columns(width - 1), self.rich_style
        if y == 0:
            head = line({name: name for name, _, _ in shown}, shown)
            return _strip(" " + head, base + Style(bold=True, underline=True), width)
        number = y - 1 + self.scroll_offset.y
        if number >= len(self._rows):
            return Strip.blank(width, base)
        row = self._rows[number]
        stuck = row["id"] in self._stuck
        style = base + self._amber if stuck else base
        if number == self._line:
            style += Style(reverse=True) if self.has_focus else Style(bold=True)
        mark = "!" if stuck else ">" if number == self._line else " "
        return _strip(mark + line(values(row), shown), style, width)

    def action_move(self, by: int) -> None:
        self._go(max(0, min(len(self._rows) - 1, self._line + by)))

    def action_page(self, by: int) -> None:
        self.action_move(by * max(1, self._seen - 1))

    def action_open(self) -> None:
        if self.chosen_id is not None:
            self.post_message(self.Opened(self.chosen_id))

    def on_click(self, event: events.Click) -> None:
        number = event.get_content_offset(self)
        if number is None or number.y == 0:
            return
        at = number.y - 1 + self.scroll_offset.y
        if at == self._line:
            self.action_open()
        elif at < len(self._rows):
            self._go(at)

    @property
    def _seen(self) -> int:
        return max(1, self.scrollable_content_region.height - 1)

    def _go(self, number: int) -> None:
        if number == self._line or not self._rows:
            return
        self._line = number
        top = self.scroll_offset.y
        if not top <= number < top + self._seen:
            self.scroll_to(y=number if number < top else number - self._seen + 1, animate=False)
        self.refresh()
        self.post_message(self.Moved(self.chosen_id))


def _strip(text: str, style: Style, width: int) -> Strip:
    return Strip([Segment(text, style)]).adjust_cell_length(width, style)
