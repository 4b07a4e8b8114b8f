"""The dashboard's contract (docs/stats.md): what `/stats` and its neighbours answer, as typed structs. Version 1.

Nothing here holds text of prompts or answers. Sizes are bytes, times seconds, rates per second; None is "not known".
"""

from __future__ import annotations

from base64 import b64encode
from itertools import pairwise

from msgspec import Struct

from workstation.engine.client import Health
from workstation.engine.snapshot import CACHED, OWNED, SHARED, BlockRow, Picture, RequestRow
from workstation.server.job import Divergence
from workstation.server.log_book import LogLine

VERSION = 1
MAX_CELLS = 4096
DEFAULT_CELLS = 400


class ModelStats(Struct):
    """What is served, fixed while the engine lives. plan: the memory plan, bytes by part.  measured: what the start took."""

    name: str
    architecture: str
    dtype: str
    device: str
    device_name: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    weight_bytes: int
    kv_bytes: int
    plan: dict[str, int]
    kv_cache_dtype: str = ""
    quantization: str = ""
    measured: dict[str, int] = {}


class LoadingStats(Struct):
    """stage: weights (done and total in bytes), kernels or graphs (counted). seconds_left: of the stage, if it keeps its speed;
    None before anything is done, and once all is."""

    stage: str
    done: int
    total: int
    seconds_left: float | None


class ServerStats(Struct):
    """state: starting, ready, restarting, draining or dead.  uptime: since the API process began to answer.

    loading: while the engine starts, at first or after its death, from its first weights on.
    """

    state: str
    uptime: float
    version: str
    restarts: int
    heartbeat_age: float
    cause: str = ""
    loading: LoadingStats | None = None


class GpuStats(Struct):
    """NVML's reading of the engine's card, at most a second old. utilization, memory_utilization, fan: 0…1.

    throttle: why clocks are lowered, "" when they are not.  pcie_read, pcie_write: bytes a second into and out of the card.
    own_bytes: what NVML counts for the engine's process, where it tells.
    """

    name: str
    total_bytes: int | None
    used_bytes: int | None
    utilization: float | None
    power_watts: float | None
    power_limit_watts: float | None
    temperature_celsius: float | None
    joules_per_token: float | None = None
    uuid: str = ""
    memory_utilization: float | None = None
    fan: float | None = None
    clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    throttle: str | None = None
    pcie_read: float | None = None
    pcie_write: float | None = None
    own_bytes: int | None = None


class CardStats(Struct):
    """One of the machine's cards; own: the engine's."""

    index: int
    name: str
    total_bytes: int | None
    used_bytes: int | None
    utilization: float | None
    own: bool


class GpuProcessStats(Struct):
    """A process on the engine's card; None where the system hides it. own: the engine."""

    pid: int
    user: str | None
    command: str | None
    bytes: int | None
    own: bool


class GpuAnswer(Struct):
    version: int
    cards: list[CardStats]
    processes: list[GpuProcessStats]


class CellMap(Struct):
    """The pool folded into cells, in physical order; cell i stands for blocks [total * i // count, total * (i + 1) // count).

    owned, shared, cached: base64 of `count` little-endian unsigned integers of `width` bytes: how many of a cell's blocks are
    held by one, held by several, cached; the rest are free. Exact, and 1,000 cells stay under 10 kB in any pool.
    heat: when asked for, base64 of a byte a cell: 0 nothing cached, else how near eviction its next block is, 1 to 255.
    """

    count: int
    width: int
    owned: str
    shared: str
    cached: str
    heat: str | None = None


class BlockStats(Struct):
    """The pool. waste: share of held token slots that hold no token, 0…1."""

    total: int
    size: int
    free: int
    held: int
    shared: int
    cached: int
    waste: float
    evictions: int
    preemptions: int
    cells: CellMap


class BatchStats(Struct):
    """running, waiting, preempted: sequences. step_*: the newest step; budget: tokens a step may compute."""

    running: int
    waiting: int
    preempted: int
    steps: int
    step_seconds: float
    step_tokens: int
    budget: int
    step_prompt_tokens: int = 0


class Spread(Struct):
    """Of the newest few hundred observations; None while there is none."""

    p50: float | None = None
    p99: float | None = None


class SpeedStats(Struct):
    """Counters since the engine's start, and rates over the last seconds. hit_rate: prompt tokens found in the cache, 0…1."""

    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    prompt_rate: float | None
    generate_rate: float | None
    eviction_rate: float | None
    preemption_rate: float | None
    hit_rate: float | None
    ttft: Spread
    itl: Spread
    e2e: Spread


class RequestStats(Struct):
    """A live request. rate: generated tokens/s since its first token.  ttft: None before it.  age: since arrival."""

    id: str
    client: str
    state: str
    prompt: int
    cached: int
    computed: int
    generated: int
    rate: float | None
    ttft: float | None
    blocks: int
    age: float
    samples: int
    preemptions: int
    route: str = ""


