"""The block map, drawn line by line: only lines whose cells have changed are drawn again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from workstation.tui.drawing import COLOURS, HEAT_COLOURS, Glyphs, state_of
from workstation.tui.frame import MAX_CELLS, Cell, Frame

# A cell's look is a byte: 0–7 states (two shapes each), 8 held in a heat map, 9–16 heat; the marks are added.
STATES = ("owned", "shared", "cached", "free")
HELD, WARM = 8, 9
LIT, CURSOR = 32, 64
STRIDE = 64  # so many cells are looked at together
HELD_LOOKS = bytes(HELD if look < STATES.index("free") * 2 else look for look in range(256))
WARM_LOOKS = bytes(WARM + (age >> 5) if age else 0 for age in range(256))


class Looks(dict[tuple[int, int, int, int], int]):
    """Blocks that are owned, shared, cached, and all of a cell → its look, worked out once: most cells are alike."""

    def __missing__(self, cell: tuple[int, int, int, int]) -> int:
        owned, shared, cached, size = cell
        name, full = state_of(Cell(owned, shared, cached, size - owned - shared - cached))
        if len(self) >= 65536:
            self.clear()
        look = self[cell] = STATES.index(name) * 2 + (not full)
        return look


class Folded:
    """The looks of a map's cells, worked out again only where the numbers have changed since the last frame."""

    def __init__(self) -> None:
        self._looks = Looks()
        self._before: tuple[Sequence[int], ...] = ()
        self._cells = bytearray()

    def feed(self, frame: Frame) -> bytearray:
        """The looks of this frame's cells. The next call changes them: copy before marking any."""
        numbers = (frame.owned, frame.shared, frame.cached, frame.sizes)
        if not self._before or (frame.sizes is not self._before[3] and frame.sizes != self._before[3]):
            self._before, self._cells = ((),) * 4, bytearray(frame.count)
        for begin in range(0, frame.count, STRIDE):
            part = slice(begin, begin + STRIDE)
            if any(now[part] != then[part] for now, then in zip(numbers[:3], self._before, strict=False)):
                cells = zip(*(values[part] for values in numbers), strict=True)
                self._cells[part] = bytes(map(self._looks.__getitem__, cells))
        self._before = numbers
        return self._cells


class MapView(Widget, can_focus=True):
    """As many cells as there is room for, in physical order. Arrows or the mouse point at one."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "point(-1, 0)", show=False), Binding("right", "point(1, 0)", show=False),
        Binding("up", "point(0, -1)", show=False), Binding("down", "point(0, 1)", show=False),
    ]

    @dataclass
    class Pointed(Message):
        """The mouse or the cursor is on a cell; None: on none any more."""

        cell: int | None

    def __init__(self, glyphs: Glyphs, widget_id: str) -> None:
        super().__init__(id=widget_id)
        self._glyphs = glyphs
        self._folded = Folded()
        self._cells = b""
        self._pointed: int | None = None
        self._lit: tuple[set[int], int, int] = (set(), 0, 0)
        self._styles: list[tuple[str, Style]] = []  # by look, marks included, for the background of now

    def notify_style_update(self) -> None:
        """The theme, or what lies behind, has changed."""
        super().notify_style_update()
        self._styles = []

    def _drawn(self) -> list[tuple[str, Style]]:
        """Shape and style of every look, made once a theme: adding styles line by line is what would cost most."""
        if self._styles:
            return self._styles
        shapes = self._glyphs.shapes
        looks = [(shapes[name][half], COLOURS[name]) for name in STATES for half in (0, 1)]
        looks.append((self._glyphs.held, COLOURS["free"]))
        looks += zip(self._glyphs.bars, HEAT_COLOURS, strict=True)
        looks += [(" ", "")] * (LIT - len(looks))
        base = self.rich_style
        plain = [(shape, base + Style.parse(colour)) for shape, colour in looks]
        for mark in (0, LIT, CURSOR, LIT | CURSOR):
            extra = Style(reverse=bool(mark & LIT) != bool(mark & CURSOR), bold=mark > 0, underline=mark >= CURSOR)
            self._styles += [(shape, style + extra if mark else style) for shape, style in plain]
        return self._styles

    @property
    def room(self) -> int:
        """As many cells as fit; never more than a server folds."""
        return max(1, min(MAX_CELLS, self.size.width * self.size.height))

    def feed(self, frame: Frame, lit: set[int], heat: bool) -> None:
        """Show a frame's cells, those in `lit` marked."""
        frame = frame.fitted(self.room)
        cells = bytearray(self._folded.feed(frame))
        if heat and frame.heat is not None:
            # What is warm has a look above that of what is held, which has one above those of states.
            cells = bytearray(map(max, cells.translate(HELD_LOOKS), frame.heat.translate(WARM_LOOKS)))
        if lit:
            cells = bytearray((int.from_bytes(cells) | self._lights(lit, len(cells))).to_bytes(len(cells)))
        if self._pointed is not None and self._pointed < len(cells):
            cells[self._pointed] |= CURSOR
        self._show(bytes(cells))

    def _lights(self, lit: set[int], count: int) -> int:
        """The marks of all lit cells as one number. The same set comes with many frames."""
        if lit is not self._lit[0] or count != self._lit[1]:
            marks = bytearray(count)
            for number in lit:
                if number < count:
                    marks[number] = LIT
            self._lit = (lit, count, int.from_bytes(marks))
        return self._lit[2]

    def _show(self, cells: bytes) -> None:
        size = self.size
        width = max(1, size.width)
        before, self._cells = self._cells, cells
        changed = [Region(0, line, width, 1) for line in range(size.height)
                   if before[line * width:(line + 1) * width] != cells[line * width:(line + 1) * width]]
        if changed:
            self.refresh(*changed)

    def render_line(self, y: int) -> Strip:
        width, drawn = self.size.width, self._drawn()
        cells = self._cells[y * width:(y + 1) * width]
        segments = []
        for look, run in groupby(cells):
            shape, style = drawn[look]
            segments.append(Segment(shape * len(list(run)), style))
        return Strip(segments, len(cells)).extend_cell_length(width, drawn[LIT - 1][1])

    # ── pointing ────────────────────────────────────────────────────────────────────────────────────────────────────

    def point(self, cell: int | None) -> None:
        """Put the cursor on a cell and say so."""
        if cell is not None and not 0 <= cell < len(self._cells):
            cell = None
        if cell != self._pointed:
            self._mark(self._pointed, lambda look: look & ~CURSOR)
            self._pointed = cell
            self._mark(cell, lambda look: look | CURSOR)
            self.post_message(self.Pointed(cell))

    def _mark(self, cell: int | None, change: Callable[[int], int]) -> None:
        if cell is not None and cell < len(self._cells):
            cells = bytearray(self._cells)
            cells[cell] = change(cells[cell])
            self._show(bytes(cells))

    def action_point(self, across: int, down: int) -> None:
        last = len(self._cells) - 1
        if last >= 0:
            at = -across if self._pointed is None and across + down > 0 else self._pointed or 0
            self.point(max(0, min(last, at + across + down * self.size.width)))

    def on_mouse_move(self, event: events.MouseMove) -> None:
        self.point(event.y * self.size.width + event.x if event.x < self.size.width else None)

    def on_leave(self) -> None:
        self.point(None)

    def on_blur(self) -> None:
        self.point(None)
