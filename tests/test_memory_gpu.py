"""A GPU without memory left: while steps are captured, and in the middle of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Answer, drain, make_engine, run, submit, take
from test_engine import PROMPTS, greedy, prompts_of
from tiny import write_tiny

from workstation.engine.engine import Engine
from workstation.engine.graphs import StepGraphs
from workstation.engine.request import EngineRequest

pytestmark = pytest.mark.gpu
GPU: dict[str, Any] = {"device": "cuda", "dtype": "float32"}
MIB = 2**20


@contextmanager
def room_for(spare: int) -> Iterator[None]:
    """Within: this process gets at most `spare` bytes of device memory more than it holds now."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose steps take much memory: half a mebibyte a token in the feed-forward part."""
    return write_tiny(tmp_path_factory.mktemp("wide") / "model", intermediate_size=65536, num_hidden_layers=1,
                      max_position_embeddings=2048)


def submit_as(engine: Engine, name: str, prompt: list[int]) -> None:
    engine.submit(EngineRequest(name, prompt, greedy(4)))


@pytest.mark.parametrize("overlap", [True, False])
def test_a_step_that_does_not_fit_the_gpu_ends_its_newest_request_and_no_other(wide: Path, overlap: bool) -> None:
    small, large = prompts_of(20, 30, seed=1), prompts_of(1500, seed=2)
    settings = {**GPU, "enforce_eager": True, "overlap": overlap, "max_num_batched_tokens": 2048}
    expected = run(wide, small, greedy(40), **settings)
    engine = make_engine(wide, **settings)
    submit(engine, small, [greedy(40)] * 2)
    answers: dict[tuple[str, int], Answer] = {}
    for event in engine.step():
        take(answers.setdefault((event.request_id, event.index), Answer()), event)
    with room_for(200 * MIB):
        submit_as(engine, "2", large[0])
        for key, answer in drain(engine).items():
            answers[key] = replace(answer, tokens=answers[key].tokens + answer.tokens) if key in answers else answer
    assert answers["2", 0].reason == "error" and "out of memory" in (answers["2", 0].error or "")
    assert [answers[str(number), 0].tokens for number in range(2)] == expected
    submit_as(engine, "3", large[0])
    assert drain(engine)["3", 0].reason == "length", "with memory again the same request is answered"


@pytest.mark.parametrize("spare", [0, 40, 70, 300])
def test_steps_that_cannot_be_captured_run_without_a_graph(
        wide: Path, spare: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Mebibytes to spare: for no graph, for small ones, for some with prompts."""
    expected = run(wide, PROMPTS, greedy(12), **GPU, enforce_eager=True)
    capture = StepGraphs.capture

    def scarce(graphs: StepGraphs, *arguments: Any) -> None:
        with room_for(spare * MIB):
            capture(graphs, *arguments)

    monkeypatch.setattr(StepGraphs, "capture", scarce)
    assert run(wide, PROMPTS, greedy(12), **GPU) == expected
    assert "no memory for a CUDA graph" in caplog.text
