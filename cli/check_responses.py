"""Handshakes of clients that speak OpenAI's responses, as Codex does."""

from __future__ import annotations

from typing import Any

from workstation.cli.check_chat import ASK, CALL, check_arguments
from workstation.cli.check_probe import Event, Failed, Probe, spoken

PATH = "/v1/responses"
OTHER_TOOLS = [{"type": "web_search"}, {"type": "namespace", "name": "shell", "tools": []}]


def _body(probe: Probe, text: str, **fields: Any) -> dict[str, Any]:
    message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
    return {"model": probe.facts.model, "input": [message], "max_output_tokens": 24, "store": False, **fields}


def _events(found: list[Event]) -> list[dict[str, Any]]:
    told = [event.json() for event in found if event.name != ":"]
    if not told or told[0]["type"] != "response.created":
        raise Failed("the stream does not begin with response.created")
    last = told[-1]
    if last["type"] not in ("response.completed", "response.incomplete"):
        raise Failed(f"the stream ends with {last['type']}")
    if not last["response"].get("id") or not last["response"].get("usage"):
        raise Failed(f"{last['type']} lacks the response's id or usage")
    return told


def stream(probe: Probe) -> str:
    with probe.stream(PATH, _body(probe, "Say hello.")) as coming:
        told = _events(list(coming))
    numbers = [event.get("sequence_number") for event in told]
    if numbers != list(range(len(told))):
        raise Failed("events are not numbered in order")
    return f"{len(told)} events, the last {told[-1]['type']}"


def tools(probe: Probe) -> str:
    """A call by name, beside tools of kinds that only OpenAI runs, which must not be an error."""
    probe.require_tools()
    body = _body(probe, ASK, max_output_tokens=200, tools=[{"type": "function", **CALL}, *OTHER_TOOLS],
                 tool_choice={"type": "function", "name": CALL["name"]})
    with probe.stream(PATH, body) as coming:
        told = _events(list(coming))
    done = [event["item"] for event in told if event["type"] == "response.output_item.done"]
    call = next((item for item in done if item["type"] == "function_call"), None)
    if call is None or not call.get("call_id") or call.get("name") != CALL["name"]:
        raise Failed("the answer holds no function_call item with call_id and name, though one was asked for by name")
    return f"{call['name']}({check_arguments(call['arguments'])}), beside tools of unknown kinds"


def probe_input(probe: Probe) -> str:
    """Codex asks with next to nothing for one token, to see who answers."""
    answer = probe.post(PATH, {**_body(probe, "hi"), "max_output_tokens": 16})
    return f"status {answer['status']}"


def usage(probe: Probe) -> str:
    counts = probe.post(PATH, _body(probe, "Say hello."))["usage"]
    if not counts["input_tokens"] or not counts["output_tokens"] or "cached_tokens" not in counts["input_tokens_details"]:
        raise Failed(f"usage is {counts}")
    cached = counts["input_tokens_details"]["cached_tokens"]
    return f"{counts['input_tokens']} + {counts['output_tokens']} tokens, {cached} cached"


def overflow(probe: Probe) -> str:
    """The code on which it compacts, in a stream as response.failed."""
    text = probe.overflow()
    with probe.stream(PATH, _body(probe, text)) as coming:
        last = [event.json() for event in coming if event.name != ":"][-1]
    error = (last.get("response") or {}).get("error") or {}
    if last["type"] != "response.failed" or error.get("code") != "context_length_exceeded":
        raise Failed(f"the stream ends with {last['type']} and the code {error.get('code')}")
    error = probe.refusal(PATH, _body(probe, text))
    if error.get("code") != "context_length_exceeded":
        raise Failed(f"the code is {error.get('code')}")
    return "response.failed with context_length_exceeded, 400 without a stream"


def keep_alive(probe: Probe) -> str:
    """Its timer counts events, not comments."""
    with probe.stream(PATH, _body(probe, probe.long_text(), max_output_tokens=16)) as coming:
        found = [event for event in coming if event.name != ":"]
    first = next((event.seconds for event in found if event.name == "response.output_text.delta"), 0.0)
    return spoken(found, max(sum(event.name == "response.in_progress" for event in found) - 1, 0), first)
