"""/v1/chat/completions: body → Job, deltas → answer or stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from msgspec import UNSET

from workstation import __version__
from workstation.engine.request import MAX_LOGPROBS
from workstation.errors import InvalidRequestError
from workstation.server import prepare, wire
from workstation.server.body import show
from workstation.server.generation import Delta, Generation
from workstation.server.job import Job
from workstation.server.logprobs import LogprobWriter
from workstation.server.messages import template_messages, template_tools
from workstation.server.prefix_history import message_digests
from workstation.server.prepare import Service
from workstation.server.schemas import ChatRequest

MAX_TEMPLATE_KWARGS = 32
MAX_TEMPLATE_TEXT = 1024
# Switches clients send to every model; off means nothing to a template without them.
_HARMLESS_WHEN_OFF = frozenset({"enable_thinking", "thinking"})


def prepare_chat(service: Service, body: ChatRequest, label: str) -> Job:
    """Everything that can be refused is refused here, before a stream starts."""
    model = service.check_model(body.model)
    usage_at_end, usage_always = body.wants_usage()
    ids = prompt_ids(service, body)
    wanted = _max_tokens(body)
    ids = prepare.truncated(service, ids, body.truncate_prompt_tokens, wanted)
    max_tokens = prepare.room(service, len(ids), wanted, None, "messages")
    logprobs = _logprobs(body)
    params = prepare.sampling_params(service, body, max_tokens=max_tokens, logprobs=logprobs,
                                     prompt_logprobs=body.prompt_logprobs)
    beam = prepare.beam_params(body, max_tokens, logprobs)
    prepare.check_fan_out(service, params.n, 1)
    public_id = prepare.new_id("chatcmpl")
    requests = prepare.engine_requests(service, body, public_id, [service.check_ids(ids, "messages")], [params], [beam],
                                       prepare.clean_label(label, body.user))
    return Job(public_id, model, int(time.time()), requests, params.n, stream=bool(body.stream), usage_at_end=usage_at_end,
               usage_always=usage_always, logprobs=logprobs is not None, prompt_logprobs=body.prompt_logprobs is not None,
               return_token_ids=bool(body.return_token_ids), tokens_as_ids=bool(body.return_tokens_as_token_ids),
               messages=message_digests(body.messages))


def prompt_ids(service: Service, body: Any) -> list[int]:
    """Ids of a chat prompt (a ChatRequest or a TokenizeRequest with messages)."""
    messages = template_messages(body.messages)
    tools = template_tools(body.tools, getattr(body, "tool_choice", "none"))
    kwargs = template_kwargs(service, body.chat_template_kwargs, getattr(body, "reasoning_effort", None))
    service.check_text(sum(len(message["content"]) for message in messages) + len(str(tools or "")), "messages")
    continued = bool(body.continue_final_message)
    prompt = body.add_generation_prompt if body.add_generation_prompt is not None else not continued
    return service.model.tokenizer.encode_chat(
        messages, tools=tools, add_generation_prompt=prompt, continue_final_message=continued, template_kwargs=kwargs,
        add_special_tokens=bool(body.add_special_tokens))


def template_kwargs(service: Service, given: dict[str, Any] | None, effort: str | None) -> dict[str, Any]:
    """Variables for the template: names it reads, plain values. Raises InvalidRequestError."""
    template = service.model.tokenizer.chat_template
    known = template.names if template is not None else frozenset()
    out: dict[str, Any] = {}
    if len(given or {}) > MAX_TEMPLATE_KWARGS:
        raise InvalidRequestError(f"chat_template_kwargs holds {len(given or {})} entries; the limit is {MAX_TEMPLATE_KWARGS}",
                                  param="chat_template_kwargs")
    for name, value in (given or {}).items():
        _check_template_value(name, value)
        if name in known:
            out[name] = value
        elif not (name in _HARMLESS_WHEN_OFF and value is False):
            raise InvalidRequestError(f"chat_template_kwargs: this model's template does not read {show(name)}; it reads "
                                      f"{', '.join(sorted(known)) or 'none'}", param="chat_template_kwargs")
    if effort is not None and effort != "none":
        if "reasoning_effort" not in known:
            raise InvalidRequestError("reasoning_effort is not used by this model's template", param="reasoning_effort")
        out["reasoning_effort"] = effort
    return out


def _check_template_value(name: str, value: Any) -> None:
    short = isinstance(value, str) and len(value) <= MAX_TEMPLATE_TEXT
    plain = short or value is None or isinstance(value, (bool, int, float))
    if not name.isidentifier() or not plain:
        raise InvalidRequestError(f"chat_template_kwargs[{show(name)}] must be null, true, false, a number or a string of at "
                                  f"most {MAX_TEMPLATE_TEXT} characters, got {show(value)}", param="chat_template_kwargs")


def _max_tokens(body: ChatRequest) -> int | None:
    newer = body.max_completion_tokens
    if newer is not None and newer < 1:
        raise InvalidRequestError(f"max_completion_tokens must be at least 1, got {newer}", param="max_completion_tokens")
    return newer if newer is not None else body.max_tokens


def _logprobs(body: ChatRequest) -> int | None:
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        raise InvalidRequestError(f"top_logprobs must be between 0 and {MAX_LOGPROBS}, got {body.top_logprobs}",
                                  param="top_logprobs")
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


async def answer_chat(generation: Generation) -> bytes:
    """The whole answer, encoded."""
    job = generation.job
    count = len(generation.choices)
    texts: list[list[str]] = [[] for _ in range(count)]
    ids: list[list[int]] = [[] for _ in range(count)]
    logprobs: list[list[Any]] = [[] for _ in range(count)]
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            index = delta.choice.index
            texts[index].append(delta.text)
            ids[index].extend(delta.token_ids)
            logprobs[index].extend(delta.logprobs)
    writer = LogprobWriter(generation.tokenizer, as_ids=job.tokens_as_ids)
    choices = [
        wire.ChatChoice(choice.index, wire.ChatMessage("assistant", "".join(texts[choice.index])),
                        writer.chat(logprobs[choice.index]) if job.logprobs else None, choice.finish_reason or "stop",
                        choice.stop_reason, ids[choice.index] if job.return_token_ids else UNSET)
        for choice in generation.choices
    ]
    answer = _answer(generation, "chat.completion", choices)
    answer.usage = generation.usage()
    prompt_logprobs = generation.prompt_logprobs[0]
    if job.prompt_logprobs:
        answer.prompt_logprobs = writer.prompt(prompt_logprobs) if prompt_logprobs is not None else None
    if job.return_token_ids:
        answer.prompt_token_ids = job.requests[0].prompt_token_ids
    return wire.encode(answer)


def _answer(generation: Generation, kind: str, choices: list[Any]) -> wire.Answer:
    job = generation.job
    return wire.Answer(job.public_id, kind, job.created, job.model, choices, system_fingerprint=f"ws-{__version__}")


async def stream_chat(generation: Generation) -> AsyncGenerator[bytes, None]:
    """Server-sent events: a role chunk a choice, content chunks, a finish chunk a choice, usage when asked for, [DONE]."""
    job = generation.job
    writer = LogprobWriter(generation.tokenizer, as_ids=job.tokens_as_ids)
    started: set[int] = set()
    pending_ids: dict[int, list[int]] = {}
    frames: dict[int, wire.Frame] = {}  # of choices that have begun, where chunks differ in their text alone
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            index = delta.choice.index
            frame = frames.get(index)
            if frame is not None and delta.finish_reason is None:
                if delta.text:
                    yield frame.around(delta.text)
                continue
            out = b""
            if index not in started:
                started.add(index)
                out = wire.sse(_first_chunk(generation, index, first=len(started) == 1))
            if job.return_token_ids:
                pending_ids.setdefault(index, []).extend(delta.token_ids)
            if not delta.empty:
                out += wire.sse(_chunk(generation, delta, writer, pending_ids.pop(index, None)))
            if out:
                yield out
            if job.varies_in_text_alone and delta.finish_reason is None:
                frames[index] = wire.Frame(_frame_chunk(generation, index), "content")
    if job.usage_at_end:
        last = _answer(generation, "chat.completion.chunk", [])
        last.usage = generation.usage()
        yield wire.sse(last)
    yield wire.DONE


def _first_chunk(generation: Generation, index: int, *, first: bool) -> wire.Answer:
    chunk = _answer(generation, "chat.completion.chunk",
                    [wire.ChatChunkChoice(index, wire.ChatDelta(role="assistant", content=""))])
    job = generation.job
    _chunk_usage(chunk, generation)
    if first and job.return_token_ids:
        chunk.prompt_token_ids = job.requests[0].prompt_token_ids
    if first and job.prompt_logprobs and generation.prompt_logprobs[0] is not None:
        chunk.prompt_logprobs = LogprobWriter(generation.tokenizer, as_ids=job.tokens_as_ids).prompt(
            generation.prompt_logprobs[0])
    return chunk


def _chunk(generation: Generation, delta: Delta, writer: LogprobWriter, ids: list[int] | None) -> wire.Answer:
    choice = wire.ChatChunkChoice(
        delta.choice.index, wire.ChatDelta(content=delta.text) if delta.text else wire.ChatDelta(),
        writer.chat(delta.logprobs) if delta.logprobs else None, delta.finish_reason,
        delta.stop_reason if delta.finish_reason is not None else UNSET, ids if ids is not None else UNSET)
    chunk = _answer(generation, "chat.completion.chunk", [choice])
    _chunk_usage(chunk, generation)
    return chunk


def _frame_chunk(generation: Generation, index: int) -> wire.Answer:
    chunk = _answer(generation, "chat.completion.chunk", [wire.ChatChunkChoice(index, wire.ChatDelta(content=""))])
    _chunk_usage(chunk, generation)
    return chunk


def _chunk_usage(chunk: wire.Answer, generation: Generation) -> None:
    """OpenAI: with include_usage every chunk but the last carries `usage: null`."""
    if generation.job.usage_always:
        chunk.usage = generation.usage()
    elif generation.job.usage_at_end:
        chunk.usage = None
