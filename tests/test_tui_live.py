"""The dashboard on a real `ws serve demo` under load, and servers in the background: started, watched, stopped."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from subprocess import Popen, run
from typing import Any

import httpx
import pytest
from servers import when_ready
from textual.pilot import Pilot

from workstation import runtime
from workstation.cli import detached
from workstation.cli.detached import Detached, arguments
from workstation.cli.main import main
from workstation.errors import StartupError
from workstation.runtime import RunningServer
from workstation.tui.app import LEAVE, STOP, Dashboard
from workstation.tui.client import Client
from workstation.tui.screens import Choice, Question

# Long enough for a slow screen to see it run.
TALK = {"model": "demo", "max_tokens": 4000, "ignore_eos": True, "stream": True,
        "messages": [{"role": "user", "content": "Copy this: " + "the quick brown fox " * 20}]}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Popen[bytes], RunningServer]]:
    log = tmp_path_factory.mktemp("live") / "log"
    command = [sys.executable, "-m", "workstation.cli.main", "serve", "demo", "--port", "0", "--device", "cpu",
               "--num-threads", "1", "--kv-cache-memory-bytes", "256M"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WS_")}
    with log.open("wb") as file:
        process = Popen(command, stdout=file, stderr=file, env=environment)
    try:
        yield process, when_ready(process, log)
    finally:
        process.kill()
        process.wait(60)


async def until(pilot: Pilot[str], true: Callable[[], bool]) -> None:
    """Wait for something that the next frames bring."""
    for _ in range(4000):
        if true():
            return
        await pilot.pause(0.02)
    raise AssertionError("it never came")


def text_of(app: Dashboard) -> str:
    strips = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in strip) for strip in strips)


def under_load(url: str, count: int, test: Callable[[Dashboard, Pilot[str], httpx.AsyncClient], Awaitable[None]]) -> None:
    """Drive a dashboard while `count` streams run; they end when the test does."""

    async def stream(client: httpx.AsyncClient, name: str) -> str:
        async with client.stream("POST", "/v1/chat/completions", json=TALK, headers={"x-client": name}) as answer:
            return (await answer.aread()).decode()

    async def go() -> None:
        source = Client(url)
        app = Dashboard(source, rate=10)
        async with httpx.AsyncClient(base_url=url, timeout=100) as client:
            streams = [asyncio.ensure_future(stream(client, f"client-{number}")) for number in range(count)]
            try:
                async with app.run_test(size=(120, 40)) as pilot:
                    await until(pilot, lambda: len(app.canvas.table.ids) == count)
                    await test(app, pilot, client)
            finally:
                for item in streams:
                    item.cancel()
                await asyncio.gather(*streams, return_exceptions=True)
                await source.close()

    asyncio.run(asyncio.wait_for(go(), 110))


def metric(text: str, name: str) -> int:
    found = re.search(rf"^{re.escape(name)}(?:{{[^}}]*}})? ([\d.]+)", text, re.MULTILINE)
    assert found is not None, name
    return int(float(found[1]))


def test_the_numbers_on_screen_are_those_of_stats_and_of_metrics(demo: tuple[Popen[bytes], RunningServer]) -> None:
    async def test(app: Dashboard, pilot: Pilot[str], client: httpx.AsyncClient) -> None:
        await until(pilot, lambda: all(row["state"] == "decode" for row in app.newest.requests) if app.newest else False)
        metrics = ""
        while not metrics or metric(metrics, "ws:num_requests_running") != 3:  # /metrics is the engine's last heartbeat
            await pilot.pause(0.05)
            metrics = (await client.get("/metrics")).text
        stats = (await client.get("/stats")).json()
        await pilot.press("space")
        await until(pilot, lambda: app.frozen and "FROZEN" in text_of(app))
        assert app.newest is not None
        data, total = app.newest.data, metric(metrics, "ws:cache_config_info") and stats["blocks"]["total"]
        assert stats["batch"]["running"] == data["batch"]["running"] == 3 and data["blocks"]["total"] == total
        wanted = ["3 running 0 waiting", f"rows 3/{data['model']['max_num_seqs']}", f"{total:,} × 16 tokens"]
        wanted += [word for row in data["requests"] for word in (row["client"], row["id"][-8:])]
        # A busy machine draws a frame late; numbers stand at fixed places.
        await until(pilot, lambda: all(word in re.sub(" +", " ", text_of(app)) for word in wanted))
        assert {row["id"] for row in stats["requests"]} == set(app.canvas.table.ids)

    under_load(demo[1].base_url, 3, test)


def test_an_abort_from_the_dashboard_ends_the_request_in_the_engine(demo: tuple[Popen[bytes], RunningServer]) -> None:
    async def test(app: Dashboard, pilot: Pilot[str], client: httpx.AsyncClient) -> None:
        chosen = app.canvas.table.chosen_id
        await pilot.press("x")
        await until(pilot, lambda: isinstance(app.screen, Question))
        await pilot.press("y")
        await until(pilot, lambda: chosen not in app.canvas.table.ids)
        rows = (await client.get("/stats")).json()["requests"]
        assert len(rows) == 1 and rows[0]["id"] != chosen

    under_load(demo[1].base_url, 2, test)


def test_an_engine_that_is_killed_is_restarting_and_then_ready_on_the_screen(
    demo: tuple[Popen[bytes], RunningServer]
) -> None:
    async def test(app: Dashboard, pilot: Pilot[str], client: httpx.AsyncClient) -> None:
        (engine,) = Path(f"/proc/{demo[1].pid}/task/{demo[1].pid}/children").read_text().split()
        os.kill(int(engine), signal.SIGKILL)
        await until(pilot, lambda: "RESTARTING" in text_of(app))
        await until(pilot, lambda: "READY" in text_of(app))
        await until(pilot, lambda: "the engine died" in text_of(app))

    under_load(demo[1].base_url, 1, test)


def test_a_server_that_dies_is_down_on_the_screen_and_one_that_comes_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workstation.tui.app.RETRY_SECONDS", 0.1)
    port = detached.free_port("127.0.0.1", 0)
    given = {"device": "cpu", "num_threads": "1", "kv_cache_memory_bytes": "64M"}
    settings: Any = {"host": "127.0.0.1", "port": port, "hf_token": None}
    server = detached.start("demo", given, settings, ())

    async def go() -> None:
        source = Client(server.base_url)
        app = Dashboard(source, rate=10, owns_server=True, waiting=server.last_word)
        async with app.run_test(size=(80, 24)) as pilot:
            await until(pilot, lambda: "LOADING" in text_of(app))
            await until(pilot, lambda: "READY" in text_of(app))
            server.process.kill()
            server.process.wait()
            await until(pilot, lambda: "DOWN" in text_of(app) and "no server answers" in text_of(app))
            again = detached.start("demo", given, settings, ())
            try:
                await until(pilot, lambda: "READY" in text_of(app))
            finally:
                again.stop()
        await source.close()

    try:
        asyncio.run(asyncio.wait_for(go(), 110))
    finally:
        server.process.kill()


def test_detach_returns_when_the_server_is_ready_and_stop_ends_it() -> None:
    command = [sys.executable, "-m", "workstation.cli.main", "serve", "demo", "--device", "cpu", "--num-threads", "1",
               "--kv-cache-memory-bytes", "64M", "--port", "0", "--detach"]
    done = run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "`ws stop " in done.stderr
    url = re.search(r"http://127\.0\.0\.1:(\d+)", done.stderr)
    assert url is not None and httpx.get(f"{url[0]}/health").status_code == 200
    with pytest.raises(SystemExit) as ended:
        main(["stop", url[1]])
    assert ended.value.code == 0 and url[0] not in [server.base_url for server in runtime.servers()]


def test_a_background_server_that_cannot_start_ends_with_its_own_last_line(tmp_path: Path) -> None:
    settings: Any = {"host": "127.0.0.1", "port": 0, "hf_token": None}
    server = detached.start(str(tmp_path), {"device": "cpu"}, settings, ())
    with pytest.raises(StartupError, match=r"config\.json"):
        server.wait_ready()


def test_the_background_servers_command_line_says_what_was_typed_but_no_secret() -> None:
    given = {"max_model_len": "32k", "api_key": ["secret"], "hf_token": "secret", "access_log": True,
             "enable_prefix_caching": False, "served_model_name": ["a", "b"], "port": "0", "seed": None}
    words = arguments("demo", given, 8123)
    assert words[0] == "demo" and words[-1] == "--port=8123" and "secret" not in " ".join(words)
    assert {"--max-model-len=32k", "--access-log", "--no-enable-prefix-caching", "--served-model-name=a",
            "--served-model-name=b"} <= set(words)


def test_dashboard_and_detach_together_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "demo", "--port", "0", "--dashboard", "--detach"])
    assert ended.value.code == 2 and "give one" in capsys.readouterr().err


def test_a_dashboard_without_a_terminal_starts_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "demo", "--port", "0", "--dashboard"])
    assert ended.value.code == 1 and "terminal" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "result"), [("s", STOP), ("d", LEAVE), ("n", None), ("escape", None)])
def test_q_asks_what_becomes_of_a_server_of_our_own(key: str, result: str | None) -> None:
    async def go() -> None:
        source = Client("http://127.0.0.1:9")
        app = Dashboard(source, rate=10, owns_server=True)
        async with app.run_test(size=(80, 24)) as pilot:
            await pilot.press("q")
            await until(pilot, lambda: isinstance(app.screen, Choice))
            await pilot.press(key)
            await until(pilot, lambda: not isinstance(app.screen, Choice) or not app.is_running)
            await pilot.pause(0.1)
        assert app.return_value == result

    asyncio.run(asyncio.wait_for(go(), 60))


def test_stopping_waits_for_the_servers_end(tmp_path: Path) -> None:
    process = Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    Detached(process, "http://h", tmp_path / "log").stop()
    assert process.poll() is not None


def test_json_is_the_frame_itself(demo: tuple[Popen[bytes], RunningServer], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["top", demo[1].base_url, "--json"])
    printed, whole = json.loads(capsys.readouterr().out), httpx.get(f"{demo[1].base_url}/stats?cells=400").json()
    assert printed["model"] == whole["model"] and printed.keys() == whole.keys()
