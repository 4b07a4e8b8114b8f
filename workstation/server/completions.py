"""/v1/completions: prompts in four shapes, echo, log-probabilities of prompt and output."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from msgspec import UNSET

from workstation import __version__
from workstation.engine.request import MAX_LOGPROBS, TokenLogprobs
from workstation.errors import InvalidRequestError
from workstation.server import prepare, wire
from workstation.server.body import show
from workstation.server.constraint import text_constraint
from workstation.server.fim import fim_prompt, fim_stops
from workstation.server.generation import Delta, Generation
from workstation.server.job import Job
from workstation.server.logprobs import LogprobWriter
from workstation.server.prepare import Service
from workstation.server.schemas import CompletionRequest
from workstation.server.structured import requested_output

DEFAULT_MAX_TOKENS = 16


def prepare_completion(service: Service, body: CompletionRequest, label: str, *, fill: bool = False,
                       extra: Sequence[tuple[str, str]] = ()) -> Job:
    """Everything that can be refused is refused here, before a stream starts.

    Args:
        fill: a middle is asked for, even before an empty suffix.  extra: (name, text) of other files shown with it.
    """
    model = service.check_model(body.model)
    usage_at_end, usage_always = body.wants_usage()
    fill = fill or bool(body.suffix)
    prompts = _middle_prompts(service, body, extra) if fill else prompt_lists(service, body)
    prompts = [prepare.truncated(service, ids, body.truncate_prompt_tokens, body.max_tokens) for ids in prompts]
    hide_output = bool(body.echo) and body.max_tokens == 0
    wanted = 1 if hide_output else body.max_tokens
    limits = [prepare.room(service, len(ids), wanted, DEFAULT_MAX_TOKENS, "prompt") for ids in prompts]
    logprobs, prompt_logprobs = _logprobs(body)
    if fill:
        stops = [*(body.stop_token_ids or []), *fim_stops(service.model.tokenizer)]
        body = body.model_copy(update={"stop_token_ids": stops})
    first = prepare.sampling_params(service, body, max_tokens=limits[0], logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    if body.best_of is not None and body.best_of not in (1, first.n):
        raise InvalidRequestError(f"best_of={show(body.best_of)} is not supported: ask for n samples and choose",
                                  param="best_of")
    params = [first if limit == limits[0] else first.clone(max_tokens=limit) for limit in limits]
    beams = [prepare.beam_params(body, limit, logprobs) for limit in limits]
    constraint = text_constraint(requested_output(body), beam=bool(body.use_beam_search))
    public_id = prepare.new_id("cmpl")
    requests = prepare.engine_requests(service, body, public_id, prompts, params, beams,
                                       prepare.clean_label(label, body.user))
    return Job(public_id, model, int(time.time()), requests, first.n, stream=bool(body.stream), usage_at_end=usage_at_end,
               usage_always=usage_always, logprobs=logprobs is not None, echo=bool(body.echo),
               echo_logprobs=bool(body.echo) and logprobs is not None, prompt_logprobs=body.prompt_logprobs is not None,
               return_token_ids=bool(body.return_token_ids), tokens_as_ids=bool(body.return_tokens_as_token_ids),
               timings_always=bool(body.timings_per_token), request_metrics=service.options.request_metrics,
               hide_output=hide_output, constraint=constraint)


def _middle_prompts(service: Service, body: CompletionRequest, extra: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Prompts that ask for the text between `prompt` and `suffix`."""
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(item, str) for item in prompts):
        raise InvalidRequestError(f"suffix needs a prompt of text, got {show(body.prompt)}", param="prompt")
    if body.echo:
        raise InvalidRequestError("echo cannot be combined with suffix", param="echo")
    prepare.check_fan_out(service, max(body.n or 1, 1), len(prompts))
    suffix = body.suffix or ""
    service.check_text(max(map(len, prompts)) + len(suffix) + sum(len(text) for _, text in extra), "prompt")
    ids = [fim_prompt(service.model.tokenizer, prefix, suffix, extra) for prefix in prompts]
    return [service.check_ids(prompt, "prompt") for prompt in ids]


