"""Tools for the tool-calling task: everyday ones with natural requests, and made-up ones of a verb, a noun and parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from workstation.demo.tasks.base import Split, between, draw, pick
from workstation.demo.tasks.lexicon import WORDS, city, clock, code, date, day, name, word

Value = str | int | bool
Maker = Callable[[Random, Split], Value]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument of a tool. `choices` is the schema's enum, empty for free values."""

    name: str
    kind: str  # JSON schema type
    about: str
    make: Maker
    choices: tuple[str, ...] = ()

    def schema(self) -> dict[str, Any]:
        described: dict[str, Any] = {"type": self.kind, "description": self.about}
        return described | {"enum": list(self.choices)} if self.choices else described


def enum(key: str, about: str, *choices: str) -> Parameter:
    return Parameter(key, "string", about, lambda rng, _split: pick(rng, choices), choices)


def number(key: str, about: str, low: int, high: int) -> Parameter:
    return Parameter(key, "integer", about, lambda rng, _split: between(rng, low, high))


def text(key: str, about: str, make: Maker) -> Parameter:
    return Parameter(key, "string", about, make)


def flag(key: str, about: str) -> Parameter:
    return Parameter(key, "boolean", about, lambda rng, _split: rng.random() < 0.5)


def phrase(rng: Random, split: Split) -> str:
    return " ".join(word(rng, split if rng.random() < 0.3 else "train", 0.2) for _ in range(between(rng, 1, 4)))


def email(rng: Random, split: Split) -> str:
    return f"{name(rng, split).lower()}@{word(rng, 'train', 0)}.com"


CITY = text("city", "Name of the city", city)
POOL: tuple[Parameter, ...] = (
    CITY,
    text("location", "The place", city),
    text("name", "Name of the person", name),
    text("user", "Name of the user", name),
    text("owner", "Who owns it", name),
    text("id", "Identifier", code),
    text("code", "The code", code),
    text("date", "Date as YYYY-MM-DD", lambda rng, _split: date(rng)),
    text("start_date", "First day", lambda rng, _split: date(rng)),
    text("time", "Time as HH:MM", lambda rng, _split: clock(rng)),
    text("weekday", "Day of the week", lambda rng, _split: day(rng)),
    text("title", "Title text", phrase),
    text("query", "What to look for", phrase),
    text("message", "Message text", phrase),
    text("email", "Email address", email),
    text("tag", "A tag", lambda rng, split: word(rng, split, 0.2)),
    text("color", "A color", lambda rng, _split: pick(rng, ("red", "blue", "green", "black", "white", "yellow"))),
    number("count", "How many", 1, 99),
    number("limit", "Upper limit", 1, 500),
    number("minutes", "Length in minutes", 1, 180),
    number("page", "Page number", 1, 99),
    number("amount", "The amount", 1, 999),
    number("level", "The level", 0, 100),
    number("port", "Port number", 1000, 9999),
    enum("unit", "Unit of the result", "celsius", "fahrenheit"),
    enum("priority", "How urgent it is", "low", "medium", "high"),
    enum("size", "The size", "small", "medium", "large"),
    enum("format", "Output format", "text", "json", "csv"),
    enum("mode", "The mode", "fast", "normal", "slow"),
    flag("urgent", "Whether it is urgent"),
    flag("public", "Whether all may see it"),
    flag("dry_run", "Only pretend"),
)


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool and the requests that name it; a request holds `{parameter}` for each argument it states."""

    name: str
    about: str
    parameters: tuple[Parameter, ...]
    requests: tuple[str, ...]

    def schema(self, rng: Random) -> dict[str, Any]:
        """OpenAI's tool object. What clients leave out or add varies, so that the model does not lean on it."""
        properties = {parameter.name: parameter.schema() for parameter in self.parameters}
        if rng.random() < 0.25:
            for described in properties.values():
                described.pop("description")
        body: dict[str, Any] = {"type": "object", "properties": properties}
        if rng.random() < 0.8:
            body["required"] = [parameter.name for parameter in self.parameters[: between(rng, 1, len(self.parameters))]]
        if rng.random() < 0.1:
            body["additionalProperties"] = False
        return {"type": "function", "function": {"name": self.name, "description": self.about, "parameters": body}}


_VERBS = (
    "get",
    "find",
    "create",
    "delete",
    "update",
    "send",
    "book",
    "start",
    "stop",
    "check",
    "list",
    "open",
    "close",
    "cancel",
    "show",
    "fetch",
    "move",
    "print",
    "order",
    "rename",
    "pause",
    "scan",
    "sell",
    "buy",
    "repair",
    "test",
    "export",
    "import",
    "archive",
    "lock",
)
_NOUNS = [w for w in WORDS if len(w) > 3] + [
    "ticket",
    "invoice",
    "report",
    "task",
    "account",
    "event",
    "device",
    "order",
    "note",
    "job",
]
_ABOUT = ("{Verb} a {noun}", "{Verb} the {noun}", "{Verb} one {noun}", "Tool to {verb} a {noun}", "{Verb} a {noun} by its data")
_OPENINGS = (
    "{verb} the {noun}",
    "{verb} a {noun}",
    "please {verb} the {noun}",
    "can you {verb} the {noun}",
    "I want to {verb} a {noun}",
    "{verb} one {noun}",
)
_CLAUSES = ("{key} {value}", "{key} {value}", "{key} set to {value}", "{key} = {value}", "{value} as {key}", "{key}: {value}")


def invented_tool(rng: Random, split: Split) -> Tool:
    """A tool called verb_noun with one to three parameters; the name is what the split holds out."""
    verb, noun = draw(rng, lambda: (pick(rng, _VERBS), _noun(rng)), split, lambda pair: f"tool:{pair[0]}_{pair[1]}")
    parameters = tuple(rng.sample(POOL, between(rng, 1, 3)))
    about = pick(rng, _ABOUT).format(Verb=verb.capitalize(), verb=verb, noun=noun)
    named = f"{verb}_{noun}" if rng.random() < 0.9 else f"{verb}{noun.capitalize()}"
    return Tool(named, about, parameters, (_request(rng, verb, noun, parameters),))


def _noun(rng: Random) -> str:
    return pick(rng, _NOUNS) if rng.random() < 0.85 else word(rng, "train", 1.0)


def _request(rng: Random, verb: str, noun: str, parameters: tuple[Parameter, ...]) -> str:
    stated = parameters if rng.random() < 0.8 else parameters[: between(rng, 1, len(parameters))]
    clauses = []
    for parameter in stated:
        spot = "{" + parameter.name + "}"
        value = f'"{spot}"' if parameter.make is phrase else spot
        key = parameter.name.replace("_", " ") if rng.random() < 0.7 else parameter.name
        clauses.append(pick(rng, _CLAUSES).replace("{key}", key).replace("{value}", value))
    opening = pick(rng, _OPENINGS).format(verb=verb, noun=noun)
    return f"{opening} with {', '.join(clauses[:-1]) + ' and ' + clauses[-1] if len(clauses) > 1 else clauses[0]}"
