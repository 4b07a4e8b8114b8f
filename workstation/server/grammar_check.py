"""GrammarCheck: no grammar reaches the engine that has not been compiled in a process of its own, within seconds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import OrderedDict
from typing import Any

from workstation.errors import InvalidRequestError, OverloadedError
from workstation.server.constraint import Constraint

COMPILE_SECONDS = 2.5
START_SECONDS = 60.0
QUEUE_SECONDS = 30.0
CACHE_BYTES = 16 * 1024 * 1024
COMMAND = (sys.executable, "-m", "workstation.grammar.check")


class GrammarCheck:
    """Tries grammars one at a time. Verdicts are remembered, the least used forgotten first.

    Args:
        folder: the model's; without one nothing is tried here, and the engine says what it cannot compile.
    """

    def __init__(self, folder: str, seconds: float = COMPILE_SECONDS) -> None:
        self._folder, self._seconds = folder, seconds
        self._turn = asyncio.Lock()
        self._process: asyncio.Task[Process] | None = None
        self._verdicts: OrderedDict[str, tuple[str, str] | None] = OrderedDict()  # (message, field) of what was refused
        self._held = 0

    async def approve(self, constraint: Constraint, width: int) -> str:
        """The first of the sources that compiles. width: of the logits.

        Raises InvalidRequestError with the last one's fault, OverloadedError when too many wait for their turn.
        """
        fault = None
        for source in constraint.sources:
            fault = await self._verdict(source, constraint, width)
            if fault is None:
                return source
        assert fault is not None, "a constraint has a source"
        raise InvalidRequestError(fault[0], param=fault[1][:512])

    async def close(self) -> None:
        """End the process."""
        starting, self._process = self._process, None
        if starting is None:
            return
        with contextlib.suppress(InvalidRequestError, ProcessLookupError):
            process = await starting
            process.kill()
            await process.wait()

    async def _verdict(self, source: str, constraint: Constraint, width: int) -> tuple[str, str] | None:
        if not self._folder:
            return None
        if source not in self._verdicts:
            try:
                async with asyncio.timeout(QUEUE_SECONDS):
                    await self._turn.acquire()
            except TimeoutError:
                raise OverloadedError("too many new grammars wait to be compiled") from None
            try:
                if source not in self._verdicts:
                    self._remember(source, await self._tried(source, constraint, width))
            finally:
                self._turn.release()
        self._verdicts.move_to_end(source)
        return self._verdicts[source]

    def _remember(self, source: str, fault: tuple[str, str] | None) -> None:
        self._verdicts[source] = fault
        self._held += len(source)
        while self._held > CACHE_BYTES and len(self._verdicts) > 1:
            self._held -= len(self._verdicts.popitem(last=False)[0])

    async def _tried(self, source: str, constraint: Constraint, width: int) -> tuple[str, str] | None:
        where = constraint.where
        process = await self._started(width)
        asked = {"source": source, "where": where, "schema": constraint.schema}
        try:
            async with asyncio.timeout(self._seconds):
                answer = await _exchange(process, asked)
        except TimeoutError:
            self._restart(process, width)
            return f"{where}: cannot be compiled within {self._seconds:g} s", where
        except (EOFError, ConnectionError):
            self._restart(process, width)
            return f"{where}: cannot be compiled: too large, or nested too deeply", where
        except asyncio.CancelledError:
            self._restart(process, width)  # its answer would be taken for the next one's
            raise
        return (answer["error"], answer["param"]) if answer["error"] is not None else None

    async def _started(self, width: int) -> Process:
        if self._process is None:
            self._process = asyncio.create_task(self._start(width))
        try:
            async with asyncio.timeout(START_SECONDS):
                return await asyncio.shield(self._process)
        except (TimeoutError, InvalidRequestError):
            self._process = None
            raise

    async def _start(self, width: int) -> Process:
        process = await asyncio.create_subprocess_exec(*COMMAND, self._folder, str(width), stdin=PIPE, stdout=PIPE,
                                                       stderr=DEVNULL)
        try:
            answer = await _read(process)
        except EOFError:
            raise InvalidRequestError("structured output is not available: the process that compiles grammars does not start",
                                      param="structured_outputs") from None
        if answer["error"] is not None:
            raise InvalidRequestError(answer["error"], param="structured_outputs")
        return process

    def _restart(self, process: Process, width: int) -> None:
        """A fresh process, begun at once: the next request should not wait for it."""
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        self._process = asyncio.create_task(self._start(width))


async def _exchange(process: Process, asked: dict[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None
    process.stdin.write(json.dumps(asked).encode() + b"\n")
    await process.stdin.drain()
    return await _read(process)


async def _read(process: Process) -> dict[str, Any]:
    """One line. Raises EOFError when the process has ended."""
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    answer: dict[str, Any] = json.loads(line)
    return answer
