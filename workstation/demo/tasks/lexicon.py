"""Words, names and small values the tasks draw from, each split into a trained and a held-out side."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from random import Random

from workstation.demo.tasks.base import Split, between, held_out, on_side, pick


def _listed(name: str) -> list[str]:
    return resources.files("workstation.demo.tasks").joinpath(f"{name}.txt").read_text(encoding="utf-8").split()


WORDS = _listed("words")
FIRST_NAMES = _listed("names")
CITIES = _listed("cities")
_ONSETS = (*"bcdfghjklmnprstvwz", "br", "dr", "kl", "st", "tr", "sh", "ch", "th", "gr", "pl")
_SYLLABLES = [onset + vowel for onset in _ONSETS for vowel in "aeiou"]
_ENDINGS = ["", "", "n", "r", "l", "s", "m", "ck", "nd", "th", "rt", "x", "y"]


def _sides(values: list[str], kind: str) -> dict[Split, list[str]]:
    return {
        "train": [value for value in values if not held_out(f"{kind}:{value}")],
        "held_out": [value for value in values if held_out(f"{kind}:{value}")],
    }


# Other text makes these words tokens of their own; a token whose letters were never shown cannot be spelled: always trained.
_COMMON = {"berry", "dry", "fast", "lock", "number", "office", "phone", "plain", "saw"}
_WORDS = _sides(WORDS, "word")
_WORDS["held_out"] = [value for value in _WORDS["held_out"] if value not in _COMMON]
_WORDS["train"] += sorted(_COMMON - set(_WORDS["train"]))
_NAMES = _sides(FIRST_NAMES, "name")
_CITIES = _sides(CITIES, "city")


def word(rng: Random, split: Split, invented: float = 0.15) -> str:
    """A lower-case word of the lexicon or, with probability `invented`, two halves of its words spliced together."""
    if rng.random() >= invented:
        return pick(rng, _WORDS[split])
    while True:
        front, back = pick(rng, _WORDS["train"]), pick(rng, _WORDS["train"])
        made = front[: between(rng, 2, len(front))] + back[between(rng, 1, len(back) - 1) :]
        if 3 <= len(made) <= 11 and on_side(f"word:{made}", split):
            return made


def invented_name(rng: Random, split: Split) -> str:
    while True:
        made = "".join(pick(rng, _SYLLABLES) for _ in range(between(rng, 2, 3))) + pick(rng, _ENDINGS)
        if on_side(f"name:{made}", split):
            return made[0].upper() + made[1:]


def name(rng: Random, split: Split) -> str:
    """A first name: half from the list, half invented from syllables."""
    return pick(rng, _NAMES[split]) if rng.random() < 0.5 else invented_name(rng, split)


def city(rng: Random, split: Split) -> str:
    return pick(rng, _CITIES[split]) if rng.random() < 0.65 else invented_name(rng, split)


def code(rng: Random, split: Split) -> str:
    """Two capital letters and three or four digits, such as "QX-4821"."""
    while True:
        made = f"{chr(between(rng, 65, 90))}{chr(between(rng, 65, 90))}-{between(rng, 100, 9999)}"
        if on_side(f"code:{made}", split):
            return made


def clock(rng: Random) -> str:
    return f"{between(rng, 0, 23):02d}:{5 * between(rng, 0, 11):02d}"


def day(rng: Random) -> str:
    return pick(rng, ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"))


def date(rng: Random) -> str:
    return f"20{between(rng, 20, 39)}-{between(rng, 1, 12):02d}-{between(rng, 1, 28):02d}"


def distinct(rng: Random, make: Callable[[], str], count: int) -> list[str]:
    """`count` different values of a no-argument maker."""
    seen: dict[str, None] = {}
    while len(seen) < count:
        seen[make()] = None
    return list(seen)
