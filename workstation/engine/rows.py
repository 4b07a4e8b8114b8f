"""Row state on the device: what a running sequence needs between steps, in a fixed slot, changed in place.

Parameters of sampling live in rows too, but in `sampling_state.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from workstation.engine.transfer import to_device


class Rows:
    """Block tables and last tokens by row.

    Attributes:
        tables: a KV group each, [max_rows, max_blocks] int32; entries of blocks a sequence does not hold are stale.
        last_token: [max_rows] int64, the token the row sampled last.
    """

    def __init__(self, max_rows: int, max_blocks: int, num_groups: int, device: torch.device) -> None:
        self.device = device
        self.tables = tuple(torch.zeros(max_rows, max_blocks, dtype=torch.int32, device=device) for _ in range(num_groups))
        self.last_token = torch.zeros(max_rows, dtype=torch.int64, device=device)

    def update_tables(self, updates: Sequence[tuple[int, int, int, int]]) -> None:
        """Apply (group, row, entry, block) changes; a later change of the same entry wins."""
        if not updates:
            return
        latest = {(group, row, entry): block for group, row, entry, block in updates}
        for group, table in enumerate(self.tables):
            cells = [(row, entry, block) for (owner, row, entry), block in latest.items() if owner == group]
            if cells:
                sent = to_device(np.array(cells, dtype=np.int64), self.device)
                table[sent[:, 0], sent[:, 1]] = sent[:, 2].to(torch.int32)

