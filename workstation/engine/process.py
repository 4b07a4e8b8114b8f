"""The engine's own process: `python -m workstation.engine.process DIRECTORY PARENT`, with DIRECTORY/config.json.

One thread runs the engine; a second one only beats. The process dies with its parent and never outlives its sockets.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import zmq

from workstation.collector import calm_collector
from workstation.config import EngineConfig
from workstation.engine import wire
from workstation.engine.host import server_threads
from workstation.engine.request import EngineStats, Stage
from workstation.errors import StartupError, WorkstationError

BEAT_SECONDS = 0.5
IDLE_POLL_MS = 200
PR_SET_PDEATHSIG = 1
log = logging.getLogger("ws.engine")


class Heart(threading.Thread):
    """Beats on a socket of its own; `step_began` is the only thing it reads from the engine's thread."""

    def __init__(self, context: zmq.Context, directory: str) -> None:
        super().__init__(name="heart", daemon=True)
        self.step_began = 0.0
        self.stats = EngineStats()
        self._context = context
        self._directory = directory

    def run(self) -> None:
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(wire.address(self._directory, wire.BEATS))
        while True:
            began = self.step_began
            age = time.monotonic() - began if began else 0.0
            with suppress(zmq.Again):
                socket.send(wire.encode(wire.Beat(age, self.stats)), zmq.NOBLOCK)
            time.sleep(BEAT_SECONDS)


class Relay(logging.Handler):
    """Sends the log's lines along with everything else. Sockets belong to one thread: lines of others stay on stderr."""

    def __init__(self, send: Callable[[wire.FromEngine], None]) -> None:
        super().__init__(logging.INFO)
        self._send = send
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if threading.get_ident() == self._thread:
            self._send(wire.Said(record.created, record.levelno, record.name.rpartition(".")[2], record.getMessage()))


class EngineLoop:
    """inbox → engine.step() → outbox, until told to stop."""

    def __init__(self, directory: str, config: EngineConfig) -> None:
        context = zmq.Context()
        self._config = config
        self._inbox = context.socket(zmq.PULL)
        self._inbox.connect(wire.address(directory, wire.INBOX))
        self._outbox = context.socket(zmq.PUSH)
        self._outbox.setsockopt(zmq.LINGER, 1000)
        self._outbox.setsockopt(zmq.SNDHWM, 0)
        self._outbox.connect(wire.address(directory, wire.OUTBOX))
        self._heart = Heart(context, directory)

    def run(self) -> int:
        """Load, announce, serve. Returns the process's exit code."""
        self._heart.start()
        relay = Relay(self._send)
        for name in ("ws", "workstation"):
            logging.getLogger(name).addHandler(relay)
        try:
            from workstation.engine.start import build_engine  # torch, seconds: only after the first beat

            self._engine = build_engine(self._config, self._progress)
        except StartupError as error:
            self._send(wire.StartFailed(type(error).__name__, error.message, error.param))
            return error.exit_code
        self._send(wire.Ready(self._engine.info))
        try:
            with calm_collector(freeze=True):
                self._serve()
        except Exception as error:
            log.exception("the engine failed")
            self._send(wire.Crashed(f"{type(error).__name__}: {error}"))
            return 1
        return 0

    def _progress(self, stage: Stage, done: int, total: int) -> None:
        self._send(wire.Loading(stage, done, total))

    def _send(self, message: wire.FromEngine) -> None:
        self._outbox.send(wire.encode(message))

    def _serve(self) -> None:
        seen = 0.0
        while self._receive():
            if self._engine.has_work:
                self._heart.step_began = time.monotonic()
                events = self._engine.step()
                if events:
                    self._send(wire.step(events))
                for request_id, error in self._engine.refused():
                    self._refuse(request_id, error)
            else:
                self._heart.step_began = 0.0
            now = time.monotonic()
            if now - seen >= BEAT_SECONDS or not self._engine.has_work:
                self._heart.stats = self._engine.stats()
                seen = now

    def _receive(self) -> bool:
        """Take all messages that have arrived; wait for one when idle. False: shut down."""
        if not self._engine.has_work:
            self._inbox.poll(IDLE_POLL_MS)
        while True:
            try:
                message = wire.decode_to_engine(self._inbox.recv(zmq.NOBLOCK))
            except zmq.Again:
                return True
            if isinstance(message, wire.Submit):
                self._submit(message)
            elif isinstance(message, wire.Abort):
                events = self._engine.abort(message.request_id, message.index)
                if events:
                    self._send(wire.step(events))
            elif isinstance(message, wire.Ask):
                self._send(wire.Shown(self._engine.look(message.look)))
            else:
                return False

    def _submit(self, message: wire.Submit) -> None:
        try:
            self._engine.submit(message.request)
        except WorkstationError as error:
            self._refuse(message.request.request_id, error)

    def _refuse(self, request_id: str, error: WorkstationError) -> None:
        self._send(wire.Refused(request_id, type(error).__name__, error.message, error.param))


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent is gone, and check that it is not gone already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)


def main() -> int:
    """Arguments: private directory, parent's pid; the configuration comes as JSON in the directory."""
    directory, parent = sys.argv[1], int(sys.argv[2])
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    config = msgspec.json.decode((Path(directory) / "config.json").read_bytes(), type=EngineConfig)
    if config.num_threads is None and config.device == "cpu":
        config = dataclasses.replace(config, num_threads=server_threads())
    return EngineLoop(directory, config).run()


if __name__ == "__main__":
    sys.exit(main())
