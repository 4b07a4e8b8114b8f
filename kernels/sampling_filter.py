"""Rows with top_k or top_p, without sorting: the head of the distribution is gathered, and everything exact happens there.

What is kept is what `sampling_math.filter_threshold` defines. With n(t) the number of logits at or above t, and W(t) the weight
of those that min_p leaves: kth = the largest t with n(t) ≥ top_k; nucleus = the largest t with W(t) ≥ top_p * W(kth); tokens
at or above max(kth, nucleus) stay, ties included.

1. `sample_kernel` has left a histogram a chunk: how many logits lie in each of 31 bins below the chunk's largest. Edges of
   bins are multiples of one power of two, so histograms of different chunks add up.
2. `gather_kernel` finds the highest edge that is surely at or below the threshold: n(edge) ≥ top_k; for top_p the weight
   below the edge, bounded from above by the bins' upper edges, is at most (1 - top_p) of all; with min_p and no top_k, an
   edge that min_p cuts. It copies what lies at or above the edge, values and ids, in the order of ids. The histograms say
   where each chunk's go, so nothing depends on who comes first.
3. `filter_kernel` searches kth and nucleus on the logits' ordered bits, five ways a pass, and draws. A row whose head does
   not fit (nearly flat distributions, a very large top_k) is searched where it lies: correct, but slow, one program passing
   over the whole row 7 times (16-bit logits) to 14 times (float32) a search; 4 bytes * V come from the L2 a float32 pass.

Bytes: the logits twice (chunks without a candidate are not read again) and 6 or 8 bytes a candidate and pass, from the L2.
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from workstation.kernels.sampling import (
    BINS,
    INF,
    NEG_INF,
    SPAN,
    bin_size,
    finish,
    is_filtered,
    logits_at,
    parameters,
    pick,
    pick_span,
    uniform,
    weights,
)

PAD = tl.constexpr(16)  # a head ends in -inf, up to a multiple of this
GROUP = tl.constexpr(32)  # chunks whose histograms are read at a time
SLACK = tl.constexpr(1e-5)  # relative; more than float32 sums of weights can be off
LARGEST_EDGE = tl.constexpr(1048576.0)  # beyond so many bins from zero, bins are too fine for float32


@triton.jit
def _peaks_and_total(peaks, sums, inverse, chunks, CHUNKS_PAD: tl.constexpr):
    """→ (the row's largest logit, the weight of all its tokens before any cut, float64; meaningless if not drawable)."""
    at = tl.arange(0, CHUNKS_PAD)
    peak = tl.load(peaks + at, mask=at < chunks, other=NEG_INF)
    total = tl.load(sums + at, mask=at < chunks, other=0.0)
    best = tl.max(peak, 0)
    base = tl.where((best > NEG_INF) & (best < INF), best, 0.0)
    scale = tl.exp((tl.minimum(peak, base) - base) * inverse)
    return best, tl.sum(total.to(tl.float64) * scale.to(tl.float64), 0)


@triton.jit
def _aligned(bins, peaks, top_bin, size, start, end):
    """Histograms of the chunks start … min(start + GROUP, end), counted from the row's largest bin. [GROUP, BINS] int32."""
    chunk = start + tl.arange(0, GROUP)
    depth = tl.arange(0, BINS)
    peak = tl.load(peaks + chunk, mask=chunk < end, other=NEG_INF)
    shift = tl.minimum(top_bin - tl.floor(peak / size), BINS).to(tl.int32)
    own = depth[None, :] - shift[:, None]
    known = (own >= 0) & (depth < BINS - 1)[None, :] & (chunk < end)[:, None]
    return tl.load(bins + chunk[:, None] * BINS + own, mask=known, other=0)


@triton.jit
def _edge(bins, peaks, best, total, size, top_k, inverse, top_p, min_p, width, chunks):
    """→ (depth of the highest edge surely at or below the threshold, BINS - 1 if there is none; logits at or above it)."""
    depth = tl.arange(0, BINS)
    top_bin = tl.floor(best / size)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, chunks, GROUP):
        counts += tl.sum(_aligned(bins, peaks, top_bin, size, start, chunks), 0)
    reached = tl.cumsum(counts, 0)
    deeper = width - tl.max(reached, 0)
    heaviest = tl.exp(tl.minimum((top_bin - depth + 1) * size - best, 0.0) * inverse)  # of what a bin may hold
    heaviest_deeper = tl.sum(tl.where(depth == BINS - 1, heaviest, 0.0), 0)
    mass = counts * heaviest
    below = tl.cumsum(mass, 0, reverse=True) - mass + deeper * heaviest_deeper
    lightest = tl.exp(((top_bin - depth) * size - best) * inverse)  # of what lies at or above the edge
    if top_k > 0:
        sure = reached >= top_k
    elif min_p > 0:
        sure = lightest < min_p * (1 - SLACK)
    else:
        sure = below <= total * (1 - top_p - SLACK)
    found = tl.min(tl.where(sure, depth, BINS - 1), 0)
    return found, tl.sum(tl.where(depth == found, reached, 0), 0)