def prompt_lists(service: Service, body: CompletionRequest) -> list[list[int]]:
    """Ids of every prompt: a string, a list of strings, a list of ids, or a list of lists of ids."""
    items = prepare.prompt_items(body.prompt, "prompt")
    prepare.check_fan_out(service, max(body.n or 1, 1), len(items))
    add_special = body.add_special_tokens is not False
    return [prepare.prompt_ids(service, item, "prompt", add_special=add_special) for item in items]


def _logprobs(body: CompletionRequest) -> tuple[int | None, int | None]:
    """(output logprobs, prompt logprobs): with echo the prompt's are shown too."""
    wanted = body.logprobs
    if wanted is not None and not 0 <= wanted <= MAX_LOGPROBS:
        raise InvalidRequestError(f"logprobs must be between 0 and {MAX_LOGPROBS}, got {wanted}", param="logprobs")
    if body.echo and wanted is not None:
        return wanted, max(wanted, body.prompt_logprobs or 0)
    return wanted, body.prompt_logprobs


@dataclass(slots=True)
class _Echo:
    """A prompt shown before its answer: its text, and where each of its tokens begins."""

    text: str
    ids: list[int]
    starts: list[int]
    entries: list[TokenLogprobs | None] = field(default_factory=list)


def _echo(generation: Generation, prompt_index: int) -> _Echo:
    ids = generation.job.requests[prompt_index].prompt_token_ids
    detokenizer = generation.tokenizer.detokenizer(skip_special_tokens=False)
    text = detokenizer.feed(ids) + detokenizer.finish()
    entries = generation.prompt_logprobs[prompt_index]
    return _Echo(text, ids, detokenizer.starts, entries if entries is not None else [None] * len(ids))


class _Writer:
    """Choice fields in the completions shape; offsets run over echoed prompt and output together."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._job = generation.job
        self._logprobs = LogprobWriter(generation.tokenizer, as_ids=self._job.tokens_as_ids)
        self._echoes: dict[int, _Echo] = {}

    def echo(self, prompt_index: int) -> _Echo | None:
        """The echo, made when first asked for: by then the engine has sent the prompt's log-probabilities."""
        if not self._job.echo:
            return None
        if prompt_index not in self._echoes:
            self._echoes[prompt_index] = _echo(self._generation, prompt_index)
        return self._echoes[prompt_index]

    def logprobs(self, echo: _Echo | None, shown: int, entries: list[TokenLogprobs], starts: list[int],
                 ) -> wire.CompletionLogprobs | None:
        """`echo` is given when its tokens come first in this piece; `shown` is the echoed text's length."""
        if not self._job.logprobs or not (entries or echo):
            return None
        ids = [entry.token_ids[0] for entry in entries]
        both: list[TokenLogprobs | None] = list(entries)
        offsets = [shown + start for start in starts]
        if echo is not None:
            return self._logprobs.completion([*echo.ids, *ids], [*echo.entries, *both], [*echo.starts, *offsets])
        return self._logprobs.completion(ids, both, offsets)

    def finish(self, choice: wire.CompletionChoice, prompt_index: int) -> None:
        """Fields shown once a choice."""
        if self._job.prompt_logprobs:
            entries = self._generation.prompt_logprobs[prompt_index]
            choice.prompt_logprobs = self._logprobs.prompt(entries) if entries is not None else None
        if self._job.return_token_ids:
            choice.prompt_token_ids = self._job.requests[prompt_index].prompt_token_ids


def _answer(generation: Generation, choices: list[Any]) -> wire.Answer:
    job = generation.job
    return wire.Answer(job.public_id, "text_completion", job.created, job.model, choices,
                       system_fingerprint=f"ws-{__version__}")


