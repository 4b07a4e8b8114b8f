"""Markers, a clean environment for every test, and the Triton kernels' interpreter in the background."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`gpu` tests need CUDA; `long` tests run only when `-m` names them."""
    if "long" not in (config.option.markexpr or ""):
        skip_long = pytest.mark.skip(reason="long: run by `make test-long`")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip_long)
    items.sort(key=lambda item: item.get_closest_marker("interpreted") is not None)  # last: they wait for the background
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if wanting and not _has_gpu():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="gpu: no usable NVIDIA GPU"))


class _Interpreter:
    """Runs files of kernel tests under Triton's interpreter, beside the tests of this process.

    In processes of their own: whether Triton interprets or compiles is settled when it is first imported. All files in
    one, since a start costs seconds; what `-m long` adds in another.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._running: subprocess.Popen[str] | None = None
        self._stopped = False
        self.outcomes: dict[bool, Future[tuple[int, str]]] = {}

    def start(self, files: set[str], *, long: bool) -> None:
        self.outcomes[long] = self._pool.submit(self._run, ["-m", "long" if long else "not long", *sorted(files)])

    def _run(self, arguments: list[str]) -> tuple[int, str]:
        if self._stopped:
            return 1, "not run"
        root = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"TRITON_INTERPRET": "1", "WS_KERNELS": "triton", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        command = [sys.executable, "-m", "pytest", "-q", "-rpfE", "-p", "no:cacheprovider", *arguments]
        self._running = subprocess.Popen(command, cwd=Path(__file__).parent, env=environment, text=True,
                                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said, _ = self._running.communicate()
        return self._running.returncode, said

    def stop(self) -> None:
        self._stopped = True
        if self._running is not None:
            self._running.kill()
        self._pool.shutdown()


_INTERPRETER = pytest.StashKey[_Interpreter]()


def pytest_collection_finish(session: pytest.Session) -> None:
    interpreter = session.config.stash[_INTERPRETER] = _Interpreter()
    wanted: dict[bool, set[str]] = {False: set(), True: set()}
    for item in session.items:
        marker = item.get_closest_marker("interpreted")
        if marker and not item.get_closest_marker("skip"):
            wanted[item.get_closest_marker("long") is not None].update(marker.args)
    for long, files in wanted.items():
        if files and not session.config.option.collectonly:
            interpreter.start(files, long=long)


def pytest_sessionfinish(session: pytest.Session) -> None:
    interpreter = session.config.stash.get(_INTERPRETER, None)
    if interpreter is not None:
        interpreter.stop()


@pytest.fixture
def no_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences are begun wherever they fit for now, so that a small pool preempts."""
    monkeypatch.setattr("workstation.engine.forecast.Forecast.fits", lambda *_: True)


@pytest.fixture(params=["default", pytest.param("long", marks=pytest.mark.long)])
def interpreted(request: pytest.FixtureRequest) -> None:
    """Fails if a test did in the files that the test's `interpreted` marker names, or if none of a file ran."""
    code, said = request.config.stash[_INTERPRETER].outcomes[request.param == "long"].result()
    report = re.sub(r"^PASSED .*\n", "", said, flags=re.MULTILINE)[-7000:]
    assert code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), report
    for file in request.node.get_closest_marker("interpreted").args:
        assert set(re.findall(rf"^([A-Z]+) {re.escape(file)}::", said, re.MULTILINE)) == {"PASSED"}, report


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No setting, catalogue, runtime file or token of the person who runs the tests reaches them."""
    for name in list(os.environ):
        if name.startswith("WS_") and name != "WS_KERNELS":
            monkeypatch.delenv(name)
    home = tmp_path_factory.getbasetemp() / "home"
    for name, folder in (("XDG_CONFIG_HOME", "config"), ("XDG_RUNTIME_DIR", "run"), ("XDG_CACHE_HOME", "cache")):
        path = home / folder
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        monkeypatch.setenv(name, str(path))
    for name in ("HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
