"""Markers, and a clean environment for every test."""

from __future__ import annotations

import os

import pytest

LONGEST = "test_interpreted.py"  # begun first, while another worker does the rest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads than cores wait for each other


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`gpu` tests need CUDA; `long` tests run only when `-m` names them."""
    if "long" not in (config.option.markexpr or ""):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    items.sort(key=lambda item: item.path.name != LONGEST)
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if wanting and not _has_gpu():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="gpu: no usable NVIDIA GPU"))


@pytest.fixture
def no_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences are begun wherever they fit for now, so that a small pool preempts."""
    monkeypatch.setattr("workstation.engine.forecast.Forecast.fits", lambda *_: True)


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
