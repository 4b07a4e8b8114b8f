"""Paged attention in plain torch: the CPU's path, and the oracle of the Triton kernels.

A block's K (or V) of one head is one contiguous row of `BS * D` elements, so one `index_select` over the pool's rows
gathers a batch with its heads in front: [2, S, Hkv, W * BS, D]. The query heads that share a key head are laid side by
side as if they were queries, so K and V are never repeated. Row numbers and masks are made once a step (plan.scratch).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch.nn import functional as F

from workstation.kernels.paging import UNSCALED, AttentionPlan, KVScales, codes
from workstation.kernels.reference_fp8 import from_codes

QUERY_TILE = 256  # queries that share one mask when a prompt's chunk has a past
GROUP_BYTES = 4 << 20  # K and V gathered at once: more would leave the caches before attention reads it
WASTE_BYTES = 768 << 10  # padding that costs as much as the calls of one more group


def attention(
    q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, scale: float, scales: KVScales = UNSCALED
) -> torch.Tensor:
    """See `ops.attention`. Reads the plan's tensors on the host: they must lie in CPU memory."""
    out = _attend(q, kv_layer, plan, scale * scales.key)
    return out if scales.value == 1.0 else out.mul_(scales.value)


def _attend(q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, scale: float) -> torch.Tensor:
    step = _step_index(q, kv_layer, plan)
    if len(step.decodes) == 1 and not step.prefills:
        return _decode(q, kv_layer, step.decodes[0], step, scale)
    out = torch.zeros(q.shape, dtype=q.dtype)  # of tokens of no sequence too: what they hold reaches the logits
    if step.decodes:
        ordered = q if step.order is None else q.index_select(0, step.order)
        parts = [_decode(ordered[group.start : group.stop], kv_layer, group, step, scale) for group in step.decodes]
        if step.order is None:
            out[: plan.num_decodes] = parts[0]
        else:
            out.index_copy_(0, step.order, torch.cat(parts))
    for chunk in step.prefills:
        _prefill(q, kv_layer, chunk, step, scale, out)
    return out


def flat_rows(kv_layer: torch.Tensor, width: int) -> torch.Tensor:
    """A view of the layer's memory, and of the layers behind it, as rows of `width` elements: [rows, width]."""
    blocks, sides, heads, block_size, _ = kv_layer.shape
    per_block, per_side, per_head, per_token, _ = kv_layer.stride()
    last = (blocks - 1) * per_block + (sides - 1) * per_side + (heads - 1) * per_head
    rows = (last + block_size * per_token) // width
    return kv_layer.as_strided((rows, width), (width, 1))


def row_strides(kv_layer: torch.Tensor, width: int) -> tuple[int, int, int]:
    """Strides of (block, K|V, head) in rows of `width` elements; ValueError if the layout has no such rows."""
    strides = kv_layer.stride()
    head_dim = kv_layer.shape[4]
    if strides[3:] != (head_dim, 1) or any(stride % width for stride in strides[:3]):
        raise ValueError(f"kv_layer (strides {strides}) must hold a head's block of tokens contiguously")
    return strides[0] // width, strides[1] // width, strides[2] // width


class _Decodes(NamedTuple):
    """Decodes [start, stop) of the step's order: sequences of like length, attended together.

    rows: [2 * G * Hkv * W] int64, rows of the flat cache.  shape: of the gathered tensor, [2, G, Hkv, W * BS, D].
    first, keys: the range of gathered keys that any of them sees.
    bias: [G, 1, 1, keys], 0 or -inf; None when all see the whole range.
    unseen: rows of D elements in the gathered tensor to be zeroed, since they may hold NaN; None when there are none.
    """

    start: int
    stop: int
    rows: torch.Tensor
    shape: tuple[int, ...]
    first: int
    keys: int
    bias: torch.Tensor | None
    unseen: torch.Tensor | None


