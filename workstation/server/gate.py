"""Who may enter, who is inside, and how everyone is told to leave."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.types import Receive

from workstation.engine.client import EngineClient
from workstation.errors import EngineDeadError, OverloadedError, WorkstationError

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client closed its connection; nobody is left to answer."""


@dataclass(eq=False, slots=True)
class Ticket:
    """One generation in flight. `error` is why it was cut, when it was."""

    task: asyncio.Task[Any]
    error: WorkstationError | None = None


class Gate:
    """Admission and the list of generations in flight.

    `drain` stops admission; `cut` ends what is in flight with an error that each client is told.
    """

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._inside: set[Ticket] = set()
        self.draining = False
        self._closed_with: WorkstationError | None = None
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def in_flight(self) -> int:
        return len(self._inside)

    def check_open(self) -> None:
        """Raise OverloadedError (503, Retry-After) or EngineDeadError when no request can be served now."""
        if self.draining:
            raise OverloadedError("the server is shutting down and takes no new requests", retry_after=10)
        health = self._engine.health()
        if health.state == "dead":
            raise EngineDeadError(f"the engine is down: {health.cause or 'no cause known'}")
        if health.state != "ready":
            raise OverloadedError(f"the engine is not ready ({health.state})", retry_after=5)

    def drain(self) -> None:
        self.draining = True

    async def empty(self) -> None:
        """Return when nothing is in flight."""
        await self._empty.wait()

    def cut(self, error: WorkstationError) -> None:
        """End everything in flight and what still tries to enter; streams send `error` as their last event."""
        self._closed_with = error
        for ticket in list(self._inside):
            ticket.error = error
            ticket.task.cancel()

    async def run(self, work: Coroutine[Any, Any, Result], leaving: Coroutine[Any, Any, None]) -> Result:
        """Run `work` until it ends, `leaving` ends (then ClientGone) or the gate is cut (the cut's error).

        `leaving` is mostly `until_disconnect(receive)`. Answers that are not streamed need it too: nothing else would notice
        that nobody waits for them any more.
        """
        if self._closed_with is not None:
            work.close()
            leaving.close()
            raise self._closed_with
        task = asyncio.ensure_future(work)
        ticket = Ticket(task)
        self._inside.add(ticket)
        self._empty.clear()
        watcher = asyncio.ensure_future(leaving)
        try:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGone
            if task.cancelled():
                raise ticket.error or ClientGone
            return task.result()
        finally:
            task.cancel()
            watcher.cancel()
            await asyncio.gather(task, watcher, return_exceptions=True)
            self._inside.discard(ticket)
            if not self._inside:
                self._empty.set()


async def until_disconnect(receive: Receive) -> None:
    """Return when the client has closed its connection (call after the body was read)."""
    while (await receive())["type"] != "http.disconnect":
        pass
