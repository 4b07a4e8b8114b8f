"""GrammarCheck: no grammar reaches the engine that has not been compiled in a process of its own, within seconds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from workstation.errors import InvalidRequestError, OverloadedError
from workstation.server.constraint import Constraint

COMPILE_SECONDS = 2.5
START_SECONDS = 60.0
QUEUE_SECONDS = 30.0
LINE_BYTES = 64 * 1024 * 1024
CACHE_BYTES = 16 * 1024 * 1024
COMMAND = (sys.executable, "-m", "workstation.grammar.check")


@dataclass(frozen=True, slots=True)
class _Verdict:
    """A grammar as the engine gets it, or what is wrong and where."""

    source: str = ""
    fault: str = ""
    where: str = ""


class GrammarCheck:
    """Tries grammars one at a time. Verdicts are remembered, the least used forgotten first.

    Args:
        folder: the model's; without one nothing is tried here, and the engine says what it cannot compile.
    """

    def __init__(self, folder: str, seconds: float = COMPILE_SECONDS) -> None:
        self._folder, self._seconds = folder, seconds
        self._turn = asyncio.Lock()
        self._process: asyncio.Task[Process] | None = None
        self._verdicts: OrderedDict[str, _Verdict] = OrderedDict()
        self._held = 0

    async def approve(self, constraint: Constraint, width: int) -> str:
        """The first of the sources that compiles, translated. width: of the logits.

        Raises InvalidRequestError with the last one's fault, OverloadedError when too many wait for their turn.
        """
        if not self._folder:
            return constraint.sources[0]
        found = _Verdict()
        for source in constraint.sources:
            found = await self._verdict(source, constraint, width)
            if not found.fault:
                break
        if found.fault:
            raise InvalidRequestError(found.fault, param=found.where[:512])
        return found.source

    async def close(self) -> None:
        """End the process."""
        starting, self._process = self._process, None
        if starting is None:
            return
        with contextlib.suppress(InvalidRequestError, ProcessLookupError):
            process = await starting
            process.kill()
            await process.wait()

    async def _verdict(self, source: str, constraint: Constraint, width: int) -> _Verdict:
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

    def _remember(self, source: str, verdict: _Verdict) -> None:
        self._verdicts[source] = verdict
        self._held += len(source) + len(verdict.source)
        while self._held > CACHE_BYTES and len(self._verdicts) > 1:
            dropped, other = self._verdicts.popitem(last=False)
            self._held -= len(dropped) + len(other.source)

    async def _tried(self, source: str, constraint: Constraint, width: int) -> _Verdict:
        where = constraint.where
        process = await self._started(width)
        asked = {"source": source, "where": where, "schema": constraint.schema}
        try:
            async with asyncio.timeout(self._seconds):
                answer = await _exchange(process, asked)
        except TimeoutError:
            self._restart(process, width)
            return _Verdict(fault=f"{where}: cannot be compiled within {self._seconds:g} s", where=where)
        except (EOFError, ConnectionError):
            self._restart(process, width)
            return _Verdict(fault=f"{where}: cannot be compiled: too large, or nested too deeply", where=where)
        except asyncio.CancelledError:
            self._restart(process, width)  # its answer would be taken for the next one's
            raise
        if answer["error"] is not None:
            return _Verdict(fault=answer["error"], where=answer["param"])
        return _Verdict(answer["source"])

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
                                                       stderr=DEVNULL, limit=LINE_BYTES)
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