@triton.jit(do_not_specialize=["chunks", "per"], do_not_specialize_on_alignment=["rows"])
def gather_kernel(
    logits,
    rows,
    table,
    peaks,
    sums,
    bins,
    edges,
    counts,
    values,
    ids,
    width,
    stride,
    chunks,
    per,
    capacity,
    CHUNK: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The head of each filtered row: values [L, capacity] of logits' dtype, ids [L, capacity] int32, both in the order of ids.

    counts [L] int32: how many with their padding, -1 where the head does not fit. edges [L] float32: none is below it.
    Grid (parts, L).
    """
    place = tl.program_id(1).to(tl.int64)
    _, top_k, inverse, top_p, min_p = parameters(table, tl.load(rows + place), COLUMNS)
    if not is_filtered(top_k, inverse, top_p):
        return
    source = logits + place * stride
    peaks += place * chunks
    bins += place * chunks * BINS
    best, total = _peaks_and_total(peaks, sums + place * chunks, inverse, chunks, CHUNKS_PAD)
    size = bin_size(inverse)
    if (best == NEG_INF) | (best == INF):
        return
    depth, count = _edge(bins, peaks, best, total, size, top_k, inverse, top_p, min_p, width, chunks)
    top_bin = tl.floor(best / size)
    fits = (depth < BINS - 1) & (count <= capacity) & (tl.abs(top_bin) < LARGEST_EDGE)
    edge = (top_bin - depth) * size
    padded = (count + PAD - 1) // PAD * PAD
    if tl.program_id(0) == 0:
        tl.store(counts + place, tl.where(fits, padded, -1))
        tl.store(edges + place, edge)
        behind = count + tl.arange(0, PAD)
        nothing = tl.full([PAD], NEG_INF, tl.float32).to(values.dtype.element_ty)
        tl.store(values + place * capacity + behind, nothing, mask=behind < tl.where(fits, padded, 0))
    if not fits:
        return
    first = tl.program_id(0) * per
    at = place * capacity
    for start in range(0, first, GROUP):
        above = _aligned(bins, peaks, top_bin, size, start, first)
        at += tl.sum(tl.sum(tl.where((tl.arange(0, BINS) <= depth)[None, :], above, 0), 1), 0)
    for chunk in range(first, tl.minimum(first + per, chunks)):
        if tl.load(peaks + chunk) >= edge:
            x = logits_at(source, chunk * CHUNK, width, CHUNK)
            kept = x >= edge
            rank = tl.cumsum(kept.to(tl.int32), 0)
            tl.store(values + at + rank - 1, x.to(values.dtype.element_ty), mask=kept)
            tl.store(ids + at + rank - 1, chunk * CHUNK + tl.arange(0, CHUNK), mask=kept)
            at += tl.max(rank, 0)


@triton.jit
def _ordered(x, SHIFT: tl.constexpr):
    """float32 → int32 of the same order. SHIFT: bits that are zero in every float of the logits' own type."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0 ties with 0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _tile(source, start, count, TILE: tl.constexpr):
    """→ (TILE values from `start` on in float32, -inf behind the end; which of them exist)."""
    at = start + tl.arange(0, TILE)
    return tl.load(source + at, mask=at < count, other=NEG_INF).to(tl.float32), at < count


@triton.jit
def _kept(source, start, count, key, best, inverse, min_p, SHIFT: tl.constexpr, SIZE: tl.constexpr):
    """The weights of SIZE values from `start` on; 0 below `key`, where min_p cuts and behind the end."""
    x, _ = _tile(source, start, count, SIZE)
    return tl.where(_ordered(x, SHIFT) >= key, weights(x, best, inverse, min_p), 0.0)


@triton.jit
def _amounts(x, inside, best, inverse, min_p, COUNTED: tl.constexpr):
    """What each value adds to n(t) (COUNTED) or to W(t)."""
    if COUNTED:
        return inside.to(tl.float32)
    else:
        return weights(x, best, inverse, min_p)


@triton.jit
def _amount_from(source, count, key, best, inverse, min_p, SHIFT: tl.constexpr, TILE: tl.constexpr):
    """W(t) for t given by its ordered bits, float64."""
    acc = tl.zeros([TILE], tl.float32)
    for start in range(0, count, TILE):
        acc += _kept(source, start, count, key, best, inverse, min_p, SHIFT, TILE)
    return tl.sum(acc.to(tl.float64), 0)


@triton.jit
def _search(
    source, count, goal, low, high, best, inverse, min_p, COUNTED: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The largest t in [low, high) with n(t) or W(t) ≥ goal, as ordered bits; low is taken to have it.

    Four thresholds a pass cut the range to a fifth. Lanes add up over the tiles before they are added to each other.
    """
    while high - low > 1:
        span = high - low
        t1 = low + span // 5
        t2 = low + span * 2 // 5
        t3 = low + span * 3 // 5
        t4 = low + span * 4 // 5
        acc1 = tl.zeros([TILE], tl.float32)
        acc2 = tl.zeros([TILE], tl.float32)
        acc3 = tl.zeros([TILE], tl.float32)
        acc4 = tl.zeros([TILE], tl.float32)
        for start in range(0, count, TILE):
            x, inside = _tile(source, start, count, TILE)
            key = _ordered(x, SHIFT)
            amount = _amounts(x, inside, best, inverse, min_p, COUNTED)
            acc1 += tl.where(key >= t1.to(tl.int32), amount, 0.0)
            acc2 += tl.where(key >= t2.to(tl.int32), amount, 0.0)
            acc3 += tl.where(key >= t3.to(tl.int32), amount, 0.0)
            acc4 += tl.where(key >= t4.to(tl.int32), amount, 0.0)
        has1 = tl.sum(acc1.to(tl.float64), 0) >= goal
        has2 = tl.sum(acc2.to(tl.float64), 0) >= goal
        has3 = tl.sum(acc3.to(tl.float64), 0) >= goal
        has4 = tl.sum(acc4.to(tl.float64), 0) >= goal
        low = tl.where(has4, t4, tl.where(has3, t3, tl.where(has2, t2, tl.where(has1, t1, low))))
        high = tl.where(has1, tl.where(has2, tl.where(has3, tl.where(has4, high, t4), t3), t2), t1)
    return low


@triton.jit
def _draw(
    source, count, key, u, best, inverse, min_p, SHIFT: tl.constexpr, TILE: tl.constexpr, TILES_PAD: tl.constexpr
):  # fmt: skip
    """The place of the draw among `count` values, of which those below `key` or cut by min_p weigh nothing."""
    number = tl.arange(0, TILES_PAD)
    totals = tl.zeros([TILES_PAD], tl.float64)
    for start in range(0, count, TILE):
        w = _kept(source, start, count, key, best, inverse, min_p, SHIFT, TILE)
        totals = tl.where(number == start // TILE, tl.sum(w, 0).to(tl.float64), totals)
    target = u * tl.sum(totals, 0)
    tile, before = pick(totals, target, TILES_PAD)
    target -= before
    at = tile * TILE
    span, before = pick_span(_kept(source, at, count, key, best, inverse, min_p, SHIFT, TILE), target, TILE)
    at += span * SPAN
    w = _kept(source, at, count, key, best, inverse, min_p, SHIFT, SPAN)
    index, _ = pick(w.to(tl.float64), target - before, SPAN)
    return at + index


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=["rows", "positions"])
def filter_kernel(
    logits,
    rows,
    positions,
    table,
    peaks,
    sums,
    edges,
    counts,
    values,
    ids,
    tokens,
    finite,
    last_token,
    width,
    stride,
    chunks,
    capacity,
    CHUNKS_PAD: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
    TILES_PAD: tl.constexpr,
):
    """The tokens of filtered rows, from their heads or, where counts is -1, from the whole row. One program a row."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + place)
    key, top_k, inverse, top_p, min_p = parameters(table, row, COLUMNS)
    if not is_filtered(top_k, inverse, top_p):
        return
    best, total = _peaks_and_total(peaks + place * chunks, sums + place * chunks, inverse, chunks, CHUNKS_PAD)
    drawable = (best > NEG_INF) & (best < INF)
    token = tl.zeros([], tl.int32)
    if drawable:
        gathered = tl.load(counts + place)
        fits = gathered >= 0
        source = tl.where(fits, values + place * capacity, logits + place * stride)
        count = tl.where(fits, gathered // PAD * PAD, width)  # says that it divides, so that loads are wide
        low = _ordered(tl.where(fits, tl.load(edges + place), NEG_INF), SHIFT).to(tl.int64)
        high = _ordered(best, SHIFT).to(tl.int64) + 1
        if top_k > 0:
            low = _search(source, count, top_k.to(tl.float64), low, high, best, inverse, min_p, True, SHIFT, TILE)
        if top_p < 1:
            left = total  # known beforehand where neither top_k nor min_p has cut
            if (top_k > 0) | (min_p > 0):
                left = _amount_from(source, count, low.to(tl.int32), best, inverse, min_p, SHIFT, TILE)
            low = _search(source, count, top_p * left, low, high, best, inverse, min_p, False, SHIFT, TILE)
        u = uniform(key, tl.load(positions + place))
        index = _draw(source, count, low.to(tl.int32), u, best, inverse, min_p, SHIFT, TILE, TILES_PAD)
        token = index
        if fits:
            token = tl.load(ids + place * capacity + index)
    finish(token, drawable, place, row, tokens, finite, last_token)
