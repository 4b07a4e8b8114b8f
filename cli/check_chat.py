"""Handshakes of clients that speak chat/completions, and what some of them look at besides."""

from __future__ import annotations

import json
from typing import Any

from workstation.cli.check_probe import Event, Failed, Probe, Skipped, spoken

PATH = "/v1/chat/completions"
CALL = {"name": "get_weather", "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}
ASK = "What is the weather in Paris?"


def _body(probe: Probe, text: str, **fields: Any) -> dict[str, Any]:
    return {"model": probe.facts.model, "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}


def _chunks(found: list[Event]) -> list[dict[str, Any]]:
    said = [event for event in found if event.name != ":"]
    if not said or said[-1].data != "[DONE]":
        raise Failed("the stream did not end with [DONE]")
    return [event.json() for event in said[:-1]]


def stream(probe: Probe) -> str:
    """Deltas that name the role first and the reason last, then [DONE]."""
    with probe.stream(PATH, _body(probe, "Say hello.", max_tokens=24)) as coming:
        chunks = _chunks(list(coming))
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    if not choices or choices[0]["delta"].get("role") != "assistant":
        raise Failed("the first delta does not name the role assistant")
    reasons = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    if len(reasons) != 1:
        raise Failed(f"the stream gave {len(reasons)} finish reasons instead of one")
    text = "".join(choice["delta"].get("content") or choice["delta"].get("reasoning_content") or "" for choice in choices)
    return f"{len(chunks)} chunks, finish_reason {reasons[0]}, {len(text)} characters"


def tools(probe: Probe) -> str:
    """A named call: index, id, type and name once, then its arguments in pieces, and finish_reason tool_calls."""
    probe.require_tools()
    choice = {"type": "function", "function": {"name": CALL["name"]}}
    body = _body(probe, ASK, max_tokens=200, tools=[{"type": "function", "function": CALL}], tool_choice=choice)
    with probe.stream(PATH, body) as coming:
        choices = [choice for chunk in _chunks(list(coming)) for choice in chunk["choices"]]
    deltas = [delta for choice in choices for delta in choice["delta"].get("tool_calls") or []]
    if not deltas:
        raise Failed("the answer holds no tool call, though one was asked for by name")
    first = deltas[0]
    if not (first.get("id") and first.get("type") == "function" and first["function"].get("name") == CALL["name"]):
        raise Failed(f"the first delta of a call lacks its id, type or name: {json.dumps(first)[:120]}")
    if any(delta.get("index") is None for delta in deltas):
        raise Failed("a delta of a call has no index")
    arguments = "".join(delta["function"].get("arguments") or "" for delta in deltas if delta["index"] == first["index"])
    reason = next((choice["finish_reason"] for choice in reversed(choices) if choice.get("finish_reason")), None)
    if reason != "tool_calls":
        raise Failed(f"finish_reason is {reason} after a call, so an agent would stop")
    return f"{CALL['name']}({check_arguments(arguments)})"


def check_arguments(text: str) -> str:
    """Raises Failed when a call's arguments are no JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        raise Failed(f"the model wrote arguments that are not JSON: {text[:80]}") from None
    if not isinstance(value, dict):
        raise Failed(f"the model wrote arguments that are no object: {text[:80]}")
    return ", ".join(f"{name}={shown!r}" for name, shown in value.items())[:80]


def usage(probe: Probe) -> str:
    """Asked for, a last chunk without choices holds the counts, cached tokens with them; and the speed."""
    with probe.stream(PATH, _body(probe, "Say hello.", max_tokens=8, stream_options={"include_usage": True})) as coming:
        last = _chunks(list(coming))[-1]
    counts = last.get("usage")
    if last["choices"] or not counts or not counts["prompt_tokens"] or not counts["completion_tokens"]:
        raise Failed("the last chunk holds no usage, though stream_options.include_usage was set")
    if "cached_tokens" not in (counts.get("prompt_tokens_details") or {}):
        raise Failed("usage holds no prompt_tokens_details.cached_tokens")
    speed = last.get("timings", {}).get("predicted_per_second")
    return (f"{counts['prompt_tokens']} + {counts['completion_tokens']} tokens, "
            f"{counts['prompt_tokens_details']['cached_tokens']} cached" + (f", {speed} tokens/s" if speed else ""))


def overflow(probe: Probe) -> str:
    """Refused, never cut, in the words clients look for."""
    error = probe.refusal(PATH, _body(probe, probe.overflow(), max_tokens=16))
    if error.get("code") != "context_length_exceeded" or "maximum context length" not in error["message"]:
        raise Failed(f"the refusal does not say so in the words clients look for: {error['message'][:120]}")
    return f"400 {error['code']}: {error['message'][:72]}…"


def keep_alive(probe: Probe) -> str:
    """Headers before the prompt is computed; then no long silence."""
    with probe.stream(PATH, _body(probe, probe.long_text(), max_tokens=4)) as coming:
        found = list(coming)
    first = next((event.seconds for event in found if event.name != ":"), 0.0)
    return spoken(found, sum(event.name == ":" for event in found), first)


def fill(probe: Probe) -> str:
    """Completions around a cursor."""
    if not probe.facts.fills:
        raise Skipped("the model has no tokens for filling in the middle; leave autocompletion to another model")
    body = {"model": probe.facts.model, "prompt": "def add(a, b):\n    return ", "suffix": "\n", "max_tokens": 16,
            "temperature": 0}
    text = probe.post("/v1/completions", body)["choices"][0]["text"]
    return f"between prompt and suffix: {text[:40]!r}"


def props(probe: Probe) -> str:
    """Zed's llama.cpp provider reads window and tools here."""
    window = (probe.props.get("default_generation_settings") or {}).get("n_ctx")
    if window != probe.facts.window:
        raise Failed(f"/props gives a window of {window}, /v1/models one of {probe.facts.window}")
    return f"n_ctx {window}, tools {'on' if probe.tools else 'off'}"
