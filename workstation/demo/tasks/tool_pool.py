"""Tools for the tool-calling task: everyday ones with natural requests, and made-up ones of a verb, a noun and parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from workstation.demo.tasks.base import Split, between, draw, held_out, pick
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


def _enum(key: str, about: str, *choices: str) -> Parameter:
    return Parameter(key, "string", about, lambda rng, _split: pick(rng, choices), choices)


def _number(key: str, about: str, low: int, high: int) -> Parameter:
    return Parameter(key, "integer", about, lambda rng, _split: between(rng, low, high))


def _text(key: str, about: str, make: Maker) -> Parameter:
    return Parameter(key, "string", about, make)


def _flag(key: str, about: str) -> Parameter:
    return Parameter(key, "boolean", about, lambda rng, _split: rng.random() < 0.5)


def _phrase(rng: Random, split: Split) -> str:
    return " ".join(word(rng, split if rng.random() < 0.3 else "train", 0.2) for _ in range(between(rng, 1, 4)))


def _email(rng: Random, split: Split) -> str:
    return f"{name(rng, split).lower()}@{word(rng, 'train', 0)}.com"


CITY = _text("city", "Name of the city", city)
POOL: tuple[Parameter, ...] = (
    CITY,
    _text("location", "The place", city),
    _text("name", "Name of the person", name),
    _text("user", "Name of the user", name),
    _text("owner", "Who owns it", name),
    _text("id", "Identifier", code),
    _text("code", "The code", code),
    _text("date", "Date as YYYY-MM-DD", lambda rng, _split: date(rng)),
    _text("start_date", "First day", lambda rng, _split: date(rng)),
    _text("time", "Time as HH:MM", lambda rng, _split: clock(rng)),
    _text("weekday", "Day of the week", lambda rng, _split: day(rng)),
    _text("title", "Title text", _phrase),
    _text("query", "What to look for", _phrase),
    _text("message", "Message text", _phrase),
    _text("email", "Email address", _email),
    _text("tag", "A tag", lambda rng, split: word(rng, split, 0.2)),
    _text("color", "A color", lambda rng, _split: pick(rng, ("red", "blue", "green", "black", "white", "yellow"))),
    _number("count", "How many", 1, 99),
    _number("limit", "Upper limit", 1, 500),
    _number("minutes", "Length in minutes", 1, 180),
    _number("page", "Page number", 1, 99),
    _number("amount", "The amount", 1, 999),
    _number("level", "The level", 0, 100),
    _number("port", "Port number", 1000, 9999),
    _enum("unit", "Unit of the result", "celsius", "fahrenheit"),
    _enum("priority", "How urgent it is", "low", "medium", "high"),
    _enum("size", "The size", "small", "medium", "large"),
    _enum("format", "Output format", "text", "json", "csv"),
    _enum("mode", "The mode", "fast", "normal", "slow"),
    _flag("urgent", "Whether it is urgent"),
    _flag("public", "Whether all may see it"),
    _flag("dry_run", "Only pretend"),
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


_WHERE = _text("location", "City or place", city)
EVERYDAY: tuple[Tool, ...] = (
    Tool("get_weather", "Get the current weather in a city", (CITY,),
         ("what is the weather in {city}", "how is the weather in {city}", "what is the weather like in {city}", "tell me the weather in {city}",
          "will it rain in {city}", "weather in {city}", "what's the weather in {city}", "get the weather for {city}", "is it cold in {city}",
          "how warm is it in {city}", "what is the weather today in {city}", "what's the weather like in {city}", "show me the weather in {city}")),
    Tool("get_weather", "Get the weather", (_WHERE, _enum("unit", "Unit of the temperature", "celsius", "fahrenheit")),
         ("what is the weather in {location}", "what is the weather in {location} in {unit}", "how warm is it in {location} in {unit}",
          "tell me the weather in {location} in {unit}", "what's the weather like in {location}", "get the weather for {location}")),
    Tool("get_current_weather", "Get the current weather in a given location", (_WHERE, _enum("unit", "Unit", "celsius", "fahrenheit")),
         ("what is the weather in {location}", "what is the current weather in {location} in {unit}", "what's the weather in {location} today",
          "how is the weather in {location} right now")),
    Tool("get_time", "Get the current time in a city", (CITY,),
         ("what time is it in {city}", "tell me the time in {city}", "what is the time in {city}", "current time in {city}", "what is the current time in {city}", "tell me what time it is in {city}")),
    Tool("send_email", "Send an email", (_text("to", "Receiver", _email), _text("subject", "Subject line", _phrase)),
         ('send an email to {to} with the subject "{subject}"', 'email {to} about "{subject}"', 'write an email to {to}, subject "{subject}"',
          'send an email about "{subject}" to {to}', 'mail {to} with the subject "{subject}"', 'send {to} an email with the subject "{subject}"')),
    Tool("send_message", "Send a message to a person", (_text("to", "Receiver", name), _text("text", "Message text", _phrase)),
         ('send {to} the message "{text}"', 'tell {to} "{text}"', 'message {to} "{text}"', 'write "{text}" to {to}',
          'send "{text}" to {to}', 'say "{text}" to {to}', 'tell "{text}" to {to}', 'text {to} "{text}"', 'send a message to {to}: "{text}"')),
    Tool("set_timer", "Start a timer", (_number("minutes", "Length in minutes", 1, 180),),
         ("set a timer for {minutes} minutes", "start a timer of {minutes} minutes", "wake me in {minutes} minutes", "timer for {minutes} minutes", "start a timer for {minutes} minutes", "set a timer of {minutes} minutes")),
    Tool("set_alarm", "Set an alarm clock", (_text("time", "Time as HH:MM", lambda rng, _split: clock(rng)),),
         ("set an alarm for {time}", "wake me up at {time}", "alarm at {time}", "wake me at {time}", "set an alarm at {time}", "set the alarm to {time}")),
    Tool("search", "Search the web", (_text("query", "What to look for", _phrase),),
         ('search for "{query}"', 'look up "{query}"', 'search the web for "{query}"', 'find pages about "{query}"', 'search "{query}"', 'look for "{query}"', 'search the web for pages about "{query}"')),
    Tool("web_search", "Search the internet", (_text("query", "Search words", _phrase), _number("limit", "Number of results", 1, 50)),
         ('search the internet for "{query}" and show {limit} results', 'find {limit} pages about "{query}"', 'look up "{query}" on the internet')),
    Tool("calculator", "Work out an operation on two numbers",
         (_number("a", "First number", 0, 9999), _number("b", "Second number", 0, 9999)),
         ("use the calculator on {a} and {b}", "give {a} and {b} to the calculator", "call the calculator with {a} and {b}",
          "run the calculator with {a} and {b}", "use the calculator with {a} and {b}", "call the calculator on {a} and {b}", "pass {a} and {b} to the calculator")),
    Tool("add", "Add two numbers", (_number("a", "First number", 0, 99999), _number("b", "Second number", 0, 99999)),
         ("add {a} and {b}", "what is {a} plus {b}", "use the tool to add {a} and {b}", "what is {a} + {b}",
          "compute {a} + {b}", "sum {a} and {b}", "how much is {a} + {b}", "how much is {a} plus {b}", "calculate {a} plus {b}")),
    Tool("multiply", "Multiply two numbers", (_number("a", "First number", 0, 9999), _number("b", "Second number", 0, 9999)),
         ("multiply {a} by {b}", "what is {a} times {b}", "multiply {a} and {b}", "what is {a} * {b}",
          "compute {a} * {b}", "how much is {a} * {b}", "how much is {a} times {b}", "calculate {a} times {b}")),
    Tool("play_song", "Play a song", (_text("title", "Title of the song", _phrase),),
         ('play the song "{title}"', 'play "{title}"', 'I want to hear "{title}"', 'I want to hear the song "{title}"', 'please play "{title}" for me')),
    Tool("turn_on_light", "Turn on the light in a room", (_enum("room", "The room", "kitchen", "bathroom", "bedroom", "office", "garage"),),
         ("turn on the light in the {room}", "switch the {room} light on", "light on in the {room}", "turn the {room} light on", "switch on the light in the {room}")),
    Tool("set_temperature", "Set the heating of a room", (_number("degrees", "Degrees Celsius", 10, 30),),
         ("set the temperature to {degrees} degrees", "make it {degrees} degrees", "heat to {degrees} degrees", "heat the room to {degrees} degrees", "set the heating to {degrees} degrees")),
    Tool("convert_currency", "Convert money into another currency",
         (_number("amount", "How much", 1, 9999), _enum("currency", "Target currency", "EUR", "USD", "GBP", "JPY", "CHF")),
         ("convert {amount} into {currency}", "how much is {amount} in {currency}", "change {amount} to {currency}", "convert {amount} to {currency}", "change {amount} into {currency}")),
    Tool("get_stock_price", "Get the price of a share", (_text("symbol", "Ticker symbol", lambda rng, split: code(rng, split)[:2]),),
         ("what is the share price of {symbol}", "get the stock price of {symbol}", "how much is a share of {symbol}", "get the price of {symbol}", "what is the stock price of {symbol}")),
    Tool("book_flight", "Book a flight", (_text("origin", "City of departure", city), _text("destination", "City of arrival", city)),
         ("book a flight from {origin} to {destination}", "I want to fly from {origin} to {destination}", "find me a flight from {origin} to {destination}")),
    Tool("read_file", "Read a file", (_text("path", "Path of the file", lambda rng, split: f"{word(rng, split, 0.2)}.txt"),),
         ("read the file {path}", "open {path}", "show me {path}", "what is in {path}", "show the file {path}", "open the file {path}", "read {path}")),
)  # fmt: skip

_VERBS = (
    "get", "find", "create", "delete", "update", "send", "book", "start", "stop", "check", "list", "open", "close", "cancel", "show",
    "fetch", "move", "print", "order", "rename", "pause", "scan", "sell", "buy", "repair", "test", "export", "import", "archive", "lock",
)  # fmt: skip
_NOUNS = [w for w in WORDS if len(w) > 3] + ["ticket", "invoice", "report", "task", "account", "event", "device", "order", "note", "job"]
_ABOUT = ("{Verb} a {noun}", "{Verb} the {noun}", "{Verb} one {noun}", "Tool to {verb} a {noun}", "{Verb} a {noun} by its data")
_OPENINGS = ("{verb} the {noun}", "{verb} a {noun}", "please {verb} the {noun}", "can you {verb} the {noun}", "I want to {verb} a {noun}", "{verb} one {noun}")
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
        value = f'"{spot}"' if parameter.make is _phrase else spot
        key = parameter.name.replace("_", " ") if rng.random() < 0.7 else parameter.name
        clauses.append(pick(rng, _CLAUSES).replace("{key}", key).replace("{value}", value))
    opening = pick(rng, _OPENINGS).format(verb=verb, noun=noun)
    return f"{opening} with {', '.join(clauses[:-1]) + ' and ' + clauses[-1] if len(clauses) > 1 else clauses[0]}"


def everyday_tool(rng: Random, split: Split) -> Tool:
    """One of the everyday tools, asked for in words of the wanted side: a request's wording is held out per tool."""
    tool = pick(rng, EVERYDAY)
    spoken = [request for request in tool.requests if held_out(f"ask:{tool.name}:{request}") == (split == "held_out")]
    return Tool(tool.name, tool.about, tool.parameters, tuple(spoken)) if spoken else everyday_tool(rng, split)
