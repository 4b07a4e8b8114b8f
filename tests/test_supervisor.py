"""The engine's process and its keeper: ready, dead, restarted, given up. Real processes, a tiny model."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny

from workstation.config import EngineConfig
from workstation.engine import wire
from workstation.engine.client import Progress
from workstation.engine.request import EngineRequest, SamplingParams
from workstation.errors import EngineDeadError, InvalidRequestError, ModelFolderError
from workstation.server import supervisor
from workstation.server.supervisor import EngineProcess

CANARY = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("supervisor") / "llama", "llama")


def config(folder: Path, **changes: Any) -> EngineConfig:
    return EngineConfig(str(folder), device="cpu", max_num_seqs=8, num_blocks=200, num_threads=1, **changes)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def shared(folder: Path, loop: asyncio.Runner) -> Iterator[EngineProcess]:
    """A start costs seconds, so tests share an engine that may die as often as they like."""
    engine = EngineProcess(config(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor, "MAX_RESTARTS", 100)
        loop.run(engine.start())
        yield engine
        loop.run(engine.stop())
        assert not Path(engine._directory).exists()


@pytest.fixture
def engine(shared: EngineProcess, loop: asyncio.Runner) -> EngineProcess:
    loop.run(asyncio.wait_for(until_ready(shared), 60))
    return shared




async def tokens(engine: EngineProcess, name: str, prompt: list[int] | None = None, count: int = 8) -> list[int]:
    request = EngineRequest(name, prompt or CANARY, SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True))
    found: list[int] = []
    async for event in engine.generate(request):
        found += event.token_ids
    return found


async def until_ready(engine: EngineProcess) -> None:
    while engine.health().state != "ready":
        await asyncio.sleep(0.05)


async def kill_under(engine: EngineProcess, work: asyncio.Task[list[int]], how: int = signal.SIGKILL) -> None:
    await asyncio.sleep(0.2)
    assert engine.pid is not None and not work.done()
    os.kill(engine.pid, how)


def test_an_engine_in_its_own_process_serves_requests_side_by_side(engine: EngineProcess, loop: asyncio.Runner) -> None:
    async def test() -> None:
        assert engine.info.logits_width == 128
        several = await asyncio.gather(*[tokens(engine, f"r{i}", [5, 6, 7, 8 + i % 2]) for i in range(8)])
        assert several[0] == several[2] and all(len(found) == 8 for found in several)

    loop.run(asyncio.wait_for(test(), 100))


def test_a_killed_engine_fails_what_was_in_flight_and_serves_the_same_tokens_again(
    engine: EngineProcess, loop: asyncio.Runner
) -> None:
    async def test() -> None:
        restarts, before = engine.health().restarts, await tokens(engine, "before")
        victim = asyncio.create_task(tokens(engine, "victim", count=500))
        await kill_under(engine, victim)
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            await victim
        with pytest.raises(EngineDeadError):
            await tokens(engine, "early")
        await until_ready(engine)
        assert engine.health().restarts == restarts + 1
        assert await tokens(engine, "after") == before

    loop.run(asyncio.wait_for(test(), 100))


def test_a_frozen_engine_is_noticed_and_replaced(
    engine: EngineProcess, loop: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "HEARTBEAT_LIMIT_SECONDS", 2.0)

    async def test() -> None:
        victim = asyncio.create_task(tokens(engine, "victim", [7, 7, 7], count=500))
        await kill_under(engine, victim, signal.SIGSTOP)
        with pytest.raises(EngineDeadError, match="heartbeat"):
            await victim
        monkeypatch.setattr(supervisor, "HEARTBEAT_LIMIT_SECONDS", 20.0)
        await until_ready(engine)
        assert len(await tokens(engine, "after")) == 8

    loop.run(asyncio.wait_for(test(), 100))


def test_a_request_present_at_two_deaths_is_refused_and_others_are_not(engine: EngineProcess, loop: asyncio.Runner) -> None:
    async def test() -> None:
        for turn in range(2):
            victim = asyncio.create_task(tokens(engine, f"victim{turn}", [9, 9, 9], count=500))
            await kill_under(engine, victim)
            with pytest.raises(EngineDeadError):
                await victim
            await until_ready(engine)
        with pytest.raises(InvalidRequestError, match="2 deaths"):
            await tokens(engine, "again", [9, 9, 9], count=500)
        assert len(await tokens(engine, "innocent")) == 8

    loop.run(asyncio.wait_for(test(), 100))


def test_an_engine_that_keeps_dying_is_given_up_with_its_cause(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MAX_RESTARTS", 1)

    async def test() -> None:
        engine = EngineProcess(config(folder))
        await engine.start()
        try:
            for _ in range(2):
                await until_ready(engine)
                assert engine.pid is not None
                os.kill(engine.pid, signal.SIGKILL)
                while engine.health().state == "ready":
                    await asyncio.sleep(0.05)
            cause = await engine.gave_up()
            assert "died 2 times" in cause and "SIGKILL" in cause
            assert engine.health().state == "dead"
        finally:
            await engine.stop()

    asyncio.run(asyncio.wait_for(test(), 100))


def test_leaving_a_stream_early_aborts_it_and_frees_its_blocks(engine: EngineProcess, loop: asyncio.Runner) -> None:
    async def test() -> None:
        aborted = engine.stats().finished.get("abort", 0)
        stream = engine.generate(EngineRequest("left", CANARY, SamplingParams(max_tokens=500, ignore_eos=True)))
        async for _ in stream:
            break
        await stream.aclose()
        began = time.monotonic()
        while engine.stats().finished.get("abort", 0) != aborted + 1 or engine.stats().blocks_held:
            assert time.monotonic() - began < 20
            await asyncio.sleep(0.05)

    loop.run(asyncio.wait_for(test(), 100))


def test_a_refusal_by_the_engine_arrives_as_its_own_error(engine: EngineProcess, loop: asyncio.Runner) -> None:
    async def test() -> None:
        with pytest.raises(InvalidRequestError, match="between 0 and 127, got 4000"):
            await tokens(engine, "bad", [4000])
        assert len(await tokens(engine, "good")) == 8

    loop.run(asyncio.wait_for(test(), 100))


def test_a_folder_that_cannot_be_served_is_a_named_error_and_leaves_neither_process_nor_directory(tmp_path: Path) -> None:
    async def main() -> EngineProcess:
        engine = EngineProcess(config(tmp_path / "nowhere"))
        with pytest.raises(ModelFolderError, match="nowhere"):
            await engine.start()
        return engine

    engine = asyncio.run(main())
    assert engine.pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(engine.pid, 0)
    assert engine._directory and not Path(engine._directory).exists()


def test_the_private_directory_is_closed_to_others(engine: EngineProcess) -> None:
    assert Path(engine._directory).stat().st_mode & 0o777 == 0o700


def test_what_is_left_of_a_start_is_reckoned_stage_by_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, int, int]] = []
    engine = EngineProcess(config(tmp_path), on_loading=lambda *now: said.append(now))
    clock = [100.0]
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: clock[0])
    reports = [wire.Loading("weights", 0, 80), wire.Loading("weights", 80, 80), wire.Loading("kernels", 0, 10),
               wire.Loading("kernels", 5, 10)]
    for report, clock[0] in zip(reports, (100.0, 140.0, 150.0, 152.0), strict=True):
        engine._handle(report)
    loading = engine.health().loading
    assert loading == Progress("kernels", 5, 10, 2.0) and loading.seconds_left == 2.0
    assert engine.health().progress == 1.0
    assert said[-1] == ("kernels", 5, 10) and len(said) == 4
