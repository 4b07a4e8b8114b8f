"""The host's side of speed: threads and malloc."""

from __future__ import annotations

import ctypes
import os

# From <malloc.h>; glibc only.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP_BYTES = 1 << 30


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
