"""What all handshakes share: requests to the live server, server-sent events, and checks that end as ok, failed or skipped."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import httpx

from workstation.cli.check_clients import Facts

FIRST_BYTE_SECONDS = 3.0  # a server sends its headers before it computes the prompt
SILENCE_SECONDS = 10.0  # and then lets no stream be silent for so long
WORD = " apple"
PING_TOKENS = 16_384


class Failed(Exception):
    """A check that did not hold; the text is the cause."""


class Skipped(Exception):
    """A check that has nothing to look at here; the text says why."""


@dataclass(frozen=True, slots=True)
class Line:
    """One check's outcome."""

    name: str
    state: Literal["ok", "failed", "skipped"]
    says: str


@dataclass(slots=True)
class Event:
    """A server-sent event, or a comment (name ":"), and how many seconds after the request it came."""

    name: str
    data: str
    seconds: float

    def json(self) -> dict[str, Any]:
        try:
            value = json.loads(self.data)
        except ValueError:
            raise Failed(f"an event holds no JSON: {self.data[:80]}") from None
        if not isinstance(value, dict):
            raise Failed(f"an event holds no JSON object: {self.data[:80]}")
        return value


class Probe:
    """The live server, and what is known of it."""

    def __init__(self, client: httpx.Client, facts: Facts, props: dict[str, Any]) -> None:
        self.client = client
        self.facts = facts
        self.props = props

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A whole answer. Raises Failed for anything but a 200."""
        answer = self.client.post(path, json=body)
        if answer.status_code != 200:
            raise Failed(f"{path} answered {answer.status_code}: {_cause(answer.text)}")
        found: dict[str, Any] = answer.json()
        return found

    def refusal(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The error object of an answer that must be a 400."""
        answer = self.client.post(path, json=body)
        if answer.status_code != 400:
            raise Failed(f"{path} answered {answer.status_code} where a 400 is due")
        error: dict[str, Any] = answer.json()["error"]
        return error

    @contextmanager
    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Iterator[Event]]:
        """Events as they come. Raises Failed for anything but a 200 with an event stream."""
        began = time.monotonic()
        with self.client.stream("POST", path, json={**body, "stream": True}) as answer:
            if answer.status_code != 200:
                answer.read()
                raise Failed(f"{path} answered {answer.status_code}: {_cause(answer.text)}")
            kind = answer.headers.get("content-type", "")
            if not kind.startswith("text/event-stream"):
                raise Failed(f"{path} streams as {kind or 'nothing'}, not as text/event-stream")
            waited = time.monotonic() - began
            if waited > FIRST_BYTE_SECONDS:
                raise Failed(f"headers came after {waited:.1f} s; clients give up on a server that computes the prompt first")
            yield events(answer.iter_lines(), began)

    @property
    def tools(self) -> bool:
        return bool(self.props.get("chat_template_caps", {}).get("supports_tools"))

    def require_tools(self) -> None:
        if not self.tools:
            raise Failed("the model's chat template shows no tools, so an agent cannot work with it")

    def overflow(self) -> str:
        """A text of more tokens than the window."""
        return self.text(self.facts.window + 64)

    def text(self, tokens: int) -> str:
        """A text of about so many tokens that nobody has sent before, so that nothing of it is cached."""
        sample = self.post("/tokenize", {"prompt": WORD * 64, "add_special_tokens": False})["count"] / 64
        return secrets.token_hex(8) + WORD * max(int(tokens / sample), 1)

    def long_text(self) -> str:
        """What is computed for a while and still leaves room for a template and an answer."""
        return self.text(min(PING_TOKENS, max(self.facts.window - 512, self.facts.window // 2)))


def events(lines: Iterator[str], began: float) -> Iterator[Event]:
    """Parse server-sent events as they come (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    name, data = "", []
    for line in lines:
        now = time.monotonic() - began
        if line.startswith(":"):
            yield Event(":", line[1:].strip(), now)
        elif line.startswith("event:"):
            name = line[6:].strip()
        elif line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            yield Event(name, "\n".join(data), now)
            name, data = "", []


def silence(found: list[Event]) -> float:
    """The longest time without any event, in seconds."""
    times = [0.0, *(event.seconds for event in found)]
    return max(after - before for before, after in pairwise(times)) if found else 0.0


def spoken(found: list[Event], alive: int, first: float) -> str:
    """What a keep-alive check saw. Raises Failed for a stream that was silent too long."""
    longest = silence(found)
    if longest > SILENCE_SECONDS:
        raise Failed(f"the stream was silent for {longest:.1f} s; clients hang up on such streams")
    due = f"{alive} signs of life" if alive else "none was due"
    return f"first token after {first:.1f} s of a long prompt, {due}, never silent for more than {longest:.1f} s"


def _cause(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:120]
