"""Python's cycle collector, told what serving is like: a step or a stream makes many short-lived objects and few cycles."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

CALM_THRESHOLD = 100_000  # objects made between two looks at the youngest generation (Python's default: 700 to 2,000)


@contextmanager
def calm_collector(*, freeze: bool = False) -> Iterator[None]:
    """Look for cycles rarely. `freeze`: and never among what is here already, which lives as long as the process does."""
    before = gc.get_threshold()
    if freeze:
        gc.collect()
        gc.freeze()
    gc.set_threshold(CALM_THRESHOLD, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        if freeze:
            gc.unfreeze()
