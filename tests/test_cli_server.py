"""`ws serve` as a process, with a small random model behind it, and the commands that find and use it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tiny import write_tiny

from workstation import measurements, runtime
from workstation.catalog import demo_folder
from workstation.cli.main import main
from workstation.runtime import RunningServer

TOKENIZER = Path(__file__).parent.parent / "workstation" / "demo" / "model"
PATIENCE_S = 90.0


def launch(folder: Path, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "workstation.cli.main", "serve", str(folder), "--device", "cpu", "--port", "0",
               "--num-threads", "1", "--kv-cache-memory-bytes", "64M", *arguments]  # fmt: skip
    with log.open("wb") as file:
        return subprocess.Popen(command, stderr=file, stdout=file)


def wait_ready(process: subprocess.Popen[bytes], log: Path) -> RunningServer:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found = [server for server in runtime.servers() if server.pid == process.pid and server.state == "ready"]
        if found:
            return found[0]
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(f"not ready after {PATIENCE_S:g} s: {log.read_text()}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_tiny(tmp_path_factory.mktemp("served") / "little", "qwen3", vocab_size=4096, max_position_embeddings=1024)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TOKENIZER / name, place / name)
    return place


@pytest.fixture
def served(folder: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], RunningServer, Path]]:
    log = tmp_path / "serve.log"
    process = launch(folder, log)
    try:
        yield process, wait_ready(process, log), log
    finally:
        process.kill()
        process.wait()


def ws(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_one_server_from_ready_to_stopped(
    served: tuple[subprocess.Popen[bytes], RunningServer, Path], folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WS_NUM_GPU_BLOCKS_OVERRIDE", "100")
    process, server, log = served
    said = log.read_text()
    assert f"little is ready at {server.base_url}/v1" in said and "curl http://127.0.0.1" in said
    assert "libtorch" not in Path(f"/proc/{server.pid}/maps").read_text(), "the API process loaded torch"

    assert ws("ps", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["model"], row["state"], row["url"]) == ("little", "ready", server.base_url)

    greedy = ["--max-tokens", "12", "--temperature", "0"]
    assert ws("chat", "Hello?", *greedy) == 0
    streamed = capsys.readouterr().out
    assert ws("generate", "little", "Hello?", "--url", server.base_url, *greedy) == 0
    whole = capsys.readouterr().out
    assert ws("generate", str(folder), "Hello?", "--device", "cpu", *greedy) == 0
    offline = capsys.readouterr().out
    assert streamed == whole == offline != "\n"

    assert ws("bench", "serve", "--num-prompts", "5", "--input-len", "20", "--output-len", "6", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["completed"], figures["input_tokens"], figures["output_tokens"]) == (5, 100, 30)
    kept = measurements.read()[-1]
    assert (kept.bench, kept.folder, kept.requests) == ("serve", str(folder.resolve()), 5) and kept.form in ("16-bit", "32-bit")

    engine = children(server.pid)
    assert ws("stop") == 0
    assert process.wait(30) == 0
    assert runtime.servers() == []
    assert not [pid for pid in engine if Path(f"/proc/{pid}").exists()]
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.base_url)


def test_a_broken_folder_ends_the_start_with_one_line_and_no_open_port(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    os.truncate(broken / "model.safetensors", 1000)
    log = tmp_path / "serve.log"
    process = launch(broken, log)
    assert process.wait(PATIENCE_S) == 1
    lines = [line for line in log.read_text().splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("ws: ") and "model.safetensors" in lines[0]
    assert runtime.servers() == []


def test_ctrl_c_while_loading_ends_without_a_trace(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    process = launch(folder, log)
    deadline = time.monotonic() + PATIENCE_S
    while not children(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) in (0, 130)
    assert "Traceback" not in log.read_text()


def test_the_bundled_demo_is_where_the_catalogue_says() -> None:
    assert (demo_folder() / "model.safetensors").stat().st_size <= 16 << 20
