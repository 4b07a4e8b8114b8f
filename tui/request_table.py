"""The table of requests: its columns for a width, and a widget that draws only the lines that are seen."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar

from rich.cells import set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
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
# In this order, while there is too little room.
LEAVING = ("route", "TTFT", "cached", "blocks", "prompt", "tok/s", "made", "age", "client")
WIDEST_CLIENT = 28
GAP = 2
HEADING, CHOSEN, CHOSEN_ELSEWHERE = Style(bold=True, underline=True), Style(reverse=True), Style(bold=True)


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
        """Another request was chosen by a key or the mouse."""

        request_id: str | None

    def __init__(self, widget_id: str) -> None:
        super().__init__(id=widget_id)
        self._rows: list[dict[str, Any]] = []
        self._stuck: set[str] = set()
        self._texts: dict[int, str] = {}  # of the rows that were seen, for the width of now
        self._line = 0
        self._amber = Style.parse(AMBER)
        self._base: Style | None = None

    def notify_style_update(self) -> None:
        """The theme, or what lies behind, has changed."""
        super().notify_style_update()
        self._base = None

    def feed(self, rows: list[dict[str, Any]], stuck: set[str]) -> None:
        """Show these rows in this order; only lines that say something new are drawn."""
        chosen_before, before = self.chosen_id, self._drawn()
        self._rows, self._stuck, self._texts = rows, stuck, {}
        names = [row["id"] for row in rows]
        at = names.index(chosen_before) if chosen_before in names else min(self._line, len(rows) - 1)
        self._line = max(0, at)
        self._fit()
        width = self.scrollable_content_region.width
        changed = [Region(0, 1 + number, width, 1)
                   for number, (then, now) in enumerate(zip_longest(before, self._drawn())) if then != now]
        if changed:
            self.refresh(*changed)

    def on_resize(self) -> None:
        self._texts = {}
        self._fit()
        self.refresh()

    def _fit(self) -> None:
        """Tell how far there is to scroll. Only a scrollbar that comes or goes is worth laying out the whole screen."""
        seen = self.scrollable_content_region
        size, before = Size(seen.width, max(seen.height, len(self._rows) + 1)), self.virtual_size
        if size == before:
            return
        if size.width == before.width and min(size.height, before.height) > seen.height:
            self.set_reactive(RequestTable.virtual_size, size)
            self.vertical_scrollbar.window_virtual_size = size.height
            self.scroll_to(y=min(self.scroll_y, self.max_scroll_y), animate=False)
        else:
            self.virtual_size = size

    def _drawn(self) -> list[tuple[str, bool, bool]]:
        """What the lines below the heading say: their text, whether it is stuck, whether it is chosen."""
        top = self.scroll_offset.y
        return [(self._text(number), self._rows[number]["id"] in self._stuck, number == self._line)
                for number in range(top, min(len(self._rows), top + self._seen))]

    def _text(self, number: int) -> str:
        if number not in self._texts:
            shown = columns(self.scrollable_content_region.width - 1)
            self._texts[number] = line(values(self._rows[number]), shown)
        return self._texts[number]

    @property
    def ids(self) -> list[str]:
        """Of all rows, in their order."""
        return [row["id"] for row in self._rows]

    @property
    def chosen_id(self) -> str | None:
        return self._rows[self._line]["id"] if self._line < len(self._rows) else None

    def render_line(self, y: int) -> Strip:
        width = self.scrollable_content_region.width
        base = self._base = self._base or self.rich_style
        if y == 0:
            shown = columns(width - 1)
            return _strip(" " + line({name: name for name, _, _ in shown}, shown), base + HEADING, width)
        number = y - 1 + self.scroll_offset.y
        if number >= len(self._rows):
            return Strip.blank(width, base)
        stuck = self._rows[number]["id"] in self._stuck
        style = base + self._amber if stuck else base
        if number == self._line:
            style += CHOSEN if self.has_focus else CHOSEN_ELSEWHERE
        mark = "!" if stuck else ">" if number == self._line else " "
        return _strip(mark + self._text(number), style, width)

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
