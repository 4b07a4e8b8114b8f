"""A server in a process of its own, in the background: `ws serve --detach` leaves it there, `--dashboard` watches it."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workstation.cli.plan import note
from workstation.cli.serve_settings import SERVE_SETTINGS
from workstation.errors import StartupError, WorkstationError
from workstation.runtime import RunningServer, servers
from workstation.settings import Settings

POLL_SECONDS = 0.1
LAST_LINES = 12
STOP_SECONDS = 60.0
# Flags whose value every user of the machine could read in the list of processes, and the variable that hides it.
SECRETS = {"api_key": "WS_API_KEY", "hf_token": "WS_HF_TOKEN"}


def log_folder() -> Path:
    """`$XDG_STATE_HOME/ws`, else `~/.local/state/ws`."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "ws"


def arguments(model: str, given: Mapping[str, Any], port: int) -> list[str]:
    """The command line that says what `given` says (settings as they were typed), secrets left out."""
    words = [model]
    for setting in SERVE_SETTINGS:
        value = given.get(setting.name)
        if value is None or setting.name in SECRETS or setting.name == "port":
            continue
        if setting.kind == "bool":
            words.append(setting.flag if value else f"--no-{setting.flag[2:]}")
        else:
            words += [f"{setting.flag}={item}" for item in (value if isinstance(value, list) else [value])]
    return [*words, f"--port={port}"]


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0: a dashboard must know where to look before the server is ready."""
    if port:
        return port
    from workstation.server.serve import bind

    with bind(host, 0) as sock:
        found: int = sock.getsockname()[1]
    return found


@dataclass(slots=True)
class Detached:
    """A server that was started in the background.

    Attributes:
        base_url: where it answers on this machine.  log: the file that takes what it says.
    """

    process: subprocess.Popen[bytes]
    base_url: str
    log: Path

    def wait_ready(self) -> RunningServer:
        """Wait until it answers requests. Raises StartupError with its last words when it ends before."""
        while True:
            found = [server for server in servers()
                     if server.pid == self.process.pid and server.state == "ready"]
            if found:
                return found[0]
            if self.process.poll() is not None:
                raise self.ended()
            time.sleep(POLL_SECONDS)

    def last_word(self) -> str:
        """The log's last line: what a server does before it answers, such as a download."""
        lines = self.log.read_text(errors="replace").splitlines()
        return lines[-1].removeprefix("ws: ") if lines else "starting"

    def ended(self) -> WorkstationError:
        """What its end looked like, with the last lines of its log."""
        lines = [line.removeprefix("ws: ") for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        words = "\n".join(lines[-LAST_LINES:]) or f"it exited with code {self.process.returncode}"
        error = StartupError(f"the server ended: {words}")
        error.exit_code = self.process.returncode or 1
        return error

    def stop(self) -> None:
        """Let it finish the requests in flight and go. Raises StartupError when it does not go in time."""
        from workstation.cli.processes import end

        end(self.process.pid, now=False)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise StartupError(f"the server (pid {self.process.pid}) still runs; `ws stop --now` ends its requests") from None


def start(model: str, given: Mapping[str, Any], settings: Settings, keys: tuple[str, ...]) -> Detached:
    """Start the server in a session of its own, so that it outlives this terminal. Raises StartupError."""
    port = free_port(settings["host"], settings["port"])
    log = log_folder() / f"serve-{port}.log"
    environment = dict(os.environ)
    environment.update({SECRETS["api_key"]: ",".join(keys)} if keys else {})
    environment.update({SECRETS["hf_token"]: settings["hf_token"]} if settings["hf_token"] else {})
    command = [sys.executable, "-m", "workstation.cli.main", "serve", *arguments(model, given, port)]
    try:
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment,
                                       start_new_session=True)
    except OSError as error:
        raise StartupError(f"the server cannot be started with its log in {log}: {error.strerror}") from error
    return Detached(process, f"http://{_shown(settings['host'])}:{port}", log)


def _shown(host: str) -> str:
    """The host as a client on this machine writes it."""
    if host in ("0.0.0.0", ""):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host and not _is_name(host) else host


def _is_name(host: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6, host)
    except OSError:
        return True
    return False


def leave(server: Detached) -> None:
    """`--detach`: wait until it is ready, say where it is, and go. Ctrl-C while it loads stops it."""
    try:
        ready = server.wait_ready()
    except KeyboardInterrupt:
        server.stop()
        raise
    note(f"{ready.model} is ready at {ready.base_url}/v1 (pid {ready.pid}); its log is {server.log}; `ws top` shows it, "
         f"`ws stop {ready.port}` stops it")


def watch(server: Detached, key: str | None) -> None:
    """`--dashboard`: show the server from its first byte; leaving asks whether it stops or goes on."""
    from workstation.tui.app import STOP

    answer = asyncio.run(_show(server, key))
    if server.process.poll() is not None:
        raise server.ended()
    if answer == STOP:
        note("stopping; requests in flight finish")
        server.stop()
    else:
        note(f"the server goes on at {server.base_url} (pid {server.process.pid}); its log is {server.log}; `ws top` shows it, "
             f"`ws stop` stops it")


async def _show(server: Detached, key: str | None) -> str | None:
    from workstation.tui.app import LEAVE, Dashboard
    from workstation.tui.client import Client

    client = Client(server.base_url, key)
    app = Dashboard(client, owns_server=True, waiting=server.last_word)

    async def end_with_the_server() -> None:
        while server.process.poll() is None:
            await asyncio.sleep(POLL_SECONDS)
        app.exit(LEAVE)

    watching = asyncio.ensure_future(end_with_the_server())
    try:
        return await app.run_async()
    finally:
        watching.cancel()
        await client.close()