class Snapshot(Struct):
    """One frame. time: Unix seconds at which the engine made it; an old time says that it has not answered since.

    requests: at most 512 rows, running ones first; requests_total counts all.  process_bytes: memory of the engine's process.
    look_seconds: what the picture cost the engine.  cards: all of the machine's, when the engine is on one of them.
    """

    version: int
    time: float
    server: ServerStats
    model: ModelStats
    gpu: GpuStats | None
    process_bytes: int | None
    blocks: BlockStats
    batch: BatchStats
    speed: SpeedStats
    requests: list[RequestStats]
    requests_total: int
    look_seconds: float
    cards: list[CardStats] = []


class BlocksAnswer(Struct):
    version: int
    total: int
    blocks: list[BlockRow]


class Timeline(Struct):
    """Seconds spent in each part so far; None for a part that has not begun."""

    queue: float
    prefill: float | None
    decode: float | None


class SampleStats(Struct):
    """One sample of a request, as engine/snapshot.py has it, without ids."""

    index: int
    tokens: int
    computed: int
    tables: list[list[int]]
    finished: str | None = None


class RequestText(Struct):
    """The end of a prompt, and of each sample's answer."""

    prompt: str
    answers: list[str]


class RequestAnswer(Struct):
    """Details of a live request: its row, where its time went, a block table a sample and KV group, and why it missed.

    text: only from a server that was told to show it.
    """

    version: int
    request: RequestStats
    max_tokens: int
    timeline: Timeline
    sampling: dict[str, float | int | bool | None]
    samples: list[SampleStats]
    diverged: Divergence | None = None
    text: RequestText | None = None


class LogAnswer(Struct):
    """The log's newest lines, oldest first. last: the newest line's number; ask for what is `after` it."""

    version: int
    last: int
    lines: list[LogLine]


class AbortAnswer(Struct):
    id: str
    aborted: bool


def fold(states: bytes, cells: int, heat: bytes = b"") -> CellMap:
    """Count the states (one byte a block, as in engine/blocks.py) of min(cells, blocks) cells. heat: as in Picture."""
    total = len(states)
    cells = min(cells, total)
    edges = [total * cell // cells for cell in range(cells + 1)] if cells else [0]
    largest = -(-total // cells) if cells else 0
    width = 1 if largest < 1 << 8 else 2 if largest < 1 << 16 else 4
    counted = [b"".join(states.count(state, begin, end).to_bytes(width, "little")
                        for begin, end in pairwise(edges)) for state in (OWNED, SHARED, CACHED)]
    warmest = bytes(max(heat[begin:end]) for begin, end in pairwise(edges)) if len(heat) == total else None
    owned, shared, cached = (b64encode(counts).decode() for counts in counted)
    return CellMap(cells, width, owned, shared, cached, None if warmest is None else b64encode(warmest).decode())


def loading_stats(health: Health) -> LoadingStats | None:
    """How far loading has come."""
    if health.loading is None:
        return None
    now, left = health.loading, health.loading.seconds_left
    return LoadingStats(now.stage, now.done, now.total, None if left is None else round(left, 1))


def request_stats(row: RequestRow, now: float) -> RequestStats:
    """now: time.monotonic() of the picture."""
    first = row.first_token
    busy = now - first if first else 0.0
    rate = row.generated / busy if busy > 0.05 and row.generated > 1 else None
    return RequestStats(
        row.id, row.label, row.state, row.prompt, row.cached, row.computed, row.generated,
        None if rate is None else round(rate, 2),
        round(first - row.arrival, 4) if first else None, row.blocks, round(max(0.0, now - row.arrival), 3), row.samples,
        row.preemptions, row.route)


def timeline(row: RequestRow, now: float) -> Timeline:
    """now: time.monotonic() of the picture."""
    if not row.scheduled:
        return Timeline(round(now - row.arrival, 4), None, None)
    queue = round(row.scheduled - row.arrival, 4)
    if not row.first_token:
        return Timeline(queue, round(now - row.scheduled, 4), None)
    return Timeline(queue, round(row.first_token - row.scheduled, 4), round(now - row.first_token, 4))


def block_stats(picture: Picture, block_size: int, cells: int) -> BlockStats:
    stats = picture.stats
    slots = stats.blocks_held * block_size
    return BlockStats(
        total=stats.blocks_total, size=block_size, free=stats.blocks_free, held=stats.blocks_held,
        shared=picture.states.count(SHARED), cached=stats.blocks_cached,
        waste=round(1 - stats.kv_tokens_held / slots, 4) if slots else 0.0, evictions=stats.evictions,
        preemptions=stats.preemptions, cells=fold(picture.states, cells, picture.heat))
