"""What an answer must look like before anything is drawn from it, as docs/stats.md promises. Decoding checks it, in C.

Names that the dashboard can do without are NotRequired: a server of another build of the same version may lack them. Others
that a server sends are left out. Numbers that are not finite, or longer than a machine's, are refused while decoding.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

import msgspec


class Versioned(TypedDict):
    version: int | str | float | bool | None


class Spread(TypedDict):
    p50: float | None
    p99: float | None


class Loading(TypedDict):
    done_bytes: int
    total_bytes: int
    seconds_left: float | None


class Server(TypedDict):
    state: str
    uptime: float
    loading: NotRequired[Loading | None]


class Model(TypedDict):
    name: str
    dtype: str
    device_name: str
    max_num_seqs: int
    weight_bytes: int
    kv_bytes: int
    plan: dict[str, int]
    kv_cache_dtype: NotRequired[str]
    quantization: NotRequired[str]


class Gpu(TypedDict):
    name: str
    total_bytes: int | None
    used_bytes: int | None
    utilization: float | None
    power_watts: float | None
    power_limit_watts: float | None
    temperature_celsius: float | None
    joules_per_token: float | None
    uuid: NotRequired[str]
    memory_utilization: NotRequired[float | None]
    fan: NotRequired[float | None]
    clock_mhz: NotRequired[float | None]
    memory_clock_mhz: NotRequired[float | None]
    throttle: NotRequired[str | None]
    pcie_read: NotRequired[float | None]
    pcie_write: NotRequired[float | None]
    own_bytes: NotRequired[int | None]


class CardOf(TypedDict):
    index: int
    name: str
    total_bytes: int | None
    used_bytes: int | None
    utilization: float | None
    own: bool


class Cells(TypedDict):
    count: int
    width: int
    owned: str
    shared: str
    cached: str
    heat: NotRequired[str | None]


class Blocks(TypedDict):
    total: int
    size: int
    free: int
    held: int
    shared: int
    cached: int
    waste: float
    cells: Cells


class Batch(TypedDict):
    running: int
    waiting: int
    preempted: int
    step_seconds: float
    step_tokens: int
    budget: int
    step_prompt_tokens: NotRequired[int]


class Speed(TypedDict):
    prompt_rate: float | None
    generate_rate: float | None
    eviction_rate: float | None
    preemption_rate: float | None
    hit_rate: float | None
    ttft: Spread
    itl: Spread
    e2e: Spread


class Request(TypedDict):
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
    route: NotRequired[str]


class FrameAnswer(TypedDict):
    version: int
    time: float
    server: Server
    model: Model
    gpu: Gpu | None
    process_bytes: int | None
    blocks: Blocks
    batch: Batch
    speed: Speed
    requests: list[Request]
    requests_total: int
    cards: NotRequired[list[CardOf]]


class Timeline(TypedDict):
    queue: float | None
    prefill: float | None
    decode: float | None


class Sample(TypedDict):
    index: int
    tables: list[list[int]]


class Diverged(TypedDict):
    token: int
    message: int | None
    earlier_tokens: int


class DetailsAnswer(TypedDict):
    request: Request
    max_tokens: int
    timeline: Timeline
    sampling: dict[str, float | bool | None]
    samples: list[Sample]
    diverged: NotRequired[Diverged | None]


class OwnerOf(TypedDict):
    request_id: str
    begin: int
    end: int


class BlockOf(TypedDict):
    state: int
    refs: int
    owners: list[OwnerOf]
    age: NotRequired[float | None]


class BlocksAnswer(TypedDict):
    blocks: list[BlockOf]


class ProcessOf(TypedDict):
    pid: int
    user: str | None
    command: str | None
    bytes: int | None
    own: bool


class CardsAnswer(TypedDict):
    cards: list[CardOf]
    processes: list[ProcessOf]


class Line(TypedDict):
    time: float
    level: str
    text: str


class LogAnswer(TypedDict):
    lines: list[Line]


_DECODERS: dict[Any, msgspec.json.Decoder[Any]] = {}


def decode(body: bytes, shape: Any) -> Any:
    """Plain dicts and lists of this shape. Raises ValueError for anything else."""
    if shape not in _DECODERS:
        _DECODERS[shape] = msgspec.json.Decoder(shape)
    try:
        return _DECODERS[shape].decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from None
