"""What a dashboard sees of an engine: block states, request rows, one request, single blocks. Plain integers, no torch.

Made inside the engine's thread between two steps, and only when asked. The pool keeps one byte of state a block, so the map is
a copy of bytes; folding it into cells is the server's work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workstation.engine.blocks import CACHED, FREE, OWNED, SHARED
from workstation.engine.request import EngineStats, SamplingParams

if TYPE_CHECKING:
    from workstation.engine.scheduler import Scheduler
    from workstation.engine.sequence import RequestState

MAX_ROWS = 512
MAX_BLOCK_ROWS = 1024
MAX_OWNERS = 16


@dataclass(slots=True)
class Look:
    """What to make. request_id: also this request's details. first, last: also these blocks, both included; 0 is none.

    heat: also the order of eviction.  tokens: with a request's details the last ids of its prompt and answers, so many at most.
    """

    number: int = 0
    request_id: str | None = None
    first: int = 0
    last: int = 0
    heat: bool = False
    tokens: int = 0


@dataclass(slots=True)
class RequestRow:
    """One live request. Times are time.monotonic() seconds, 0.0 means "not yet".

    Attributes:
        state: waiting, preempted, prefill or decode.  computed: tokens of its first sample with K and V.
        generated: over all samples.  blocks: entries of all its block tables (blocks shared by samples count each time).
    """

    id: str
    label: str
    state: str
    samples: int
    prompt: int
    cached: int
    computed: int
    generated: int
    blocks: int
    preemptions: int
    arrival: float
    scheduled: float
    first_token: float
    route: str = ""


@dataclass(slots=True)
class SampleDetail:
    """One sample of a request. tables: a block table a KV group; 0 is a block that slid out of the window.

    last: the last ids of the answer, when asked for.
    """

    index: int
    tokens: int
    computed: int
    tables: list[list[int]]
    finished: str | None = None
    last: list[int] = field(default_factory=list)


@dataclass(slots=True)
class RequestDetail:
    """prompt: its last ids, when asked for."""

    row: RequestRow
    params: SamplingParams
    max_tokens: int
    samples: list[SampleDetail]
    prompt: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Owner:
    """A sample that holds a block, and the tokens [begin, end) of it that lie there."""

    request_id: str
    index: int
    group: int
    begin: int
    end: int


@dataclass(slots=True)
class BlockRow:
    """One block. state as in blocks.py; published: the prefix cache can find it; owners: the first 16.

    age: seconds since it was handed out or, cached, since its last holder let go; None for a free one.
    """

    block: int
    state: int
    refs: int
    published: bool
    owners: list[Owner] = field(default_factory=list)
    age: float | None = None


@dataclass(slots=True)
class Picture:
    """The answer to a Look.

    Attributes:
        states: one byte a block, block 1 first: FREE, OWNED, SHARED or CACHED of blocks.py.
        rows: at most 512, those that run first.  requests: how many there are.  preempted: sequences waiting to be recomputed.
        heat: when asked for, one byte a block: 0 not cached, else 1 (used last) to 255 (evicted next).
        seconds: what making it cost the engine.
    """

    number: int
    stats: EngineStats
    states: bytes
    rows: list[RequestRow]
    requests: int
    preempted: int = 0
    detail: RequestDetail | None = None
    blocks: list[BlockRow] = field(default_factory=list)
    seconds: float = 0.0
    heat: bytes = b""


def take_picture(scheduler: Scheduler, look: Look) -> Picture:
    """Answer a Look from the scheduler's books; changes nothing."""
    chosen = _chosen(scheduler)
    picture = Picture(
        look.number, scheduler.snapshot(), scheduler.pool.state_bytes(), [_row(request) for request in chosen],
        len(scheduler.requests), sum(seq.request.num_preemptions > 0 for seq in scheduler.waiting))
    if look.request_id is not None:
        request = scheduler.requests.get(look.request_id)
        picture.detail = None if request is None else _detail(request, look.tokens)
    if look.heat:
        picture.heat = scheduler.pool.heat_bytes()
    if look.last >= look.first > 0:
        picture.blocks = _blocks(scheduler, look.first, min(look.last, scheduler.pool.total, look.first + MAX_BLOCK_ROWS - 1))
    return picture


def _chosen(scheduler: Scheduler) -> list[RequestState]:
    """All requests in order of arrival, or the first 512 when there are more, running ones before the queue."""
    if len(scheduler.requests) <= MAX_ROWS:
        return list(scheduler.requests.values())
    everyone = dict.fromkeys(seq.request for seq in [*scheduler.running, *scheduler.waiting])
    return list(everyone)[:MAX_ROWS]


def _row(request: RequestState) -> RequestRow:
    generated = blocks = 0
    running = False
    for seq in request.sequences:
        if seq.born:
            generated += len(seq.tokens) - request.prompt_len
        running = running or seq.row >= 0
        for table in seq.tables:
            blocks += len(table)
        for freed in seq.freed:
            blocks -= freed
    first = request.sequences[0] if request.sequences else None
    computed = first.num_computed if first else 0
    if running:
        state = "prefill" if computed < request.prompt_len and generated == 0 else "decode"
    else:
        state = "preempted" if request.num_preemptions else "waiting"
    times, asked = request.times, request.request
    return RequestRow(
        asked.request_id, asked.label, state, request.num_live, request.prompt_len, request.num_cached_tokens, computed,
        generated, blocks, request.num_preemptions, times.arrival, times.scheduled, times.first_token,
        asked.route)


def _detail(request: RequestState, tokens: int) -> RequestDetail:
    length = request.prompt_len
    samples = [SampleDetail(seq.index, len(seq.tokens), seq.num_computed, [list(table) for table in seq.tables], seq.finished,
                            seq.tokens[max(length, len(seq.tokens) - tokens):] if tokens and seq.born else [])
               for seq in request.sequences]
    prompt = request.request.prompt_token_ids[max(0, length - tokens):] if tokens else []
    return RequestDetail(_row(request), request.request.params, request.max_tokens, samples, prompt)


def _blocks(scheduler: Scheduler, first: int, last: int) -> list[BlockRow]:
    pool, size = scheduler.pool, scheduler.pool.block_size
    now = scheduler.clock()
    rows = {block: BlockRow(block, pool.state(block), pool.refs(block), pool.is_published(block),
                            age=None if pool.state(block) == FREE else round(max(0.0, now - pool.since(block)), 1))
            for block in range(first, last + 1)}
    for seq in scheduler.running:
        for group, table in enumerate(seq.tables):
            for entry, block in enumerate(table):
                if first <= block <= last and len(rows[block].owners) < MAX_OWNERS:
                    end = max(entry * size, min((entry + 1) * size, seq.num_computed))
                    rows[block].owners.append(Owner(seq.request.request_id, seq.index, group, entry * size, end))
    return list(rows.values())


__all__ = [
    "CACHED", "FREE", "OWNED", "SHARED", "BlockRow", "Look", "Owner", "Picture", "RequestDetail", "RequestRow", "SampleDetail",
    "take_picture",
]
