"""The door between server and engine: what any engine, real or fake, in-process or behind a socket, offers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from workstation.engine.request import EngineInfo, EngineRequest, EngineStats, Stage, TokenEvent
from workstation.engine.snapshot import Look, Picture
from workstation.errors import WorkstationError

EngineState = Literal["starting", "ready", "restarting", "draining", "dead"]


@dataclass(slots=True)
class Progress:
    """How far a stage of the start has come: bytes of weights, kernels compiled, graphs captured.

    seconds: since the stage began; what is left of a stage of even speed follows from it.
    """

    stage: Stage
    done: int
    total: int
    seconds: float

    @property
    def seconds_left(self) -> float | None:
        """None before anything was done, and once all is: what follows has no known length."""
        if not 0 < self.done < self.total:
            return None
        return self.seconds * (self.total - self.done) / self.done


@dataclass(slots=True)
class Health:
    """Answered without a call into the engine.

    Attributes:
        heartbeat_age: seconds since the engine last said it lives.  restarts: deaths survived so far.
        cause: of the last death.  loading: set while weights load and until the engine is ready.
    """

    state: EngineState
    heartbeat_age: float = 0.0
    restarts: int = 0
    cause: str = ""
    loading: Progress | None = None

    @property
    def progress(self) -> float | None:
        """Share of the weights' bytes that is read, 0 to 1; None when nothing loads."""
        if self.loading is None or self.loading.total <= 0:
            return None
        return min(1.0, self.loading.done / self.loading.total) if self.loading.stage == "weights" else 1.0


class Inbox:
    """One request's events between the engine's messages and the request's reader, who iterates and at last closes it.

    Args:
        begin: submits the request, given the inbox; awaited before the first event is waited for.
        leave: called once, when the last event or an error was read (True) or the reader closed the inbox before that (False).
    """

    __slots__ = ("_begin", "_begun", "_items", "_leave", "_left", "_waiter")

    def __init__(self, begin: Callable[[Inbox], Awaitable[None]], leave: Callable[[bool], None]) -> None:
        self._begin = begin
        self._leave = leave
        self._begun = self._left = False
        self._items: deque[TokenEvent | WorkstationError] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: TokenEvent | WorkstationError) -> None:
        """Hand over an event, or the error that ends the request."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> Inbox:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._left:
            raise StopAsyncIteration
        if not self._items:
            await self._wait()
        item = self._items.popleft()
        if isinstance(item, WorkstationError):
            self._go(True)
            raise item
        if item.finished:
            self._go(True)
        return item

    async def _wait(self) -> None:
        try:
            if not self._begun:
                self._begun = True
                await self._begin(self)
            loop = asyncio.get_running_loop()
            while not self._items:
                self._waiter = loop.create_future()
                await self._waiter
        except WorkstationError:
            self._go(True)
            raise

    async def aclose(self) -> None:
        self._go(False)

    def _go(self, done: bool) -> None:
        if not self._left:
            self._left = True
            self._leave(done or not self._begun)

    @property
    def waiting(self) -> int:
        """Events that have come and were not read."""
        return len(self._items)

    def join_waiting(self) -> None:
        """Make one event a sample of those that wait, in the order of their last tokens."""
        joined: dict[object, TokenEvent | WorkstationError] = {}
        for item in self._items:
            if isinstance(item, WorkstationError) or item.finish_reason in ("error", "abort"):
                joined[id(item)] = item  # tokens that came before are told before
            else:
                earlier = joined.pop(("sample", item.index), None)
                joined["sample", item.index] = item if earlier is None else _joined(earlier, item)
        self._items = deque(joined.values())


def _joined(first: TokenEvent | WorkstationError, second: TokenEvent) -> TokenEvent:
    """One event that says what two of the same sample say."""
    assert isinstance(first, TokenEvent)
    second.token_ids = first.token_ids + second.token_ids
    if first.logprobs is not None or second.logprobs is not None:
        second.logprobs = (first.logprobs or []) + (second.logprobs or [])
    second.prompt_logprobs = first.prompt_logprobs or second.prompt_logprobs
    second.times = second.times or first.times
    second.num_cached_tokens = max(first.num_cached_tokens, second.num_cached_tokens)
    second.plain = False
    return second


class EngineClient(Protocol):
    """An engine as the server sees it.

    `generate` yields events until the one with `finished=True`. It raises OverloadedError when the queue is full and
    EngineDeadError when the engine dies under the request. Leaving the iterator early (aclose, cancellation) aborts the
    request. Where it is an Inbox, a reader that was held up may join what came meanwhile.
    """

    @property
    def info(self) -> EngineInfo: ...

    def generate(self, request: EngineRequest) -> AsyncIterator[TokenEvent]: ...

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or only one of its samples; its blocks go back at the next step. Unknown ids are ignored."""
        ...

    def health(self) -> Health: ...

    def stats(self) -> EngineStats:
        """The newest snapshot the engine sent (at most a second old while it works)."""
        ...

    async def look(self, look: Look) -> Picture:
        """What a dashboard asked for, made between two steps. Callers ask at most ten times a second.

        Raises EngineDeadError when the engine is not ready or dies, OverloadedError when a step lasts longer than 2 s.
        """
        ...

    async def start(self) -> None:
        """Return when the engine is ready; raise the StartupError that stopped it."""
        ...

    async def stop(self) -> None: ...
