"""What an answer must look like before anything is drawn from it, as docs/stats.md promises. Decoding checks it, in C.

Names that the dashboard can do without are NotRequired: a server of another build of the same version may lack them. Others
that a server sends are left out. Numbers that are not finite, or longer than a machine's, are refused while decoding.
"""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

Int = Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]


class Versioned(TypedDict):
    version: Int | str | float | bool | None


class Spread(TypedDict):
    p50: float | None
    p99: float | None


class Loading(TypedDict):
    stage: str
    done: Int
    total: Int
    seconds_left: float | None


class Server(TypedDict):
    state: str
    uptime: float
    loading: NotRequired[Loading | None]


class Model(TypedDict):
    name: str
    dtype: str
    device_name: str
    max_num_seqs: Int
    weight_bytes: Int
    kv_bytes: Int
    plan: dict[str, Int]
    kv_cache_dtype: NotRequired[str]
    quantization: NotRequired[str]


class Gpu(TypedDict):
    name: str
    total_bytes: Int | None
    used_bytes: Int | None
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
    own_bytes: NotRequired[Int | None]


class CardOf(TypedDict):
    index: Int
    name: str
    total_bytes: Int | None
    used_bytes: Int | None
    utilization: float | None
    own: bool


class Cells(TypedDict):
    count: Int
    width: Int
    owned: str
    shared: str
    cached: str
    heat: NotRequired[str | None]


class Blocks(TypedDict):
    total: Int
    size: Int
    free: Int
    held: Int
    shared: Int
    cached: Int
    waste: float
    cells: Cells


class Batch(TypedDict):
    running: Int
    waiting: Int
    preempted: Int
    step_seconds: float
    step_tokens: Int
    budget: Int
    step_prompt_tokens: NotRequired[Int]


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
    prompt: Int
    cached: Int
    computed: Int
    generated: Int
    rate: float | None
    ttft: float | None
    blocks: Int
    age: float
    samples: Int
    preemptions: Int
    route: NotRequired[str]


class FrameAnswer(TypedDict):
    version: Int
    time: float
    server: Server
    model: Model
    gpu: Gpu | None
    process_bytes: Int | None
    blocks: Blocks
    batch: Batch
    speed: Speed
    requests: list[Request]
    requests_total: Int
    cards: NotRequired[list[CardOf]]


class Timeline(TypedDict):
    queue: float | None
    prefill: float | None
    decode: float | None


class Sample(TypedDict):
    index: Int
    tables: list[list[Int]]


class Diverged(TypedDict):
    token: Int
    message: Int | None
    earlier_tokens: Int


class RequestText(TypedDict):
    prompt: str
    answers: list[str]


class DetailsAnswer(TypedDict):
    request: Request
    max_tokens: Int
    timeline: Timeline
    sampling: dict[str, int | float | bool | None]
    samples: list[Sample]
    diverged: NotRequired[Diverged | None]
    text: NotRequired[RequestText | None]


class OwnerOf(TypedDict):
    request_id: str
    begin: Int
    end: Int


class BlockOf(TypedDict):
    state: Int
    refs: Int
    owners: list[OwnerOf]
    age: NotRequired[float | None]


class BlocksAnswer(TypedDict):
    blocks: list[BlockOf]


class ProcessOf(TypedDict):
    pid: Int
    user: str | None
    command: str | None
    bytes: Int | None
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
