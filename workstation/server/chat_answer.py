"""Answers and streams of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from msgspec import UNSET

from workstation import __version__
from workstation.parsers.parts import CallArguments, CallStart, Part, Reasoning, Text, gathered
from workstation.server import wire
from workstation.server.generation import Choice, Delta, Generation
from workstation.server.job import Job
from workstation.server.logprobs import LogprobWriter


async def answer_chat(generation: Generation) -> bytes:
    """The whole answer, encoded."""
    job = generation.job
    count = len(generation.choices)
    parts: list[list[Part]] = [[] for _ in range(count)]
    ids: list[list[int]] = [[] for _ in range(count)]
    logprobs: list[list[Any]] = [[] for _ in range(count)]
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            index = delta.choice.index
            parts[index].extend(delta.parts if delta.parts is not None else [Text(delta.text)])
            ids[index].extend(delta.token_ids)
            logprobs[index].extend(delta.logprobs)
    writer = LogprobWriter(generation.tokenizer, as_ids=job.tokens_as_ids)
    choices = [
        wire.ChatChoice(choice.index, _message(job, parts[choice.index]),
                        writer.chat(logprobs[choice.index]) if job.logprobs else None, choice.finish_reason or "stop",
                        choice.stop_reason, ids[choice.index] if job.return_token_ids else UNSET)
        for choice in generation.choices
    ]
    answer = _answer(generation, "chat.completion", choices)
    answer.usage, answer.timings = generation.usage(), generation.timings()
    answer.metrics = generation.request_metrics()
    prompt_logprobs = generation.prompt_logprobs[0]
    if job.prompt_logprobs:
        answer.prompt_logprobs = writer.prompt(prompt_logprobs) if prompt_logprobs is not None else None
    if job.return_token_ids:
        answer.prompt_token_ids = job.requests[0].prompt_token_ids
    return wire.encode(answer)


def _message(job: Job, parts: list[Part]) -> wire.ChatMessage:
    """Content is null in an answer that only calls."""
    found = gathered(parts)
    message = wire.ChatMessage("assistant", found.text)
    parsing = job.parsing
    if parsing is None:
        return message
    if found.calls:
        message.content = found.text or None
        message.tool_calls = [wire.ToolCall(parsing.call_id(), wire.FunctionCall(call.name, call.arguments))
                              for call in found.calls]
    if found.reasoning and parsing.show_reasoning:
        message.reasoning_content = message.reasoning = found.reasoning
    return message


def _answer(generation: Generation, kind: str, choices: list[Any]) -> wire.Answer:
    job = generation.job
    return wire.Answer(job.public_id, kind, job.created, job.model, choices, system_fingerprint=f"ws-{__version__}")


async def stream_chat(generation: Generation) -> AsyncGenerator[bytes, None]:
    """Server-sent events: a role chunk a choice, content chunks, a finish chunk a choice, usage when asked for, [DONE]."""
    chunks = _Chunks(generation)
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            out = chunks.event(delta)
            if out:
                yield out
    if generation.job.usage_at_end:
        last = _answer(generation, "chat.completion.chunk", [])
        last.usage, last.timings = generation.usage(), generation.timings()
        last.metrics = generation.request_metrics()
        yield wire.sse(last)
    yield wire.DONE


class _Chunks:
    """The chunks of one stream."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._job = generation.job
        self._writer = LogprobWriter(generation.tokenizer, as_ids=self._job.tokens_as_ids)
        self._started: set[int] = set()
        self._pending_ids: dict[int, list[int]] = {}
        self._frames: dict[int, wire.Frame] = {}  # of choices that have begun, where chunks differ in their text alone

    def event(self, delta: Delta) -> bytes:
        """The event or events of a delta, b"" when it shows nothing yet."""
        frame = self._frames.get(delta.choice.index)
        if frame is None or delta.finish_reason is not None:
            return self._whole(delta)
        if delta.parts is None:
            return frame.around(delta.text) if delta.text else b""
        return b"".join(frame.around(part.text) if isinstance(part, Text) else self._part_event(delta.choice, part)
                        for part in delta.parts)

    def _part_event(self, choice: Choice, part: Part) -> bytes:
        change = self._change(part)
        return wire.sse(self._chunk(wire.ChatChunkChoice(choice.index, change))) if change is not None else b""

    def _whole(self, delta: Delta) -> bytes:
        job, index = self._job, delta.choice.index
        out = b""
        if index not in self._started:
            self._started.add(index)
            out = wire.sse(self._first_chunk(index, first=len(self._started) == 1))
        if job.return_token_ids:
            self._pending_ids.setdefault(index, []).extend(delta.token_ids)
        changes = self._changes(delta)
        if changes or not delta.empty:
            out += b"".join(map(wire.sse, self._delta_chunks(delta, changes)))
        if job.varies_in_text_alone and delta.finish_reason is None:
            empty = wire.ChatChunkChoice(index, wire.ChatDelta(content=""))
            self._frames[index] = wire.Frame(self._chunk(empty), "content")
        return out

    def _changes(self, delta: Delta) -> list[wire.ChatDelta]:
        parts = delta.parts if delta.parts is not None else [Text(delta.text)] if delta.text else []
        changes = [self._change(part) for part in parts]
        return [change for change in changes if change is not None]

    def _change(self, part: Part) -> wire.ChatDelta | None:
        """What a part adds to the message; None for what OpenAI's stream has no words for."""
        parsing = self._job.parsing
        if isinstance(part, Text):
            return wire.ChatDelta(content=part.text)
        if isinstance(part, Reasoning):
            hidden = parsing is None or not parsing.show_reasoning
            return None if hidden else wire.ChatDelta(reasoning_content=part.text, reasoning=part.text)
        if isinstance(part, CallStart):
            assert parsing is not None
            function = wire.FunctionDelta("", part.name)
            return wire.ChatDelta(tool_calls=[wire.ToolCallDelta(part.index, function, parsing.call_id(), "function")])
        if isinstance(part, CallArguments):
            return wire.ChatDelta(tool_calls=[wire.ToolCallDelta(part.index, wire.FunctionDelta(part.text))])
        return None

    def _delta_chunks(self, delta: Delta, changes: list[wire.ChatDelta]) -> list[wire.Answer]:
        """One chunk a change; the first brings log-probabilities and ids, the last the end."""
        index = delta.choice.index
        if not changes or (delta.finish_reason is not None and self._job.parsing is not None):
            changes = [*changes, wire.ChatDelta()]
        choices = [wire.ChatChunkChoice(index, change) for change in changes]
        choices[0].logprobs = self._writer.chat(delta.logprobs) if delta.logprobs else None
        ids = self._pending_ids.pop(index, None)
        choices[0].token_ids = ids if ids is not None else UNSET
        if delta.finish_reason is not None:
            choices[-1].finish_reason, choices[-1].stop_reason = delta.finish_reason, delta.stop_reason
        chunks = [self._chunk(choice) for choice in choices]
        if self._generation.done and not self._job.usage_at_end:
            chunks[-1].timings = self._generation.timings()
        return chunks

    def _first_chunk(self, index: int, *, first: bool) -> wire.Answer:
        job, prompt_logprobs = self._job, self._generation.prompt_logprobs[0]
        chunk = self._chunk(wire.ChatChunkChoice(index, wire.ChatDelta(role="assistant", content="")))
        if first and job.return_token_ids:
            chunk.prompt_token_ids = job.requests[0].prompt_token_ids
        if first and job.prompt_logprobs and prompt_logprobs is not None:
            chunk.prompt_logprobs = self._writer.prompt(prompt_logprobs)
        return chunk

    def _chunk(self, choice: wire.ChatChunkChoice) -> wire.Answer:
        """OpenAI: with include_usage every chunk but the last carries `usage: null`."""
        chunk = _answer(self._generation, "chat.completion.chunk", [choice])
        if self._job.usage_always:
            chunk.usage = self._generation.usage()
        elif self._job.usage_at_end:
            chunk.usage = None
        if self._job.timings_always:
            chunk.timings = self._generation.timings()
        return chunk
