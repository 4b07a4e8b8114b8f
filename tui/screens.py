"""What opens above the dashboard: the keys, a question, a choice, a request's details, the log."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import ClassVar

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from workstation.tui.drawing import Glyphs

KEYS = (("?", "this help"), ("q", "quit"), ("Tab", "next panel"), ("↑ ↓", "choose a request, a cell"),
        ("Enter", "a request's details"), ("x", "abort it (asks first)"), ("s", "sort by the next column"),
        ("/", "filter requests"), ("space", "freeze, and go on"), ("h", "heat: who goes next"), ("g", "the card's page"),
        ("l", "the log (again: graver)"), ("t", "the next theme"), ("Ctrl+P", "all commands"),
        ("Esc", "close, show all"))  # fmt: skip
MAP = (
    "A cell of the map stands for one or more KV blocks, in physical order: █ held by one request, ▓ shared by several, "
    "▒ cached, · free (▄ ▚ ░: less than half of the cell's blocks). The chosen request's cells are drawn reversed; the mouse "
    "or the arrows tell what is in a cell. In heat, ▁ was used last and █ is evicted next, and ╎ is held.")
TWO_COLUMNS = 66


def keys(glyphs: Glyphs, width: int) -> Text:
    """The help, in characters that the screen can draw and as wide as there is room for."""
    cells = [f"{key:<7} {what:<24}" for key, what in KEYS]
    step = 2 if width >= TWO_COLUMNS else 1
    lines = ["  ".join(cells[at:at + step]).rstrip() for at in range(0, len(cells), step)]
    return Text(glyphs.plain("\n".join((*lines, "", MAP))))


class Sheet(ModalScreen[None]):
    """Text in a box; Esc, q, Enter or ? closes it. subject: whose details it shows, "" for other texts."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(key, "close", show=False) for key in ("escape", "q", "enter", "question_mark")
    ]

    def __init__(self, title: str, text: Text, subject: str = "") -> None:
        super().__init__()
        self._title = title
        self._text = text
        self.subject = subject

    def compose(self) -> ComposeResult:
        box = VerticalScroll(Static(self._text, id="sheet-text", markup=False), id="sheet")
        box.border_title = self._title
        yield box

    def show(self, text: Text) -> None:
        self.query_one("#sheet-text", Static).update(text)

    def action_close(self) -> None:
        self.dismiss(None)


class LogSheet(Sheet):
    """The log from a level on; l takes the next one.

    Args:
        read: the lines of a level and graver.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("l", "level", show=False)]
    LEVELS = ("info", "warning", "error", "debug")

    def __init__(self, read: Callable[[str], Awaitable[Text]]) -> None:
        super().__init__("Log", Text(""))
        self._read = read
        self._level = 0

    async def on_mount(self) -> None:
        await self._show_level()

    async def action_level(self) -> None:
        self._level = (self._level + 1) % len(self.LEVELS)
        await self._show_level()

    async def _show_level(self) -> None:
        level = self.LEVELS[self._level]
        self.query_one("#sheet").border_title = f"Log: {level}{'' if level == 'error' else ' and graver'} · l next level"
        self.show(await self._read(level))


class Choice(ModalScreen[str]):
    """A question answered by one key.

    Args:
        question: plain text.  answers: key → what it means.  escape: the answer of Esc.
    """

    def __init__(self, question: str, answers: dict[str, str], escape: str) -> None:
        super().__init__()
        self._question = question
        self._answers = answers
        self._escape = escape

    def compose(self) -> ComposeResult:
        answers = "    ".join(f"{key} {meaning}" for key, meaning in self._answers.items())
        yield Static(Text(f"{self._question}\n\n{answers}"), id="question", markup=False)

    def on_key(self, event: events.Key) -> None:
        event.stop()
        if event.key in self._answers:
            self.dismiss(event.key)
        elif event.key == "escape":
            self.dismiss(self._escape)


class Question(Choice):
    """y says yes; n or Esc says no."""

    def __init__(self, question: str) -> None:
        super().__init__(question, {"y": "yes", "n": "no"}, "n")
