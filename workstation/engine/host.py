"""The host's side of speed and memory: threads, malloc, and what the driver sets aside."""

from __future__ import annotations

import ctypes
import os

# From <malloc.h>; glibc only.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP_BYTES = 1 << 30
CU_LIMIT_STACK_SIZE = 0  # from <cuda.h>


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


def release_stacks() -> None:
    """Let the driver keep no stack for threads of the current CUDA context, beyond what a kernel turns out to need.

    It keeps 1 KiB for every thread that the GPU can hold, 264 MiB on an H200; kernels like ours have none, and for others it
    takes what they need when they are launched (CUDA Driver API, cuCtxSetLimit). Does nothing where it cannot be asked.
    """
    try:
        set_limit = ctypes.CDLL("libcuda.so.1").cuCtxSetLimit
    except (OSError, AttributeError):
        return
    set_limit(CU_LIMIT_STACK_SIZE, ctypes.c_size_t(0))


def server_threads() -> int:
    """Threads for an engine beside an API process: all cores but one.

    Threads that wait for each other in spin loops fall far behind as soon as one of them has to share its core.
    """
    return max(1, len(os.sched_getaffinity(0)) - 1)
