"""`ws ps`, `ws stop` and `ws top` without a URL: which servers run here, how far, and which is meant."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import main_ends, run
from fakes import FakeEngine

from workstation import runtime
from workstation.cli import processes
from workstation.cli.servers import find_server
from workstation.engine.client import Health, Progress
from workstation.engine.request import EngineStats
from workstation.errors import ConfigError, StartupError
from workstation.runtime import RunningServer
from workstation.server import serve
from workstation.server.options import ServerOptions


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends on SIGTERM, with a runtime file as a server leaves it."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    path = runtime.write(RunningServer(process.pid, "127.0.0.1", 1, "sleepy", "http://127.0.0.1:1", time.time()))
    yield process
    process.kill()
    process.wait()
    runtime.remove(path)


def test_stop_ends_the_only_server_and_waits_for_it(
    sleeper: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    main_ends("stop")
    assert capsys.readouterr().out == f"stopped sleepy (pid {sleeper.pid})\n"
    assert sleeper.wait(10) == -signal.SIGTERM


def test_ps_shows_a_server_that_does_not_answer(
    sleeper: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    main_ends("ps", "--json")
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["pid"], row["model"], row["state"]) == (sleeper.pid, "sleepy", "no answer")


def test_the_running_server_is_found_without_a_url(sleeper: subprocess.Popen[bytes]) -> None:
    assert find_server(None).url == "http://127.0.0.1:1"


def server(pid: int, port: int, model: str) -> RunningServer:
    return RunningServer(pid, "127.0.0.1", port, model, f"http://127.0.0.1:{port}", 0.0)


def test_one_of_several_servers_is_named_by_model_port_or_pid() -> None:
    both = [server(11, 8000, "demo"), server(12, 8001, "llama")]
    assert processes.choose(both, "llama", False) == both[1:]
    assert processes.choose(both, "8000", False) == both[:1]
    assert processes.choose(both, "12", False) == both[1:]
    assert processes.choose(both, None, True) == both


@pytest.mark.parametrize("which", [None, "qwen", "demo"])
def test_an_unclear_name_stops_nothing(which: str | None) -> None:
    both = [server(11, 8000, "demo"), server(12, 8001, "demo")]
    with pytest.raises(ConfigError, match="port 8000, pid 11"):
        processes.choose(both, which, False)


@pytest.mark.parametrize(("seconds", "text"), [(5, "5s"), (61, "1m"), (3 * 3600 + 300, "3h05m"), (90000, "1d01h")])
def test_durations_are_short(seconds: float, text: str) -> None:
    assert processes.duration(seconds) == text


class Loading(FakeEngine):
    """An engine that has read 42 of its 100 bytes, and never gets further than the command typed meanwhile."""

    command: tuple[str, ...] = ()
    code = -1

    def health(self) -> Health:
        return Health(self.state, loading=Progress("weights", 42, 100, 2.0))

    def stats(self) -> EngineStats:
        return EngineStats()

    async def start(self) -> None:
        self.code = await asyncio.to_thread(run, *self.command)
        raise StartupError("seen enough")


def while_loading(*command: str) -> int:
    """The exit code of a command that is typed while a server loads."""
    engine = Loading(state="starting")
    engine.command = command
    with pytest.raises(StartupError, match="seen enough"):
        serve.run(ServerOptions(port=0), engine, lambda: time.sleep(0.01), name="slow")  # type: ignore[arg-type, return-value]
    assert runtime.servers() == []
    return engine.code


def test_ps_shows_how_far_a_loading_server_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert while_loading("ps") == 0
    shown = capsys.readouterr().out
    assert "slow" in shown and "loading 42 %" in shown


def test_ps_as_json_has_the_share_of_the_weights_that_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert while_loading("ps", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["model"], row["state"], row["progress"]) == ("slow", "loading", 0.42)


def test_top_without_a_url_finds_a_loading_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert while_loading("top", "--once") == 0
    shown = capsys.readouterr().out
    assert "slow" in shown and "LOADING  42 %" in shown


def test_chat_says_that_the_only_server_still_loads(capsys: pytest.CaptureFixture[str]) -> None:
    assert while_loading("chat", "Hello?") == 1
    assert "slow at http://127.0.0.1:" in (said := capsys.readouterr().err) and "is still loading" in said


def test_a_server_that_answers_is_preferred_to_one_that_loads(sleeper: subprocess.Popen[bytes]) -> None:
    path = runtime.write(runtime.describe("127.0.0.1", 2, "slow", "loading"))
    assert find_server(None).url == "http://127.0.0.1:1"
    runtime.remove(path)


STUCK = """
import asyncio, sys, time
sys.path.insert(0, {tests!r})
from fakes import FakeEngine
from workstation.server.options import ServerOptions
from workstation.server.serve import run
class Stuck(FakeEngine):
    async def start(self):
        await asyncio.sleep(60)
run(ServerOptions(port=0), Stuck(state="starting"), lambda: None, name="stuck")
"""


def test_stop_ends_a_server_that_still_loads(capsys: pytest.CaptureFixture[str]) -> None:
    process = subprocess.Popen([sys.executable, "-c", STUCK.format(tests=str(Path(__file__).parent))])
    try:
        deadline = time.monotonic() + 60
        while not runtime.servers() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        main_ends("stop", "stuck")
        assert capsys.readouterr().out == f"stopped stuck (pid {process.pid})\n"
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
