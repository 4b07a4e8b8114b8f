"""Handshakes of clients that speak Anthropic's messages."""

from __future__ import annotations

import re
from typing import Any

from workstation.cli.check_chat import ASK, CALL, check_arguments
from workstation.cli.check_probe import Event, Failed, Probe, spoken

PATH = "/v1/messages?beta=true"
TOOL = {"name": CALL["name"], "description": CALL["description"], "input_schema": CALL["parameters"]}


def _body(probe: Probe, text: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": probe.facts.model, "messages": messages, "max_tokens": 24, "temperature": 0, **fields}


def _events(found: list[Event]) -> list[dict[str, Any]]:
    told = [event.json() for event in found if event.name not in (":", "ping")]
    if not told or told[0]["type"] != "message_start" or told[-1]["type"] != "message_stop":
        raise Failed("the stream does not run from message_start to message_stop")
    return told


def hello(probe: Probe) -> str:
    """Paths it asks for unasked; a 404 there is taken for a bad connection."""
    for answer in (probe.client.head("/api/hello"), probe.client.post("/api/event_logging/batch", json={"events": []})):
        if answer.status_code != 200:
            raise Failed(f"{answer.request.method} {answer.request.url.path} answered {answer.status_code}")
    return "/api/hello and the event log are answered"


def names(probe: Probe) -> str:
    """Model ids it uses by itself, where a variable does not reach."""
    answer = probe.client.post(PATH, json={**_body(probe, "Say hello."), "model": "claude-haiku-4-5", "max_tokens": 1})
    if answer.status_code != 200:
        raise Failed("claude-… ids are refused (--no-map-claude-models); every model variable must be set")
    return f"claude-… ids are answered by {answer.json()['model']}"


def count(probe: Probe) -> str:
    body = {"model": probe.facts.model, "messages": [{"role": "user", "content": "Say hello."}]}
    tokens = probe.post("/v1/messages/count_tokens?beta=true", body)["input_tokens"]
    if not isinstance(tokens, int) or tokens < 1:
        raise Failed(f"count_tokens answered {tokens!r}")
    return f"{tokens} tokens"


def stream(probe: Probe) -> str:
    with probe.stream(PATH, _body(probe, "Say hello.")) as coming:
        told = _events(list(coming))
    blocks = [event["content_block"]["type"] for event in told if event["type"] == "content_block_start"]
    ends = sum(event["type"] == "content_block_stop" for event in told)
    if not blocks or ends != len(blocks):
        raise Failed(f"{len(blocks)} content blocks began and {ends} ended")
    return f"{len(told)} events, blocks {', '.join(blocks)}"


def tools(probe: Probe) -> str:
    probe.require_tools()
    body = _body(probe, ASK, max_tokens=200, tools=[TOOL], tool_choice={"type": "tool", "name": TOOL["name"]})
    with probe.stream(PATH, body) as coming:
        told = _events(list(coming))
    call = next((event["content_block"] for event in told if event["type"] == "content_block_start"
                 and event["content_block"]["type"] == "tool_use"), None)
    if call is None or not call.get("id") or call.get("name") != TOOL["name"]:
        raise Failed("the answer holds no tool_use block with id and name, though one was asked for by name")
    pieces = [event["delta"]["partial_json"] for event in told if event["type"] == "content_block_delta"
              and event["delta"]["type"] == "input_json_delta"]
    reason = next((event["delta"].get("stop_reason") for event in told if event["type"] == "message_delta"), None)
    if reason != "tool_use":
        raise Failed(f"stop_reason is {reason} after a call, so an agent would stop")
    return f"{call['name']}({check_arguments(''.join(pieces))})"


def usage(probe: Probe) -> str:
    with probe.stream(PATH, _body(probe, "Say hello.")) as coming:
        told = _events(list(coming))
    first, last = told[0]["message"]["usage"], next(event["usage"] for event in told if event["type"] == "message_delta")
    total = first["input_tokens"] + (first.get("cache_read_input_tokens") or 0)
    if not total or not last["output_tokens"]:
        raise Failed(f"usage is {first} and {last}")
    return f"{total} + {last['output_tokens']} tokens, {first.get('cache_read_input_tokens') or 0} cached"


def overflow(probe: Probe) -> str:
    """The words on which it compacts a conversation."""
    error = probe.refusal(PATH, _body(probe, probe.overflow()))
    said = re.match(r"prompt is too long: \d+ tokens > \d+ maximum", error["message"])
    if error["type"] != "invalid_request_error" or not said:
        raise Failed(f"the refusal is not in the words it compacts on: {error['message'][:120]}")
    return f"400: {error['message']}"


def keep_alive(probe: Probe) -> str:
    with probe.stream(PATH, _body(probe, probe.long_text(), max_tokens=4)) as coming:
        found = list(coming)
    first = next((event.seconds for event in found if event.name == "content_block_delta"), 0.0)
    return spoken(found, sum(event.name == "ping" for event in found), first)
