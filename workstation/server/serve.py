"""`run`: from options to a serving process and back. Signals, draining, the runtime file, the engine's death."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

import uvicorn

from workstation import runtime
from workstation.collector import calm_collector
from workstation.engine.client import EngineClient
from workstation.errors import ConfigError, EngineDeadError, OverloadedError, PortInUseError, StartupError
from workstation.runtime import RunningServer
from workstation.server.app import create_app
from workstation.server.door import loading_door
from workstation.server.gate import Gate
from workstation.server.log_book import LogBook
from workstation.server.options import ServedModel, ServerOptions
from workstation.server.protocol import limited_protocol

log = logging.getLogger("workstation.server")
ENGINE_WATCH_SECONDS = 0.25
LAST_WORDS_SECONDS = 2.0


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address but not listening yet: the port is ours before anything is loaded.

    Raises PortInUseError or ConfigError naming address and cure.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise ConfigError(f"host {host!r} is not an address of this machine: {error.strerror}", param="host") from error
    made = socket.socket(family, kind, proto)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(f"port {port} on {host} is taken; stop the program that holds it or choose another --port",
                                 param="port") from error
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}", param="host") from error
    return made


def run(options: ServerOptions, engine: EngineClient, load_model: Callable[[], ServedModel], *, name: str = "",
        folder: str = "", form: str = "", book: LogBook | None = None,
        on_ready: Callable[[RunningServer], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT; returns after a clean drain.

    While the engine loads the port answers 503, and `/stats` with the progress; the runtime file is there from then on.

    Args:
        engine: not started yet.  load_model: called in a thread while the engine loads.
        name: of the model, for those who watch it load.  folder, form: of its weights, for the runtime file.
        book: what `/stats/log` answers.
        on_ready: called once requests are answered.

    Raises StartupError (nothing was served) or EngineDeadError (the engine could not be kept alive).
    """
    if not options.loopback and not options.api_keys:
        raise ConfigError(f"listening on {options.host} without an API key would open the model to the network",
                          param="api_key")
    sock = bind(options.host, options.port)
    try:
        host, port = sock.getsockname()[:2]
        record = runtime.describe(host, port, name, "loading", folder=folder, form=form)
        uvloop_run(Serving(options, engine, load_model, sock, on_ready, record, book or LogBook()).run())
    finally:
        sock.close()


