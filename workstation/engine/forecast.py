"""Forecast: whether a sequence can be begun without a preemption later, as far as outputs can be foreseen.

A preempted sequence is computed again: with a pool full of half-done sequences that costs more than starting some later.
So a new one waits until the pool holds the peak of all that run, itself included:

    peak = max over k of  sum over j ≥ k of (held_j + grown(remaining_k)),   sequences in the order of their remaining tokens

for at the moment sequence k ends, those after it have grown by as many tokens as k had left, and those before it are gone
(Gong et al. 2025, arXiv:2507.10150, with expected lengths in place of sampled ones).
"""

from __future__ import annotations

from collections.abc import Iterable

from workstation.engine.blocks import BlockPool
from workstation.engine.sequence import Sequence

FIRST_GUESS = 256  # output tokens of a sequence that may end by itself, before any has
MEMORY = 32  # sequences that the guess looks back on, about


class Forecast:
    """Knows how long outputs have been lately.

    A sequence that ignores EOS goes on to its limit. Another is expected to be as long as those that ended lately; one
    that is longer already, a quarter of that more.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._typical = float(FIRST_GUESS)

    def ended(self, outputs: int) -> None:
        """A sequence has ended after so many output tokens."""
        self._typical += (outputs - self._typical) / MEMORY

    def fits(self, running: Iterable[Sequence], new: Sequence) -> bool:
        """Whether the pool holds what `running` and `new` will have grown to at their peak."""
        size = self._pool.block_size
        found = [(self._remaining(seq), len(seq.tables[0])) for seq in running if seq.tables]
        held = sum(blocks for _, blocks in found)
        found.append((self._remaining(new), -(-new.num_known // size)))
        found.sort()
        others = max(0, self._pool.num_held - held)  # not theirs; shared blocks count twice in `held`, on the safe side
        blocks, left = others + sum(count for _, count in found), len(found)
        for remaining, count in found:
            if blocks + left * (remaining // size + 1) > self._pool.total:
                return False
            blocks -= count
            left -= 1
        return True

    def _remaining(self, seq: Sequence) -> int:
        """Output tokens still expected."""
        left = seq.limit - seq.num_known
        if seq.request.request.params.ignore_eos or seq.request.request.beam is not None:
            return left
        made = seq.num_known - seq.request.prompt_len
        return max(0, min(left, max(int(self._typical) - made, int(self._typical) // 4)))