class _Chunk(NamedTuple):
    """A prompt's chunk: queries q[start:stop] whose last `stop - start` keys are their own; rows, shape as above."""

    rows: torch.Tensor
    shape: tuple[int, ...]
    start: int
    stop: int
    first: int
    keys: int


class _Step(NamedTuple):
    """What one KV group's layers share, made by the first of them; `staircase` is described in `_staircase`."""

    geometry: tuple[object, ...]
    order: torch.Tensor | None  # [num_decodes] int64, decodes longest first; None when one group holds them as they are
    decodes: list[_Decodes]
    prefills: list[_Chunk]
    staircase: torch.Tensor | None
    window: int
    gathered: torch.Tensor  # [most rows of any gather, BS * D]: fresh memory for each gather would cost as much again


def _step_index(q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan) -> _Step:
    geometry = (kv_layer.shape[2:], kv_layer.stride(), kv_layer.dtype, q.dtype)
    step: _Step | None = plan.scratch.get("reference")
    if step is None or step.geometry != geometry:
        step = _make_step(q, kv_layer, plan, geometry)
        plan.scratch["reference"] = step
    return step


def _make_step(q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, geometry: tuple[object, ...]) -> _Step:
    starts: list[int] = plan.query_start.tolist()
    lengths: list[int] = plan.context_lens.tolist()
    if max(lengths, default=0) > plan.tables.shape[1] * plan.block_size:
        raise ValueError(f"context_lens ({max(lengths)}) exceeds the block tables ({list(plan.tables.shape)} blocks)")
    tables = plan.tables.index_select(0, plan.rows).long()
    order, decodes = _index_decodes(lengths[: plan.num_decodes], tables, q.dtype, kv_layer, plan)
    prefills = [
        _index_chunk(tables[i], starts[i], starts[i + 1], lengths[i], kv_layer, plan)
        for i in range(plan.num_decodes, len(lengths))
        if starts[i + 1] > starts[i]
    ]
    staircase = None
    if any(_needs_mask(chunk, plan.window) for chunk in prefills):
        staircase = _staircase(max(chunk.keys for chunk in prefills), plan.window, q.dtype)
    parts: list[_Decodes | _Chunk] = [*decodes, *prefills]
    most = max((part.rows.numel() for part in parts), default=0)
    gathered = torch.empty(most, kv_layer.stride(2), dtype=codes(kv_layer).dtype)
    return _Step(geometry, order, decodes, prefills, staircase, plan.window, gathered)


def _gather(kv_layer: torch.Tensor, part: _Decodes | _Chunk, step: _Step) -> torch.Tensor:
    """K and V of a group or a chunk as stored, [2, G, Hkv, W * BS, D], FP8 as bytes; valid until the step's next gather."""
    room = step.gathered[: part.rows.numel()]
    torch.index_select(flat_rows(codes(kv_layer), room.shape[1]), 0, part.rows, out=room)
    return room.view(part.shape)


