"""Looking into a real engine in a process of its own, through the server's door."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest
from tiny import write_tiny

from workstation.config import EngineConfig
from workstation.engine.request import EngineRequest, SamplingParams
from workstation.engine.snapshot import Look
from workstation.errors import EngineDeadError
from workstation.server.supervisor import EngineProcess


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("look") / "llama", "llama")


def test_a_live_request_is_seen_aborted_and_gone_and_a_dead_engine_says_so(folder: Path) -> None:
    async def main() -> None:
        engine = EngineProcess(EngineConfig(str(folder), device="cpu", max_num_seqs=4, num_blocks=64, num_threads=1))
        with pytest.raises(EngineDeadError):
            await engine.look(Look())
        await engine.start()
        try:
            await _watch_one(engine)
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGSTOP)  # the question is still open when it dies
            asking = asyncio.ensure_future(engine.look(Look()))
            await asyncio.sleep(0.05)
            os.kill(engine.pid, signal.SIGKILL)
            with pytest.raises(EngineDeadError):
                await asking
        finally:
            await engine.stop()

    asyncio.run(asyncio.wait_for(main(), 100))


async def _watch_one(engine: EngineProcess) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=480, ignore_eos=True)
    stream = engine.generate(EngineRequest("a", [5, 6, 7, 8] * 5, params, label="editor"))
    await anext(stream)
    picture = await engine.look(Look(request_id="a", first=1, last=4))
    assert picture.detail is not None and picture.detail.prompt == picture.detail.samples[0].last == []
    told = await engine.look(Look(request_id="a", tokens=3))
    assert told.detail is not None and told.detail.prompt == [6, 7, 8] and len(told.detail.samples[0].last) in (1, 2, 3)
    assert [(row.id, row.label, row.state) for row in picture.rows] == [("a", "editor", "decode")]
    assert picture.detail is not None and picture.detail.params.max_tokens == 480
    held = {block for block in picture.detail.samples[0].tables[0] if block}
    assert {number + 1 for number, state in enumerate(picture.states) if state} == held
    assert [block.block for block in picture.blocks] == [1, 2, 3, 4] and picture.blocks[0].owners[0].request_id == "a"
    engine.abort("a")
    with contextlib.suppress(StopAsyncIteration):
        while (await anext(stream)).finish_reason != "abort":
            pass
    await stream.aclose()  # type: ignore[attr-defined]
    picture = await engine.look(Look())
    assert picture.rows == [] and picture.stats.blocks_held == 0
