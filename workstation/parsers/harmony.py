"""gpt-oss: every message names its channel, and a call is a message to a function."""

from __future__ import annotations

from dataclasses import dataclass

from workstation.parsers.out import Out
from workstation.parsers.reader import Marks, Reader, Sink, Steps

CONTROLS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|return|>", "<|call|>")
_BODY = Marks("<|message|>", "<|end|>", "<|return|>", "<|call|>")
_END = Marks("<|end|>", "<|return|>", "<|call|>", "<|start|>")
_HEADER = Marks("<|channel|>", "<|start|>", "<|message|>")


@dataclass(frozen=True, slots=True)
class Harmony:
    """The whole answer. `calls` says whether messages to functions are calls; without it they are text."""

    calls: bool

    def run(self, reader: Reader, out: Out) -> Steps[None]:
        """Read message after message. The prompt ended with `<|start|>assistant`, so the first header has begun."""
        while True:
            header: list[str] = []
            opened = yield from reader.until(_HEADER, header.append)
            if opened != "<|message|>":
                if opened is None:
                    out.text("".join(header).strip())  # no header at all: a plain answer
                    return
                header.append(" " + opened + " ")
                mark = yield from reader.until(_BODY, header.append)
                if mark is None:
                    return
                if mark != "<|message|>":
                    continue
            yield from self._message("".join(header), reader, out)

    def _message(self, header: str, reader: Reader, out: Out) -> Steps[None]:
        to = _recipient(header)
        if to is not None and self.calls:
            out.start_call(to)
            body = _Arguments(out)
            yield from reader.until(_END, body.add)
            body.end()
            return
        thinking = "analysis" in header.split("<|constrain|>")[0]
        sink: Sink = out.thought if thinking else out.text
        yield from reader.until(_END, sink)
        if thinking:
            out.end_thought()

    def opening(self, name: str | None) -> str:
        head = "<|channel|>commentary to=functions."
        return head + (f"{name} <|constrain|>json<|message|>" if name else "")


class _Arguments:
    """The body of a call; an empty one means no arguments."""

    def __init__(self, out: Out) -> None:
        self._out, self._any = out, False

    def add(self, piece: str) -> None:
        self._any = self._any or bool(piece.strip())
        self._out.arguments(piece)

    def end(self) -> None:
        if not self._any:
            self._out.arguments("{}")
        self._out.end_call()


def _recipient(header: str) -> str | None:
    """The function's name in `to=functions.NAME`."""
    _, found, rest = header.partition("to=functions.")
    if not found:
        return None
    name = rest.replace("<|", " <|").split()
    return name[0] if name else None
