"""The host's side of speed: threads, malloc, the cycle collector."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

# From <malloc.h>; glibc only.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP_BYTES = 1 << 30
CALM_THRESHOLD = 100_000  # objects made between two looks at the youngest generation (Python's default: 700 to 2,000)


def keep_large_buffers() -> None:
    """Let malloc reuse large buffers instead of mapping fresh pages for each: page faults cost more than a step's arithmetic.

    Does nothing where the C library has no mallopt.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, KEEP_BYTES)
    mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)


def server_threads() -> int:
    """Threads for an engine beside an API process: all cores but one.

    Threads that wait for each other in spin loops fall far behind as soon as one of them has to share its core.
    """
    return max(1, len(os.sched_getaffinity(0)) - 1)


@contextmanager
def calm_collector() -> Iterator[None]:
    """Run Python's cycle collector rarely: a step makes thousands of short-lived objects and no cycles."""
    before = gc.get_threshold()
    gc.set_threshold(CALM_THRESHOLD, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
