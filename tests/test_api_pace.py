"""How streams keep pace: an event a token for who reads, joined events for who is slow, nothing lost, ids checked at once."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, post, served_model, sse_events, write_byte_level_folder
from prometheus_client import Histogram as PrometheusHistogram
from prometheus_client import generate_latest
from prometheus_client.registry import CollectorRegistry
from test_api_streams import Client

from workstation.engine.client import Inbox
from workstation.engine.request import EngineRequest, TokenEvent
from workstation.server.app import create_app
from workstation.server.histogram import Histogram
from workstation.server.options import ServedModel, ServerOptions
from workstation.server.serve import run
from workstation.server.served_model import load_served_model

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level_folder(tmp_path_factory.mktemp("pace"))


@pytest.fixture(scope="module")
def model(folder: Path) -> ServedModel:
    return served_model(folder)


class Hand(FakeEngine):
    """An engine whose events the test puts into the inbox by hand, plain as the real engine's."""

    inbox: Inbox
    request: EngineRequest

    def generate(self, request: EngineRequest) -> Inbox:  # type: ignore[override]
        async def begin(inbox: Inbox) -> None:
            self.inbox, self.request = inbox, request

        return Inbox(begin, lambda done: None)

    def put(self, *token_ids: int, index: int = 0, first: bool = False, last: bool = False) -> None:
        for token_id in token_ids:
            self.inbox.put(TokenEvent(self.request.request_id, index, [token_id], plain=not (first or last),
                                      finish_reason="length" if last else None, finished=last))


BODIES = {COMPLETIONS: {"prompt": "hello world"}, CHAT: {"messages": [{"role": "user", "content": "hello world"}]}}


async def begun(model: ServedModel, path: str, **fields: Any) -> tuple[Hand, Client]:
    """A stream whose first token the client has read."""
    engine = Hand()
    body = {**BODIES[path], "stream": True, "max_tokens": 100, **fields}
    client = Client(create_app(engine, model), body, path)
    await client.until(lambda: hasattr(engine, "inbox"))
    engine.put(ids(model, "a"), first=True)
    await client.until(lambda: "data: {" in client.text)
    return engine, client


def ids(model: ServedModel, letter: str) -> int:
    return model.tokenizer.encode(letter)[0]


