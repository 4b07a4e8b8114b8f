"""`ws ps` and `ws stop`: the servers of this machine, through the runtime files they leave."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workstation.errors import ConfigError, StartupError

if TYPE_CHECKING:
    from workstation.runtime import RunningServer

_POLL_S = 0.1


def ps(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the servers that run on this machine, those that still load with how far they are."""
    from workstation.cli.models import print_columns
    from workstation.runtime import servers

    rows = [_row(server) for server in servers()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    names = ("pid", "model", "url", "state", "uptime")
    shown = [row | {"state": _with_percentage(row["state"], row["progress"])} for row in rows]
    print_columns([name.upper() for name in names], [[str(row[name]) for name in names] for row in shown])


def _row(server: RunningServer) -> dict[str, Any]:
    state, progress = _state(server.base_url)
    return {
        "pid": server.pid, "model": server.model, "url": server.base_url, "state": state, "progress": progress,
        "uptime": duration(time.time() - server.started),
    }  # fmt: skip


def _with_percentage(state: str, progress: float | None) -> str:
    return state if progress is None else f"{state} {math.floor(100 * progress)} %"


def _state(url: str) -> tuple[str, float | None]:
    """What /health says, within two seconds, and the share of the weights that is read while they load."""
    import httpx

    from workstation.cli.servers import root_of

    try:
        answer = httpx.get(f"{root_of(url)}/health", timeout=2.0)
    except httpx.HTTPError:
        return "no answer", None
    if answer.status_code == 200:
        return "ready", None
    try:
        said = answer.json()
        state, progress = said["status"], said.get("progress")
    except (ValueError, KeyError, TypeError, AttributeError):
        return "not ready", None
    return {"starting": "loading"}.get(state, str(state)), progress if isinstance(progress, (int, float)) else None


def duration(seconds: float) -> str:
    """Such as 45s, 12m, 3h05m, 2d04h."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def stop(
    which: Annotated[str | None, typer.Argument(help="Model, port or pid; needed when several servers run.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Stop all of them.")] = False,
    now: Annotated[bool, typer.Option("--now", help="End requests in flight at once.")] = False,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for the end.")] = 60.0,
) -> None:
    """Stop a server: it finishes the requests in flight, then exits."""
    from workstation.runtime import servers

    chosen = choose(servers(), which, every)
    for server in chosen:
        end(server.pid, now=now)
    deadline = time.monotonic() + timeout
    for server in chosen:
        if not gone(server.pid, deadline):
            raise StartupError(f"{server.model} (pid {server.pid}) still runs after {timeout:g} s; --now ends its requests")
        typer.echo(f"stopped {server.model} (pid {server.pid})")


def choose(running: list[RunningServer], which: str | None, every: bool) -> list[RunningServer]:
    """The servers that are meant. Raises StartupError when there is none, ConfigError when it is not clear which."""
    if not running:
        raise StartupError("no server runs here")
    if every:
        return running
    known = ", ".join(f"{server.model} (port {server.port}, pid {server.pid})" for server in running)
    if which is None:
        if len(running) == 1:
            return running
        raise ConfigError(f"several servers run here; name one, or give --all: {known}", param="which")
    found = [server for server in running if which in (server.model, str(server.port), str(server.pid))]
    if not found:
        raise ConfigError(f"no server here is called {which!r}; running: {known}", param="which")
    if len(found) > 1:
        raise ConfigError(f"{which!r} fits several servers; name the port or pid: {known}", param="which")
    return found


def end(pid: int, *, now: bool) -> None:
    """SIGTERM, which drains; a second one, a moment later, ends what is in flight."""
    try:
        os.kill(pid, signal.SIGTERM)
        if now:
            time.sleep(_POLL_S)
            os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    except PermissionError:
        raise StartupError(f"pid {pid} belongs to another user") from None


def gone(pid: int, deadline: float) -> bool:
    """Wait until the process has ended or the deadline (time.monotonic) has passed."""
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        if _is_zombie(pid):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)


def _is_zombie(pid: int) -> bool:
    """Ended, but its parent has not asked how: /proc/PID/stat says Z after the name in parentheses."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False
