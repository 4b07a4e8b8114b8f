"""The tuner of small products, its clock and its oracle replaced: what it tries, keeps, throws away and writes down."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from test_tuning import H200, PRO_6000

from workstation.kernels import tuning
from workstation.kernels.tuning import LIBRARY, Device, GemmConfig, Problem

NOBODY: Any = SimpleNamespace(known={})


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A product takes (64 + splits) µs less its stages, its sum 1 µs, the library 64 µs; six stages are wrong."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    module = importlib.import_module("gemm")

    def clock(bench: Any, config: GemmConfig, repeats: int, *, parts_only: bool = False) -> float:
        return 64.0 + config.splits - config.stages + (config.splits > 1 and not parts_only)

    monkeypatch.setattr(module, "time_config", clock)
    monkeypatch.setattr(module, "time_library", lambda bench, repeats: 64.0)
    monkeypatch.setattr(module, "error_of", lambda bench, config: 0.5 if config.stages == 6 else 1e-3)
    return module


@pytest.mark.parametrize("device", [H200, PRO_6000], ids=lambda device: device.name)
def test_every_problem_has_candidates_and_all_of_them_fit(tuner: ModuleType, device: Device) -> None:
    problems = tuner.problems(list(tuner.SHAPES), tuner.SCHEMES, tuner.ROWS)
    assert len(set(problems)) == len(problems)
    for problem in problems:
        found = tuner.candidates(problem, device)
        if problem.scheme == "int4_halves" and device.capability != 90:
            assert found == []
            continue
        few = problem.scheme == "int4_halves" and problem.k == 1024  # too short for parts
        assert len(found) >= (3 if few else 4) and len(set(found)) == len(found)
        assert found[0] in (tuning.default_config(problem, device), tuning.choose(problem, device))
        assert all(tuning.shared_bytes(problem, config, device.capability) <= device.shared_bytes for config in found)
        assert all(problem.m == 1 for config in found if config.kind == "gemv")


def test_the_fastest_right_configuration_wins(tuner: ModuleType) -> None:
    problem = Problem("fp8", "linear", 8, 4096, 4096)
    configs = [GemmConfig("dot", splits=splits, stages=stages) for stages in (3, 5, 6) for splits in (1, 2)]
    point = tuner.Point(problem)
    tuner.search(point, SimpleNamespace(problem=problem), configs, deadline=float("inf"))
    assert point.config == GemmConfig("dot", splits=1, stages=5) and point.us == 60.0
    assert len(point.wrong) == 2


def test_a_deadline_ends_the_search_after_a_few(tuner: ModuleType) -> None:
    problem = Problem("fp8", "linear", 8, 4096, 4096)
    configs = [GemmConfig("dot", block_k=16 << i, stages=3) for i in range(9)]
    point = tuner.Point(problem)
    tuner.search(point, SimpleNamespace(problem=problem), configs, deadline=0.0)
    assert point.tried == 4 and point.config is not None


@pytest.mark.parametrize(("library", "wins"), [(59.0, False), (50.0, True), (None, False)])
def test_the_library_must_be_clearly_faster(tuner: ModuleType, library: float | None, wins: bool) -> None:
    config = GemmConfig("dot", splits=2)
    point = tuner.Point(Problem("fp8", "silu_mul", 8, 4096, 4096), library, config, us=60.0)
    assert tuner.tuned_rows([point]) == [tuning.make_row(point.problem, LIBRARY if wins else config)]


def test_what_it_writes_is_what_the_choice_reads(tuner: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = GemmConfig("dot", 128, 16, 256, 3, 4, 5)
    points = [tuner.Point(Problem("fp8", "linear", m, 4096, 4096), 60.0, config, 40.0 + m, 1e-3) for m in (1, 8, 32)]
    points[2].us = 70.0
    tuner.write(tmp_path, points, H200, NOBODY)
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    tuning.tuned.cache_clear()
    chosen = [tuning.choose(Problem("fp8", "linear", m, 4096, 4096), H200) for m in (1, 2, 8, 9, 32)]
    tuning.tuned.cache_clear()
    assert chosen == [config, config, config, LIBRARY, LIBRARY]
    assert json.loads((tmp_path / "gemm.json").read_text())["points"][0]["problem"]["m"] == 1
