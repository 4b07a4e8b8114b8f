"""Adding and subtracting whole numbers of up to three digits. The pair of operands is what is held out."""

from __future__ import annotations

from random import Random

from workstation.demo.tasks.base import ORDER_OPENINGS, QUESTION_OPENINGS, Split, Task, Wordings, between, draw, pick, user
from workstation.demo.tasks.lexicon import name

_ENDS = ("?", "", " please?", "? Thanks.")
_STOPS = (".", "", " please.", ". Thank you.", " for me.")
_ADD = (
    Wordings(
        QUESTION_OPENINGS,
        (
            "what is {a} plus {b}",
            "what is {a} + {b}",
            "how much is {a} plus {b}",
            "how much is {a} + {b}",
            "what is the sum of {a} and {b}",
        ),
        _ENDS,
    ),
    Wordings(
        QUESTION_OPENINGS,
        (
            "what do you get when you add {a} and {b}",
            "what is {a} and {b} together",
            "what does {a} + {b} give",
            "{a} plus {b} equals what",
        ),
        _ENDS,
    ),
    Wordings(
        ORDER_OPENINGS,
        (
            "add {a} and {b}",
            "compute {a} + {b}",
            "calculate {a} plus {b}",
            "work out {a} + {b}",
            "sum {a} and {b}",
            "find the sum of {a} and {b}",
        ),
        _STOPS,
    ),
    Wordings(("", "ok: ", "now ", "please: ", "hi, "), ("{a} + {b}", "{a} plus {b}", "{a}+{b}"), ("", " =", " = ?", "?", "=")),
)
_SUBTRACT = (
    Wordings(
        QUESTION_OPENINGS,
        (
            "what is {a} minus {b}",
            "what is {a} - {b}",
            "how much is {a} minus {b}",
            "how much is {a} - {b}",
            "what is the difference of {a} and {b}",
        ),
        _ENDS,
    ),
    Wordings(
        QUESTION_OPENINGS,
        (
            "what is left of {a} when you take away {b}",
            "what do you get when you subtract {b} from {a}",
            "what does {a} - {b} give",
        ),
        _ENDS,
    ),
    Wordings(
        ORDER_OPENINGS,
        (
            "subtract {b} from {a}",
            "compute {a} - {b}",
            "calculate {a} minus {b}",
            "work out {a} - {b}",
            "take {b} away from {a}",
            "take {b} from {a}",
        ),
        _STOPS,
    ),
    Wordings(("", "ok: ", "now ", "please: ", "hi, "), ("{a} - {b}", "{a} minus {b}", "{a}-{b}"), ("", " =", " = ?", "?", "=")),
)
_STORY_ADD = Wordings(
    ("NAME has {a} THINGS", "there are {a} THINGS in a box", "NAME owns {a} THINGS", "NAME found {a} THINGS"),
    (" and gets {b} more. ", ", then {b} more come. ", " and {b} more are added. ", ". Then {b} more arrive. "),
    ("how many THINGS are there now?", "how many THINGS is that?", "how many THINGS are there in total?"),
)
_STORY_SUBTRACT = Wordings(
    ("NAME has {a} THINGS", "there are {a} THINGS in a box", "NAME owns {a} THINGS", "NAME found {a} THINGS"),
    (" and gives away {b}. ", ", then {b} are taken. ", " and loses {b} of them. ", ". Then {b} are removed. "),
    ("how many THINGS are left?", "how many THINGS remain?", "how many THINGS are there now?"),
)
_THINGS = ("apples", "books", "coins", "stamps", "marbles", "pencils", "cards", "eggs", "bottles", "tickets", "stones", "keys")


def _operand(rng: Random) -> int:
    digits = rng.random()
    return between(rng, 0, 999) if digits < 0.75 else between(rng, 0, 99) if digits < 0.93 else between(rng, 0, 20)


def columns(a: int, b: int) -> str:
    """The sum worked out digit by digit, from the ones up."""
    steps, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        one, two = a // 10**place % 10, b // 10**place % 10
        total = one + two + carry
        steps.append(f"{one} + {two}{' + 1' if carry else ''} = {total}")
        carry = total // 10
    return ", ".join(steps) + "."


def _thought(a: int, b: int, minus: bool) -> str:
    if not minus:
        return f"{a} + {b}: {columns(a, b)}"
    if a < b:
        return f"{a} is less than {b}, so the result is negative: {b} - {a} = {b - a}."
    return f"{a} - {b} = {a - b}, because {b} + {a - b} = {a}."


def arithmetic(rng: Random, split: Split) -> Task:
    """One sum or difference; one in eight is told as a small story (with no negative result)."""
    minus = rng.random() < 0.5
    sign = "-" if minus else "+"
    a, b = draw(rng, lambda: (_operand(rng), _operand(rng)), split, lambda pair: f"{pair[0]}{sign}{pair[1]}")
    if rng.random() < 0.12 and (not minus or a >= b):
        wording = (_STORY_SUBTRACT if minus else _STORY_ADD).pick(rng, split)
        wording = wording.replace("THINGS", pick(rng, _THINGS)).replace("NAME", name(rng, split))
    else:
        wording = pick(rng, _SUBTRACT if minus else _ADD).pick(rng, split)
    question = wording.replace("{a}", str(a)).replace("{b}", str(b))
    answer = f"{a} {sign} {b} = {a - b if minus else a + b}."
    return Task("arithmetic", user(question), answer, thought=_thought(a, b, minus))
