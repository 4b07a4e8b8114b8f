"""The serving process: start, drain, second signal, the engine's death, bad starts, the runtime file."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from fakes import FakeEngine, write_byte_level_folder

from workstation import runtime
from workstation.errors import ConfigError, ModelFolderError, OutOfMemoryError, PortInUseError, WorkstationError
from workstation.server.options import ServerOptions, is_loopback
from workstation.server.serve import bind, run
from workstation.server.served_model import load_served_model

SCRIPT = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from fakes import FakeEngine
from workstation.errors import WorkstationError
from workstation.server.options import ServerOptions
from workstation.server.serve import run
from workstation.server.served_model import load_served_model
engine = FakeEngine(state="starting", **{engine!r})
try:
    run(ServerOptions(port=0, drain_seconds={drain}), engine, lambda: load_served_model({folder!r}, ("fake",)),
        on_ready=lambda server: print(server.base_url, flush=True))
except WorkstationError as error:
    print("error:", error.message, flush=True)
    raise SystemExit(error.exit_code)
print("heavy:", [name for name in ("torch", "transformers") if name in sys.modules], flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level_folder(tmp_path_factory.mktemp("serve"))


@contextmanager
def serving(folder: Path, *, drain: float = 10.0, **engine: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process on a fake engine, and its URL."""
    code = SCRIPT.format(tests=str(Path(__file__).parent), engine=engine, drain=drain, folder=str(folder))
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, what it still said)."""
    out, _ = process.communicate(timeout=30)
    return process.returncode, out


def begin_stream(client: httpx.Client, tokens: int) -> Iterator[str]:
    with client.stream(
        "POST", "/v1/completions", json={"prompt": "hello world", "max_tokens": tokens, "stream": True}
    ) as reply:
        yield from (line for line in reply.iter_lines() if line)


def test_sigterm_lets_streams_finish_and_refuses_new_requests(folder: Path) -> None:
    with serving(folder, delay=0.05) as (process, url), httpx.Client(base_url=url, timeout=20) as client:
        assert [server.base_url for server in runtime.servers()] == [url]
        lines = begin_stream(client, 60)
        next(lines)
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 5
        while httpx.get(f"{url}/health").status_code != 503 and time.monotonic() < deadline:
            time.sleep(0.01)
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "a"})
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        rest = list(lines)
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert end_of(process) == (0, "heavy: []\n")
        assert runtime.servers() == []


@pytest.mark.parametrize("signals", [1, 2], ids=["the limit", "a second signal"])
def test_a_drain_that_lasts_too_long_ends_in_error_events(folder: Path, signals: int) -> None:
    drain = 0.3 if signals == 1 else 60.0
    with serving(folder, drain=drain, delay=0.02) as (process, url), httpx.Client(base_url=url, timeout=20) as client:
        lines = begin_stream(client, 4000)
        next(lines)
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        rest = list(lines)
        assert rest[-1] == "data: [DONE]"
        assert "shut down" in json.loads(rest[-2][6:])["error"]["message"]
        assert end_of(process)[0] == 0


def test_a_dead_engine_ends_the_server_with_its_cause(folder: Path) -> None:
    class Dying(FakeEngine):
        def health(self) -> object:  # type: ignore[override]
            health = super().health()
            if self.state == "ready" and self.seen:
                health.state, health.cause = "dead", "killed by signal 9"
            return health

    engine = Dying(state="starting", delay=0.01)
    said: list[str] = []

    def ready(server: runtime.RunningServer) -> None:
        import threading

        def talk() -> None:
            body = {"prompt": "a", "max_tokens": 4000, "stream": True}
            with httpx.stream("POST", f"{server.base_url}/v1/completions", json=body, timeout=20) as reply:
                said.extend(line for line in reply.iter_lines() if line)

        threading.Thread(target=talk).start()

    with pytest.raises(WorkstationError, match="killed by signal 9") as caught:
        run(ServerOptions(port=0), engine, lambda: load_served_model(folder, ("fake",)), on_ready=ready)
    assert caught.value.exit_code == 1
    deadline = time.monotonic() + 5
    while not (said and said[-1] == "data: [DONE]") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "killed by signal 9" in said[-2]
    assert not engine.active


class NeverReady(FakeEngine):
    async def start(self) -> None:
        raise OutOfMemoryError("the weights need 3 GiB more")


def test_an_engine_that_does_not_start_is_the_error(folder: Path) -> None:
    engine = NeverReady(state="starting")
    with pytest.raises(OutOfMemoryError, match="3 GiB"):
        run(ServerOptions(port=0), engine, lambda: load_served_model(folder, ("fake",)))
    assert engine.state == "dead"  # it was stopped


def test_a_broken_folder_stops_the_start(tmp_path: Path) -> None:
    engine = FakeEngine(state="starting")
    with pytest.raises(ModelFolderError):
        run(ServerOptions(port=0), engine, lambda: load_served_model(tmp_path / "missing", ("fake",)))
    assert engine.state == "dead"


def test_a_taken_port_is_named_before_anything_loads(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"port {port} on 127.0.0.1 is taken"):
            run(ServerOptions(port=port), FakeEngine(), lambda: pytest.fail("loaded"))


def test_a_bound_port_answers_nobody_until_the_engine_is_ready() -> None:
    with bind("127.0.0.1", 0) as sock, pytest.raises(ConnectionRefusedError):
        socket.create_connection(sock.getsockname(), timeout=2)


def test_the_network_is_not_served_without_a_key() -> None:
    with pytest.raises(ConfigError, match="without an API key"):
        run(ServerOptions(host="0.0.0.0", port=0), FakeEngine(), lambda: pytest.fail("loaded"))


def test_an_address_that_is_not_ours_is_a_config_error() -> None:
    for host in ("203.0.113.7", "no such host.invalid"):
        with pytest.raises(ConfigError):
            bind(host, 0)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("example.org", False),
        ("127.8.9.1", True),
    ],
)
def test_loopback_addresses_are_known(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


def test_default_sampling_and_eos_come_from_the_folder(tmp_path: Path) -> None:
    folder = write_byte_level_folder(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "temperature": 0.25, "top_k": 40}))
    model = load_served_model(folder, ("m",), sampling={"top_k": 5})
    assert model.eos_token_ids == (2, 0)
    assert dict(model.default_sampling) == {"temperature": 0.25, "top_k": 5}
    assert dict(load_served_model(folder, ("m",), use_generation_config=False).default_sampling) == {}


def test_without_generation_config_the_tokenizers_eos_ends_a_sample(tmp_path: Path) -> None:
    model = load_served_model(write_byte_level_folder(tmp_path), ("m",))
    assert model.eos_token_ids == (model.tokenizer.eos_token_id,)
    assert load_served_model(tmp_path, ("m",), config_eos=(7,)).eos_token_ids == (7,)


def test_a_runtime_file_is_private_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    server = runtime.describe("0.0.0.0", 8000, "demo")
    path = runtime.write(server)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert set(json.loads(path.read_text())) == {"pid", "host", "port", "model", "base_url", "started", "start_ticks", "state",
                                                  "folder", "form"}
    assert server.base_url == "http://127.0.0.1:8000"
    assert runtime.servers() == [server]
    runtime.remove(path)
    assert runtime.servers() == []


def test_a_runtime_file_without_a_state_is_a_ready_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = runtime.write(runtime.describe("127.0.0.1", 8000, "demo"))
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "state"}))
    assert [server.state for server in runtime.servers()] == ["ready"]


def test_files_of_dead_servers_are_cleaned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    alive = runtime.describe("127.0.0.1", 8000, "demo")
    dead = runtime.RunningServer(done.pid, "127.0.0.1", 8001, "demo", "http://127.0.0.1:8001", 1.0, 1)
    reused = runtime.RunningServer(os.getpid(), "127.0.0.1", 8002, "demo", "http://127.0.0.1:8002", 1.0, alive.start_ticks + 1)
    paths = [runtime.write(server) for server in (alive, dead, reused)]
    (paths[0].parent / "1-1.json").write_text("not json")
    assert runtime.servers() == [alive]
    assert [path.exists() for path in paths] == [True, False, False]


def test_without_a_runtime_dir_the_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert runtime.place() == tmp_path / "ws" / "run"
