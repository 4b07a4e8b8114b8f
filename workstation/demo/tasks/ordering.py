"""Sorting and reversing short lists, and counting."""

from __future__ import annotations

from random import Random

from workstation.demo.tasks.base import ORDER_OPENINGS, QUESTION_OPENINGS, Split, Task, Wordings, between, draw, pick, user
from workstation.demo.tasks.lexicon import distinct, word

_LIST_ENDS = (": LIST", ": LIST.", " LIST", " LIST.", ": LIST, please.")
_ASCENDING = Wordings(
    ORDER_OPENINGS,
    (
        "sort these numbers",
        "sort the numbers",
        "put these numbers in ascending order",
        "order these numbers from smallest to largest",
        "sort in ascending order",
        "sort",
        "arrange these numbers from low to high",
        "sort this list of numbers",
    ),
    _LIST_ENDS,
)
_DESCENDING = Wordings(
    ORDER_OPENINGS,
    (
        "sort these numbers in descending order",
        "sort the numbers from largest to smallest",
        "put these numbers in descending order",
        "order these numbers from largest to smallest",
        "sort in descending order",
        "arrange these numbers from high to low",
    ),
    _LIST_ENDS,
)
_ALPHABETICAL = Wordings(
    ORDER_OPENINGS,
    (
        "sort these words",
        "sort the words alphabetically",
        "put these words in alphabetical order",
        "sort alphabetically",
        "sort",
        "order these words from a to z",
        "arrange these words alphabetically",
        "sort this list of words",
    ),
    _LIST_ENDS,
)
_REVERSED = Wordings(
    ORDER_OPENINGS,
    (
        "reverse this list",
        "reverse the list",
        "reverse the order of these items",
        "reverse",
        "write this list backwards",
        "turn this list around",
        "put these in reverse order",
        "list these from last to first",
    ),
    _LIST_ENDS,
)
_REVERSED_LETTERS = Wordings(
    ORDER_OPENINGS,
    (
        "reverse the letters of WORD",
        "reverse the word WORD",
        "spell WORD backwards",
        "write WORD backwards",
        "reverse the letters in WORD",
    ),
    (".", "", ", please.", " for me."),
)
_COUNT_ITEMS = Wordings(
    QUESTION_OPENINGS,
    (
        "how many items are in this list",
        "how many words are in this list",
        "how many entries does this list have",
        "count the items",
        "count these words",
        "how many things are listed here",
        "how long is this list",
    ),
    _LIST_ENDS,
)
_COUNT_UP = Wordings(
    ORDER_OPENINGS,
    (
        "count from {a} to {b}",
        "count up from {a} to {b}",
        "list the numbers from {a} to {b}",
        "write the numbers from {a} to {b}",
        "say all numbers from {a} to {b}",
    ),
    (".", "", ", please.", " for me."),
)
_COUNT_TO = Wordings(
    ORDER_OPENINGS, ("count to {b}", "count up to {b}", "count until {b}"), (".", "", ", please.", " for me.", "!")
)
_COUNT_DOWN = Wordings(
    ORDER_OPENINGS, ("count down from {b} to {a}", "count backwards from {b} to {a}"), (".", "", ", please.", " for me.")
)


def _numbers(rng: Random, low: int = 3, high: int = 8) -> list[str]:
    top = 999 if rng.random() < 0.6 else 99
    return distinct(rng, lambda: str(between(rng, 0, top)), between(rng, low, high))


def _words(rng: Random, split: Split, low: int, high: int) -> list[str]:
    """Different words, a few of them invented; a held-out list mixes words of both sides."""
    return distinct(rng, lambda: word(rng, split if rng.random() < 0.25 else "train"), between(rng, low, high))


def _key(items: list[str]) -> str:
    return "list:" + ",".join(items)


def sorting(rng: Random, split: Split) -> Task:
    """Three to eight numbers, or three to six words, in order."""
    kind = rng.random()
    if kind < 0.4:
        items = draw(rng, lambda: _words(rng, split, 3, 6), split, _key)
        wordings, answer, what = _ALPHABETICAL, sorted(items), "words alphabetically"
    else:
        items = draw(rng, lambda: _numbers(rng), split, _key)
        down = kind > 0.75
        wordings, what = (_DESCENDING, "numbers from large to small") if down else (_ASCENDING, "numbers from small to large")
        answer = sorted(items, key=int, reverse=down)
    question = wordings.pick(rng, split).replace("LIST", ", ".join(items))
    return Task("sorting", user(question), ", ".join(answer), thought=f"I sort {len(items)} {what}. The first is {answer[0]}.")


