"""Sampling without sorting: greedy rows and plain random ones (temperature, min_p) in one launch over logits of any float type.

A sample is defined as in `engine/sampling_math.py`: with m the row's largest logit and T its temperature, token i weighs
w_i = exp((x_i - m) / T), and one uniform u of the row's counter-based stream picks the first token, in the order of ids, whose
cumulative weight exceeds u * sum(w). Greedy is the lowest id among the largest logits.

A row is cut into chunks of CHUNK tokens. One pass over the logits leaves each chunk's largest logit and sum(exp((x - its
largest) / T)), in float32. The row's last program to arrive rescales the sums by exp((its largest - m) / T) and adds them up in
float64, picks the chunk, reads it again and picks the token in it. Chunks do not depend on how many rows there are or on how
many programs share them, so a row's token is the same alone and in any company.

Bytes: the logits once, two float32 a chunk, one chunk again; with min_p also the chunks whose largest logit survives the cut.
Rows with top_k or top_p leave a histogram a chunk here and go on in `sampling_filter.py`.
"""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
NEG_INF = tl.constexpr(float("-inf"))
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)  # splitmix64 (Steele, Lea, Flood 2014), as in sampling_math.uniform
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)
UNIFORM_STEP = tl.constexpr(2.0**-52)
SPAN = tl.constexpr(32)  # tokens a draw looks at last
BINS = tl.constexpr(32)  # of a chunk's histogram; the last one holds all that lies deeper


@triton.jit
def uniform(key, position):
    """`sampling_math.uniform`, bit by bit: key, position int64 → float64 in [0, 1 - 2**-52]."""
    bits = key.to(tl.uint64, bitcast=True) + (position + 1).to(tl.uint64, bitcast=True) * GOLDEN
    bits = (bits ^ (bits >> 30)) * MIX_1
    bits = (bits ^ (bits >> 27)) * MIX_2
    bits = bits ^ (bits >> 31)
    return (bits >> 12).to(tl.int64, bitcast=True).to(tl.float64) * UNIFORM_STEP


@triton.jit
def parameters(table, row, COLUMNS: tl.constexpr):
    """A row of the sampling table: key, top_k (int64), 1 / T, top_p, min_p (float64 bits)."""
    at = table + row * COLUMNS
    inverse = tl.load(at + 2).to(tl.float64, bitcast=True).to(tl.float32)
    top_p = tl.load(at + 3).to(tl.float64, bitcast=True)
    min_p = tl.load(at + 4).to(tl.float64, bitcast=True).to(tl.float32)
    return tl.load(at), tl.load(at + 1), inverse, top_p, min_p


@triton.jit
def is_filtered(top_k, inverse, top_p):
    """Whether a random row (a greedy one has 1 / T = 0) is cut by top_k or top_p."""
    return (inverse > 0) & ((top_k > 0) | (top_p < 1))


@triton.jit
def weights(x, best, inverse, min_p):
    """exp((x - best) / T), 0 below min_p."""
    w = tl.exp((x - best) * inverse)
    return tl.where(w >= min_p, w, 0.0)


@triton.jit
def pick(w, target, SIZE: tl.constexpr):
    """w [SIZE] ≥ 0 float64 → the first index whose cumulative sum exceeds target, and the sum before it.

    An index of weight zero is never returned while there is another, even where rounding puts target past the end.
    """
    at = tl.arange(0, SIZE)
    cumulative = tl.cumsum(w, 0)
    first = tl.min(tl.where((w > 0) & (cumulative > target), at, SIZE), 0)
    last = tl.max(tl.where(w > 0, at, 0), 0)
    index = tl.minimum(first, last)
    return index, tl.sum(tl.where(at == index - 1, cumulative, 0.0), 0)


