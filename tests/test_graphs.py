"""The graph path of a step, with a stand-in that runs the captured function instead of replaying it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import drain, make_engine, submit
from test_engine import PROMPTS, RANDOM, greedy
from tiny import write_tiny

from workstation.engine.engine import Engine
from workstation.engine.graphs import (
    Shape,
    StepGraphs,
    _Captured,
    _Fields,
    _no_collection,
    graph_shapes,
    largest_shape,
    uncaptured_shapes,
)
from workstation.engine.inputs import HostStep
from workstation.memory import GRAPH_CHUNKS

DECODES = [Shape(1), Shape(2), Shape(4), Shape(8)]
MIXED = [Shape(0, 16, 2), Shape(4, 16, 2), Shape(0, 64, 4), Shape(4, 64, 4), Shape(8, 256, 8)]


class _Replayed:
    """What `torch.cuda.CUDAGraph` is to StepGraphs, on the CPU: the same inputs, the same output tensor."""

    def __init__(self, graphs: StepGraphs, shape: Shape, width: int) -> None:
        self.graphs, self.shape = graphs, shape
        self.inputs = torch.full((_Fields.size(shape),), 10**9)
        self.logits = torch.zeros(shape.sequences, width)
        self.count = 0

    def replay(self) -> None:
        self.count += 1
        self.logits[:] = self.graphs._run(self.shape, self.inputs)


def with_graphs(engine: Engine, shapes: list[Shape]) -> list[_Replayed]:
    graphs = engine._runner._graphs
    made = [_Replayed(graphs, shape, engine.info.logits_width) for shape in shapes]
    graphs._captured = {item.shape: _Captured(item.inputs, item.logits, item) for item in made}
    return made


@pytest.fixture(scope="module", params=["llama", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    extra = {"sliding_window": 20} if request.param == "mistral" else {}
    return write_tiny(tmp_path_factory.mktemp("graphs") / request.param, request.param, **extra)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("params", [[greedy()] * len(PROMPTS), RANDOM], ids=["greedy", "random"])
def test_padded_replays_give_the_tokens_of_the_eager_step(folder: Path, params: Any, overlap: bool) -> None:
    found = []
    for shapes in ([], DECODES, [*DECODES, *MIXED]):
        engine = make_engine(folder, overlap=overlap, max_num_batched_tokens=24)
        made = with_graphs(engine, shapes)
        submit(engine, PROMPTS, params)
        found.append({key: answer.tokens for key, answer in drain(engine).items()})
        assert not shapes or sum(item.count for item in made) > 5
        assert MIXED[0] not in shapes or sum(item.count for item in made if item.shape.tokens) > 1, "no prompt was replayed"
    assert found[0] == found[1] == found[2]


def test_padding_writes_no_kv_and_leaves_the_null_block_alone(folder: Path) -> None:
    engine = make_engine(folder)
    with_graphs(engine, [Shape(8), Shape(8, 64, 4)])
    submit(engine, PROMPTS[:3], [greedy()] * 3)
    drain(engine)
    assert engine._runner.pool[0].abs().max() == 0


def test_of_steps_too_large_to_be_captured_one_of_each_range_is_known() -> None:
    shapes = uncaptured_shapes(40, [64, 128], 3000)
    assert [shape.all_tokens for shape in shapes] == [256, 512, 1024, 2048, 3000]
    assert uncaptured_shapes(1, [64, 128, 256, 512, 1024, 2048], 8192) == [Shape(0, 8192, 1)]
    assert [shape.all_tokens for shape in uncaptured_shapes(1, [64], 256)] == [128, 256]


def test_garbage_is_left_alone_within_a_capture_and_collected_again_behind_it() -> None:
    with pytest.raises(RuntimeError, match="capture"), _no_collection():
        assert not gc.isenabled()
        raise RuntimeError("a capture that failed")
    assert gc.isenabled()


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("tokens", [1, 2, 24, 300])
def test_the_largest_step_has_the_whole_budget_and_does_nothing(folder: Path, rows: int, tokens: int) -> None:
    shape = largest_shape(rows, tokens)
    assert shape.all_tokens == tokens and 1 <= shape.sequences <= rows + GRAPH_CHUNKS
    engine = make_engine(folder, max_num_seqs=rows)
    logits = torch.full((shape.sequences, engine.info.logits_width), 7.0)
    engine._runner._graphs.run(shape, logits)
    assert engine._runner.pool.abs().max() == 0
    assert torch.isfinite(logits).all() and not (logits == 7.0).any()


def test_a_step_takes_the_smallest_shape_with_room_for_its_decodes_and_its_prompts(folder: Path) -> None:
    engine = make_engine(folder)
    with_graphs(engine, [*DECODES, *MIXED])
    choose = engine._runner._graphs.choose

    def step(decodes: int, *chunks: int) -> HostStep:
        counts = np.array([1] * decodes + list(chunks))
        tokens = np.zeros(counts.sum(), dtype=np.int64)
        rows = np.arange(len(counts))
        return HostStep(tokens, tokens, tokens, rows, rows, np.array([0, *counts.cumsum()]), decodes, max(counts), 99)

    assert choose(step(3)) == Shape(4)
    assert choose(step(0, 16)) == Shape(0, 16, 2)
    assert choose(step(0, 9, 9)) == Shape(0, 64, 4)
    assert choose(step(1, 9)) == Shape(4, 16, 2)
    assert choose(step(5, 9)) == Shape(8, 256, 8)
    assert choose(step(9, 9)) is None
    assert choose(step(0, 2, 2, 2, 2, 2, 2, 2, 2, 2)) is None
    assert choose(step(0, 257)) is None


def test_shapes_climb_by_sixteen_decodes_and_end_at_the_rows_there_are() -> None:
    def decodes(rows: int) -> list[int]:
        return [shape.decodes for shape in graph_shapes(rows, [])]

    assert decodes(1) == [1]
    assert decodes(6) == [1, 2, 4, 6]
    assert decodes(40) == [1, 2, 4, 8, 16, 32, 40]
    assert decodes(2000)[-1] == 512


def test_shapes_with_prompts_stay_within_the_rows() -> None:
    mixed = [shape for shape in graph_shapes(40, [64, 128]) if shape.chunks]
    assert {shape.tokens for shape in mixed} == {64, 128}
    assert {shape.decodes for shape in mixed} == {0, 16, 40}
    assert all(shape.chunks == 1 for shape in graph_shapes(1, [64]) if shape.chunks)
