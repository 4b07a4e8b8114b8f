"""Grids and scratch of the sampling kernels. Called through `ops_sampling.py`, which has checked the shapes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton

from workstation.kernels.dependent import chained
from workstation.kernels.gemm_launch import Call
from workstation.kernels.sampling import BINS, sample_kernel
from workstation.kernels.sampling_filter import filter_kernel, gather_kernel
from workstation.kernels.token_mask import token_mask_kernel

LEAST_CHUNK = 1024  # tokens; one warp reads them in 16-byte loads, and its reductions need no barrier
MOST_CHUNKS = 256  # a row: what one warp adds up at the end
SCAN_PROGRAMS = 32  # a multiprocessor: as many as it holds of any kind
GATHER_PROGRAMS, GATHER_WARPS = 8, 4
TILE, FILTER_WARPS = 4096, 16  # values one program looks at in a turn, where the time of a whole row matters
MASK_BLOCK = 2048  # logits a program masks
HEAD = 8  # the head of a row is at most an 8th of it
SHIFTS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}  # mantissa bits that float32 has and the type has not


class Room:
    """Scratch for rows of one width, the same addresses at every step until a step brings more rows.

    A graph must be captured after a step of its size has run, and dropped when a larger one runs.

    Attributes:
        chunk, chunks: tokens a chunk and chunks a row; they follow from the width alone.
        peaks, sums: [rows, chunks] float32.  arrivals: [rows] int32, zero between steps.
        bins, edges, counts, ids, values: see `gather_kernel`; made when the first row has top_k or top_p.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.width, self.device = width, device
        self.chunk = LEAST_CHUNK
        while triton.cdiv(width, self.chunk) > MOST_CHUNKS:
            self.chunk *= 2
        self.chunks = triton.cdiv(width, self.chunk)
        self.chunks_pad = triton.next_power_of_2(self.chunks)
        self.capacity = triton.cdiv(width, 16 * HEAD) * 16
        self.bins = self._empty(torch.int32, 0)
        self._rows = self._filtered_rows = 0

    def fit(self, rows: int, *, filtered: bool) -> None:
        """Grow to this many rows, by doubling."""
        if rows > self._rows:
            self._rows = triton.next_power_of_2(rows)
            self.peaks = self._empty(torch.float32, self._rows, self.chunks)
            self.sums = torch.empty_like(self.peaks)
            self.arrivals = torch.zeros(self._rows, dtype=torch.int32, device=self.device)
        if filtered and rows > self._filtered_rows:
            self._filtered_rows = triton.next_power_of_2(rows)
            self.bins = self._empty(torch.int32, self._filtered_rows, self.chunks, BINS.value)
            self.counts = self._empty(torch.int32, self._filtered_rows)
            self.edges = self._empty(torch.float32, self._filtered_rows)
            self.ids = self._empty(torch.int32, self._filtered_rows, self.capacity)
            values = self._empty(torch.float32, self._filtered_rows, self.capacity)
            self.values = {dtype: values.view(dtype) for dtype in SHIFTS}

    def _empty(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


def sample(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    room: Room,
    last_token: torch.Tensor | None,
    *,
    filtered: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    count = logits.shape[0]
    tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
    finite = torch.empty(count, dtype=torch.bool, device=logits.device)
    if count:
        room.fit(count, filtered=filtered)
        results = (tokens, finite, last_token)
        pdl = bool(chained(logits.device)["PDL"])
        sample_call(logits, rows, positions, table, room, results, filtered=filtered, pdl=pdl).launch()
        if filtered:
            gather_call(logits, rows, table, room).launch()
            filter_call(logits, rows, positions, table, room, results).launch()
    return tokens, finite


def sample_call(
    logits: Any, rows: Any, positions: Any, table: torch.Tensor, room: Room, results: tuple[Any, ...], *,
    filtered: bool, pdl: bool,
) -> Call:  # fmt: skip
    count, width = logits.shape
    parts, per = _shared(room.chunks, count, SCAN_PROGRAMS * _multiprocessors(room.device))
    arguments = (
        logits, rows, positions, table, room.peaks, room.sums, room.bins, room.arrivals, *results,
        width, logits.stride(0), room.chunks, per,
    )  # fmt: skip
    options = {
        "CHUNK": room.chunk, "CHUNKS_PAD": room.chunks_pad, "COLUMNS": table.shape[1], "FILTERS": filtered, "PDL": pdl,
        "num_warps": room.chunk // LEAST_CHUNK,
    }  # fmt: skip
    if pdl:
        options["launch_pdl"] = True
    return Call(sample_kernel, (parts, count), arguments, options)


def gather_call(logits: torch.Tensor, rows: torch.Tensor, table: torch.Tensor, room: Room) -> Call:
    count, width = logits.shape
    parts, per = _shared(room.chunks, count, GATHER_PROGRAMS * _multiprocessors(room.device))
    arguments = (
        logits, rows, table, room.peaks, room.sums, room.bins, room.edges, room.counts, room.values[logits.dtype], room.ids,
        width, logits.stride(0), room.chunks, per, room.capacity,
    )  # fmt: skip
    options = {
        "CHUNK": room.chunk, "CHUNKS_PAD": room.chunks_pad, "COLUMNS": table.shape[1],
        "num_warps": GATHER_WARPS * room.chunk // LEAST_CHUNK,
    }  # fmt: skip
    return Call(gather_kernel, (parts, count), arguments, options)


def filter_call(
    logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, room: Room, results: tuple[Any, ...]
) -> Call:
    count, width = logits.shape
    arguments = (
        logits, rows, positions, table, room.peaks, room.sums, room.edges, room.counts, room.values[logits.dtype], room.ids,
        *results, width, logits.stride(0), room.chunks, room.capacity,
    )  # fmt: skip
    options = {
        "CHUNKS_PAD": room.chunks_pad, "COLUMNS": table.shape[1], "SHIFT": SHIFTS[logits.dtype], "TILE": TILE,
        "TILES_PAD": triton.next_power_of_2(triton.cdiv(width, TILE)), "num_warps": FILTER_WARPS,
    }  # fmt: skip
    return Call(filter_kernel, (count,), arguments, options)


def mask_tokens(logits: torch.Tensor, bits: torch.Tensor, index: torch.Tensor) -> None:
    if logits.shape[0]:
        mask_call(logits, bits, index).launch()


def mask_call(logits: torch.Tensor, bits: torch.Tensor, index: torch.Tensor) -> Call:
    count, width = logits.shape
    grid = (count, triton.cdiv(width, MASK_BLOCK))
    return Call(token_mask_kernel, grid, (logits, bits, index, width, logits.stride(0), bits.shape[1]), {"BLOCK": MASK_BLOCK})


def prepare(dtype: torch.dtype, table: torch.Tensor, room: Room) -> None:
    """Compile, and make room for one row, before the first request would wait for it."""
    nothing = torch.zeros(1, dtype=torch.int64, device=room.device)
    for kind in {dtype, torch.float32}:
        logits = torch.zeros(1, room.width, dtype=kind, device=room.device)
        for filtered in (False, True):
            sample(logits, nothing, nothing, table, room, nothing.clone(), filtered=filtered)


def _shared(chunks: int, rows: int, programs: int) -> tuple[int, int]:
    """(programs a row, chunks each reads) when there shall be about so many programs."""
    per = -(-chunks // min(chunks, max(1, programs // rows)))
    return -(-chunks // per), per


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
