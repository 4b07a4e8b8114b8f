"""Small drawings made of characters: numbers of fixed width, bars, sparklines, the block map's cells. No widgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from workstation.tui.frame import Cell, Frame

GIB = 1024**3
# Okabe and Ito's palette: told apart with every common colour blindness. Shapes say the same, for NO_COLOR.
COLOURS = {"owned": "#56B4E9", "shared": "#E69F00", "cached": "#009E73", "free": "#666666"}
SHAPES = {"owned": "█▄", "shared": "▓▚", "cached": "▒░", "free": "··"}
ASCII_SHAPES = {"owned": "#=", "shared": "%~", "cached": "+-", "free": ".."}
AMBER, RED, GREEN = "#E69F00", "#D55E00", "#009E73"
# From used last to evicted next.
HEAT_COLOURS = ("#56B4E9", "#56B4E9", "#009E73", "#009E73", "#F0E442", "#E69F00", "#E69F00", "#D55E00")
BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-=+*%#"
DASH = "-"
TO_ASCII = str.maketrans({"·": ".", "●": "*", "°": " ", "…": "~", "–": "-", "↓": "v", "█": "#", "▓": "%", "▒": "+",
                          "▄": "=", "▚": "~", "░": "-", "╎": "|", "▁": "_", "×": "x", "↑": "^"})


@dataclass(frozen=True, slots=True)
class Glyphs:
    """Which characters to draw with."""

    ascii: bool = False

    @property
    def shapes(self) -> dict[str, str]:
        return ASCII_SHAPES if self.ascii else SHAPES

    @property
    def bars(self) -> str:
        return ASCII_BARS if self.ascii else BARS

    @property
    def held(self) -> str:
        """A cell in use, in a map of heat."""
        return "|" if self.ascii else "╎"

    def plain(self, text: str) -> str:
        """The text, in ASCII where that is asked for; as long as before."""
        return text.translate(TO_ASCII) if self.ascii else text

    def spark(self, values: Sequence[float], width: int, top: float = 0.0) -> str:
        """The newest `width` values, scaled to `top`, or to the largest of them."""
        bars = self.bars
        shown = list(values)[-width:] if width > 0 else []
        top = top or max(shown, default=0.0)
        line = "".join(bars[max(0, min(7, int(value / top * 7.999))) if top > 0 else 0] for value in shown)
        return line.rjust(width)

    def bar(self, parts: Sequence[tuple[float, str]], total: float, width: int) -> Text:
        """A stacked bar: (size, colour) parts of `total`, the rest empty."""
        text, drawn, reached = Text(no_wrap=True), 0, 0.0
        fills = "=:~+^" if self.ascii else "━╍┅┉╺"
        for number, (size, colour) in enumerate(parts):
            reached += size
            end = min(width, round(reached / total * width)) if total > 0 else 0
            text.append(fills[number % 5] * max(0, end - drawn), style=colour)
            drawn = max(drawn, end)
        return text.append(("." if self.ascii else "─") * (width - drawn), style=COLOURS["free"])


def state_of(cell: Cell) -> tuple[str, bool]:
    """The state a cell is drawn in, and whether at least half of its blocks are in use or cached.

    The largest state that is not free wins, so that one small request in a large pool is seen.
    """
    owned, shared, cached, free = cell
    busy = owned + shared + cached
    if busy == 0:
        return "free", True
    if owned >= shared and owned >= cached:
        return "owned", busy >= free
    return ("shared" if shared >= cached else "cached"), busy >= free


def block_rows(frame: Frame, width: int, glyphs: Glyphs) -> str:
    """The map as plain text, `width` cells a line."""
    looks = (state_of(frame.cell(number)) for number in range(frame.count))
    drawn = "".join(glyphs.shapes[name][0 if full else 1] for name, full in looks)
    return "\n".join(drawn[at:at + width] for at in range(0, len(drawn), width))


def fitting(parts: list[str], gap: str, width: int) -> str:
    """As many of the parts, from the first, as fit."""
    while len(parts) > 1 and len(gap.join(parts)) > width:
        parts = parts[:-1]
    return gap.join(parts)


def gib(size: float | None) -> str:
    return DASH if size is None else f"{size / GIB:.{1 if size >= GIB / 10 else 2}f}"


def count(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


def percent(share: float | None) -> str:
    return DASH if share is None else f"{share * 100:.0f} %"


def seconds(value: float | None) -> str:
    """Such as 84 ms, 4.1 s, 12 s, 3m05, 2h07."""
    if value is None:
        return DASH
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 100:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    if value < 6000:
        return f"{int(value) // 60}m{int(value) % 60:02d}"
    return f"{int(value) // 3600}h{int(value) % 3600 // 60:02d}"


def clock(value: float) -> str:
    """Hours, minutes and seconds: 02:14:07."""
    whole = int(value)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"