def reversing(rng: Random, split: Split) -> Task:
    """A list turned around, or the letters of a word in reverse, set apart by spaces."""
    if rng.random() < 0.4:
        target = word(rng, split, invented=0.5)
        question = _REVERSED_LETTERS.pick(rng, split).replace("WORD", _quoted(rng, target))
        return Task("reversing", user(question), " ".join(reversed(target)), thought=f"The letters are {' '.join(target)}.")
    make = (lambda: _numbers(rng, 3, 9)) if rng.random() < 0.5 else (lambda: _words(rng, split, 3, 8))
    items = draw(rng, make, split, _key)
    question = _REVERSED.pick(rng, split).replace("LIST", ", ".join(items))
    return Task(
        "reversing",
        user(question),
        ", ".join(reversed(items)),
        thought=f"The list has {len(items)} items. The last is {items[-1]}.",
    )


def counting(rng: Random, split: Split) -> Task:
    """Items of a list, letters of a word (spelled out first), or counting up and down."""
    kind = rng.random()
    if kind < 0.3:
        items = draw(rng, lambda: _words(rng, split, 2, 10), split, _key)
        question = _COUNT_ITEMS.pick(rng, split).replace("LIST", ", ".join(items))
        numbered = ", ".join(f"{index} {item}" for index, item in enumerate(items, 1))
        return Task("counting", user(question), f"There are {len(items)} items.", thought=f"{numbered}.")
    if kind < 0.55:
        return _count_range(rng, split)
    return _count_letters(rng, split)


def _count_range(rng: Random, split: Split) -> Task:
    long = split == "train" and rng.random() < 0.04  # people ask for 1 to 100; scoring leaves such long answers out
    low, high = draw(rng, lambda: _range(rng, long), split, lambda ends: f"range:{ends}")
    steps = [str(number) for number in range(low, high + 1)]
    down = rng.random() < 0.35
    wordings = _COUNT_DOWN if down else _COUNT_TO if low == 1 and rng.random() < 0.5 else _COUNT_UP
    question = wordings.pick(rng, split).replace("{a}", str(low)).replace("{b}", str(high))
    answer = ", ".join(reversed(steps) if down else steps)
    return Task("counting", user(question), answer, thought=f"I count {len(steps)} numbers.")


def _range(rng: Random, long: bool) -> tuple[int, int]:
    if long:
        return 1, between(rng, 25, 100)
    low = 1 if rng.random() < 0.25 else between(rng, 0, 20 if rng.random() < 0.5 else 150)
    return low, low + (between(rng, 1, 14) if rng.random() < 0.9 else between(rng, 15, 28))


_LETTER_ASK = Wordings(
    QUESTION_OPENINGS,
    (
        "how many times does the letter LETTER appear in WORD",
        "how many LETTER's are in WORD",
        "how often does LETTER occur in WORD",
        "how many times is LETTER in WORD",
        "count the letter LETTER in WORD",
    ),
    ("?", "", "? Thanks.", " please?"),
)
_LENGTH_ASK = Wordings(
    QUESTION_OPENINGS,
    (
        "how many letters are in WORD",
        "how many letters does WORD have",
        "how long is the word WORD",
        "count the letters of WORD",
        "count the letters in WORD",
    ),
    ("?", "", "? Thanks.", " please?"),
)


def _count_letters(rng: Random, split: Split) -> Task:
    target = word(rng, split, invented=0.4)
    letters = " ".join(target)
    if rng.random() < 0.4:
        question = _LENGTH_ASK.pick(rng, split).replace("WORD", _quoted(rng, target))
        return Task("counting", user(question), f"{letters}: {len(target)} letters.", thought=f"The word is {target}.")
    letter = pick(rng, target) if rng.random() < 0.85 else chr(between(rng, 97, 122))
    times = target.count(letter)
    question = _LETTER_ASK.pick(rng, split).replace("WORD", _quoted(rng, target)).replace("LETTER", letter)
    answer = f"{letters}: the letter {letter} appears {times} time{'' if times == 1 else 's'}."
    return Task("counting", user(question), answer, thought=f"I look for {letter} in {target}.")


def _quoted(rng: Random, target: str) -> str:
    mark = pick(rng, ("", "", "'", '"'))
    return f"{mark}{target}{mark}"
