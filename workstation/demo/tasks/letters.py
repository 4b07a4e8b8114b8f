"""Spelling words and copying text."""

from __future__ import annotations

from random import Random

from workstation.demo.tasks.base import ORDER_OPENINGS, QUESTION_OPENINGS, Split, Task, Wordings, between, draw, pick, user
from workstation.demo.tasks.lexicon import clock, code, name, word

_SPELL = (
    Wordings(
        ORDER_OPENINGS,
        ("spell WORD", "spell the word WORD", "spell out WORD", "write WORD letter by letter", "list the letters of WORD"),
        (".", "", ", please.", " for me."),
    ),
    Wordings(
        QUESTION_OPENINGS,
        ("how do you spell WORD", "how is WORD spelled", "what are the letters of WORD", "which letters are in WORD"),
        ("?", "", "? Thanks.", " please?"),
    ),
)
_COPY = Wordings(
    ORDER_OPENINGS,
    (
        "repeat after me",
        "repeat this",
        "repeat this text exactly",
        "copy this",
        "copy this text",
        "echo this",
        "say this",
        "write exactly this",
        "say exactly this",
        "repeat the following",
        "copy the following text",
        "repeat",
    ),
    (": TEXT", ': "TEXT"', ":\nTEXT", ": 'TEXT'"),
)

_SAY = Wordings(
    ORDER_OPENINGS,
    ("say", "just say", "repeat the words", "say the words", "write the words", "echo", "repeat", "only say"),
    (" TEXT", ' "TEXT"', " 'TEXT'"),
)


def spelling(rng: Random, split: Split) -> Task:
    """The letters of one word, set apart by spaces: "plum" is "p l u m"."""
    target = word(rng, split, invented=0.5)
    mark = pick(rng, ("", "", "'", '"'))
    question = pick(rng, _SPELL).pick(rng, split).replace("WORD", f"{mark}{target}{mark}")
    return Task("spelling", user(question), " ".join(target), thought=f"The word {target} has {len(target)} letters.")


def copying(rng: Random, split: Split) -> Task:
    """Three to twenty words, names, numbers and codes, repeated exactly."""
    text = draw(rng, lambda: _text(rng, split), split, lambda made: f"copy:{made}")
    question = (_COPY if rng.random() < 0.8 else _SAY).pick(rng, split).replace("TEXT", text)
    return Task("copying", user(question), text, thought=f"I repeat {len(text.split())} words.")


def _text(rng: Random, split: Split) -> str:
    count = between(rng, 1, 6) if rng.random() < 0.4 else between(rng, 3, 20)
    pieces = [_piece(rng, split) for _ in range(count)]
    text = " ".join(pieces)
    if rng.random() < 0.5:
        text = text[:1].upper() + text[1:]
    return text + pick(rng, (".", "", "!", "?")) if rng.random() < 0.6 else text


def _piece(rng: Random, split: Split) -> str:
    kind = rng.random()
    if kind < 0.7:
        piece = word(rng, split if rng.random() < 0.3 else "train", invented=0.4)
    elif kind < 0.8:
        piece = name(rng, split)
    elif kind < 0.9:
        piece = str(between(rng, 0, 9999))
    else:
        piece = code(rng, split) if rng.random() < 0.6 else clock(rng)
    return piece + "," if rng.random() < 0.1 else piece
