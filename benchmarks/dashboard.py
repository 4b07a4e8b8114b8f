"""What the dashboard costs: its first frame, its share of a core, its memory. No GPU and no model are needed.

    python benchmarks/dashboard.py                  # ws top on a pseudo-terminal, watching 65,536 blocks and 64 requests
    python benchmarks/dashboard.py --hour           # an hour of frames (14,400), as fast as they are drawn: does memory grow?

The frames are made up beforehand and served over HTTP by a thread of this process, whose own cost does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import pty
import select
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from dashboard_frames import Load

from workstation.tui.app import Dashboard
from workstation.tui.drawing import Glyphs
from workstation.tui.frame import Frame, parse

KEPT = 64
RATE = 4  # what `ws top` draws unless it is told otherwise
CACHE = tempfile.TemporaryDirectory()  # of bytecode, as an installed package has it


class Answers:
    """Bodies by route, made once for each number of cells; frames follow one another in a ring."""

    def __init__(self, blocks: int, requests: int) -> None:
        self._load = Load(blocks, requests)
        self._frames: dict[int, list[bytes]] = {}
        self._served = 0
        self._logs: list[bytes] = []
        self._details: list[bytes] = []

    def frames(self, cells: int) -> list[bytes]:
        if cells not in self._frames:
            made = []
            for _ in range(KEPT):
                self._load.step()
                made.append(json.dumps(self._load.frame(cells)).encode())
                self._logs.append(json.dumps(self._load.log()).encode())
                self._details.append(json.dumps(self._load.details()).encode())
            self._frames[cells] = made
        return self._frames[cells]

    def body(self, path: str) -> bytes:
        where = urlsplit(path)
        if where.path == "/stats":
            self._served += 1
            return self.frames(int(parse_qs(where.query)["cells"][0]))[self._served % KEPT]
        return (self._logs if where.path == "/stats/log" else self._details)[self._served % KEPT]


def serve(answers: Answers) -> ThreadingHTTPServer:
    """An HTTP server in a thread."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = answers.body(self.path)
            with contextlib.suppress(ConnectionError):  # a dashboard that was closed
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle()

        def log_message(self, *words: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class Terminal:
    """`ws top` on a pseudo-terminal; reads what it draws, as a terminal would."""

    def __init__(self, url: str, size: tuple[int, int], rate: int) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        self.started = time.perf_counter()
        command = [sys.executable, "-m", "workstation.cli.main", "top", url]
        command += ["--rate", str(rate)] if rate != RATE else []
        environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "PYTHONPYCACHEPREFIX": CACHE.name}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self._process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment,
                                         start_new_session=True)
        os.close(slave)
        self.drawn = 0

    def until(self, mark: bytes) -> float:
        """Seconds from the start until these bytes were drawn."""
        seen = b""
        while mark not in seen:
            seen += self._read(10.0)
        return time.perf_counter() - self.started

    def run(self, seconds: float) -> None:
        """Draw for so long."""
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0:
            self._read(left)

    def _read(self, patience: float) -> bytes:
        ready, _, _ = select.select([self._master], [], [], patience)
        data = os.read(self._master, 1 << 16) if ready else b""
        self.drawn += len(data)
        return data

    def cpu(self) -> float:
        """Seconds of CPU so far, of its one thread that counts."""
        return int(Path(f"/proc/{self._process.pid}/schedstat").read_text().split()[0]) / 1e9

    def memory(self) -> int:
        return resident(self._process.pid)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)


def resident(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def mib(size: float) -> str:
    return f"{size / (1 << 20):.1f} MiB"


def watch(answers: Answers, size: tuple[int, int], rate: int, seconds: float, times: int) -> None:
    """First frame, median of `times` starts after one; then one dashboard for as many rounds of some seconds, and their median.

    CPU time is what another process on the same core does not lengthen much; the load average says how many there were.
    """
    server = serve(answers)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    answers.frames(400)
    firsts, spent = [], []
    for number in range(times + 1):
        terminal = Terminal(url, size, rate)
        first = terminal.until(b"READY")
        if number:  # the first one compiles
            firsts.append(first)
            spent.append(terminal.cpu())
        if number < times:
            terminal.close()
    terminal.run(5.0)  # every import is done, every cache filled
    memory, shares, drawn = terminal.memory(), [], []
    for _ in range(times):
        began, cpu, before = time.perf_counter(), terminal.cpu(), terminal.drawn
        terminal.run(seconds)
        took = time.perf_counter() - began
        shares.append((terminal.cpu() - cpu) / took * 100)
        drawn.append((terminal.drawn - before) / took / 1024)
    print(f"{size[0]}x{size[1]} at {rate} Hz, load average {os.getloadavg()[0]:.1f}, {times} times:\n"
          f"  first frame {spread(firsts)} s, {spread(spent)} s of CPU\n"
          f"  {spread(shares)} % of a core in {seconds:.0f} s, {statistics.median(drawn):.1f} KiB/s drawn, "
          f"memory {mib(memory)} then {mib(terminal.memory())}")
    terminal.close()
    server.shutdown()


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


class Ring:
    """A Source of made-up frames, without HTTP: what drawing alone costs."""

    url = "http://127.0.0.1:8000"

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self.taken = 0

    async def frame(self, cells: int, heat: bool = False) -> Frame:
        self.taken += 1
        return parse(self._answers.frames(cells)[self.taken % KEPT])

    async def details(self, request_id: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._answers.body("/stats/requests/x"))
        return answer

    async def log(self, lines: int, level: str = "info") -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self._answers.body("/stats/log"))["lines"]
        return found

    async def blocks(self, first: int, last: int) -> dict[str, Any]:
        return {"blocks": []}

    async def cards(self) -> dict[str, Any]:
        return {"cards": [], "processes": []}

    async def abort(self, request_id: str) -> None:
        return None


async def hour(answers: Answers, size: tuple[int, int], frames: int) -> None:
    """Draw that many frames and print the memory on the way."""
    source = Ring(answers)
    app = Dashboard(source, rate=50, glyphs=Glyphs())
    seen: list[tuple[int, int]] = []
    async with app.run_test(size=size) as pilot:
        for part in range(1, 11):
            while source.taken < frames * part // 10:
                await pilot.pause(0.2)
            seen.append((source.taken, resident(os.getpid())))
            print(f"{seen[-1][0]:>7,} frames: {mib(seen[-1][1])}", flush=True)
    print(f"from frame {seen[0][0]:,} to {seen[-1][0]:,}: {mib(seen[-1][1] - seen[0][1])} more")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=65_536)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rate", type=int, default=RATE)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--times", type=int, default=5, help="starts and rounds, for their medians")
    parser.add_argument("--size", default="120x40,200x60")
    parser.add_argument("--hour", action="store_true")
    parser.add_argument("--frames", type=int, default=14_400)
    given = parser.parse_args()
    answers = Answers(given.blocks, given.requests)
    for text in given.size.split(","):
        width, height = (int(number) for number in text.split("x"))
        if given.hour:
            asyncio.run(hour(answers, (width, height), given.frames))
        else:
            watch(answers, (width, height), given.rate, given.seconds, given.times)


if __name__ == "__main__":
    main()
