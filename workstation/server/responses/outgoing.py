"""/v1/responses: answers and streams. One writer makes both, so that they cannot differ."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from workstation.errors import EngineError, WorkstationError
from workstation.parsers.parts import CallArguments, CallEnd, CallStart, Part, Reasoning, Text
from workstation.server import wire
from workstation.server.generation import Delta, Generation
from workstation.server.ids import fresh_id
from workstation.server.messages import call_arguments
from workstation.server.responses.incoming import Turn
from workstation.server.responses.schema import ResponsesRequest
from workstation.server.responses.store import ResponseStore


def response_object(response_id: str, created: int, model: str, body: ResponsesRequest) -> dict[str, Any]:
    """A response that has just begun."""
    return {
        "id": response_id, "object": "response", "created_at": created, "status": "in_progress", "error": None,
        "incomplete_details": None, "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {}, "model": model, "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id, "reasoning": body.reasoning or {"effort": None, "summary": None},
        "store": body.store is not False, "temperature": body.temperature, "text": body.text or {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or "auto", "tools": body.tools or [], "top_p": body.top_p, "truncation": "disabled",
        "usage": None, "user": body.user, "background": False,
    }


def failed(response: dict[str, Any], error: WorkstationError) -> dict[str, Any]:
    return {**response, "status": "failed", "error": {"code": error.code, "message": error.message}}


class _Log:
    """Events in their order; each carries its number."""

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent
        self._number = 0

    def event(self, name: str, /, **fields: Any) -> bytes:
        if self._silent:
            return b""
        data = {"type": name, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: " + name.encode() + b"\ndata: " + wire.encode(data) + b"\n\n"


def refused_stream(response: dict[str, Any], error: WorkstationError) -> bytes:
    """A whole stream for a request that never ran: some clients learn of an overflow from no other place."""
    log = _Log(silent=False)
    return log.event("response.created", response=response) + log.event("response.failed", response=failed(response, error))


class ResponseWriter:
    """Makes one response: its items, its events, and what is said beside them. One item is open at a time."""

    def __init__(self, generation: Generation, turn: Turn, store: ResponseStore) -> None:
        self._generation, self._turn, self._store = generation, turn, store
        job = generation.job
        self._response = response_object(job.public_id, job.created, job.model, turn.body)
        self._log = _Log(silent=not job.stream)
        self._opened = False
        self._cancelled = False
        self._item: dict[str, Any] | None = None
        self._pieces: list[str] = []
        self._thought_tokens = 0

    # ── the voice beside the events ─────────────────────────────────────────────────────────────────────────────────────

    def opening(self) -> bytes:
        """response.created and response.in_progress, once."""
        if self._opened:
            return b""
        self._opened = True
        return (self._log.event("response.created", response=self._response)
                + self._log.event("response.in_progress", response=self._response))

    def keep_alive(self) -> bytes:
        return self._log.event("response.in_progress", response=self._response)

    def last_words(self, error: WorkstationError) -> bytes:
        out = self.opening()
        self._response = failed(self._response, error)
        return out + self._log.event("response.failed", response=self._response)

    # ── the response ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def whole(self) -> bytes:
        """The whole response, encoded."""
        async with aclosing(self.events()) as events:
            async for _ in events:
                pass
        return wire.encode(self._response)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Every event of the response; at the end it is kept, unless the request said otherwise."""
        response_id = self._response["id"]
        self._store.begin(response_id, lambda: self._response, self._cancel)
        try:
            async with aclosing(self._generation.deltas()) as deltas:
                async for delta in deltas:
                    out = self._delta(delta)
                    if out:
                        yield out
        except EngineError:
            if not self._cancelled:
                raise
        finally:
            self._store.end(response_id)
        yield self._finish()

    def _cancel(self) -> None:
        self._cancelled = True
        for request in self._generation.job.requests:
            self._generation.engine.abort(request.request_id)

    def _delta(self, delta: Delta) -> bytes:
        parts: list[Part] = delta.parts if delta.parts is not None else [Text(delta.text)] if delta.text else []
        out = self.opening() + b"".join(map(self._part, parts))
        self._count_thought(delta, parts)
        return out

    def _count_thought(self, delta: Delta, parts: list[Part]) -> None:
        """Tokens of a thought: those of a delta, by its share of the characters where the thought begins or ends in it."""
        thought = sum(len(part.text) for part in parts if isinstance(part, Reasoning))
        total = sum(len(part.text) for part in parts if isinstance(part, (Reasoning, Text, CallArguments)))
        if thought:
            self._thought_tokens += max(round(len(delta.token_ids) * thought / total), 1)

    def _part(self, part: Part) -> bytes:
        parsing = self._generation.job.parsing
        if isinstance(part, Text):
            return self._switch("message") + self._grow("response.output_text.delta", part.text, content_index=0, logprobs=[])
        if isinstance(part, Reasoning):
            return self._switch("reasoning") + self._grow("response.reasoning_text.delta", part.text, content_index=0)
        if isinstance(part, CallStart):
            assert parsing is not None
            item = {"type": "function_call", "id": f"fc_{fresh_id()}", "call_id": parsing.call_id(), "name": part.name,
                    "arguments": "", "status": "in_progress"}
            return self._close() + self._open(item)
        if isinstance(part, CallArguments):
            return self._grow("response.function_call_arguments.delta", part.text)
        assert isinstance(part, CallEnd)
        return self._close()

    def _switch(self, kind: str) -> bytes:
        """Make sure that an item of this kind is open."""
        if self._item is not None and self._item["type"] == kind:
            return b""
        if kind == "message":
            item: dict[str, Any] = {"type": "message", "id": f"msg_{fresh_id()}", "role": "assistant", "status": "in_progress",
                                    "content": []}
            return self._close() + self._open(item) + self._part_event("added", _text_part(""))
        item = {"type": "reasoning", "id": f"rs_{fresh_id()}", "summary": [], "content": [], "status": "in_progress"}
        return self._close() + self._open(item) + self._part_event("added", {"type": "reasoning_text", "text": ""})

    def _open(self, item: dict[str, Any]) -> bytes:
        self._item, self._pieces = item, []
        return self._log.event("response.output_item.added", output_index=self._index, item=item)

    @property
    def _index(self) -> int:
        return len(self._response["output"])

    def _grow(self, name: str, text: str, **fields: Any) -> bytes:
        if self._item is None:
            return b""
        self._pieces.append(text)
        return self._log.event(name, item_id=self._item["id"], output_index=self._index, delta=text, **fields)

    def _part_event(self, end: str, part: dict[str, Any]) -> bytes:
        assert self._item is not None
        return self._log.event(f"response.content_part.{end}", item_id=self._item["id"], output_index=self._index,
                               content_index=0, part=part)

    def _close(self, status: str = "completed") -> bytes:
        """End the open item: what it came to stands in events of its own, then the item as a whole."""
        item = self._item
        if item is None:
            return b""
        text, place = "".join(self._pieces), {"item_id": item["id"], "output_index": self._index}
        if item["type"] == "message":
            part = _text_part(text)
            item = {**item, "content": [part]}
            out = self._log.event("response.output_text.done", **place, content_index=0, text=text, logprobs=[])
            out += self._part_event("done", part)
        elif item["type"] == "reasoning":
            part = {"type": "reasoning_text", "text": text}
            item = {**item, "content": [part]}
            out = self._log.event("response.reasoning_text.done", **place, content_index=0, text=text)
            out += self._part_event("done", part)
        else:
            item = {**item, "arguments": text}
            out = self._log.event("response.function_call_arguments.done", **place, name=item["name"], arguments=text)
        item = {**item, "status": status}
        out += self._log.event("response.output_item.done", output_index=self._index, item=item)
        self._response = {**self._response, "output": [*self._response["output"], item]}
        self._item = None
        return out

    def _finish(self) -> bytes:
        reason = self._generation.choices[0].finish_reason
        status = "cancelled" if self._cancelled else "incomplete" if reason == "length" else "completed"
        out = self.opening() + (b"" if self._response["output"] or self._item or self._cancelled else self._switch("message"))
        out += self._close("completed" if status == "completed" else "incomplete")
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        self._response = {**self._response, "status": status, "incomplete_details": details, "usage": self._usage(),
                          "completed_at": int(time.time())}
        if self._turn.body.store is not False and not self._cancelled:
            self._store.keep(self._response, [*self._turn.messages, *said(self._response["output"])])
        return out + self._log.event("response.completed" if status == "completed" else "response.incomplete",
                                     response=self._response)

    def _usage(self) -> dict[str, Any]:
        usage = self._generation.usage()
        return {"input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens, "output_tokens_details": {"reasoning_tokens": self._thought_tokens},
                "total_tokens": usage.total_tokens}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def said(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The assistant's message that a response's items amount to, for the next turn's prompt."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for item in output:
        if item["type"] == "message":
            message["content"] += item["content"][0]["text"]
        elif item["type"] == "reasoning":
            message["reasoning_content"] = message.get("reasoning_content", "") + item["content"][0]["text"]
        else:
            call = {"id": item["call_id"], "type": "function",
                    "function": {"name": item["name"], "arguments": _object(item["arguments"])}}
            message.setdefault("tool_calls", []).append(call)
    return [message]


def _object(arguments: str) -> dict[str, Any]:
    """Arguments for the template; a model's broken JSON is shown to it as it was."""
    try:
        return call_arguments(arguments, "arguments")
    except WorkstationError:
        return {"invalid_json": arguments}