def _widened(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What was gathered, in the queries' dtype; an FP8 cache's scales are folded into the scores and the result."""
    return from_codes(stored, dtype) if stored.dtype == torch.uint8 else stored.to(dtype)


def _blocks_seen(length: int, queries: int, plan: AttentionPlan) -> tuple[int, int]:
    """The blocks [first, last) of a sequence that its last `queries` tokens see; one block for an empty sequence."""
    oldest = max(0, length - queries + 1 - plan.window) if plan.window else 0
    return oldest // plan.block_size, max(1, -(-length // plan.block_size))


def _group_by_length(widths: list[int], block_bytes: int) -> list[int]:
    """Where to cut sequences of `widths` blocks, widest first, so that neither padding nor a group's size gets large."""
    cuts = [0]
    waste = 0
    for i, width in enumerate(widths):
        widest = widths[cuts[-1]]
        waste += (widest - width) * block_bytes
        if i > cuts[-1] and (waste > WASTE_BYTES or (i + 1 - cuts[-1]) * widest * block_bytes > GROUP_BYTES):
            cuts.append(i)
            waste = 0
    return [*cuts, len(widths)]


def _gather_rows(tables: torch.Tensor, kv_layer: torch.Tensor) -> torch.Tensor:
    """Block tables [G, W] → [2 (K, V), G, Hkv, W], the rows of BS * D elements that hold those blocks."""
    heads, block_size, head_dim = kv_layer.shape[2:]
    per_block, per_side, per_head = row_strides(kv_layer, block_size * head_dim)
    sides = torch.arange(2).view(2, 1, 1, 1) * per_side
    return sides + ((torch.arange(heads) * per_head).view(1, heads, 1) + (tables * per_block).unsqueeze(1))


def _index_decodes(
    lengths: list[int], tables: torch.Tensor, dtype: torch.dtype, kv_layer: torch.Tensor, plan: AttentionPlan
) -> tuple[torch.Tensor | None, list[_Decodes]]:
    if not lengths:
        return None, []
    heads, block_size, head_dim = kv_layer.shape[2:]
    seen = [_blocks_seen(length, 1, plan) for length in lengths]
    block_bytes = 2 * heads * block_size * head_dim * kv_layer.element_size()
    ranking = sorted(range(len(lengths)), key=lambda i: seen[i][0] - seen[i][1])
    cuts = _group_by_length([seen[i][1] - seen[i][0] for i in ranking], block_bytes)
    if len(cuts) == 2:
        ranking = list(range(len(lengths)))
    width = max(last - first for first, last in seen)

    first = [seen[i][0] for i in ranking]
    stop = [max(1, lengths[i]) - block * block_size for i, block in zip(ranking, first, strict=True)]
    start = [max(0, s - plan.window) if plan.window else 0 for s in stop]
    order = torch.tensor(ranking)
    columns = torch.tensor(first).unsqueeze(1) + torch.arange(width)
    held = torch.tensor([-(-lengths[i] // block_size) for i in ranking]).unsqueeze(1)
    blocks = tables[order].gather(1, columns.clamp(max=tables.shape[1] - 1))
    blocks.masked_fill_(columns >= held, 0)  # behind the last block, the null block: zeros
    rows = _gather_rows(blocks, kv_layer)

    hidden = bias = None
    if len(set(stop)) > 1 or len(set(start)) > 1:
        keys = torch.arange(width * block_size)
        hidden = (keys < torch.tensor(start).unsqueeze(1)) | (keys >= torch.tensor(stop).unsqueeze(1))
        bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
        hidden &= blocks.repeat_interleave(block_size, 1) != 0
    groups = []
    for low, high in itertools.pairwise(cuts):
        wide = max(seen[i][1] - seen[i][0] for i in ranking[low:high])
        shape = (2, high - low, heads, wide * block_size, head_dim)
        own_rows = rows[:, low:high, :, :wide].flatten()
        if len(set(stop[low:high])) == 1 and len(set(start[low:high])) == 1:
            groups.append(_Decodes(low, high, own_rows, shape, start[low], stop[low] - start[low], None, None))
            continue
        assert hidden is not None and bias is not None
        unseen = _rows_to_clear(hidden[low:high, : shape[3]], heads)
        mask = bias[low:high, None, None, : shape[3]]
        groups.append(_Decodes(low, high, own_rows, shape, 0, shape[3], mask, unseen))
    return (None if len(cuts) == 2 else order), groups


def _rows_to_clear(hidden: torch.Tensor, heads: int) -> torch.Tensor | None:
    """hidden [G, keys] → rows of D elements in a gathered tensor [2, G, heads, keys, D] that must not be read."""
    sequence, key = hidden.nonzero().unbind(1)
    if not sequence.numel():
        return None
    count, keys = hidden.shape
    lanes = torch.arange(2).view(2, 1, 1) * (count * heads) + torch.arange(heads).view(1, heads, 1)
    return ((lanes + sequence * heads) * keys + key).flatten()


def _decode(q: torch.Tensor, kv_layer: torch.Tensor, group: _Decodes, step: _Step, scale: float) -> torch.Tensor:
    """q [G, Hq, D] → [G, Hq, D]."""
    _, sequences, kv_heads, _, head_dim = group.shape
    gathered = _gather(kv_layer, group, step)
    if group.unseen is not None:
        gathered.view(-1, head_dim).index_fill_(0, group.unseen, 0)
    key, value = _widened(gathered.narrow(3, group.first, group.keys), q.dtype).unbind(0)
    packed = q.reshape(sequences, kv_heads, -1, head_dim)
    out = F.scaled_dot_product_attention(packed, key, value, group.bias, scale=scale)
    return out.reshape(q.shape)


def _index_chunk(
    table: torch.Tensor, start: int, stop: int, length: int, kv_layer: torch.Tensor, plan: AttentionPlan
) -> _Chunk:
    first_block, last_block = _blocks_seen(length, stop - start, plan)
    rows = _gather_rows(table[None, first_block:last_block], kv_layer)
    shape = (2, 1, *rows.shape[2:3], rows.shape[3] * plan.block_size, kv_layer.shape[4])
    base = first_block * plan.block_size
    oldest = max(0, length - (stop - start) + 1 - plan.window) if plan.window else 0
    return _Chunk(rows.flatten(), shape, start, stop, oldest - base, length - oldest)


def _needs_mask(chunk: _Chunk, window: int) -> bool:
    """Not when all keys are the chunk's own (plain causal), nor for one query, whose keys are all seen."""
    queries = chunk.stop - chunk.start
    return queries > 1 and (chunk.keys > queries or 0 < window < chunk.keys)


def _staircase(longest: int, window: int, dtype: torch.dtype) -> torch.Tensor:
    """[QUERY_TILE, longest + QUERY_TILE] of 0 and -inf: row i sees columns (longest + i - window, longest + i].

    Whether a query sees a key depends on their distance only, so the mask of any tile of queries is a view of this one.
    """
    distance = torch.arange(QUERY_TILE).unsqueeze(1) + longest - torch.arange(longest + QUERY_TILE)
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _prefill(q: torch.Tensor, kv_layer: torch.Tensor, chunk: _Chunk, step: _Step, scale: float, out: torch.Tensor) -> None:
    """Fill out[start:stop]. The group's query heads become heads of a batch of key heads: K and V expand at no cost."""
    _, _, kv_heads, _, head_dim = chunk.shape
    stored = _gather(kv_layer, chunk, step)[:, 0, :, chunk.first : chunk.first + chunk.keys]
    seen = _widened(stored, q.dtype)
    group = q.shape[1] // kv_heads
    queries = chunk.stop - chunk.start
    packed = q[chunk.start : chunk.stop].reshape(queries, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    key, value = seen.unsqueeze(2).expand(2, kv_heads, group, chunk.keys, head_dim).unbind(0)
    target = out[chunk.start : chunk.stop].view(queries, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    if not _needs_mask(chunk, step.window):
        target.copy_(F.scaled_dot_product_attention(packed, key, value, is_causal=queries > 1, scale=scale))
        return
    assert step.staircase is not None
    zero = step.staircase.shape[1] - QUERY_TILE  # the column of row 0's own key
    for low in range(0, queries, QUERY_TILE):
        high = min(low + QUERY_TILE, queries)
        own = chunk.keys - queries + low  # the key of the tile's first query
        stop = chunk.keys - queries + high
        begin = max(0, own + 1 - step.window) if step.window else 0
        bias = step.staircase[: high - low, zero - own + begin : zero - own + stop]
        tile = F.scaled_dot_product_attention(
            packed[:, :, low:high], key[:, :, begin:stop], value[:, :, begin:stop], bias, scale=scale
        )
        target[:, :, low:high].copy_(tile)