@triton.jit
def pick_span(w, target, SIZE: tl.constexpr):
    """`pick` among the spans of w [SIZE] float32: SPAN neighbours each, so that few float64 numbers are held."""
    spans = tl.sum(tl.reshape(w, [SIZE // SPAN, SPAN]).to(tl.float64), 1)
    return pick(spans, target, SIZE // SPAN)


@triton.jit
def logits_at(source, start, width, SIZE: tl.constexpr):
    """Logits start … start + SIZE in float32, -inf behind the row's end. NaN reads as +inf: neither leaves a row drawable."""
    at = start + tl.arange(0, SIZE)
    x = tl.load(source + at, mask=at < width, other=NEG_INF).to(tl.float32)
    return tl.where(x != x, INF, x)


@triton.jit
def bin_size(inverse):
    """Logits a bin of the histogram spans: the power of two at or below T, 1 at least (so that divisions are exact)."""
    temperature = (1.0 / inverse).to(tl.int32, bitcast=True)
    return tl.maximum((temperature & 0x7F800000).to(tl.float32, bitcast=True), 1.0)


@triton.jit
def _histogram(x, base, inverse):
    """How many of x [CHUNK] lie 0, 1, 2 … bins below the bin of base, their largest. [BINS] int32."""
    size = bin_size(inverse)
    depth = tl.floor(base / size) - tl.floor(x / size)
    inside = (depth >= 0) & (depth < BINS - 1)  # the former holds unless the row has NaN or inf
    return tl.histogram(tl.where(inside, depth, BINS - 1).to(tl.int32), BINS)


@triton.jit
def _cut_totals(source, peaks, best, inverse, min_p, width, chunks, CHUNK: tl.constexpr, CHUNKS_PAD: tl.constexpr):
    """Each chunk's weight after min_p: a chunk whose largest is cut has none and is not read. [CHUNKS_PAD] float64."""
    at = tl.arange(0, CHUNKS_PAD)
    totals = tl.zeros([CHUNKS_PAD], tl.float64)
    for chunk in range(chunks):
        peak = tl.load(peaks + chunk, cache_modifier=".cg")
        if tl.exp((peak - best) * inverse) >= min_p:
            w = weights(logits_at(source, chunk * CHUNK, width, CHUNK), best, inverse, min_p)
            totals = tl.where(at == chunk, tl.sum(w, 0).to(tl.float64), totals)
    return totals


@triton.jit
def _choose(
    source, peaks, sums, inverse, min_p, u, width, chunks, CHUNK: tl.constexpr, CHUNKS_PAD: tl.constexpr
):  # fmt: skip
    """→ (token, whether the row is drawable), from the chunks' largest logits and sums."""
    at = tl.arange(0, CHUNKS_PAD)
    inside = at < chunks
    peak = tl.load(peaks + at, mask=inside, other=NEG_INF, cache_modifier=".cg")
    best = tl.max(peak, 0)
    drawable = (best > NEG_INF) & (best < INF)
    token = tl.zeros([], tl.int32)
    if drawable:
        if inverse > 0:
            if min_p > 0:
                totals = _cut_totals(source, peaks, best, inverse, min_p, width, chunks, CHUNK, CHUNKS_PAD)
            else:
                total = tl.load(sums + at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
                totals = total * tl.exp((peak - best) * inverse).to(tl.float64)
            target = u * tl.sum(totals, 0)
            chunk, before = pick(totals, target, CHUNKS_PAD)
            target -= before
            start = chunk * CHUNK
            span, before = pick_span(weights(logits_at(source, start, width, CHUNK), best, inverse, min_p), target, CHUNK)
            start += span * SPAN
            w = weights(logits_at(source, start, width, SPAN), best, inverse, min_p)
            index, _ = pick(w.to(tl.float64), target - before, SPAN)
            token = start + index
        else:
            start = tl.min(tl.where(peak == best, at, CHUNKS_PAD), 0) * CHUNK
            x = logits_at(source, start, width, CHUNK)
            token = start + tl.min(tl.where(x == best, tl.arange(0, CHUNK), CHUNK), 0)
    return token, drawable


@triton.jit
def finish(token, drawable, place, row, tokens, finite, last_token):
    """Write a row's results. last_token: the table the next step reads its input from, or None."""
    token = token.to(tl.int64)
    tl.store(tokens + place, token)
    tl.store(finite + place, drawable)
    if last_token is not None:
        tl.store(last_token + row, token)


@triton.jit(do_not_specialize=["chunks", "per"], do_not_specialize_on_alignment=["rows", "positions"])
def sample_kernel(
    logits,
    rows,
    positions,
    table,
    peaks,
    sums,
    bins,
    arrivals,
    tokens,
    finite,
    last_token,
    width,
    stride,
    chunks,
    per,
    CHUNK: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    COLUMNS: tl.constexpr,
    FILTERS: tl.constexpr,
    PDL: tl.constexpr,
):
    """logits [L, width], rows `stride` apart → tokens [L] int64, finite [L] bool, last_token[rows[l]] = tokens[l].

    rows, positions [L] int64; table [·, COLUMNS] int64 (see `parameters`). Scratch: peaks, sums [L, chunks] float32; bins
    [L, chunks, BINS] int32; arrivals [L] int32, zero before and after. Grid (parts, L): a program reads `per` chunks of a row.
    FILTERS: some rows have top_k or top_p; they get peaks, sums and bins here, and their tokens from `filter_kernel`.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    place = tl.program_id(1).to(tl.int64)
    row = tl.load(rows + place)
    key, top_k, inverse, top_p, min_p = parameters(table, row, COLUMNS)
    filtered = is_filtered(top_k, inverse, top_p)
    source = logits + place * stride
    peaks += place * chunks
    sums += place * chunks
    first = tl.program_id(0) * per
    for chunk in range(first, tl.minimum(first + per, chunks)):
        x = logits_at(source, chunk * CHUNK, width, CHUNK)
        peak = tl.max(x, 0)
        tl.store(peaks + chunk, peak)
        if inverse > 0:
            base = tl.where((peak > NEG_INF) & (peak < INF), peak, 0.0)
            tl.store(sums + chunk, tl.sum(tl.exp((x - base) * inverse), 0))
            if FILTERS and filtered:
                target = bins + (place * chunks + chunk) * BINS + tl.arange(0, BINS)
                tl.store(target, _histogram(x, base, inverse))
    tl.debug_barrier()  # all threads' results are written before one thread says so
    if tl.atomic_add(arrivals + place, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(arrivals + place, 0)  # for the next step
        if not (FILTERS and filtered):
            u = uniform(key, tl.load(positions + place))
            token, drawable = _choose(source, peaks, sums, inverse, min_p, u, width, chunks, CHUNK, CHUNKS_PAD)
            finish(token, drawable, place, row, tokens, finite, last_token)
