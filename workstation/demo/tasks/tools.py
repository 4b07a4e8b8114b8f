"""Calling one of the tools in the prompt, and answering from its result."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from workstation.demo.tasks.base import Message, Split, Task, between, draw, on_side, pick, user
from workstation.demo.tasks.everyday_tools import everyday_tool
from workstation.demo.tasks.lexicon import city, name, word
from workstation.demo.tasks.tool_pool import Tool, Value, invented_tool

NO_TOOL = "None of my tools can do that."
_STARTS = ("", "", "", "please ", "hey, ", "hi, ", "ok, ", "now ", "could you help? ", "a request: ")
_ENDS = ("", ".", "?", ", please.", ". Thanks.", "!")

_RESULTS: tuple[tuple[str, Callable[[Random, Split], Any]], ...] = (
    ("temperature", lambda rng, _split: between(rng, -20, 40)),
    ("condition", lambda rng, _split: pick(rng, ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy"))),
    ("status", lambda rng, _split: pick(rng, ("ok", "done", "sent", "open", "closed", "waiting", "failed"))),
    ("price", lambda rng, _split: between(rng, 1, 999)),
    ("count", lambda rng, _split: between(rng, 0, 99)),
    ("result", lambda rng, _split: between(rng, 0, 99999)),
    ("title", lambda rng, split: word(rng, split, 0.3)),
    ("name", name),
    ("city", city),
    ("time", lambda rng, _split: f"{between(rng, 0, 23):02d}:{between(rng, 0, 59):02d}"),
    ("id", lambda rng, _split: f"{chr(between(rng, 65, 90))}{between(rng, 10, 9999)}"),
    ("level", lambda rng, _split: between(rng, 0, 100)),
)


def tools(rng: Random, split: Split) -> Task:
    """One to four tools in the prompt; the answer is a call (six in ten), a sentence from the result, or that no tool fits."""
    if rng.random() < 0.07:
        chosen = invented_tool(rng, split)
        offered = [tool for tool in _offered(rng, split, chosen) if tool is not chosen] or [invented_tool(rng, split)]
        return _task(rng, offered, user(_request(rng, split, chosen)[0]), NO_TOOL, f"No tool is called {chosen.name}.")
    chosen = _any_tool(rng, split)
    offered = _offered(rng, split, chosen)
    request, arguments = _request(rng, split, chosen)
    call = tool_call(chosen.name, arguments)
    if rng.random() < 0.6:
        return _task(rng, offered, user(request), call, f"I call {chosen.name}.", check="tool_call")
    result, answer = _result(rng, split)
    messages = [*user(request), {"role": "assistant", "content": call}, {"role": "tool", "content": result}]
    return _task(rng, offered, messages, answer, "I have the result.")


def tool_call(called: str, arguments: dict[str, Value]) -> str:
    """The markup of a call, as the chat template writes it too."""
    return f"<tool_call>\n{json.dumps({'name': called, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


def _task(rng: Random, offered: list[Tool], messages: list[Message], answer: str, thought: str, check: Any = "text") -> Task:
    return Task("tools", messages, answer, thought=thought, tools=[tool.schema(rng) for tool in offered], check=check)


def _any_tool(rng: Random, split: Split) -> Tool:
    return everyday_tool(rng, split) if rng.random() < 0.35 else invented_tool(rng, split)


def _offered(rng: Random, split: Split, chosen: Tool) -> list[Tool]:
    """The chosen tool among up to three others, in any order; all names differ."""
    offered = {chosen.name: chosen}
    for _ in range(pick(rng, (0, 0, 1, 1, 2, 3))):
        other = _any_tool(rng, split)
        if not _alike(other, chosen):
            offered.setdefault(other.name, other)
    listed = list(offered.values())
    rng.shuffle(listed)
    return listed


def _alike(one: Tool, two: Tool) -> bool:
    """Whether two tools could answer the same request."""
    groups = ("weather", "search", "time", "add", "calculator", "message", "email")
    return one.name == two.name or any(word in one.name and word in two.name for word in groups)


def _request(rng: Random, split: Split, tool: Tool) -> tuple[str, dict[str, Value]]:
    """A request for the tool and the arguments it states, in the schema's order."""
    wording = draw(
        rng,
        lambda: (pick(rng, _STARTS), pick(rng, tool.requests), pick(rng, _ENDS)),
        split,
        lambda parts: f"frame:{parts[0]}|{parts[2]}",
    )
    text = "".join(wording)
    arguments: dict[str, Value] = {}
    for parameter in tool.parameters:
        spot = "{" + parameter.name + "}"
        if spot in text:
            value = parameter.make(rng, split)
            arguments[parameter.name] = value
            text = text.replace(spot, str(value).lower() if isinstance(value, bool) else str(value))
    return text[0].upper() + text[1:], arguments


_REASONS = (
    "not found",
    "no access",
    "timeout",
    "bad request",
    "try again later",
    "server is down",
    "not allowed",
    "no such city",
    "wrong date",
    "unknown user",
    "out of stock",
    "too many requests",
    "invalid id",
    "connection lost",
    "file is missing",
    "no results",
    "closed today",
)


def _bare(rng: Random, split: Split) -> str:
    """A result that is no JSON object."""
    return pick(rng, (str(between(rng, 0, 9999)), word(rng, split, 0.3), city(rng, split), _report(rng, split)))


def _report(rng: Random, split: Split) -> str:
    """A result in words, such as "sunny, 21 degrees"."""
    words = " ".join(word(rng, split if rng.random() < 0.3 else "train", 0.2) for _ in range(between(rng, 1, 3)))
    return f"{words}, {between(rng, 0, 99)} {word(rng, 'train', 0)}"


def _result(rng: Random, split: Split) -> tuple[str, str]:
    """What a tool returned and the sentence that tells it."""
    kind = rng.random()
    if kind < 0.08:
        reason = draw(rng, lambda: pick(rng, _REASONS), split, lambda text: f"reason:{text}")
        return json.dumps({"error": reason}), f"The tool reported an error: {reason}."
    if kind < 0.2:
        value = draw(rng, lambda: _bare(rng, split), split, lambda text: f"result:{text}")
        return value, f"The result is {value}."
    while True:
        fields = rng.sample(_RESULTS, between(rng, 1, 3))
        if on_side("result:" + ",".join(key for key, _ in fields), split):
            break
    values = {key: make(rng, split) for key, make in fields}
    told = [f"the {key} is {value}" for key, value in values.items()]
    sentence = " and ".join(told)
    return json.dumps(values, ensure_ascii=False), f"{sentence[0].upper()}{sentence[1:]}."
