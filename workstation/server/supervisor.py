"""EngineProcess: the real EngineClient. Starts the engine's process, watches it, restarts it, fails what was in flight."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import zmq

from workstation import errors
from workstation.config import EngineConfig
from workstation.engine import wire
from workstation.engine.client import EngineState, Health, Inbox, Progress
from workstation.engine.request import EngineInfo, EngineRequest, EngineStats, Stage
from workstation.engine.snapshot import Look, Picture

log = logging.getLogger("ws.supervisor")

MAX_RESTARTS = 3
RESTART_WINDOW_SECONDS = 60.0
HEARTBEAT_LIMIT_SECONDS = 20.0
STEP_LIMIT_SECONDS = 300.0
STOP_SECONDS = 5.0
LOOK_SECONDS = 2.0
WATCH_SECONDS = 0.25
CONNECT_SECONDS = 0.005
MAX_DEATHS_OF_A_REQUEST = 2
REMEMBERED_REQUESTS = 4096
ENGINE_COMMAND = (sys.executable, "-m", "workstation.engine.process")


def _error(kind: str, message: str, param: str | None) -> errors.WorkstationError:
    """An error that crossed the process border, by class name."""
    made = getattr(errors, kind, errors.EngineError)
    if not issubclass(made, errors.WorkstationError):
        made = errors.EngineError
    if made is errors.OverloadedError:
        return errors.OverloadedError(message)
    return made(message, param=param)


def _fingerprint(request: EngineRequest) -> bytes:
    """Equal for equal prompts and parameters, whatever the request's id."""
    asked = (request.prompt_token_ids, request.params, request.beam, request.grammar)
    return hashlib.blake2b(wire.encode(asked), digest_size=16).digest()