async def answer_completion(generation: Generation) -> bytes:
    """The whole answer, encoded."""
    job = generation.job
    count = len(generation.choices)
    texts: list[list[str]] = [[] for _ in range(count)]
    ids: list[list[int]] = [[] for _ in range(count)]
    entries: list[list[TokenLogprobs]] = [[] for _ in range(count)]
    starts: list[list[int]] = [[] for _ in range(count)]
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            if job.hide_output:
                continue
            index = delta.choice.index
            texts[index].append(delta.text)
            ids[index].extend(delta.token_ids)
            entries[index].extend(delta.logprobs)
            starts[index].extend(delta.starts)
    writer = _Writer(generation)
    choices = []
    for choice in generation.choices:
        index = choice.index
        echo = writer.echo(choice.prompt_index)
        head = echo.text if echo is not None else ""
        reason = "length" if job.hide_output else choice.finish_reason
        out = wire.CompletionChoice(index, head + "".join(texts[index]),
                                    writer.logprobs(echo, len(head), entries[index], starts[index]), reason,
                                    choice.stop_reason, token_ids=ids[index] if job.return_token_ids else UNSET)
        writer.finish(out, choice.prompt_index)
        choices.append(out)
    answer = _answer(generation, choices)
    answer.usage, answer.timings = generation.usage(), generation.timings()
    answer.metrics = generation.request_metrics()
    return wire.encode(answer)


def _chunk(generation: Generation, choice: wire.CompletionChoice) -> wire.Answer:
    """OpenAI: with include_usage every chunk but the last carries `usage: null`."""
    chunk = _answer(generation, [choice])
    if generation.job.usage_always:
        chunk.usage = generation.usage()
    elif generation.job.usage_at_end:
        chunk.usage = None
    if generation.job.timings_always:
        chunk.timings = generation.timings()
    return chunk


class _Chunks:
    """The chunks of one stream."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._job = generation.job
        self._writer = _Writer(generation)
        self._started: set[int] = set()
        self._pending_ids: dict[int, list[int]] = {}
        self._frames: dict[int, wire.Frame] = {}  # of choices that have begun, where chunks differ in their text alone

    def event(self, delta: Delta) -> bytes:
        """The event of a delta, b"" when it shows nothing yet."""
        frame = self._frames.get(delta.choice.index)
        if frame is None or delta.finish_reason is not None:
            return self._whole(delta)
        return frame.around(delta.text) if delta.text else b""

    def _whole(self, delta: Delta) -> bytes:
        job, index, prompt_index = self._job, delta.choice.index, delta.choice.prompt_index
        first = index not in self._started
        if job.return_token_ids and not job.hide_output:
            self._pending_ids.setdefault(index, []).extend(delta.token_ids)
        if delta.empty and not (first and job.echo):
            return b""
        self._started.add(index)
        choice = self._choice(delta, first)
        if job.return_token_ids:
            choice.token_ids = self._pending_ids.pop(index, [])
        if first:
            self._writer.finish(choice, prompt_index)
        if job.varies_in_text_alone and delta.finish_reason is None:
            self._frames[index] = wire.Frame(_chunk(self._generation, wire.CompletionChoice(index, "")), "text")
        chunk = _chunk(self._generation, choice)
        if self._generation.done and not job.usage_at_end:
            chunk.timings = self._generation.timings()
        return wire.sse(chunk)

    def _choice(self, delta: Delta, first: bool) -> wire.CompletionChoice:
        hidden = self._job.hide_output
        echo = self._writer.echo(delta.choice.prompt_index)
        text = (echo.text if echo is not None and first else "") + ("" if hidden else delta.text)
        logprobs = self._writer.logprobs(echo if first else None, len(echo.text) if echo is not None else 0,
                                         [] if hidden else delta.logprobs, [] if hidden else delta.starts)
        reason = "length" if hidden and delta.finish_reason else delta.finish_reason
        return wire.CompletionChoice(delta.choice.index, text, logprobs, reason, delta.stop_reason)


async def stream_completion(generation: Generation) -> AsyncGenerator[bytes, None]:
    """Server-sent events: text chunks (an echoed prompt first), a finish chunk a choice, usage when asked for, [DONE]."""
    chunks = _Chunks(generation)
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            event = chunks.event(delta)
            if event:
                yield event
    if generation.job.usage_at_end:
        last = _answer(generation, [])
        last.usage, last.timings = generation.usage(), generation.timings()
        last.metrics = generation.request_metrics()
        yield wire.sse(last)
    yield wire.DONE
