"""/v1/messages: answers and streams in Anthropic's shape."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from workstation.errors import WorkstationError
from workstation.parsers.parts import CallArguments, CallStart, Part, Reasoning, Text, gathered
from workstation.server import wire
from workstation.server.errors import anthropic_error
from workstation.server.generation import Delta, Generation
from workstation.server.job import Job

# Thoughts come back unsigned; the field has to hold something, for some clients drop thoughts without it.
SIGNATURE = "unsigned"
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def event(name: str, **fields: Any) -> bytes:
    """One server-sent event; its name stands in its data as well."""
    return b"event: " + name.encode() + b"\ndata: " + wire.encode({"type": name, **fields}) + b"\n\n"


async def answer_message(generation: Generation) -> bytes:
    """The whole answer, encoded."""
    parts: list[Part] = []
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            parts += _parts(delta)
    found = gathered(parts)
    content: list[dict[str, Any]] = []
    parsing = generation.job.parsing
    if found.reasoning and parsing is not None and parsing.show_reasoning:
        content.append({"type": "thinking", "thinking": found.reasoning, "signature": SIGNATURE})
    if found.text or not found.calls:
        content.append({"type": "text", "text": found.text})
    for call in found.calls:
        content.append({"type": "tool_use", "id": _call_id(generation.job), "name": call.name, "input": _input(call.arguments)})
    return wire.encode({**_message(generation.job), "content": content, **_stop(generation), "usage": _usage(generation)})


def _parts(delta: Delta) -> list[Part]:
    if delta.parts is not None:
        return delta.parts
    return [Text(delta.text)] if delta.text else []


def _input(arguments: str) -> dict[str, Any]:
    """The arguments as an object; what a model wrote that is none is shown as it is."""
    try:
        value = json.loads(arguments, strict=False)
    except (ValueError, RecursionError):
        return {"invalid_json": arguments}
    return value if isinstance(value, dict) else {"invalid_json": arguments}


def _call_id(job: Job) -> str:
    assert job.parsing is not None
    return job.parsing.call_id().replace("call_", "toolu_")


def _message(job: Job) -> dict[str, Any]:
    return {"id": job.public_id, "type": "message", "role": "assistant", "model": job.model}


def _stop(generation: Generation) -> dict[str, Any]:
    choice = generation.choices[0]
    sequence = choice.stop_reason if isinstance(choice.stop_reason, str) and choice.finish_reason == "stop" else None
    reason = "stop_sequence" if sequence is not None else _STOP_REASONS.get(choice.finish_reason or "stop", "end_turn")
    return {"stop_reason": reason, "stop_sequence": sequence}


def _usage(generation: Generation) -> dict[str, int]:
    """Anthropic counts what came from the cache apart from the rest of the prompt."""
    usage = generation.usage()
    cached = usage.prompt_tokens_details.cached_tokens
    return {"input_tokens": usage.prompt_tokens - cached, "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached,
            "output_tokens": usage.completion_tokens}


class MessageStream:
    """The events of one stream, and what is said beside them. One content block is open at a time."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._opened = False
        self._index = -1
        self._kind = ""

    def opening(self) -> bytes:
        """message_start and a ping, once."""
        if self._opened:
            return b""
        self._opened = True
        message = {**_message(self._generation.job), "content": [], "stop_reason": None, "stop_sequence": None,
                   "usage": {**_usage(self._generation), "output_tokens": 0}}
        return event("message_start", message=message) + event("ping")

    def keep_alive(self) -> bytes:
        return event("ping")

    def last_words(self, error: WorkstationError) -> bytes:
        body = anthropic_error(error)
        return event("error", error=body["error"])

    async def events(self) -> AsyncGenerator[bytes, None]:
        """message_start, blocks, message_delta, message_stop."""
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                out = self.opening() + b"".join(map(self._part, _parts(delta)))
                if out:
                    yield out
        end = self._close() if self._kind else self._open("text", {"type": "text", "text": ""}) + self._close()
        last = event("message_delta", delta=_stop(self._generation), usage=_usage(self._generation))
        yield end + last + event("message_stop")

    def _part(self, part: Part) -> bytes:
        parsing = self._generation.job.parsing
        if isinstance(part, Text):
            head = self._switch("text", {"type": "text", "text": ""})
            return head + self._delta({"type": "text_delta", "text": part.text})
        if isinstance(part, Reasoning):
            if parsing is None or not parsing.show_reasoning:
                return b""
            head = self._switch("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            return head + self._delta({"type": "thinking_delta", "thinking": part.text})
        if isinstance(part, CallStart):
            block = {"type": "tool_use", "id": _call_id(self._generation.job), "name": part.name, "input": {}}
            return self._close() + self._open("tool_use", block)
        if isinstance(part, CallArguments):
            return self._delta({"type": "input_json_delta", "partial_json": part.text})
        return b""

    def _switch(self, kind: str, block: dict[str, Any]) -> bytes:
        return b"" if self._kind == kind else self._close() + self._open(kind, block)

    def _open(self, kind: str, block: dict[str, Any]) -> bytes:
        self._index += 1
        self._kind = kind
        return event("content_block_start", index=self._index, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return event("content_block_delta", index=self._index, delta=delta)

    def _close(self) -> bytes:
        if not self._kind:
            return b""
        signed = self._delta({"type": "signature_delta", "signature": SIGNATURE}) if self._kind == "thinking" else b""
        self._kind = ""
        return signed + event("content_block_stop", index=self._index)
