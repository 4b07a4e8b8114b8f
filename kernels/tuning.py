"""Which tile sizes a matrix product runs with: measured ones for the GPUs in `tuned/`, computed ones elsewhere.

Pure Python. A tuned file is named after the GPU, as its driver calls it, blanks as underscores, and holds
`{"device": the fields of Device, "origin": how it was measured, "rows": [[scheme, output, n, k, m, kind, block_n, block_m,
block_k, splits, warps, stages, pdl], ...]}`: the configuration for up to m rows of activations on a weight [n, k].
`benchmarks/gemm.py` writes such files.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

# bf16 or fp16; FP8 weights and activations; FP8 weights only; integer weights with a scale a group, the first also with
# activations that their maker took apart (`Halves`); 4-bit codes with a table and float32 scales, with e8m0 and with e4m3
# ones. All but the second and the halves have 16-bit activations.
Scheme = Literal["16bit", "fp8", "fp8_weight", "int4", "int4_halves", "int8_weight", "nf4", "mxfp4", "nvfp4"]
Output = Literal["linear", "silu_mul"]
Kind = Literal["dot", "gemv", "hopper", "library"]

MAX_ROWS = 256  # beyond, the library's large tiles win
TUNED = Path(__file__).parent / "tuned"
# GPUs that take another's measurements: the same processor with slower memory.
SAME_AS = {"NVIDIA H100 80GB HBM3": "NVIDIA H200"}
KIB = 1024
FP8_CAPABILITY = 89  # the first with e4m3fn conversions and products
CHANNELS, PANEL_BYTES = 64, 128  # of a tile of weights in `gemm_hopper.py`: the rows of a wgmma, the span of a swizzle
READS_SHARED = (9, 10)  # major capabilities whose tensor cores read operands from shared memory: wgmma, tcgen05
# Without a measurement the library gets what lies above: its FP8 products are slow at few rows, its 16-bit ones less so,
# and FP8 weights with 16-bit activations it cannot read at all.
LIBRARY_ABOVE: dict[Scheme, int] = {
    "16bit": 64, "fp8": 128, "fp8_weight": MAX_ROWS, "int4": MAX_ROWS, "int4_halves": MAX_ROWS, "int8_weight": MAX_ROWS,
    "nf4": MAX_ROWS, "mxfp4": MAX_ROWS, "nvfp4": MAX_ROWS,
}  # fmt: skip
INTEGER_BITS: dict[Scheme, int] = {"int4": 4, "int4_halves": 4, "int8_weight": 8}
GROUPED: tuple[Scheme, ...] = (*INTEGER_BITS, "nf4", "mxfp4", "nvfp4")  # what `gemm_grouped_hopper.py` multiplies
BYTE_SCALES: tuple[Scheme, ...] = ("mxfp4", "nvfp4")
RINGED: tuple[Scheme, ...] = ("int4", *BYTE_SCALES)  # whose weights meet their scales first, which rings of many rows do
# For more rows still: the library needs them widened first. Others than ringed ones only where a measurement says so.
NARROW_ROWS = 1024  # up to here programs of 128 channels win
MOST_ROWS: dict[Scheme, int] = dict.fromkeys(GROUPED, 512) | dict.fromkeys(BYTE_SCALES, NARROW_ROWS) | {"int4": 1 << 30}
WIDE_ABOVE = 512  # rows: programs of 256 channels beyond, whose x the L2 would not bring in time for 128, where they fit
CODE_SCHEMES: tuple[Scheme, ...] = ("nf4", "mxfp4", "nvfp4")
# The least step along K: integers and codes come in chunks of 32 words of 16 bits.
LEAST_STEP: dict[Scheme, int] = {"int4": 128, "int4_halves": 256, "int8_weight": 64, **dict.fromkeys(CODE_SCHEMES, 128)}
MOST_STEP: dict[Scheme, int] = dict.fromkeys(CODE_SCHEMES, 256)
LEAST_GROUP = 32  # columns that may have a scale of their own
WIDE_GROUP = 128  # the same where a program has 256 channels and 128 rows, which fill registers and shared memory
CODE_SCALES: dict[Scheme, float] = {"nf4": 4 / 32, "mxfp4": 1 / 32, "nvfp4": 1 / 16}  # bytes a column, at most
CODED_ROWS: dict[Scheme, int] = {"nf4": 64, "mxfp4": 128, "nvfp4": 128}  # of a program, at most
FEW_ROWS = 4  # of a program in `gemm_few_hopper.py`, which is what a ring with so many rows means
# Of activations there, at most: sums of e2m1 codes are two groups'.
FEW_OF: dict[Scheme, int] = {"int4": 4, "int4_halves": 4, **dict.fromkeys(BYTE_SCALES, 2)}
FEW_SPAN, FEW_CHUNK_BYTES = 128, 1024 + 64  # there: columns of x with a power of two in common, and their shared memory
HALVED_ROWS = 2  # of those that it is the fastest for
MOST_CHUNKS = 32  # of x, taken apart by each program: with more there was nothing gained
FUSED_ROWS = 32  # of activations, at most, where gate and up share a ring
TABLE_BYTES = 32 * KIB  # what codes are looked up in, beside a ring
# Triton asks for more shared memory than the usual 48 KiB if it allots more than that itself; it does not know of the table.
OPTING = 48 * KIB


@dataclass(frozen=True)
class Device:
    """What a choice depends on. `shared_bytes`: shared memory one program may ask for; `capability`: 90 for 9.0."""

    name: str
    processors: int
    shared_bytes: int
    capability: int


@dataclass(frozen=True)
class Problem:
    """x [m, k] times a weight [n, k]; for `silu_mul` n counts gate and up rows together."""

    scheme: Scheme
    output: Output
    m: int
    n: int
    k: int

    @property
    def weight_bytes(self) -> float:
        """Bytes a weight element takes, scales not counted."""
        return {"16bit": 2, "int4": 0.5, "int4_halves": 0.5, **dict.fromkeys(CODE_SCHEMES, 0.5)}.get(self.scheme, 1)

    @property
    def row_bytes(self) -> int:
        """Bytes an activation element takes."""
        return 1 if self.scheme == "fp8" else 2


@dataclass(frozen=True)
class GemmConfig:
    """`dot`: tensor cores; `gemv`: CUDA cores, one row only; `hopper`: `gemm_hopper.py`, compute capability 9.0 only;
    `library`: torch, and the sizes mean nothing. `hopper` with a block_m of FEW_ROWS is `gemm_few_hopper.py`.

    block_n: output channels a program computes (of gate and of up each, when it fuses SiLU); block_m: activation rows;
    block_k: the step along K; splits: chunks of K, at most (a short K has fewer); pdl: programmatic dependent launch.
    """

    kind: Kind
    block_n: int = 64
    block_m: int = 16
    block_k: int = 128
    splits: int = 1
    warps: int = 4
    stages: int = 3
    pdl: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}; one of {', '.join(get_args(Kind))} is needed")
        for name in ("block_n", "block_m", "block_k", "warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} is {value}; a power of two is needed")
        if self.splits < 1 or self.stages < 1:
            raise ValueError(f"splits is {self.splits} and stages {self.stages}; both must be at least 1")


LIBRARY = GemmConfig("library")


def fuses_silu(problem: Problem, config: GemmConfig) -> bool:
    """Whether the product itself applies SiLU·mul: K is in one chunk, or summed inside. Else the sum over the chunks does."""
    return problem.output == "silu_mul" and (config.splits == 1 or config.kind == "hopper")


def shared_bytes(problem: Problem, config: GemmConfig, capability: int) -> int:
    """Shared memory a program takes, in bytes, at most: its pipeline's tiles of weights and activations.

    wgmma and its successor read them there while the next ones arrive, `stages` in all; mma.sync takes them through
    registers and needs one less. The result's tile passes through the same memory on its way out, in float32.
    `tests/test_compile.py` holds this against what the compiler says.
    """
    if config.kind == "library":
        return 0
    if is_few(config):
        x = few_chunks(problem.k, config, problem.m) * FEW_CHUNK_BYTES if problem.scheme != "int4_halves" else 0
        return config.stages * stage_bytes(problem, config) + x + CHANNELS * FEW_ROWS * 4 + KIB
    if config.kind == "hopper":
        stages, table = config.stages, 0
        if problem.scheme == "nf4":
            stages, table = max(stages, table_stages(config.block_k, _channels(problem, config), config.block_m)), TABLE_BYTES
        ring = stages * stage_bytes(problem, config) + table
        tile = CHANNELS * config.block_m * 4
        sums = max(tile, 16 * KIB) if _is_paired(problem, config) else min(tile, 16 * KIB)
        return ring + sums + (config.warps // 4 - 1) * min(tile, 16 * KIB) + KIB
    tiles = 2 if fuses_silu(problem, config) else 1
    columns = 1 if config.kind == "gemv" else config.block_m
    # Scales of codes come by the same way, at most as many bytes as fp32 ones of 64 columns or bytes of 16.
    weight_bytes = problem.weight_bytes + (1 / 16 if problem.scheme in CODE_SCHEMES else 0)
    stage = int(config.block_k * (tiles * config.block_n * weight_bytes + columns * problem.row_bytes))
    buffers = config.stages if config.kind == "gemv" or capability // 10 in READS_SHARED else config.stages - 1
    return max(buffers * stage, config.block_n * columns * 4) + KIB


def stage_bytes(problem: Problem, config: GemmConfig) -> int:
    """Shared memory a step of a ring takes, in bytes, at most."""
    channels = _channels(problem, config)
    if is_few(config):
        x = FEW_CHUNK_BYTES / FEW_SPAN if problem.scheme == "int4_halves" else 0
        scales = CODE_SCALES.get(problem.scheme, 2 / FEW_SPAN)
        return int(config.block_k * ((problem.weight_bytes + scales) * channels + x))
    size = problem.weight_bytes * channels + problem.row_bytes * config.block_m
    if problem.scheme in GROUPED:
        group = WIDE_GROUP if is_wide(problem.output, config) else LEAST_GROUP
        size += CODE_SCALES.get(problem.scheme, 2 / group) * channels
    return int(config.block_k * size)


def _channels(problem: Problem, config: GemmConfig) -> int:
    return 2 * config.block_n if problem.output == "silu_mul" else config.block_n


def _is_paired(problem: Problem, config: GemmConfig) -> bool:
    """Whether gate and up have a warpgroup each, and one hands its sums to the other."""
    return problem.output == "silu_mul" and config.warps == 8 and config.block_n == CHANNELS


def is_wide(output: Output, config: GemmConfig) -> bool:
    """Whether a warpgroup of a ring has two tiles of 128 rows."""
    channels = config.block_n * (2 if output == "silu_mul" else 1)
    return config.kind == "hopper" and config.block_m == 128 and channels == config.warps * CHANNELS // 2


def is_few(config: GemmConfig) -> bool:
    """Whether it is one of `gemm_few_hopper.py`."""
    return config.kind == "hopper" and config.block_m == FEW_ROWS


def few_chunks(k: int, config: GemmConfig, m: int) -> int:
    """Chunks of x that a program of that kernel has room for: its part of K, rounded up as its layouts ask."""
    steps = -(-k // (config.block_k * config.splits))
    chunks = steps * config.block_k // FEW_SPAN
    rows = 1 << (m - 1).bit_length()
    return max(4 * rows, 1 << (chunks - 1).bit_length())  # whole layouts


def table_stages(step: int, channels: int, rows: int) -> int:
    """The least stages of a ring beside a table, for so many channels and rows a program. Scales and barriers come on top."""
    return -(-OPTING // (step * (channels // 2 + 2 * rows)))


def most_rows(scheme: Scheme) -> int:
    """Rows of activations beyond which there is nothing to choose."""
    return MOST_ROWS.get(scheme, MAX_ROWS)


def choose(problem: Problem, device: Device, *, rings: bool = True) -> GemmConfig:
    """The measured configuration of this GPU and weight shape for the next number of rows, or a computed one.

    rings: whether `hopper` may be chosen, which Triton may be too old or too new for.
    """
    if problem.m > most_rows(problem.scheme):
        return LIBRARY
    rows = tuned(device.name).get((problem.scheme, problem.output, problem.n, problem.k), ())
    for most, config in rows:
        if problem.m <= most and (rings or config.kind != "hopper"):
            return config
    if problem.scheme in RINGED and problem.m > MAX_ROWS and rings and device.capability == 90:
        return _many_ring(problem, device)
    if problem.m > LIBRARY_ABOVE[problem.scheme] or _is_left_apart(problem, device, rings=rings):
        return LIBRARY
    return default_config(problem, device, rings=rings)


def _is_left_apart(problem: Problem, device: Device, *, rings: bool) -> bool:
    """Whether SiLU·mul follows a product, unless measured otherwise: gate's and up's codes in one program have no registers for
    many rows, and in a warpgroup each a few measured shapes are known only."""
    if problem.output != "silu_mul" or problem.m <= FUSED_ROWS:
        return False
    return problem.scheme in INTEGER_BITS or (problem.scheme in CODED_ROWS and rings and device.capability == 90)


@cache
def tuned(gpu: str) -> dict[tuple[str, str, int, int], tuple[tuple[int, GemmConfig], ...]]:
    """The tuned file of a GPU, {(scheme, output, n, k): ((most rows, configuration), ...) by rows}; empty without one."""
    path = TUNED / (SAME_AS.get(gpu, gpu).replace(" ", "_") + ".json")
    if not path.is_file():
        return {}
    table: dict[tuple[str, str, int, int], list[tuple[int, GemmConfig]]] = {}
    for row in json.loads(path.read_text())["rows"]:
        problem, config = parse_row(row)
        table.setdefault((problem.scheme, problem.output, problem.n, problem.k), []).append((problem.m, config))
    return {key: tuple(sorted(found, key=lambda pair: pair[0])) for key, found in table.items()}


def parse_row(row: list[Any]) -> tuple[Problem, GemmConfig]:
    """One row of a tuned file; ValueError if a field has a value that no kernel serves."""
    scheme, output, n, k, m, *config = row
    if scheme not in get_args(Scheme) or output not in get_args(Output):
        raise ValueError(f"a tuned row names scheme {scheme!r} and output {output!r}, which do not exist")
    found = GemmConfig(*config)
    if found.kind == "gemv" and m != 1:
        raise ValueError(f"a tuned row gives m={m} rows to the gemv kernel, which computes one")
    if is_few(found) and m > FEW_OF.get(scheme, 0):
        most = FEW_OF.get(scheme, 0)
        raise ValueError(f"a tuned row gives {scheme} with m={m} to the kernel of few rows, which takes {most} of them at most")
    return Problem(scheme, output, m, n, k), found


def make_row(problem: Problem, config: GemmConfig) -> list[Any]:
    """`parse_row`'s inverse."""
    return [problem.scheme, problem.output, problem.n, problem.k, problem.m, *astuple(config)]


