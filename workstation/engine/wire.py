"""Messages between server and engine: the one file that knows msgpack and sockets.

Two unix sockets in a private directory: `inbox` (server → engine) and `outbox` (engine → server). Every message is a tagged
struct, typed on arrival; nothing is ever unpickled. One `Step` message carries all new tokens of an engine step; nearly all of
them are plain (see TokenEvent) and travel as three parallel lists: a map of 14 fields each would cost several times as much.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from workstation.engine.request import EngineInfo, EngineRequest, EngineStats, Stage, TokenEvent
from workstation.engine.snapshot import Look, Picture


class Submit(msgspec.Struct, tag="submit", array_like=True):
    request: EngineRequest


class Abort(msgspec.Struct, tag="abort", array_like=True):
    """End a request, or only one of its samples."""

    request_id: str
    index: int | None = None


class Shutdown(msgspec.Struct, tag="shutdown", array_like=True):
    """Stop at once; what is in flight is dropped (the server has drained before)."""


class Ask(msgspec.Struct, tag="ask", array_like=True):
    """A dashboard looks in; answered by Shown with the same number."""

    look: Look


class Shown(msgspec.Struct, tag="shown", array_like=True):
    picture: Picture


class Ready(msgspec.Struct, tag="ready", array_like=True):
    info: EngineInfo


class Loading(msgspec.Struct, tag="loading", array_like=True):
    """How far a stage of the start has come: bytes of weights, kernels compiled, graphs captured."""

    stage: Stage
    done: int
    total: int


class Said(msgspec.Struct, tag="said", array_like=True):
    """A line of the engine's log. when: Unix seconds.  level: as in `logging`."""

    when: float
    level: int
    source: str
    text: str


class StartFailed(msgspec.Struct, tag="failed", array_like=True):
    """kind: class name in errors.py."""

    kind: str
    message: str
    param: str | None


class Step(msgspec.Struct, tag="step", array_like=True):
    """events: all but the plain ones, which are the lists: sample `indexes[i]` of request `ids[i]` got `tokens[i]`."""

    events: list[TokenEvent]
    ids: list[str]
    indexes: list[int]
    tokens: list[int]


class Refused(msgspec.Struct, tag="refused", array_like=True):
    """A submitted request the engine does not take. kind: class name in errors.py."""

    request_id: str
    kind: str
    message: str
    param: str | None


class Crashed(msgspec.Struct, tag="crashed", array_like=True):
    """The engine's last words."""

    cause: str


class Beat(msgspec.Struct, tag="beat", array_like=True):
    """Sent every half second by a thread of its own, so that a long step does not look like death.

    step_age: seconds the present step has lasted, 0 when idle.
    """

    step_age: float
    stats: EngineStats


ToEngine = Submit | Abort | Ask | Shutdown
FromEngine = Ready | Loading | Said | StartFailed | Step | Refused | Crashed | Beat | Shown

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
INBOX, OUTBOX, BEATS = "inbox", "outbox", "beats"


def step(events: list[TokenEvent]) -> Step:
    """The message that carries a step's events."""
    plain = [event for event in events if event.plain]
    others = [event for event in events if not event.plain]
    return Step(others, [event.request_id for event in plain], [event.index for event in plain],
                [event.token_ids[0] for event in plain])


def plain_events(message: Step) -> Iterator[TokenEvent]:
    """The plain events of a message. They come before its other events: one of those may be a request's last."""
    for request_id, index, token in zip(message.ids, message.indexes, message.tokens, strict=True):
        yield TokenEvent(request_id, index, [token], plain=True)


def address(directory: str, name: str) -> str:
    """The zmq endpoint of one of the sockets in the private directory."""
    return f"ipc://{directory}/{name}"
