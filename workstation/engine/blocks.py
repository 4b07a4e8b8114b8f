"""BlockPool: who owns which KV block, and which prefix each finished block holds. Plain integers, no torch.

A block is in exactly one of three states; `check()` proves it:

    free    refs = 0, not published      → taken first
    cached  refs = 0, published          → evicted in LRU order when no free block is left
    held    refs > 0 (published or not)  → never touched

Block 0 is the null block: padding points to it, it is never handed out. A published block is found by its chain digest
(BLAKE2b over the parent's digest and the block's tokens) and is handed out only if its tokens match as well.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from struct import pack
from time import monotonic

NULL_BLOCK = 0
FREE, OWNED, SHARED, CACHED = range(4)  # a block's byte in the dashboard's map


def root_digest(salt: str) -> bytes:
    """The digest before a sequence's first block: sequences share blocks only inside one salt."""
    return blake2b(salt.encode(errors="surrogatepass"), digest_size=16, person=b"ws-prefix").digest()


def chain_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Digest of a full block, given the digest of the block before it."""
    return blake2b(parent + pack(f"{len(tokens)}q", *tokens), digest_size=16).digest()


@dataclass(slots=True)
class Block:
    """One block's book-keeping. `key` is (KV group, chain digest) while published; `tokens` are compared on a hit.

    since: time.monotonic() at which it was handed out or, cached, its last holder let go.
    """

    refs: int = 0
    since: float = 0.0
    key: tuple[int, bytes] | None = None
    tokens: tuple[int, ...] = ()


class BlockPool:
    """All KV blocks of an engine.

    Args:
        num_blocks: blocks in the pool tensor, the null block included; at least 2.
        block_size: tokens a block holds.
    """

    def __init__(self, num_blocks: int, block_size: int = 16) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks must be at least 2, got {num_blocks}")
        self.block_size = block_size
        self.total = num_blocks - 1
        self.evictions = 0
        self._blocks = [Block() for _ in range(num_blocks)]
        self._blocks[NULL_BLOCK].refs = 1
        self._free: deque[int] = deque(range(1, num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._published: dict[tuple[int, bytes], int] = {}
        self._states = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self.total - len(self._free) - len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that `allocate` can hand out."""
        return len(self._free) + len(self._cached)

    def refs(self, block: int) -> int:
        return self._blocks[block].refs

    def state(self, block: int) -> int:
        """FREE, OWNED (one reference), SHARED (several) or CACHED."""
        return self._states[block]

    def is_published(self, block: int) -> bool:
        return self._blocks[block].key is not None

    def state_bytes(self) -> bytes:
        """The states of blocks 1 … total, one byte each: a copy."""
        return bytes(memoryview(self._states)[1:])

    def since(self, block: int) -> float:
        """time.monotonic() at which a block was handed out or, cached, its last holder let go; 0.0 for one never used."""
        return self._blocks[block].since

    def heat_bytes(self) -> bytes:
        """One byte a block: 0 for those that are not cached, else 1 (used last) to 255 (evicted next)."""
        heat = bytearray(self.total)
        count = len(self._cached)
        for place, block in enumerate(self._cached):
            heat[block - 1] = 255 - 254 * place // count
        return bytes(heat)

    def allocate(self) -> int:
        """Hand out one block with refs = 1, evicting the least recently used cached block if none is free.

        Raises:
            IndexError: nothing is available; callers look at `available` first.
        """
        if self._free:
            block = self._free.popleft()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
            self.evictions += 1
        else:
            raise IndexError("no KV block is free or cached")
        entry = self._blocks[block]
        entry.refs, entry.since = 1, monotonic()
        self._states[block] = OWNED
        return block

    def acquire(self, block: int) -> None:
        """Add a reference to a held or cached block."""
        entry = self._blocks[block]
        if entry.refs == 0:
            del self._cached[block]
        entry.refs += 1
        self._states[block] = SHARED if entry.refs > 1 else OWNED

    def release(self, block: int) -> None:
        """Drop one reference; the last one makes the block cached (if published) or free."""
        if block == NULL_BLOCK:
            return
        entry = self._blocks[block]
        if entry.refs <= 0:
            raise ValueError(f"block {block} is released more often than it was taken")
        entry.refs -= 1
        if entry.refs == 0:
            entry.since = monotonic()
            if entry.key is not None:
                self._cached[block] = None
                self._states[block] = CACHED
            else:
                self._free.append(block)
                self._states[block] = FREE
        elif entry.refs == 1:
            self._states[block] = OWNED

    def release_all(self, blocks: Iterable[int]) -> None:
        """Release a table from its tail, so that the tail of a chain is evicted before its head."""
        for block in reversed(list(blocks)):
            self.release(block)

    def lookup(self, group: int, digest: bytes, tokens: Sequence[int]) -> int | None:
        """The published block that holds exactly this prefix, or None. Takes no reference."""
        block = self._published.get((group, digest))
        if block is None or self._blocks[block].tokens != tuple(tokens):
            return None
        return block

    def publish(self, block: int, group: int, digest: bytes, tokens: Sequence[int]) -> None:
        """Let others find a held, full block. A prefix already published keeps its first block."""
        entry = self._blocks[block]
        key = (group, digest)
        if entry.key is not None or key in self._published:
            return
        entry.key, entry.tokens = key, tuple(tokens)
        self._published[key] = block

    def withdraw(self, block: int) -> None:
        """Make a block unfindable (its contents are not to be trusted). It stays with whoever holds it."""
        entry = self._blocks[block]
        if entry.key is None:
            return
        self._forget(block)
        if entry.refs == 0:
            del self._cached[block]
            self._free.append(block)
            self._states[block] = FREE

    def clear_cache(self) -> int:
        """Forget every published prefix; returns how many cached blocks became free."""
        dropped = len(self._cached)
        for block in list(self._published.values()):
            self.withdraw(block)
        return dropped

    def _forget(self, block: int) -> None:
        entry = self._blocks[block]
        if entry.key is not None:
            del self._published[entry.key]
            entry.key, entry.tokens = None, ()

    def check(self, held: Iterable[int] | None = None) -> None:
        """Prove that free + cached + held = total and that every block is in one state.

        Args:
            held: every reference callers believe they have, with repetition; compared when given.

        Raises:
            AssertionError: with the first block that breaks a rule.
        """
        expected: dict[int, int] = {}
        for block in held or ():
            expected[block] = expected.get(block, 0) + 1
        free, seen = set(self._free), set(self._cached)
        if len(free) != len(self._free) or free & seen:
            raise AssertionError("a block stands twice in the free and cached lists")
        for block, entry in enumerate(self._blocks):
            if block == NULL_BLOCK:
                continue
            states = (block in free) + (block in seen) + (entry.refs > 0)
            if states != 1:
                raise AssertionError(f"block {block} is in {states} states (refs {entry.refs})")
            if self._states[block] != (CACHED if block in seen else min(entry.refs, SHARED)):
                raise AssertionError(f"block {block} is drawn in state {self._states[block]} (refs {entry.refs})")
            if block in seen and entry.key is None:
                raise AssertionError(f"block {block} is cached but not published")
            if block in free and entry.key is not None:
                raise AssertionError(f"block {block} is free but published")
            if entry.key is not None and self._published.get(entry.key) != block:
                raise AssertionError(f"block {block} is published under a key that names another block")
            if held is not None and entry.refs != expected.get(block, 0):
                raise AssertionError(f"block {block} has {entry.refs} references, its users count {expected.get(block, 0)}")
        if len(self._published) != sum(entry.key is not None for entry in self._blocks):
            raise AssertionError("the prefix map and the blocks disagree")
        if self.num_free + self.num_cached + self.num_held != self.total:
            raise AssertionError("free + cached + held is not the total")
