"""What the Gluon kernels for Hopper share: names that changed between Triton's versions, launches in a chain, tiles by TMA."""

# Arguments of kernels are pointers and scalars that only Triton can type.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,attr-defined"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

# Triton 3.6 says thread_barrier, _reinterpret and async_copy_global_to_shared; later ones renamed them, one by one.
align = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
PANEL = gl.constexpr(64)  # components of a head a copy brings: 128 bytes, the span of the shared memory's swizzle


@gluon.jit
def await_previous():
    """As in `dependent.py`."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def allow_next():
    """As in `dependent.py`."""
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def reinterpreted(ring, SHAPE: gl.constexpr):
    """The same bytes in another shape."""
    if HAS_REINTERPRET:
        other = ring.reinterpret(ring.dtype, SHAPE, ring.layout)
    else:
        other = ring._reinterpret(ring.dtype, SHAPE, ring.layout)
    return other


@gluon.jit
def as_tiles(ring, STAGES: gl.constexpr, KEYS: gl.constexpr, HEAD_DIM: gl.constexpr):
    """The ring's pieces seen as [STAGES, KEYS, HEAD_DIM]: panel by panel is how such a tile lies under this swizzle."""
    return reinterpreted(ring, [STAGES, KEYS, HEAD_DIM])


@gluon.jit
def fetch_tile(
    cache, table, tile, last_block, first_row, block_rows, bar, ring, slot, BLOCKS: gl.constexpr, PANELS: gl.constexpr
):
    """Blocks [tile * BLOCKS, + BLOCKS) of one head into ring slots [slot * PANELS * BLOCKS, …): panel by panel."""
    for i in gl.static_range(BLOCKS):
        index = tile * BLOCKS + i
        block = gl.load(table + gl.maximum(gl.minimum(index, last_block), 0))
        block = gl.where(index <= last_block, block, 0)  # behind the end: the null block, zeros
        row = block * block_rows + first_row
        for panel in gl.static_range(PANELS):
            fetch(cache, [row, panel * PANEL], bar, ring.index((slot * PANELS + panel) * BLOCKS + i))


@gluon.jit
def zero_behind(ring, slot, block, filled, BLOCKS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr):
    """Zero what lies behind a block's first `filled` slots, in ring slot `slot`: it may be NaN, and 0 * NaN is NaN."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    at = gl.arange(0, BLOCK_SIZE, layout=gl.SliceLayout(1, LAYOUT))
    for panel in gl.static_range(HEAD_DIM // PANEL):
        place = ring.index((slot * (HEAD_DIM // PANEL) + panel) * BLOCKS + block)
        values = place.load(LAYOUT)
        place.store(gl.where((at < filled)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()
    align()
