"""Which servers run on this machine: each leaves a small file that `ws ps`, `ws stop` and `ws chat` find. No secrets in it."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from workstation.errors import StartupError


@dataclass(frozen=True, slots=True)
class RunningServer:
    """Attributes:
        pid: of the API process.  start_ticks: when that process began (clock ticks since boot), so that a reused pid is
            not mistaken for it; 0 where unknown.
        base_url: for clients on this machine, without /v1.  started: Unix seconds.
        state: "loading" from the moment the port is open, "ready" once requests were answered.
        folder, form: of its weights, as `ws estimate` names the form; "" where unknown.
    """

    pid: int
    host: str
    port: int
    model: str
    base_url: str
    started: float
    start_ticks: int = 0
    state: str = "ready"
    folder: str = ""
    form: str = ""


def describe(host: str, port: int, model: str, state: str = "ready", *, folder: str = "", form: str = "") -> RunningServer:
    """This process as a running server."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    began = _start_ticks(os.getpid())
    return RunningServer(os.getpid(), host, port, model, f"http://{shown}:{port}", time.time(), began, state,
                         folder, form)


def place() -> Path:
    """`$XDG_RUNTIME_DIR/ws`, else `~/.cache/ws/run`."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base:
        return Path(base) / "ws"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "ws" / "run"


def write(server: RunningServer) -> Path:
    """Leave the file, readable by this user only, or replace this server's earlier one.

    Raises StartupError when the folder cannot be used.
    """
    folder = place()
    path = folder / f"{server.pid}-{server.port}.json"
    draft = path.with_suffix(".tmp")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(server), file)
        draft.replace(path)
    except OSError as error:
        raise StartupError(f"cannot write the runtime file {path}: {error.strerror}") from error
    return path


def remove(path: Path) -> None:
    """Take the file away; a missing one is fine."""
    with contextlib.suppress(OSError):
        path.unlink()


def servers() -> list[RunningServer]:
    """Servers that live, oldest first, those that still load among them. Files of dead ones are removed."""
    found = []
    for path in sorted(place().glob("*.json")) if place().is_dir() else []:
        server = _read(path)
        if server is None:
            continue
        if alive(server):
            found.append(server)
        else:
            remove(path)
    return sorted(found, key=lambda server: server.started)


def alive(server: RunningServer) -> bool:
    """Whether the process that wrote the file still runs."""
    try:
        os.kill(server.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not server.start_ticks or _start_ticks(server.pid) in (0, server.start_ticks)


def _read(path: Path) -> RunningServer | None:
    """None for a file that is not ours to understand."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        kinds: dict[str, tuple[type, ...]] = {"int": (int,), "str": (str,), "float": (int, float)}
        given = {item.name: value.get(item.name, item.default) for item in fields(RunningServer)}
        if not all(isinstance(given[item.name], kinds[str(item.type)]) for item in fields(RunningServer)) or given["pid"] <= 0:
            return None
        return RunningServer(**given)
    except (OSError, ValueError, AttributeError):
        return None


def _start_ticks(pid: int) -> int:
    """Field 22 of /proc/PID/stat; 0 where there is no such file."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[19])
