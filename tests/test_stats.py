"""The dashboard's HTTP contract: frames, streams, details, aborts, limits, the key."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import httpx
import msgspec
import pytest
from fakes import FakeEngine, api_client, served_model, write_byte_level_folder

from workstation.engine.client import Health, Progress
from workstation.engine.request import EngineRequest, EngineStats, SamplingParams
from workstation.engine.snapshot import Picture
from workstation.server import stats_desk
from workstation.server.app import create_app
from workstation.server.door import loading_door
from workstation.server.log_book import LogBook
from workstation.server.options import ServedModel, ServerOptions
from workstation.server.stats import Snapshot, fold
from workstation.server.stats_rates import Rates, Recent
from workstation.tui.frame import parse

Test = Callable[[httpx.AsyncClient], Awaitable[Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served_model(write_byte_level_folder(tmp_path_factory.mktemp("stats") / "model"))


def with_server(engine: FakeEngine, model: ServedModel, test: Test, options: ServerOptions | None = None) -> Any:
    async def main() -> Any:
        async with api_client(create_app(engine, model, options)) as client:
            return await test(client)

    return asyncio.run(asyncio.wait_for(main(), 30))


def get(engine: FakeEngine, model: ServedModel, path: str, options: ServerOptions | None = None) -> httpx.Response:
    return with_server(engine, model, lambda client: client.get(path), options)


def busy(*names: str, prompt: Sequence[int] = (1, 2, 3)) -> FakeEngine:
    """An engine in which these requests run."""
    engine = FakeEngine()
    for name in names:
        engine.seen.append(EngineRequest(name, list(prompt), SamplingParams(temperature=0.5), arrival=time.monotonic() - 2,
                                         label="editor"))
        engine.active.add(name)
    return engine


def counts(text: str, width: int) -> list[int]:
    data = base64.b64decode(text)
    return [int.from_bytes(data[i:i + width], "little") for i in range(0, len(data), width)]


def test_a_frame_is_typed_and_says_what_the_engine_says(model: ServedModel) -> None:
    answer = get(busy("a", "b"), model, "/stats?cells=8")
    frame = msgspec.json.decode(answer.content, type=Snapshot)
    assert (frame.version, frame.server.state, frame.model.name) == (1, "ready", "fake")
    blocks = frame.blocks
    assert (blocks.total, blocks.free, blocks.held, blocks.cached, blocks.shared) == (64, 48, 8, 8, 2)
    assert [row.id for row in frame.requests] == ["a", "b"] and frame.batch.running == 2
    assert frame.requests[0].client == "editor" and frame.requests[0].ttft == pytest.approx(0.1, abs=1e-3)
    assert frame.speed.hit_rate == 0.4 and abs(frame.time - time.time()) < 5


def test_the_dashboards_parser_reads_the_servers_frame(model: ServedModel) -> None:
    engine = busy("a")
    frame = parse(get(engine, model, "/stats?cells=64").content)
    cells = map(frame.cell, range(frame.count))
    assert [(cell.owned, cell.shared, cell.cached, cell.free).index(1) for cell in cells] == [
        {1: 0, 2: 1, 3: 2, 0: 3}[state] for state in engine.states]


def test_cells_add_up_to_the_pool_whatever_their_number() -> None:
    states = bytes([0, 1, 2, 3, 1, 1, 0] * 143)
    for cells in (1, 7, 100, 1000, 1001, 4000):
        folded = fold(states, cells)
        assert folded.count == min(cells, len(states))
        for state, text in ((1, folded.owned), (2, folded.shared), (3, folded.cached)):
            found = counts(text, folded.width)
            assert len(found) == folded.count and sum(found) == states.count(state)


def test_a_cell_of_many_blocks_is_counted_exactly() -> None:
    folded = fold(bytes([1]) * 70_000 + bytes([3]) * 70_000, 2)
    assert counts(folded.owned, folded.width) == [70_000, 0] and counts(folded.cached, folded.width) == [0, 70_000]


@pytest.mark.parametrize("blocks", [1000, 65_536, 2_000_000])
def test_a_frame_of_a_thousand_cells_is_under_ten_kilobytes(model: ServedModel, blocks: int) -> None:
    engine = FakeEngine(states=bytes(i * 7919 % 4 for i in range(blocks)))
    assert len(get(engine, model, "/stats?cells=1000").content) < 10_000


@pytest.mark.parametrize("query", ["cells=0", "cells=4097", "cells=-1", "cells=x", "cells=1e3", "cells=" + "9" * 50])
def test_a_wrong_number_of_cells_is_refused_by_name(model: ServedModel, query: str) -> None:
    answer = get(FakeEngine(), model, f"/stats?{query}")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "cells"
    assert "from 1 to 4096" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/stats", "/stats/stream", "/stats/blocks", "/stats/requests/a", "/stats/log"])
def test_every_route_asks_for_the_key(model: ServedModel, path: str) -> None:
    assert get(busy("a"), model, path, ServerOptions(api_keys=("secret",))).status_code == 401


@pytest.mark.parametrize("state", ["restarting", "dead"])
def test_a_frame_is_answered_while_the_engine_is_not_there(model: ServedModel, state: str) -> None:
    engine = FakeEngine(state=state)  # type: ignore[arg-type]
    frame = get(engine, model, "/stats").json()
    assert frame["server"]["state"] == state and frame["requests"] == []


def test_the_last_picture_stays_when_the_engine_goes_away(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats_desk, "LOOK_PERIOD", 0.0)
    engine = busy("a")

    async def test(client: httpx.AsyncClient) -> Any:
        before = (await client.get("/stats")).json()
        engine.state = "restarting"
        await asyncio.sleep(0.3)
        return before, (await client.get("/stats")).json()

    before, after = with_server(engine, model, test)
    assert after["server"]["state"] == "restarting" and [row["id"] for row in after["requests"]] == ["a"]
    assert after["time"] == pytest.approx(before["time"], abs=0.2)


def test_many_dashboards_cost_the_engine_one_look_a_tenth_of_a_second(model: ServedModel) -> None:
    engine = busy("a")

    async def test(client: httpx.AsyncClient) -> None:
        await asyncio.gather(*(client.get("/stats?cells=10") for _ in range(40)))

    started = time.monotonic()
    with_server(engine, model, test)
    assert 1 <= len(engine.looks) <= 2 + (time.monotonic() - started) / stats_desk.LOOK_PERIOD


def test_nobody_asks_the_engine_while_nobody_watches(model: ServedModel) -> None:
    engine = busy("a")
    with_server(engine, model, lambda client: client.get("/metrics"))
    assert engine.looks == []


def test_a_stream_sends_frames_and_ends_when_the_server_drains(model: ServedModel) -> None:
    app = create_app(busy("a"), model)

    async def main() -> str:
        async with api_client(app) as client:
            reading = asyncio.ensure_future(client.get("/stats/stream?cells=4&hz=10"))
            await asyncio.sleep(0.5)
            app.state.api.gate.drain()
            return (await reading).text

    text = asyncio.run(asyncio.wait_for(main(), 20))
    frames = [json.loads(part.removeprefix("data: ")) for part in text.split("\n\n") if part.startswith("data: ")]
    assert len(frames) >= 2 and all(frame["version"] == 1 for frame in frames)
    assert [frame["time"] for frame in frames] == sorted(frame["time"] for frame in frames)


def test_a_stream_does_not_keep_the_server_from_draining(model: ServedModel) -> None:
    app = create_app(FakeEngine(), model)

    async def main() -> int:
        async with api_client(app) as client:
            reading = asyncio.ensure_future(client.get("/stats/stream"))
            await asyncio.sleep(0.1)
            inside: int = app.state.api.gate.in_flight
            app.state.api.gate.drain()
            await reading
            return inside

    assert asyncio.run(asyncio.wait_for(main(), 20)) == 0


@pytest.mark.parametrize("hz", ["0", "11", "1.5"])
def test_a_stream_faster_than_ten_frames_a_second_is_refused(model: ServedModel, hz: str) -> None:
    answer = get(FakeEngine(), model, f"/stats/stream?hz={hz}")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "hz"


def test_a_slow_reader_makes_no_frames_pile_up(model: ServedModel) -> None:
    desk = create_app(busy("a"), model).state.api.stats._desk

    async def main() -> tuple[int, float]:
        frames = desk.stream(4, 10)
        await anext(frames)
        await asyncio.sleep(0.6)
        looked, asked = desk.looks, time.time()
        newest = json.loads((await anext(frames)).removeprefix(b"data: "))
        await frames.aclose()
        return looked, asked - newest["time"]

    looked, age = asyncio.run(main())
    assert looked == 1 and age < 0.3


def test_single_blocks_are_listed_in_the_range_asked_for(model: ServedModel) -> None:
    engine = FakeEngine()
    answer = get(engine, model, "/stats/blocks?from=5&to=9").json()
    assert [row["block"] for row in answer["blocks"]] == [5, 6, 7, 8, 9] and answer["total"] == 64
    assert (engine.looks[-1].first, engine.looks[-1].last) == (5, 9)


@pytest.mark.parametrize("query", ["from=0", "from=9&to=3", "from=1&to=2000", "to=x"])
def test_a_wrong_range_of_blocks_is_refused_by_name(model: ServedModel, query: str) -> None:
    answer = get(FakeEngine(), model, f"/stats/blocks?{query}")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == ("from" if query == "from=0" else "to")


def test_details_hold_sampling_timeline_and_block_table_but_no_text(model: ServedModel) -> None:
    answer = get(busy("a"), model, "/stats/requests/a").json()
    assert answer["sampling"]["temperature"] == 0.5 and "stop" not in answer["sampling"]
    assert answer["samples"][0]["tables"] == [[1, 2, 3]]
    assert answer["timeline"]["queue"] == 0 and answer["timeline"]["prefill"] == pytest.approx(0.1, abs=1e-3)
    assert answer["text"] is None and "last" not in answer["samples"][0]


def test_a_server_that_may_show_text_adds_the_ends_of_prompt_and_answers_to_details_and_to_nothing_else(
        model: ServedModel) -> None:
    options = ServerOptions(show_text=True)
    prompt = model.tokenizer.encode("the quick brown fox " * 200)
    engine = busy("a", prompt=prompt)
    shown = with_server(engine, model, lambda client: client.get("/stats/requests/a"), options).json()["text"]
    whole = model.tokenizer.decode(prompt)
    assert len(shown["prompt"]) == 400 and whole.endswith(shown["prompt"])
    assert shown["answers"] == [model.tokenizer.decode(prompt[:2])]
    for path in ("/stats", "/stats/blocks?from=1&to=3", "/stats/log"):
        assert "quick" not in with_server(engine, model, lambda client, path=path: client.get(path), options).text


def test_an_unknown_request_is_a_404(model: ServedModel) -> None:
    assert get(FakeEngine(), model, "/stats/requests/nobody").status_code == 404


def test_an_abort_reaches_the_engine(model: ServedModel) -> None:
    engine = busy("a", "b")
    answer = with_server(engine, model, lambda client: client.post("/stats/requests/a/abort", json={}))
    assert answer.json() == {"id": "a", "aborted": True} and engine.aborted == ["a"]


def test_aborting_an_unknown_request_is_a_404(model: ServedModel) -> None:
    engine = busy("a")
    answer = with_server(engine, model, lambda client: client.post("/stats/requests/zz/abort", json={}))
    assert answer.status_code == 404 and engine.aborted == []


def test_rates_are_growth_over_time_and_start_anew_after_a_restart() -> None:
    rates = Rates()
    assert rates.of("generated_tokens") is None
    rates.feed(EngineStats(time=1.0, generated_tokens=100))
    rates.feed(EngineStats(time=2.0, generated_tokens=150))
    assert rates.of("generated_tokens") == 50
    rates.feed(EngineStats(time=3.0, generated_tokens=5))
    assert rates.of("generated_tokens") is None


def test_rates_forget_what_is_older_than_their_window() -> None:
    rates = Rates()
    for second in range(10):
        rates.feed(EngineStats(time=float(second), evictions=100 if second > 2 else 0))
    assert rates.of("evictions") == 0


def test_quantiles_are_of_the_newest_observations() -> None:
    recent = Recent(kept=100)
    assert recent.quantiles((0.5,)) == [None]
    for value in [*range(1000), *range(100)]:
        recent.add(float(value))
    assert recent.quantiles((0.5, 0.99)) == [50.0, 99.0]


def test_waste_is_the_share_of_held_slots_without_a_token(model: ServedModel) -> None:
    from workstation.server.stats import block_stats

    stats = replace(FakeEngine().stats(), kv_tokens_held=96)
    assert block_stats(Picture(0, stats, b"", [], 0), 16, 4).waste == 0.25


def test_the_log_holds_our_loggers_lines_of_the_level_asked_for(model: ServedModel) -> None:
    with LogBook() as book:
        app = create_app(FakeEngine(), model, None, book)
        log = logging.getLogger("workstation.server")
        log.info("one %d", 1)
        log.warning("two")

        async def main() -> list[Any]:
            async with api_client(app) as client:
                queries = ("", "level=warning", "after=1", "lines=1")
                return [(await client.get(f"/stats/log?{query}")).json() for query in queries]

        answers = asyncio.run(main())
    texts = [[(line["level"], line["text"]) for line in answer["lines"]] for answer in answers]
    assert texts[0] == [("info", "one 1"), ("warning", "two")] and answers[0]["last"] == 2
    assert texts[1] == texts[2] == texts[3] == [("warning", "two")]


def test_talk_never_pushes_trouble_out_of_the_log() -> None:
    book = LogBook(kept=4)
    book.add(0.0, logging.ERROR, "engine", "the engine died")
    for number in range(1000):
        book.add(1.0, logging.INFO, "server", f"{number} " + "x" * 1000)
    lines = book.newest("info", 200)
    assert [line.level for line in lines] == ["error"] + ["info"] * 4 and all(len(line.text) <= 400 for line in lines)


def test_no_text_of_a_prompt_is_in_the_log(model: ServedModel) -> None:
    secret = "correct horse battery"

    async def test(client: httpx.AsyncClient) -> str:
        for engine_fault in (None, 1):
            engine.error_after = engine_fault
            await client.post("/v1/completions", json={"prompt": secret, "max_tokens": 3})
        await client.post("/v1/completions", json={"prompt": secret, "max_tokens": secret})
        return (await client.get("/stats/log?level=debug")).text

    engine = FakeEngine()
    with LogBook() as book:
        app = create_app(engine, model, None, book)

        async def main() -> str:
            async with api_client(app) as client:
                return await test(client)

        said = asyncio.run(main())
    assert "ended: length, 3 tokens" in said and "ended: error" in said and "horse" not in said


@pytest.mark.parametrize(("query", "param"), [("level=loud", "level"), ("lines=0", "lines"), ("lines=201", "lines"),
                                              ("after=x", "after")])
def test_a_wrong_question_to_the_log_is_refused_by_name(model: ServedModel, query: str, param: str) -> None:
    answer = get(FakeEngine(), model, f"/stats/log?{query}")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_a_frame_says_how_far_loading_has_come(model: ServedModel) -> None:
    class Loading(FakeEngine):
        def health(self) -> Health:
            return Health("restarting", loading=Progress("weights", 25, 100, 2.0))

    frame = get(Loading(), model, "/stats").json()
    assert frame["server"]["loading"] == {"stage": "weights", "done": 25, "total": 100, "seconds_left": 6.0}
    assert Progress("weights", 0, 100, 2.0).seconds_left is None and Progress("weights", 100, 100, 2.0).seconds_left is None


def test_while_the_engine_loads_the_door_answers_its_state_and_refuses_the_rest(model: ServedModel) -> None:
    engine = FakeEngine(state="starting")
    door = loading_door(engine, "fake", ServerOptions(api_keys=("secret",)), LogBook())

    async def main() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=door)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            key = {"authorization": "Bearer secret"}
            answers = [await client.get("/health"), await client.get("/stats"), await client.get("/stats", headers=key),
                       await client.get("/v1/models", headers=key), await client.get("/stats?cells=0", headers=key)]
            engine.state = "ready"
            app = create_app(engine, model, ServerOptions(api_keys=("secret",)))
            door.open(app, app.state.api.close)
            return [*answers, await client.get("/v1/models", headers=key)]

    health, keyless, frame, models, wrong, opened = asyncio.run(main())
    assert (health.status_code, health.json()["status"]) == (503, "starting") and keyless.status_code == 401
    assert frame.json()["server"]["state"] == "starting" and frame.json()["model"]["name"] == "fake"
    assert (models.status_code, "retry-after" in models.headers) == (503, True)
    assert wrong.status_code == 400 and opened.status_code == 200
