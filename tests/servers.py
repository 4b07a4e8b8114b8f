"""`ws serve demo` in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

from workstation import runtime
from workstation.runtime import RunningServer

PATIENCE_S = 90.0


@contextmanager
def serving_demo(log: Path, *flags: str) -> Iterator[tuple[Popen[bytes], RunningServer]]:
    """A ready server; it must end well."""
    command = [sys.executable, "-m", "workstation.cli.main", "serve", "demo", "--port", "0", "--device", "cpu",
               "--num-threads", "1", "--kv-cache-memory-bytes", "256M", *flags]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WS_")}
    with log.open("wb") as file:
        process = Popen(command, stdout=file, stderr=file, env=environment)
    try:
        yield process, when_ready(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def when_ready(process: Popen[bytes], log: Path) -> RunningServer:
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE_S:
        for server in runtime.servers():
            if server.pid == process.pid and server.state == "ready":
                return server
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())
