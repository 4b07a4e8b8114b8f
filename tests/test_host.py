"""What the process asks of its host: here, of the GPU's driver."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from workstation.engine.host import CU_LIMIT_STACK_SIZE, release_stacks


def test_the_driver_is_asked_to_keep_no_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    driver = SimpleNamespace(cuCtxSetLimit=lambda limit, size: asked.append((limit, size.value)))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    release_stacks()
    assert asked == [(CU_LIMIT_STACK_SIZE, 0)]


def test_a_machine_without_a_driver_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    release_stacks()
