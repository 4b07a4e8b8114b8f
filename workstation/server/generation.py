"""Running a job: engine events in, finished text deltas out, cut at stop strings, aborted when nobody needs more."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType

from workstation.engine.client import EngineClient, Inbox
from workstation.engine.request import EngineRequest, TokenEvent, TokenLogprobs
from workstation.errors import EngineDeadError, EngineError, InvalidRequestError, OverloadedError
from workstation.parsers.parts import CallEnd, Part
from workstation.server.job import Job
from workstation.server.metrics import Metrics
from workstation.server.parsing import Parsing
from workstation.server.wire import RequestMetrics, Timings, TokenDetails, Usage
from workstation.text.detokenizer import Detokenizer
from workstation.text.tokenizer import Tokenizer

log = logging.getLogger("workstation.server")


@dataclass(slots=True)
class Delta:
    """What one event adds to one choice.

    Attributes:
        token_ids: new ids that count.  logprobs: of tokens whose text is certain now (a possible stop string holds them back).
        starts: [len(logprobs)] offsets of those tokens in the choice's text, in characters.
        parts: what a parser made of the text; None when there is no parser.
    """

    choice: Choice
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    starts: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    parts: list[Part] | None = None

    @property
    def empty(self) -> bool:
        return not ((self.text if self.parts is None else self.parts) or self.logprobs or self.finish_reason)


class Choice:
    """One sample: its text so far and how it ended."""

    __slots__ = ("_detokenizer", "_include_stop", "_logprobs", "_opened", "_parser", "_parsing", "_plain", "finish_reason",
                 "index", "last_event", "num_tokens", "prompt_index", "stop_reason")

    def __init__(self, index: int, prompt_index: int, request: EngineRequest, tokenizer: Tokenizer,
                 parsing: Parsing | None = None) -> None:
        params = request.params
        self._parsing = parsing
        self._parser = parsing.parser() if parsing is not None else None
        self._opened = self._parser.feed(parsing.opening) if self._parser is not None and parsing is not None else []
        self.index = index
        self.prompt_index = prompt_index
        self._detokenizer: Detokenizer = tokenizer.detokenizer(
            skip_special_tokens=params.skip_special_tokens, stop=params.stop, include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens, keep=parsing.keep if parsing is not None else frozenset())
        self._include_stop = params.include_stop_str_in_output
        self._logprobs: list[TokenLogprobs] = []
        self._plain = not params.stop and params.logprobs is None
        self.num_tokens = 0
        self.last_event = 0.0  # time.monotonic()
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    def take(self, event: TokenEvent) -> Delta:
        """Feed one event. A stop token's text is left out (unless include_stop_str_in_output), its count is not."""
        delta = self._take(event)
        if self._parser is not None:
            self._parse(delta)
        return delta

    def _parse(self, delta: Delta) -> None:
        """Take the text apart. An answer with calls ends for their sake, and as soon as it has as many as it may have."""
        assert self._parser is not None and self._parsing is not None
        parts = self._opened + self._parser.feed(delta.text)
        self._opened = []
        if self.finish_reason is not None:
            parts += self._parser.finish()
        last = CallEnd(self._parsing.max_calls - 1)
        if last in parts:
            parts = parts[:parts.index(last) + 1]
            self.finish_reason = "tool_calls"
        elif self.finish_reason == "stop" and self._parser.calls:
            self.finish_reason = "tool_calls"
        delta.parts, delta.finish_reason = parts, self.finish_reason

    def _take(self, event: TokenEvent) -> Delta:
        detokenizer = self._detokenizer
        if event.plain and self._plain:
            self.num_tokens += 1
            return Delta(self, detokenizer.feed(event.token_ids), event.token_ids, [], [])
        before, shown = detokenizer.num_tokens, detokenizer.num_shown
        ids = event.token_ids
        hidden = event.finish_reason == "stop" and bool(ids) and not self._include_stop
        text = detokenizer.feed(ids[:-1] if hidden else ids)
        if event.finish_reason is not None and detokenizer.stopped is None:
            text += detokenizer.finish()
        kept = detokenizer.num_tokens - before
        if event.logprobs is not None:
            self._logprobs.extend(event.logprobs[:kept])
        if detokenizer.stopped is not None:
            self.finish_reason, self.stop_reason = "stop", detokenizer.stopped
        elif event.finish_reason is not None:
            self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason
            kept += hidden
        self.num_tokens += kept
        now_shown = detokenizer.num_shown
        return Delta(self, text, ids[:kept], self._logprobs[shown:now_shown], detokenizer.starts[shown:now_shown],
                     self.finish_reason, self.stop_reason)


