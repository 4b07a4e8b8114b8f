"""KVManager: block tables of sequences, over one BlockPool and all KV groups. Plain integers, no torch.

Where a sequence's blocks change owner, drawn once (block size 4, full attention):

    tokens     p p p p | p p p p | p p o o | .
    computed   ──────────────────────→
    table      A         B         C
    owner      shared with the     own
               prefix cache

A and B are full: they are published as soon as the step that computes them is scheduled and may be held by many sequences.
C is partial: it is written by one sequence only. A fork (n samples, beams) shares C as well until one side writes to it;
that side first takes a copy (copy-on-write).  In a sliding group, blocks wholly behind the window become the null block.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Tokens

from workstation.architecture import KVGroup
from workstation.engine.blocks import NULL_BLOCK, BlockPool, chain_digest
from workstation.engine.request import EngineRequest
from workstation.engine.sequence import Sequence


class KVManager:
    """Grows, shares, copies and frees block tables."""

    def __init__(self, pool: BlockPool, groups: Tokens[KVGroup], *, caching: bool = True) -> None:
        self.pool = pool
        self.groups = tuple(groups)
        self.caching = caching
        self.slides = any(group.window for group in self.groups)

    def blocks_for(self, num_tokens: int, max_chunk: int) -> int:
        """Most blocks a sequence of this many tokens can hold at once when a step computes at most max_chunk of them."""
        return sum(self._most_blocks(group, num_tokens, max_chunk) for group in self.groups)

    def _most_blocks(self, group: KVGroup, num_tokens: int, max_chunk: int) -> int:
        size = self.pool.block_size
        whole = -(-num_tokens // size)
        return min(whole, -(-(group.window + max_chunk) // size) + 1) if group.window else whole

    def start(self, seq: Sequence) -> None:
        """Give a sequence empty tables."""
        count = len(self.groups)
        seq.tables = [[] for _ in range(count)]
        seq.published = [0] * count
        seq.freed = [0] * count
        seq.table_updates = []
        seq.num_computed = 0
        seq.own_until, seq.publish_at = 0, self.pool.block_size

    # ── prefix cache ────────────────────────────────────────────────────────────────────────────────────────────────

    def _reads_cache(self, request: EngineRequest) -> bool:
        """Prompt logprobs and a mean need something of every prompt token, so they bypass hits."""
        params = request.params
        needs_all = params.prompt_logprobs is not None or request.pooling == "mean"
        return self.caching and not params.skip_reading_prefix_cache and not needs_all

    def shares(self, request: EngineRequest) -> bool:
        """Whether sequences of a request that were preempted find each other's blocks again, however long they are."""
        return self._reads_cache(request) and not any(group.window for group in self.groups)

    def attach_prefix(self, seq: Sequence) -> int:
        """Take the longest published prefix of a started sequence; returns its tokens, always less than all of them.

        The last token is computed even on a full hit: its logits are needed.
        """
        if not self._reads_cache(seq.request.request):
            return 0
        limit = (len(seq.tokens) - 1) // self.pool.block_size
        self._extend_digests(seq, limit)
        length, found = self._longest_hit(seq, limit)
        for group, blocks in enumerate(found):
            for block in blocks:
                if block != NULL_BLOCK:
                    self.pool.acquire(block)
            seq.tables[group] = list(blocks)
            seq.published[group] = length
            seq.freed[group] = next((i for i, block in enumerate(blocks) if block != NULL_BLOCK), length)
            seq.table_updates += [(group, entry, block) for entry, block in enumerate(blocks)]
        seq.num_computed = length * self.pool.block_size
        seq.publish_at = seq.num_computed + self.pool.block_size
        return seq.num_computed

    def _longest_hit(self, seq: Sequence, limit: int) -> tuple[int, list[list[int]]]:
        """Most blocks that every full group has, and of which every sliding group has the last window."""
        hits: list[list[int | None]] = [self._group_hits(seq, group, limit) for group in range(len(self.groups))]
        length = limit
        for group, row in enumerate(hits):
            if self.groups[group].kind == "full":
                length = min(length, next((i for i, block in enumerate(row) if block is None), limit))
        while length > 0 and not all(self._window_present(group, hits[group], length) for group in range(len(hits))):
            length -= 1
        tables = [[block if block is not None and i >= self._first_needed(group, length) else NULL_BLOCK
                   for i, block in enumerate(row[:length])] for group, row in enumerate(hits)]
        return length, tables

    def _group_hits(self, seq: Sequence, group: int, limit: int) -> list[int | None]:
        size = self.pool.block_size
        row: list[int | None] = []
        for i in range(limit):
            block = self.pool.lookup(group, seq.digests[i], seq.tokens[i * size:(i + 1) * size])
            if block is None and self.groups[group].kind == "full":
                return row + [None] * (limit - i)
            row.append(block)
        return row

    def _first_needed(self, group: int, length: int) -> int:
        """First block a query right after `length` blocks can still see."""
        window = self.groups[group].window
        if not window:
            return 0
        return max(0, (length * self.pool.block_size - window + 1) // self.pool.block_size)

    def _window_present(self, group: int, row: list[int | None], length: int) -> bool:
        return all(block is not None for block in row[self._first_needed(group, length):length])

    def _extend_digests(self, seq: Sequence, count: int) -> None:
        size = self.pool.block_size
        parent = seq.digests[-1] if seq.digests else seq.request.root
        for i in range(len(seq.digests), count):
            parent = chain_digest(parent, seq.tokens[i * size:(i + 1) * size])
            seq.digests.append(parent)

    def publish(self, seq: Sequence) -> None:
        """Offer every full block whose tokens are known and whose K and V are written by a launched step."""
        if seq.num_computed < seq.publish_at or len(seq.tokens) < seq.publish_at or not self.caching:
            return
        full = min(seq.num_computed, len(seq.tokens)) // self.pool.block_size
        seq.publish_at = (full + 1) * self.pool.block_size
        self._extend_digests(seq, full)
        size = self.pool.block_size
        for group, table in enumerate(seq.tables):
            for i in range(seq.published[group], full):
                if table[i] != NULL_BLOCK:
                    self.pool.publish(table[i], group, seq.digests[i], seq.tokens[i * size:(i + 1) * size])
            seq.published[group] = full

    def withdraw(self, seq: Sequence) -> None:
        """Make every block of a sequence unfindable: its K and V are not to be trusted."""
        for table in seq.tables:
            for block in table:
                if block != NULL_BLOCK:
                    self.pool.withdraw(block)

    def tokens_held(self, running: Iterable[Sequence]) -> int:
        """Distinct token slots in use, shared blocks once: all of the held blocks but what the tails of `running` leave."""
        size, seen, empty = self.pool.block_size, set[int](), 0
        for seq in running:
            for table in seq.tables:
                for entry in range(seq.num_computed // size, len(table)):
                    if table[entry] and table[entry] not in seen:
                        seen.add(table[entry])
                        empty += size - max(0, seq.num_computed - entry * size)
        return self.pool.num_held * size - empty

    # ── growing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def needed(self, seq: Sequence, num_tokens: int) -> int:
        """Blocks to allocate before tokens [num_computed, num_tokens) can be written, copies included."""
        target = -(-num_tokens // self.pool.block_size)
        fresh = sum(max(0, target - len(table)) for table in seq.tables)
        return fresh + sum(self._must_copy(seq, group) for group in range(len(seq.tables)))

    def needed_whole(self, seq: Sequence, max_chunk: int) -> int:
        """Most blocks a started sequence must still allocate, at any one time, until all its known tokens are computed."""
        total = 0
        for group, table in zip(self.groups, seq.tables, strict=True):
            held = len(table) - table.count(NULL_BLOCK)
            most = self._most_blocks(group, seq.num_known, max_chunk)
            total += max(0, min(-(-seq.num_known // self.pool.block_size) - len(table), most - held))
        return total

    def _must_copy(self, seq: Sequence, group: int) -> bool:
        """The block the next token goes to is partial and someone else reads it."""
        entry, offset = divmod(seq.num_computed, self.pool.block_size)
        if offset == 0 or entry >= len(seq.tables[group]):
            return False
        return self.pool.refs(seq.tables[group][entry]) > 1

    def grow(self, seq: Sequence, num_tokens: int) -> list[tuple[int, int]] | None:
        """Make room for tokens [num_computed, num_tokens).

        Returns (source, target) blocks to copy before the step writes, or None (and changes nothing) when too few blocks
        are available.
        """
        if num_tokens <= seq.own_until:
            return []
        if self.needed(seq, num_tokens) > self.pool.available:
            return None
        copies: list[tuple[int, int]] = []
        target = -(-num_tokens // self.pool.block_size)
        for group, table in enumerate(seq.tables):
            if self._must_copy(seq, group):
                entry = seq.num_computed // self.pool.block_size
                copies.append((table[entry], self._replace(seq, group, entry)))
            for entry in range(len(table), target):
                table.append(self.pool.allocate())
                seq.table_updates.append((group, entry, table[entry]))
        seq.own_until = target * self.pool.block_size
        return copies

    def _replace(self, seq: Sequence, group: int, entry: int) -> int:
        table = seq.tables[group]
        fresh = self.pool.allocate()
        self.pool.release(table[entry])
        table[entry] = fresh
        seq.table_updates.append((group, entry, fresh))
        return fresh

    def slide(self, seq: Sequence) -> None:
        """Free blocks that the next query of a sliding group cannot see.

        Called before a step is planned, never after: blocks freed behind a planned step could be written by another
        sequence of the same step before this one has read them.
        """
        for group, shape in enumerate(self.groups):
            if not shape.window:
                continue
            table = seq.tables[group]
            end = min(max(0, (seq.num_computed - shape.window + 1) // self.pool.block_size), len(table))
            for entry in range(seq.freed[group], end):
                self.pool.release(table[entry])
                table[entry] = NULL_BLOCK
                seq.table_updates.append((group, entry, NULL_BLOCK))
            seq.freed[group] = max(seq.freed[group], end)

    # ── forking and freeing ─────────────────────────────────────────────────────────────────────────────────────────

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let the child share every block of its parent, the partial one included."""
        child.tables = [list(table) for table in parent.tables]
        child.digests = list(parent.digests)
        child.published = list(parent.published)
        child.freed = list(parent.freed)
        child.num_computed = parent.num_computed
        child.publish_at = parent.publish_at
        parent.own_until = child.own_until = 0  # both read the partial block now
        child.table_updates = []
        for group, table in enumerate(child.tables):
            for entry, block in enumerate(table):
                if block != NULL_BLOCK:
                    self.pool.acquire(block)
                child.table_updates.append((group, entry, block))

    def free(self, seq: Sequence) -> None:
        """Give every block back; published ones stay cached."""
        for table in seq.tables:
            self.pool.release_all(table)
        self.start(seq)
