"""What opens above the dashboard: the keys, a question, one request's details."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

KEYS = """\
 ?       this help                 q       quit
 Tab     next panel                ↑ ↓     choose a request
 Enter   its details               x       abort it (asks first)
 s       sort by the next column   /       filter by id, client or state
 space   freeze, and go on         Esc     close, or clear the filter

 A cell of the map stands for one or more KV blocks, in physical order:
 █ held by one request   ▓ shared by several   ▒ cached   · free
 (▄ ▚ ░: less than half of the cell's blocks). The chosen request's cells
 are drawn reversed. Esc closes this."""


class Sheet(ModalScreen[None]):
    """Text in a box; Esc, q, Enter or ? closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(key, "close", show=False) for key in ("escape", "q", "enter", "question_mark")
    ]

    def __init__(self, title: str, text: Text) -> None:
        super().__init__()
        self._title = title
        self._text = text

    def compose(self) -> ComposeResult:
        box = VerticalScroll(Static(self._text, id="sheet-text", markup=False), id="sheet")
        box.border_title = self._title
        yield box

    def show(self, text: Text) -> None:
        self.query_one("#sheet-text", Static).update(text)

    def action_close(self) -> None:
        self.dismiss(None)


class Question(ModalScreen[bool]):
    """y or Enter says yes; n or Esc says no."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y,enter", "answer(True)", show=False), Binding("n,escape", "answer(False)", show=False),
    ]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        yield Static(Text(f"{self._question}\n\ny yes    n no"), id="question", markup=False)

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)