@dataclass(slots=True)
class Generation:
    """A job while it runs; `deltas` drives it. Leaving `deltas` early aborts what is left in the engine."""

    engine: EngineClient
    job: Job
    tokenizer: Tokenizer
    metrics: Metrics
    choices: list[Choice] = field(default_factory=list)
    prompt_logprobs: list[list[TokenLogprobs | None] | None] = field(default_factory=list)
    cached_tokens: int = 0
    first_events: list[float] = field(default_factory=list)  # a request's first, time.monotonic(); 0.0 is "not yet"
    started: float = 0.0  # when the first of the requests was first scheduled, time.monotonic()

    def __post_init__(self) -> None:
        samples = self.job.samples
        self.choices = [Choice(index, index // samples, self.job.requests[index // samples], self.tokenizer,
                               self.job.parsing)
                        for index in range(samples * len(self.job.requests))]
        self.prompt_logprobs = [None] * len(self.job.requests)
        self.first_events = [0.0] * len(self.job.requests)

    def usage(self) -> Usage:
        prompt = sum(len(request.prompt_token_ids) for request in self.job.requests)
        output = 0 if self.job.hide_output else sum(choice.num_tokens for choice in self.choices)
        diverged = self.job.divergence or UNSET
        return Usage(prompt, output, prompt + output, TokenDetails(self.cached_tokens, diverged))

    @property
    def done(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    def timings(self) -> Timings:
        """What llama.cpp's clients show as speed; of several prompts and samples the spans that hold them all."""
        usage, firsts = self.usage(), [first for first in self.first_events if first]
        computed = usage.prompt_tokens - self.cached_tokens
        prompt_ms = 1e3 * max(max(firsts) - self.started, 0.0) if firsts else 0.0
        output_ms = 1e3 * max(max(choice.last_event for choice in self.choices) - min(firsts), 0.0) if firsts else 0.0
        return Timings(self.cached_tokens, computed, *_pace(computed, prompt_ms), usage.completion_tokens,
                       *_pace(usage.completion_tokens, output_ms))

    def request_metrics(self) -> RequestMetrics | UnsetType | None:
        """vLLM's figures, where they are asked for; None where several sequences share them."""
        if not self.job.request_metrics:
            return UNSET
        if len(self.choices) != 1 or not self.first_events[0]:
            return None
        timings, tokens = self.timings(), self.choices[0].num_tokens
        first, rest = timings.prompt_ms, timings.predicted_ms
        queued = 1e3 * max(self.started - self.job.requests[0].arrival, 0.0)
        return RequestMetrics(first, rest, round(queued, 3), round(rest / (tokens - 1), 3) if tokens > 1 else None,
                              _pace(tokens, first + rest)[2])

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Every change of every choice, in the order of the engine's events.

        Events that came while the reader was held up (its socket was busy) make one delta a choice, so that a slow client
        costs less and not more.

        Raises OverloadedError, EngineDeadError, EngineError, or InvalidRequestError when the engine refuses at admission.
        """
        outcome = "abort"
        try:
            async with closing_events(self._events()) as events:
                inbox = events if isinstance(events, Inbox) else None
                places = {request.request_id: place for place, request in enumerate(self.job.requests)}
                async for event in events:
                    prompt_index = places[event.request_id]
                    choice = self.choices[prompt_index * self.job.samples + event.index]
                    if choice.finish_reason is not None and event.finish_reason != "error":
                        continue  # tokens under way when a stop string was found, or the end we asked for
                    self._note(prompt_index, choice, event)
                    waiting = inbox.waiting if inbox is not None else 0
                    yield choice.take(event)
                    if inbox is not None and inbox.waiting > waiting:
                        inbox.join_waiting()
                    if choice.finish_reason is None:
                        continue
                    if event.finish_reason is None:
                        self._end_sample(event)
                    if self.done:
                        outcome = "length" if all(item.finish_reason == "length" for item in self.choices) else "stop"
                        return
            outcome = "error"
            raise EngineError("the engine ended this request without a last event")
        except (OverloadedError, EngineDeadError, EngineError, InvalidRequestError) as error:
            outcome = "error"
            self.metrics.reject(error)
            raise
        finally:
            tokens = sum(choice.num_tokens for choice in self.choices)
            self.metrics.finish(self.job, outcome, tokens, self._spans(), max(choice.num_tokens for choice in self.choices))
            log.info("%s ended: %s, %d tokens, %.1f s", self.job.public_id[-8:], outcome, tokens,
                     time.monotonic() - self.job.requests[0].arrival)

    def _end_sample(self, event: TokenEvent) -> None:
        """A stop string ended one sample; the engine need not go on with it. (With none left, leaving the iterator does it.)"""
        if any(choice.finish_reason is None for choice in self.choices):
            self.engine.abort(event.request_id, event.index)

    def _spans(self) -> list[tuple[float, float]]:
        """When each request's first and last event came, of those that had any."""
        samples = self.job.samples
        lasts = [max(choice.last_event for choice in self.choices[at:at + samples])
                 for at in range(0, len(self.choices), samples)]
        return [(first, last) for first, last in zip(self.first_events, lasts, strict=True) if first]

    def _note(self, prompt_index: int, choice: Choice, event: TokenEvent) -> None:
        now = time.monotonic()
        if not event.plain:
            self._note_whole(prompt_index, event, now)
        if choice.last_event:
            self.metrics.gap(now - choice.last_event)
        choice.last_event = now

    def _note_whole(self, prompt_index: int, event: TokenEvent, now: float) -> None:
        if event.finish_reason == "error":
            raise EngineError(event.error or "the engine could not finish this request")
        if event.finish_reason == "abort":
            raise EngineError("the engine aborted this request")
        if event.prompt_logprobs is not None:
            self.prompt_logprobs[prompt_index] = event.prompt_logprobs
        if not self.first_events[prompt_index]:
            self.first_events[prompt_index] = now
            self.metrics.first_token(self.job.requests[prompt_index], event, now)
            self.cached_tokens += event.num_cached_tokens
            scheduled = event.times.scheduled if event.times is not None else 0.0
            self.started = min(self.started or now, scheduled or self.job.requests[prompt_index].arrival)
        if event.finished:
            self.metrics.last_token(event)

    def _events(self) -> AsyncIterator[TokenEvent]:
        requests = self.job.requests
        if len(requests) == 1:
            return self.engine.generate(requests[0])
        return _merged([self.engine.generate(request) for request in requests])


def _pace(tokens: int, ms: float) -> tuple[float, float, float]:
    """(milliseconds, milliseconds a token, tokens a second); 0 where there is nothing to divide by."""
    return round(ms, 3), round(ms / tokens, 3) if tokens else 0.0, round(1e3 * tokens / ms, 2) if ms else 0.0


async def _merged(streams: list[AsyncIterator[TokenEvent]]) -> AsyncGenerator[TokenEvent, None]:
    """Events of several requests as they come. The first failure ends all of them."""
    queue: asyncio.Queue[TokenEvent | BaseException | None] = asyncio.Queue()

    async def pump(events: AsyncIterator[TokenEvent]) -> None:
        try:
            async with closing_events(events):
                async for event in events:
                    queue.put_nowait(event)
            queue.put_nowait(None)
        except Exception as error:  # carried over to the reader, who raises it
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(pump(events)) for events in streams]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def closing_events(events: AsyncIterator[TokenEvent]) -> AsyncIterator[AsyncIterator[TokenEvent]]:
    """Leaving an engine's iterator early is what aborts the request."""
    try:
        yield events
    finally:
        close = getattr(events, "aclose", None)
        if close is not None:
            await close()
