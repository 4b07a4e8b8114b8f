"""The graph path of the decode step, with a stand-in that runs the captured function instead of replaying it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import drain, make_engine, submit
from test_engine import PROMPTS, RANDOM, greedy
from tiny import write_tiny

from workstation.engine.engine import Engine
from workstation.engine.graphs import DecodeGraphs, graph_sizes


class _Replayed:
    """What `torch.cuda.CUDAGraph` is to DecodeGraphs, on the CPU: the same inputs, the same output tensor."""

    def __init__(self, graphs: DecodeGraphs, size: int) -> None:
        self.graphs, self.size = graphs, size
        self.constants = (torch.arange(size + 1, dtype=torch.int32), torch.arange(size))
        self.inputs = torch.zeros(5 * size, dtype=torch.int64)
        self.logits = torch.zeros(0)
        self.count = 0

    def replay(self) -> None:
        self.count += 1
        self.logits[:] = self.graphs._run(self.inputs, self.size, self.constants)


def with_graphs(engine: Engine, sizes: list[int]) -> list[_Replayed]:
    graphs = engine._runner._graphs
    made = []

    def capture(size: int, pool: Any) -> Any:
        from workstation.engine.graphs import _Captured

        replayed = _Replayed(graphs, size)
        replayed.logits = torch.zeros(size, engine.info.logits_width)
        made.append(replayed)
        return _Captured(size, replayed.inputs, replayed.logits, replayed)

    for size in sizes:
        graphs._captured[size] = capture(size, None)
    graphs._sizes = sorted(sizes)
    return made


@pytest.fixture(scope="module", params=["llama", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    extra = {"sliding_window": 20} if request.param == "mistral" else {}
    return write_tiny(tmp_path_factory.mktemp("graphs") / request.param, request.param, **extra)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("params", [[greedy()] * len(PROMPTS), RANDOM], ids=["greedy", "random"])
def test_padded_replays_give_the_tokens_of_the_eager_step(folder: Path, params: Any, overlap: bool) -> None:
    found = []
    for sizes in ([], [1, 2, 4, 8]):
        engine = make_engine(folder, overlap=overlap)
        made = with_graphs(engine, sizes)
        submit(engine, PROMPTS, params)
        found.append({key: answer.tokens for key, answer in drain(engine).items()})
        assert not sizes or sum(item.count for item in made) > 5
    assert found[0] == found[1]


def test_padding_writes_no_kv_and_leaves_the_null_block_alone(folder: Path) -> None:
    engine = make_engine(folder)
    with_graphs(engine, [8])
    submit(engine, PROMPTS[:3], [greedy()] * 3)
    drain(engine)
    assert engine._runner.pool[0].abs().max() == 0


def test_sizes_climb_by_sixteen_and_end_at_the_rows_there_are() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(6) == [1, 2, 4, 6]
    assert graph_sizes(40) == [1, 2, 4, 8, 16, 32, 40]
    assert graph_sizes(2000)[-1] == 512
