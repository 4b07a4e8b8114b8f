"""`ws ps` and `ws stop`: which servers run here, and which one is meant."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from commands import main_ends

from workstation import runtime
from workstation.cli import processes
from workstation.cli.servers import find_server
from workstation.errors import ConfigError
from workstation.runtime import RunningServer


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