def default_config(problem: Problem, device: Device, *, rings: bool = True) -> GemmConfig:
    """Tile sizes from the device's multiprocessors and shared memory alone; they compile and fit wherever Triton does.

    Aims: a step of 256 bytes along K (128 once the activations' tile grows), two programs a multiprocessor, and enough of
    them to keep every multiprocessor loading; the float32 parts of a split K stay well below the weights' own bytes.
    """
    make = few_ring if problem.scheme == "int4_halves" else _grouped_ring if problem.scheme in GROUPED else _ring
    ring = make(problem, device) if rings else None
    if ring is not None:
        return ring
    tile = _tile(problem, device)
    if problem.output == "silu_mul":
        return tile  # fused: K in one chunk
    tiles = -(-problem.n // tile.block_n) * -(-problem.m // tile.block_m)
    wanted = round(2.3 * device.processors / tiles)
    filling = problem.k // (4 * tile.block_k)  # at least four steps a chunk, or the pipeline never fills
    affordable = int(problem.k * problem.weight_bytes) // (8 * problem.m)
    return replace(tile, splits=max(1, min(wanted, filling, affordable, 16)))


def _ring(problem: Problem, device: Device) -> GemmConfig | None:
    """On Hopper, for up to 64 rows of whole tiles: what the measured shapes of an H200 have in common. None: something else.

    A ring as large as leaves room for as many programs as there are; a long K is split while multiprocessors are idle.
    """
    width = int(PANEL_BYTES // problem.weight_bytes)
    whole = problem.n % (2 * CHANNELS) == 0 and problem.k % (2 * width) == 0
    if device.capability != 90 or problem.scheme not in ("16bit", "fp8") or problem.m > 64 or not whole:
        return None
    silu = problem.output == "silu_mul"
    block_m, tiles, panels = max(8, 1 << (problem.m - 1).bit_length()), 2 if silu else 1, 1 if silu else 2
    programs = problem.n // (2 * CHANNELS if silu else CHANNELS)
    idle = device.processors // programs if programs else 0
    long = problem.k * problem.weight_bytes >= 64 * PANEL_BYTES
    splits = min(4, 2 * idle) if idle and long and block_m <= 16 else 1
    ring = (205 if programs * splits <= device.processors else 100) * KIB
    stages = ring // (panels * PANEL_BYTES * (tiles * CHANNELS + block_m))
    config = GemmConfig("hopper", CHANNELS, block_m, panels * width, splits, 4, min(stages, 12), True)
    return config if stages >= 3 and shared_bytes(problem, config, device.capability) <= device.shared_bytes else None


def _grouped_ring(problem: Problem, device: Device) -> GemmConfig | None:
    """As `_ring`, for `gemm_grouped_hopper.py`: small rings, so that three programs a multiprocessor take turns at widening; K
    is split until there are two for each. From 128 rows on two warpgroups share the rows of x. Beside a table of codes there is
    room for two programs, so from 64 on, and with 8 where they have registers.

    Left to measurements: gate and up in a warpgroup each. One or two rows of 4-bit integers and of e2m1 codes have a kernel of
    their own."""
    silu, table = problem.output == "silu_mul", problem.scheme == "nf4"
    if device.capability != 90 or problem.n % (4 * CHANNELS) or (silu and problem.m > FUSED_ROWS):
        return None
    apart = problem.scheme in BYTE_SCALES or (problem.scheme == "int4" and not silu)  # gate and up of int4: by their norm
    if apart and problem.m <= HALVED_ROWS and problem.k % FEW_SPAN == 0:
        few = few_ring(problem, device)
        if few_chunks(problem.k, few, problem.m) <= MOST_CHUNKS:
            return few
    block_m = min(CODED_ROWS.get(problem.scheme, 128), max(8, 1 << (problem.m - 1).bit_length()))
    teams = 2 if block_m >= 128 or (table and (block_m == 64 or (block_m == 8 and not silu))) else 1
    tiles = 2 if silu or (problem.n >= 6144 and block_m <= 16 and teams == 1) else 1
    step = int(PANEL_BYTES // problem.weight_bytes)
    programs = problem.n // (tiles * teams * CHANNELS) * -(-problem.m // block_m)
    splits = max(1, min(2 * device.processors // programs, problem.k // (4 * step), 8))
    config = GemmConfig("hopper", teams * tiles * CHANNELS // (2 if silu else 1), block_m, step, splits, 4 * teams, 1, True)
    ring = 76 if table else 66
    return replace(config, stages=max(2, min(6, ring * KIB // stage_bytes(problem, config))))


def _many_ring(problem: Problem, device: Device) -> GemmConfig:
    """For `gemm_grouped_hopper.py`: programs of 128 rows, and of as many channels as their registers have sums for, but for a
    weight so narrow that they would leave multiprocessors idle, which is widened for the library."""
    if problem.n % (4 * CHANNELS) or 8 * problem.n // (4 * CHANNELS) < 0.9 * device.processors:
        return LIBRARY
    channels = 4 * CHANNELS if problem.m > WIDE_ABOVE else 2 * CHANNELS
    return GemmConfig("hopper", channels // (2 if problem.output == "silu_mul" else 1), 128, 256, 1, 8, 2, True)


def few_ring(problem: Problem, device: Device) -> GemmConfig:
    """For `gemm_few_hopper.py`: rings of four or five steps; programs that run at once, with 2,048 columns or more."""
    silu = problem.output == "silu_mul"
    programs = -(-problem.n // (2 * CHANNELS if silu else CHANNELS))
    room = (2 if silu else 4) * device.processors
    splits = max(1, min(room // programs, problem.k // 2048))
    return GemmConfig("hopper", CHANNELS, FEW_ROWS, 2 * FEW_SPAN, splits, 4, 5 if problem.scheme == "int4_halves" else 4, True)


def _tile(problem: Problem, device: Device) -> GemmConfig:
    """The largest tile whose pipeline fits; it shrinks along K first, then in channels, then in rows."""
    block_m = _block_m(problem, device)
    fused = 2 if problem.output == "silu_mul" else 1
    block_n = 128 // fused if block_m >= 64 else 64
    widest = int(max(problem.weight_bytes, problem.row_bytes))
    least = LEAST_STEP.get(problem.scheme, 64 // widest)
    block_k = max(least, (256 if block_m <= 32 else 128) // widest)
    budget = device.shared_bytes if block_m >= 128 else device.shared_bytes // 2
    while True:
        warps = 8 if fused * block_n * block_m >= 128 * 64 else 4  # large accumulators spread over two warpgroups
        for stages in (5, 4, 3, 2):
            config = GemmConfig("dot", block_n, block_m, block_k, 1, warps, stages)
            deep_enough = stages >= 3 or block_k <= least
            if deep_enough and shared_bytes(problem, config, device.capability) <= budget:
                return config
        if block_k > least:
            block_k //= 2
        elif block_n > 64:
            block_n //= 2
        else:
            block_m //= 2


def _block_m(problem: Problem, device: Device) -> int:
    # Integers need a sum a group beside the sum of all, tables all planes of a word at once: two of either, gate's and up's,
    # leave no registers for 128 rows.
    crowded = problem.scheme in (*INTEGER_BITS, *CODE_SCHEMES) and problem.output == "silu_mul"
    most = 128 if device.shared_bytes > 128 * KIB and not crowded else 64
    return min(most, max(16, 1 << (problem.m - 1).bit_length()))
