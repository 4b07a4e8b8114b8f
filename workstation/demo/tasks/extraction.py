"""Pulling fields out of a sentence into JSON. The list of wanted keys (the schema) is what is held out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from workstation.demo.tasks.base import ORDER_OPENINGS, Split, Task, Wordings, between, draw, joined, pick, user
from workstation.demo.tasks.lexicon import city, clock, code, date, day, name, word

Value = str | int | float


@dataclass(frozen=True, slots=True)
class Field:
    """One fact of a sentence: the keys it may be asked by, the clauses that state it, and its value."""

    keys: tuple[str, ...]
    clauses: tuple[str, ...]
    value: Callable[[Random, Split], Value]


def _whole(low: int, high: int) -> Callable[[Random, Split], int]:
    return lambda rng, _split: between(rng, low, high)


def _price(rng: Random, _split: Split) -> float:
    return between(rng, 1, 99) + between(rng, 1, 9) / 10 + between(rng, 1, 9) / 100


def _one_of(*values: str) -> Callable[[Random, Split], str]:
    return lambda rng, _split: pick(rng, values)


def _plain(make: Callable[[Random], str]) -> Callable[[Random, Split], str]:
    return lambda rng, _split: make(rng)


def _email(rng: Random, split: Split) -> str:
    return f"{name(rng, split).lower()}@{word(rng, 'train', 0)}.{pick(rng, ('com', 'org', 'net'))}"


_JOBS = _one_of(
    "teacher",
    "baker",
    "nurse",
    "pilot",
    "doctor",
    "farmer",
    "painter",
    "lawyer",
    "chef",
    "driver",
    "writer",
    "singer",
    "plumber",
    "dentist",
)
_COLOURS = _one_of("red", "blue", "green", "black", "white", "yellow", "purple", "orange", "brown", "gray", "pink", "silver")
_ROOMS = _one_of("A1", "A2", "B1", "B4", "C3", "D2", "E5", "F6")

# A domain: the fields a sentence can state, the first of them its subject.
DOMAINS: tuple[tuple[Field, ...], ...] = (
    (
        Field(("name", "person", "first_name"), ("V",), name),
        Field(("age", "years"), ("is V years old", "is V years of age", "turned V this year"), _whole(18, 99)),
        Field(("city", "town", "home"), ("lives in V", "comes from V", "is from V", "has a flat in V"), city),
        Field(("job", "profession", "work"), ("works as a V", "is a V", "earns a living as a V"), _JOBS),
        Field(("email", "mail"), ("can be reached at V", "writes from V", "has the address V"), _email),
        Field(("color", "favorite_color"), ("likes the color V", "loves V", "always wears V"), _COLOURS),
    ),
    (
        Field(("customer", "buyer", "client"), ("V",), name),
        Field(
            ("item", "product", "article"),
            ("bought a V", "ordered a V", "paid for a V"),
            lambda rng, split: word(rng, split, 0.2),
        ),
        Field(("quantity", "amount", "pieces"), ("took V pieces", "asked for V pieces", "needs V of them"), _whole(2, 99)),
        Field(("price", "cost"), ("paid V euros", "spent V euros", "was charged V euros"), _price),
        Field(("order_id", "order", "number"), ("has order V", "got the order number V", "received order V"), code),
        Field(("date", "order_date"), ("came on V", "ordered on V", "visited on V"), _plain(date)),
    ),
    (
        Field(
            ("event", "title", "meeting"),
            ("The V meeting", "The V workshop", "The V party"),
            lambda rng, split: word(rng, split, 0.2),
        ),
        Field(("day", "weekday"), ("is on V", "happens on V", "takes place on V"), _plain(day)),
        Field(("time", "start"), ("starts at V", "begins at V", "opens at V"), _plain(clock)),
        Field(("room", "place"), ("is held in room V", "meets in room V", "uses room V"), _ROOMS),
        Field(("host", "speaker", "organizer"), ("is led by V", "is hosted by V", "is organized by V"), name),
        Field(("guests", "people", "seats"), ("has V guests", "expects V people", "has seats for V people"), _whole(2, 300)),
    ),
    (
        Field(
            ("server", "machine", "hostname"),
            ("Server V", "The machine V", "Host V"),
            lambda rng, split: f"{word(rng, split, 0.2)}{between(rng, 1, 99)}",
        ),
        Field(("port",), ("listens on port V", "uses port V", "answers on port V"), _whole(1000, 9999)),
        Field(("city", "location", "site"), ("stands in V", "runs in V", "is located in V"), city),
        Field(("memory", "memory_gb", "ram"), ("has V GB of memory", "comes with V GB of memory"), _whole(2, 512)),
        Field(("owner", "admin"), ("belongs to V", "is run by V", "is owned by V"), name),
        Field(
            ("status", "state"),
            ("is V today", "was reported V", "is currently V"),
            _one_of("online", "offline", "busy", "idle", "broken", "healthy"),
        ),
    ),
)

_ASK = Wordings(
    ORDER_OPENINGS,
    ("extract KEYS", "extract the fields KEYS", "pull out KEYS", "give me KEYS", "find KEYS", "return KEYS"),
    (" as JSON", " in JSON", " as a JSON object", " into JSON"),
    (
        ": TEXT",
        " from this sentence: TEXT",
        " from: TEXT",
        ' from this text: "TEXT"',
        ".\nTEXT",
        " from the following sentence.\nTEXT",
    ),
)
_ASK_AFTER = Wordings(
    ("TEXT ", "TEXT\n", '"TEXT" '),
    (
        "extract KEYS",
        "extract the fields KEYS",
        "from this, give me KEYS",
        "now return KEYS",
        "please extract KEYS",
        "please give me KEYS",
    ),
    (" as JSON", " in JSON", " as a JSON object"),
    (".", ""),
)


def extraction(rng: Random, split: Split) -> Task:
    """Two to four keys out of a sentence that may state more; one key in thirty is not stated and is null."""
    domain = pick(rng, DOMAINS)
    stated = [0, *sorted(rng.sample(range(1, len(domain)), between(rng, 2, min(4, len(domain) - 1))))]
    values = {index: domain[index].value(rng, split) for index in stated}
    wanted = draw(
        rng, lambda: _schema(rng, domain, stated), split, lambda schema: "schema:" + ",".join(key for key, _ in schema)
    )
    text = _sentence(rng, domain, values)
    asked = [key for key, _ in wanted]
    listed = joined(asked) if rng.random() < 0.7 else ", ".join(asked)
    wording = (_ASK if rng.random() < 0.7 else _ASK_AFTER).pick(rng, split)
    answer = json.dumps({key: values.get(index) for key, index in wanted}, ensure_ascii=False)
    question = wording.replace("KEYS", listed).replace("TEXT", text)
    return Task("extraction", user(question), answer, thought=f"I look for {listed}.", check="json")


def _schema(rng: Random, domain: tuple[Field, ...], stated: list[int]) -> list[tuple[str, int]]:
    chosen = rng.sample(stated, between(rng, 2, len(stated)))
    if rng.random() < 0.08:
        chosen[-1] = between(rng, 1, len(domain) - 1)
    return [(pick(rng, domain[index].keys), index) for index in dict.fromkeys(chosen)]


def _sentence(rng: Random, domain: tuple[Field, ...], values: dict[int, Value]) -> str:
    subject, *rest = (pick(rng, domain[index].clauses).replace("V", str(value)) for index, value in values.items())
    if rng.random() < 0.5:
        rng.shuffle(rest)
    return f"{subject} {joined(rest)}."