class EngineProcess:
    """An engine in a process of its own, restarted when it dies: at most 3 times in 60 s.

    Args:
        config: handed to the engine.  on_loading: called with (stage, done, in all) while the engine starts.
        on_said: called with each line of the engine's log: Unix seconds, level, source, text.
    """

    def __init__(self, config: EngineConfig, *, on_loading: Callable[[Stage, int, int], None] | None = None,
                 on_said: Callable[[float, int, str, str], None] | None = None) -> None:
        self._config = config
        self._on_loading = on_loading
        self._on_said = on_said
        self._loading: tuple[wire.Loading, float] | None = None  # the newest, and when its stage began
        self._state: EngineState = "starting"
        self._info = EngineInfo()
        self._stats = EngineStats()
        self._cause = ""
        self._restarts = 0
        self._deaths: deque[float] = deque()
        self._inboxes: dict[str, Inbox] = {}
        self._requests: dict[str, EngineRequest] = {}
        self._looks: dict[int, asyncio.Future[Picture]] = {}
        self._look_count = 0
        self._suspects: OrderedDict[bytes, int] = OrderedDict()
        self._last_beat = time.monotonic()
        self._step_age = 0.0
        self._gave_up = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._directory = ""
        self._tasks: list[asyncio.Task[None]] = []
        self._sources: list[zmq.Socket[bytes]] = []

    # ── what the server sees ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def stats(self) -> EngineStats:
        return self._stats

    def health(self) -> Health:
        now, progress = time.monotonic(), None
        if self._loading is not None and self._state in ("starting", "restarting"):
            newest, began = self._loading
            progress = Progress(newest.stage, newest.done, newest.total, now - began)
        return Health(self._state, now - self._last_beat, self._restarts, self._cause, progress)

    async def start(self) -> None:
        """Return when the engine is ready; raise the StartupError that stopped it."""
        await self._launch()
        self._tasks.append(asyncio.create_task(self._watch(), name="engine-watch"))

    async def stop(self) -> None:
        """End the engine and remove its private directory. Requests in flight get EngineDeadError."""
        listens = self._state == "ready"  # one that still loads reads no messages
        self._state = "draining"
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(zmq.ZMQError):
                if listens:
                    self._socket.send(wire.encode(wire.Shutdown()), zmq.NOBLOCK)
            await self._end_process(STOP_SECONDS if listens else 0.0)
        self._fail_all("the server is shutting down")
        self._close()
        self._state = "dead"

    async def gave_up(self) -> str:
        """Wait until the engine has died too often to be restarted; the cause of the last death."""
        await self._gave_up.wait()
        return self._cause

    def generate(self, request: EngineRequest) -> Inbox:
        """See EngineClient.generate."""
        return Inbox(partial(self._begin, request), partial(self._leave, request.request_id))

    async def _begin(self, request: EngineRequest, inbox: Inbox) -> None:
        self._admit(request)
        self._inboxes[request.request_id], self._requests[request.request_id] = inbox, request
        await self._send(wire.Submit(request))

    def _leave(self, request_id: str, done: bool) -> None:
        self._inboxes.pop(request_id, None)
        self._requests.pop(request_id, None)
        if not done:
            self.abort(request_id)

    async def _send(self, message: wire.ToEngine) -> None:
        data = wire.encode(message)
        while True:
            self._check_ready()
            try:
                self._socket.send(data, zmq.NOBLOCK)
                return
            except zmq.Again:  # the engine has said that it is ready, and its end of this socket is still on the way
                await asyncio.sleep(CONNECT_SECONDS)

    def abort(self, request_id: str, index: int | None = None) -> None:
        if self._state == "ready":
            with contextlib.suppress(zmq.ZMQError):
                self._socket.send(wire.encode(wire.Abort(request_id, index)), zmq.NOBLOCK)

    async def look(self, look: Look) -> Picture:
        """See EngineClient.look."""
        self._check_ready()
        self._look_count += 1
        number = self._look_count
        answer: asyncio.Future[Picture] = asyncio.get_running_loop().create_future()
        self._looks[number] = answer
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                await self._send(wire.Ask(dataclasses.replace(look, number=number)))
                return await answer
        except TimeoutError:
            raise errors.OverloadedError(f"the engine has not answered for {LOOK_SECONDS:g} s (a long step?)") from None
        finally:
            self._looks.pop(number, None)

    def _check_ready(self) -> None:
        if self._state != "ready":
            raise errors.EngineDeadError(f"the engine is {self._state}" + (f" ({self._cause})" if self._cause else ""))

    def _admit(self, request: EngineRequest) -> None:
        self._check_ready()
        if self._suspects and self._suspects.get(_fingerprint(request), 0) >= MAX_DEATHS_OF_A_REQUEST:
            raise errors.InvalidRequestError(
                f"this request was in flight at {MAX_DEATHS_OF_A_REQUEST} deaths of the engine and is not tried again")

    # ── the process ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _launch(self) -> None:
        self._directory = tempfile.mkdtemp(prefix="ws-")  # mode 0700: nobody else may connect
        self._context = zmq.Context()
        self._socket = self._bind(zmq.PUSH, wire.INBOX)
        self._sources = [self._bind(zmq.PULL, wire.OUTBOX), self._bind(zmq.PULL, wire.BEATS)]
        config = msgspec.json.encode(dataclasses.asdict(self._config))
        await asyncio.to_thread((Path(self._directory) / "config.json").write_bytes, config)
        self._last_beat, self._step_age, self._loading = time.monotonic(), 0.0, None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._process = await asyncio.create_subprocess_exec(
            *ENGINE_COMMAND, self._directory, str(os.getpid()), stdin=asyncio.subprocess.DEVNULL)
        for source in self._sources:
            asyncio.get_running_loop().add_reader(source.getsockopt(zmq.FD), self._read, source)
            self._read(source)
        died: asyncio.Future[Any] = asyncio.ensure_future(self._process.wait())
        waited: list[asyncio.Future[Any]] = [died, self._ready]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not self._ready.done():
            await asyncio.sleep(0.1)  # its last message may still be on the way
        died.cancel()
        if not self._ready.done():
            self._ready.set_exception(errors.StartupError(f"the engine {self._how_it_ended()} while starting"))
        try:
            await self._ready
        except errors.WorkstationError:
            await self._end_process(0.0)
            self._close()
            self._state = "dead"
            raise
        self._state = "ready"

    def _bind(self, kind: int, name: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.bind(wire.address(self._directory, name))
        return socket

    def _close(self) -> None:
        while self._sources:
            source = self._sources.pop()
            asyncio.get_running_loop().remove_reader(source.getsockopt(zmq.FD))
            source.close(0)
        self._socket.close(0)
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _end_process(self, patience: float) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        if patience:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), patience)
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            try:
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
            except TimeoutError:
                log.error("engine process %d does not die (stuck in the driver?)", process.pid)

    def _how_it_ended(self) -> str:
        code = self._process.returncode if self._process else None
        if code is None:
            return "stopped answering"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"exited with code {code}"

    # ── messages ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _read(self, source: zmq.Socket[bytes]) -> None:
        """Take all that has come: the descriptor tells of new messages once, not of each."""
        with contextlib.suppress(zmq.Again):
            while True:
                self._handle(wire.decode_from_engine(source.recv(zmq.NOBLOCK)))

    def _handle(self, message: wire.FromEngine) -> None:
        if isinstance(message, wire.Step):
            for event in chain(wire.plain_events(message), message.events):
                inbox = self._inboxes.get(event.request_id)
                if inbox is not None:
                    inbox.put(event)
        elif isinstance(message, wire.Beat):
            self._last_beat, self._step_age, self._stats = time.monotonic(), message.step_age, message.stats
        elif isinstance(message, wire.Refused):
            inbox = self._inboxes.get(message.request_id)
            if inbox is not None:
                inbox.put(_error(message.kind, message.message, message.param))
        elif isinstance(message, wire.Shown):
            answer = self._looks.get(message.picture.number)
            if answer is not None and not answer.done():
                answer.set_result(message.picture)
        elif isinstance(message, wire.Loading):
            same = self._loading is not None and self._loading[0].stage == message.stage
            self._loading = (message, self._loading[1] if same and self._loading else time.monotonic())
            if self._on_loading is not None:
                self._on_loading(message.stage, message.done, message.total)
        elif isinstance(message, wire.Said):
            if self._on_said is not None:
                self._on_said(message.when, message.level, message.source, message.text)
        elif isinstance(message, wire.Crashed):
            self._cause = message.cause
        elif isinstance(message, wire.Ready):
            self._info = message.info
            self._settle(None)
        elif isinstance(message, wire.StartFailed):
            self._settle(_error(message.kind, message.message, message.param))

    def _settle(self, error: errors.WorkstationError | None) -> None:
        if self._ready.done():
            return
        if error is None:
            self._ready.set_result(None)
        else:
            self._ready.set_exception(error)

    # ── death ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            cause = self._trouble()
            if cause is None:
                continue
            self._state = "restarting"
            await self._end_process(0.0)
            self._read(self._sources[0])  # its last words
            self._cause = self._cause or cause
            log.error("the engine died: %s", self._cause)
            self._blame()
            self._fail_all(f"the engine died: {self._cause}")
            self._close()
            if not await self._restart():
                return

    def _trouble(self) -> str | None:
        if self._process is not None and self._process.returncode is not None:
            return f"it {self._how_it_ended()}"
        silence = time.monotonic() - self._last_beat
        if silence > HEARTBEAT_LIMIT_SECONDS:
            return f"no heartbeat for {silence:.0f} s"
        if self._step_age > STEP_LIMIT_SECONDS:
            return f"one step has taken {self._step_age:.0f} s"
        return None

    async def _restart(self) -> bool:
        """Start the engine again; False when it has died too often."""
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths and now - self._deaths[0] > RESTART_WINDOW_SECONDS:
            self._deaths.popleft()
        if len(self._deaths) > MAX_RESTARTS:
            return self._give_up(f"the engine died {len(self._deaths)} times in {RESTART_WINDOW_SECONDS:.0f} s; "
                                 f"last: {self._cause}")
        self._restarts += 1
        last_cause, self._cause = self._cause, ""
        try:
            await self._launch()
        except errors.WorkstationError as error:
            return self._give_up(f"it did not start again: {error.message} (it had died: {last_cause})")
        self._cause = last_cause
        log.warning("the engine is ready again (restart %d)", self._restarts)
        self._cause = ""
        return True

    def _give_up(self, cause: str) -> bool:
        self._state, self._cause = "dead", cause
        log.error(cause)
        self._gave_up.set()
        return False

    def _blame(self) -> None:
        """Remember who was present; a request present at two deaths is not taken again."""
        for request in self._requests.values():
            key = _fingerprint(request)
            self._suspects[key] = self._suspects.pop(key, 0) + 1
        while len(self._suspects) > REMEMBERED_REQUESTS:
            self._suspects.popitem(last=False)

    def _fail_all(self, message: str) -> None:
        for inbox in self._inboxes.values():
            inbox.put(errors.EngineDeadError(message))
        for answer in self._looks.values():
            if not answer.done():
                answer.set_exception(errors.EngineDeadError(message))
