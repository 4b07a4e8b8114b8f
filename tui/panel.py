"""A panel of text, drawn line by line: only lines that say something new are drawn again."""

from __future__ import annotations

from itertools import zip_longest

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget


class Panel(Widget):
    """Shows a Text at the top left of the size that it is given, cut at the right unless it may be wrapped."""

    def __init__(self, panel_id: str) -> None:
        super().__init__(id=panel_id)
        self._shown = Text()
        self._width = 0
        self._lines: list[Text] = []
        self._base: Style | None = None

    @property
    def text(self) -> str:
        """What it says, before it is cut."""
        return self._shown.plain

    def notify_style_update(self) -> None:
        """The theme, or what lies behind, has changed."""
        super().notify_style_update()
        self._base = None

    def show(self, text: Text) -> None:
        """Say this from now on."""
        size = self.content_size
        if text == self._shown and size.width == self._width:
            return
        self._shown, self._width = text, size.width
        before, self._lines = self._lines, self._broken(text)[:size.height]
        changed = [Region(0, y, size.width, 1) for y, (then, now) in enumerate(zip_longest(before, self._lines)) if then != now]
        if changed:
            self.refresh(*changed)

    def on_resize(self) -> None:
        self._lines = self._broken(self._shown)[:self.content_size.height]
        self.refresh()

    def _broken(self, text: Text) -> list[Text]:
        lines = text.split("\n", allow_blank=True)
        if text.no_wrap or not self.content_size.width:
            return list(lines)
        return [part for line in lines for part in line.wrap(self.app.console, self.content_size.width)]

    def render_line(self, y: int) -> Strip:
        width = self.content_size.width
        base = self._base = self._base or self.rich_style
        if y >= len(self._lines):
            return Strip.blank(width, base)
        line, console = self._lines[y], self.app.console
        style = base + console.get_style(line.style) if line.style else base
        return Strip(Segment.apply_style(line.render(console), style)).adjust_cell_length(width, style)