def uvloop_run(work: Coroutine[Any, Any, None]) -> None:
    """asyncio.run, on uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(work)
    else:
        uvloop.run(work)


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handlers: draining is ours, and it would re-raise the signal after shutdown."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Serving:
    """One serving run: start, serve, drain, stop."""

    def __init__(self, options: ServerOptions, engine: EngineClient, load_model: Callable[[], ServedModel],
                 sock: socket.socket, on_ready: Callable[[RunningServer], None] | None, record: RunningServer,
                 book: LogBook) -> None:
        self._options = options
        self._engine = engine
        self._load_model = load_model
        self._sock = sock
        self._on_ready = on_ready
        self._record = record
        self._book = book
        self._door = loading_door(engine, record.model, options, book)
        self._first_signal = asyncio.Event()
        self._second_signal = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        server = self._uvicorn()
        serving = asyncio.ensure_future(server.serve(sockets=[self._sock]))
        try:
            await self._until_listening(server, serving)
            await self._known(serving)
        finally:
            server.should_exit = True
            await asyncio.wait({serving}, timeout=10)
            server.force_exit = True
            await asyncio.gather(serving, return_exceptions=True)
            await self._engine.stop()

    async def _known(self, serving: asyncio.Future[None]) -> None:
        """Load and serve, with the runtime file there meanwhile."""
        path = runtime.write(self._record)
        try:
            model = await self._start()
            if model is not None:
                await self._serve(model, serving, replace(self._record, model=model.name, state="ready"))
        finally:
            runtime.remove(path)

    def _uvicorn(self) -> _Uvicorn:
        options = self._options
        made = _Uvicorn(uvicorn.Config(
            self._door, http=limited_protocol(options.max_header_bytes, options.header_timeout), ws="none", lifespan="on",
            log_level="warning", access_log=options.access_log, limit_concurrency=options.max_connections,
            timeout_keep_alive=75, timeout_graceful_shutdown=5, server_header=False, date_header=True, proxy_headers=False))
        if options.access_log:
            logging.getLogger("uvicorn.access").setLevel(logging.INFO)  # log_level above silenced it with the rest
        return made

    def _signalled(self) -> None:
        (self._second_signal if self._first_signal.is_set() else self._first_signal).set()

    async def _start(self) -> ServedModel | None:
        """Engine and tokenizer load side by side; None when a signal came first."""
        model = asyncio.ensure_future(asyncio.to_thread(self._load_model))
        engine = asyncio.ensure_future(self._engine.start())
        stopped = asyncio.ensure_future(self._first_signal.wait())
        waiting: set[asyncio.Future[Any]] = {model, engine, stopped}
        try:
            while not (model.done() and engine.done()):
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if stopped in done:
                    return None
                for item in done:
                    item.result()  # a failure of either ends the start at once
            return model.result()
        finally:
            for task in (model, engine, stopped):
                task.cancel()
            await asyncio.gather(engine, stopped, return_exceptions=True)

    async def _serve(self, model: ServedModel, serving: asyncio.Future[None], record: RunningServer) -> None:
        """Open the door and stay until the end."""
        app = create_app(self._engine, model, self._options, self._book)
        self._door.open(app, app.state.api.close)
        runtime.write(record)
        log.info("%s is ready at %s", model.name, record.base_url)
        if self._on_ready is not None:
            self._on_ready(record)
        with calm_collector(freeze=True):
            await self._until_end(serving, app.state.api.gate)

    async def _until_listening(self, server: uvicorn.Server, serving: asyncio.Future[None]) -> None:
        while not server.started:
            if serving.done():
                error = serving.exception() if not serving.cancelled() else None
                raise StartupError(f"the HTTP server did not start: {error or 'no cause known'}")
            await asyncio.sleep(0.01)

    async def _until_end(self, serving: asyncio.Future[None], gate: Gate) -> None:
        """Wait for a signal (then drain) or the engine's final death (then raise)."""
        signalled = asyncio.ensure_future(self._first_signal.wait())
        dead = asyncio.ensure_future(self._engine_dead())
        try:
            ends: set[asyncio.Future[Any]] = {signalled, dead, serving}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if signalled.done():
                await self._drain(gate)
            elif dead.done():
                gate.drain()
                error = EngineDeadError(f"the engine could not be kept alive: {dead.result()}")
                gate.cut(error)
                await _at_most(gate.empty(), LAST_WORDS_SECONDS)
                raise error
        finally:
            for task in (signalled, dead):
                task.cancel()
            await asyncio.gather(signalled, dead, return_exceptions=True)

    async def _engine_dead(self) -> str:
        while self._engine.health().state != "dead":
            await asyncio.sleep(ENGINE_WATCH_SECONDS)
        return self._engine.health().cause or "no cause known"

    async def _drain(self, gate: Gate) -> None:
        """Admit nobody, let those inside finish; on the limit or a second signal tell them and go."""
        gate.drain()
        log.info("draining %d requests", gate.in_flight)
        empty = asyncio.ensure_future(gate.empty())
        again = asyncio.ensure_future(self._second_signal.wait())
        ends: set[asyncio.Future[Any]] = {empty, again}
        await asyncio.wait(ends, timeout=self._options.drain_seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in (empty, again):
            task.cancel()
        gate.cut(OverloadedError("the server was shut down before this request was finished", retry_after=10))
        await _at_most(gate.empty(), LAST_WORDS_SECONDS)


async def _at_most(work: Coroutine[Any, Any, None], seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(work, seconds)
