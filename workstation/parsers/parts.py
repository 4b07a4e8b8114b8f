"""What a parser finds in a model's output, in the order in which the model wrote it."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


class Text(msgspec.Struct):
    """Text for the reader."""

    text: str


class Reasoning(msgspec.Struct):
    """What the model thought before it answered."""

    text: str


class CallStart(msgspec.Struct):
    """A call begins. `index` counts the calls of one answer."""

    index: int
    name: str


class CallArguments(msgspec.Struct):
    """The next characters of a call's arguments, which together are one JSON object."""

    index: int
    text: str


class CallEnd(msgspec.Struct):
    """A call is whole."""

    index: int


Part = Text | Reasoning | CallStart | CallArguments | CallEnd


class Call(msgspec.Struct):
    """A whole call; `arguments` is the JSON text the model wrote."""

    name: str
    arguments: str


class Output(msgspec.Struct):
    """An answer taken apart: what an answer that is not streamed shows."""

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = []


def joined(parts: Iterable[Part]) -> list[Part]:
    """The same parts with neighbours of one kind made one."""
    out: list[Part] = []
    for part in parts:
        last = out[-1] if out else None
        if (isinstance(part, Text) and isinstance(last, Text)) or (isinstance(part, Reasoning) and isinstance(last, Reasoning)):
            out[-1] = type(part)(last.text + part.text)
        elif isinstance(part, CallArguments) and isinstance(last, CallArguments) and part.index == last.index:
            out[-1] = CallArguments(part.index, last.text + part.text)
        else:
            out.append(part)
    return out


def gathered(parts: Iterable[Part]) -> Output:
    """Everything of one kind together."""
    texts: list[str] = []
    thoughts: list[str] = []
    names: list[str] = []
    arguments: list[list[str]] = []
    for part in parts:
        if isinstance(part, Text):
            texts.append(part.text)
        elif isinstance(part, Reasoning):
            thoughts.append(part.text)
        elif isinstance(part, CallStart):
            names.append(part.name)
            arguments.append([])
        elif isinstance(part, CallArguments):
            arguments[part.index].append(part.text)
    calls = [Call(name, "".join(pieces)) for name, pieces in zip(names, arguments, strict=True)]
    return Output("".join(texts), "".join(thoughts), calls)