def pieces(text: str) -> list[str]:
    """The texts of a stream's events, those without any left out."""
    choices = [event["choices"][0] for event in sse_events(text) if event["choices"]]
    texts = [choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices]
    return [piece for piece in texts if piece]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_client_that_reads_gets_an_event_a_token(model: ServedModel, path: str) -> None:
    async def go() -> str:
        engine, client = await begun(model, path)
        engine.put(*(ids(model, letter) for letter in "bcd"))
        engine.put(ids(model, "e"), last=True)
        await client.until(client.task.done)
        return client.text

    assert pieces(asyncio.run(go())) == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("fields", [{}, {"stop": ["zz"]}], ids=["plain", "with a stop string"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_what_comes_while_a_client_does_not_read_makes_one_event(model: ServedModel, path: str, fields: dict[str, Any]) -> None:
    async def go() -> str:
        engine, client = await begun(model, path, **fields)
        client.stall.clear()
        engine.put(ids(model, "b"))
        await asyncio.sleep(0.02)  # the event with b hangs in the socket
        for letter in "cde":
            engine.put(ids(model, letter))
        await asyncio.sleep(0.02)
        client.stall.set()
        await client.until(lambda: '"cde"' in client.text)  # in quotes: an id may hold the letters
        engine.put(ids(model, "f"))
        engine.put(ids(model, "g"), last=True)
        await client.until(client.task.done)
        return client.text

    assert pieces(asyncio.run(go())) == ["a", "b", "cde", "f", "g"]


def test_usage_counts_joined_tokens_one_by_one(model: ServedModel) -> None:
    async def go() -> str:
        engine, client = await begun(model, COMPLETIONS, stream_options={"include_usage": True})
        client.stall.clear()
        engine.put(*(ids(model, letter) for letter in "bcd"))
        await asyncio.sleep(0.02)
        engine.put(ids(model, "e"), last=True)
        client.stall.set()
        await client.until(client.task.done)
        return client.text

    assert sse_events(asyncio.run(go()))[-1]["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("options", [{}, {"include_usage": True}], ids=["bare", "with usage"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_chunks_between_the_first_and_the_last_differ_in_their_text_alone(
    model: ServedModel, path: str, options: dict[str, Any]
) -> None:
    async def go() -> str:
        engine, client = await begun(model, path, stream_options=options, n=2)
        for index in (0, 1):
            engine.put(*(ids(model, letter) for letter in 'b"'), index=index)
        engine.inbox.put(TokenEvent(engine.request.request_id, 0, [ids(model, "c")], finish_reason="length"))
        engine.put(ids(model, "c"), index=1, last=True)
        await client.until(client.task.done)
        return client.text

    shapes: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    for event in sse_events(asyncio.run(go())):
        for choice in event["choices"]:
            if choice.get("text") or choice.get("delta", {}).get("content"):
                shapes[choice["index"]].append({**event, "choices": [{**choice, "text": "", "delta": ""}]})
    same = [shape for shape in shapes[0] if shape["choices"][0]["finish_reason"] is None]
    told = path == CHAT  # in chat the reason comes in a chunk of its own
    assert len(same) == 3 + told and same.count(same[0]) == len(same)
    assert [shape["choices"][0]["finish_reason"] for shape in shapes[1]] == [None, None, None if told else "length"]


@pytest.mark.parametrize(
    ("prompt", "on_the_loop"), [([5, 6, 7], True), ("hello", False), ([[5, 6], [7]], False), ([5] * 40_000, False)],
    ids=["ids", "text", "several prompts", "very many ids"],
)  # fmt: skip
def test_only_token_ids_of_ordinary_number_are_checked_on_the_event_loop(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch, prompt: Any, on_the_loop: bool
) -> None:
    seen: list[bool] = []
    real = create_app.__globals__["prepare_completion"]

    def noted(*args: Any) -> Any:
        seen.append(threading.current_thread() is threading.main_thread())
        return real(*args)

    monkeypatch.setitem(create_app.__globals__, "prepare_completion", noted)
    post(COMPLETIONS, FakeEngine(window=50_000), model, {"prompt": prompt, "max_tokens": 1})
    assert seen == [on_the_loop]


def test_head_is_refused_where_a_body_would_never_end(model: ServedModel) -> None:
    async def go() -> int | None:
        client = Client(create_app(FakeEngine(), model), {}, "/stats/stream", method="HEAD")
        await client.until(client.task.done)
        return client.status

    assert asyncio.run(go()) == 405


def test_our_histograms_read_like_the_librarys() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = Histogram("ws:x_seconds", "Text.", (("model", "engine"), ("m", "0")), (0.5, 1, 2.5))
    ours.register(mine)
    other = PrometheusHistogram("ws:x_seconds", "Text.", ("model", "engine"), registry=theirs, buckets=(0.5, 1, 2.5))
    for value in (0.1, 0.5, 0.6, 1.0, 2.6, 99.0, -0.5):
        mine.observe(value)
        other.labels("m", "0").observe(value)
    expected = [line for line in generate_latest(theirs).decode().splitlines() if "_created" not in line]
    assert generate_latest(ours).decode().splitlines() == expected


def test_the_server_runs_on_uvloop(folder: Path) -> None:
    pytest.importorskip("uvloop")
    loops: list[str] = []

    class Ends(FakeEngine):
        def health(self) -> Any:
            health = super().health()
            if loops:
                health.state = "dead"
            return health

    with pytest.raises(Exception, match="could not be kept alive"):
        run(ServerOptions(port=0), Ends(state="starting"), lambda: load_served_model(folder, ("fake",)),
            on_ready=lambda server: loops.append(type(asyncio.get_running_loop()).__module__))
    assert loops[0].startswith("uvloop")
