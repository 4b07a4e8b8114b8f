"""The door between server and engine: what any engine, real or fake, in-process or behind a socket, offers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

from workstation.engine.request import EngineInfo, EngineRequest, EngineStats, TokenEvent
from workstation.engine.snapshot import Look, Picture

EngineState = Literal["starting", "ready", "restarting", "draining", "dead"]


@dataclass(slots=True)
class Health:
    """Answered without a call into the engine.

    Attributes:
        heartbeat_age: seconds since the engine last said it lives.  restarts: deaths survived so far.
        cause: of the last death.
    """

    state: EngineState
    heartbeat_age: float = 0.0
    restarts: int = 0
    cause: str = ""


class EngineClient(Protocol):
    """An engine as the server sees it.

    `generate` yields events until the one with `finished=True`. It raises OverloadedError when the queue is full and
    EngineDeadError when the engine dies under the request. Leaving the iterator early (aclose, cancellation) aborts the
    request.
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
