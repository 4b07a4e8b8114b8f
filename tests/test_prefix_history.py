"""Why did it miss? Where a client's prompt leaves the earlier one it shares most with: found, told, bounded."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fakes import FakeEngine, api_client, served_model, sse_events, write_byte_level_folder

from workstation.engine.request import EngineRequest, SamplingParams
from workstation.server.app import create_app
from workstation.server.callers import guessed_name
from workstation.server.job import Divergence, Job
from workstation.server.options import ServedModel
from workstation.server.prefix_history import PrefixHistory, message_digests

LONG = " and then the quick brown fox jumps over the lazy dog" * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served_model(write_byte_level_folder(tmp_path_factory.mktemp("prefix") / "model"))


def admitted(history: PrefixHistory, *prompts: list[int], client: str = "editor", salt: str = "",
             messages: tuple[bytes, ...] = (), name: str = "r", **params: Any) -> Divergence | None:
    requests = [EngineRequest(f"{name}-{place}", ids, SamplingParams(**params), cache_salt=salt)
                for place, ids in enumerate(prompts)]
    job = Job(name, "m", 0, requests, 1, messages=messages)
    history.admit(job, client)
    return job.divergence


def test_a_prompt_that_grows_an_earlier_one_is_no_miss() -> None:
    history = PrefixHistory()
    assert admitted(history, list(range(100))) is None
    assert admitted(history, list(range(200))) is None
    assert admitted(history, list(range(50))) is None


def test_the_first_token_that_differs_is_told_with_the_earlier_prompts_length() -> None:
    history = PrefixHistory()
    admitted(history, list(range(100)))
    found = admitted(history, [*range(37), 9999, *range(38, 120)])
    assert found == Divergence(token=37, message=None, earlier_tokens=100)


def test_less_than_a_block_lost_is_no_miss() -> None:
    history = PrefixHistory(block_size=16)
    admitted(history, list(range(70)))
    assert admitted(history, [*range(65), 9, 9, 9, 9, 9, 9]) is None


def test_the_nearest_of_the_earlier_prompts_counts() -> None:
    history = PrefixHistory()
    for first in (1000, 0, 2000):
        admitted(history, [7] * 16 + list(range(first, first + 100)))
    found = admitted(history, [7] * 16 + list(range(60)) + [5] * 60)
    assert found is not None and found.token == 76


def test_other_clients_and_other_salts_are_not_compared() -> None:
    history = PrefixHistory()
    admitted(history, list(range(100)))
    changed = [*range(50), *([3] * 60)]
    assert admitted(history, changed, client="other") is None and admitted(history, changed, salt="s") is None
    assert admitted(history, changed) is not None


def test_a_request_that_does_not_read_the_cache_is_left_out() -> None:
    history = PrefixHistory()
    admitted(history, list(range(100)))
    assert admitted(history, [0] * 100, skip_reading_prefix_cache=True) is None and history.bytes == 400


def test_the_first_message_that_differs_is_told_by_its_index() -> None:
    talk = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}, {"role": "user", "content": "c"}]
    history = PrefixHistory()
    admitted(history, list(range(100)), messages=message_digests(talk))
    edited = [*talk[:2], {"role": "user", "content": "C"}]
    found = admitted(history, [*range(50), *([3] * 60)], messages=message_digests(edited))
    assert found is not None and found.message == 2


def test_of_several_prompts_the_first_that_diverged_is_told_and_siblings_are_not_compared() -> None:
    history = PrefixHistory()
    assert admitted(history, list(range(100)), [*range(20), *([1] * 80)]) is None
    found = admitted(history, list(range(100)), [*range(90), *([4] * 30)], name="q")
    assert found is not None and (found.prompt, found.token) == (1, 90)
    assert history.of("q-1") == found and history.of("q-0") is None


def test_memory_is_bounded_whatever_comes() -> None:
    history = PrefixHistory(max_bytes=10_000)
    for number in range(500):
        admitted(history, [number * 7 + place for place in range(300)], client=f"c{number % 200}")
        assert history.bytes <= 10_000
    admitted(history, list(range(100_000)))
    assert history.bytes <= 10_000


def ask(model: ServedModel, *bodies: dict[str, Any], agent: str = "curl/8") -> list[httpx.Response]:
    engine = FakeEngine()

    async def main() -> list[httpx.Response]:
        async with api_client(create_app(engine, model)) as client:
            return [await client.post("/v1/chat/completions", json={"max_tokens": 2, **body}, headers={"user-agent": agent})
                    for body in bodies]

    return asyncio.run(main())


def talk(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text} for text in texts]}


def test_a_whole_answer_says_in_usage_and_header_where_it_diverged(model: ServedModel) -> None:
    first, second = ask(model, talk("hello" + LONG, "b" + LONG), talk("hello" + LONG, "c" + LONG))
    assert "x-ws-prefix" not in first.headers and "diverged" not in first.json()["usage"]["prompt_tokens_details"]
    diverged = second.json()["usage"]["prompt_tokens_details"]["diverged"]
    assert diverged["message"] == 1 and 0 < diverged["token"] < diverged["earlier_tokens"]
    assert second.headers["x-ws-prefix"] == (
        f"diverged; message=1; token={diverged['token']}; earlier-tokens={diverged['earlier_tokens']}; prompt=0")
    assert "fox" not in second.headers["x-ws-prefix"]


def test_a_stream_says_it_in_its_final_usage(model: ServedModel) -> None:
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    _, second = ask(model, talk("hello" + LONG), {**talk("hallo" + LONG), **stream})
    assert sse_events(second.text)[-1]["usage"]["prompt_tokens_details"]["diverged"]["message"] == 0


def test_the_details_of_a_live_request_say_it(model: ServedModel) -> None:
    engine = FakeEngine(delay=0.02)

    async def main() -> dict[str, Any]:
        async with api_client(create_app(engine, model)) as client:
            await client.post("/v1/chat/completions", json={"max_tokens": 1, **talk("hello" + LONG)})
            body = {"max_tokens": 200, **talk("hallo" + LONG)}
            second = asyncio.ensure_future(client.post("/v1/chat/completions", json=body))
            while len(engine.seen) < 2:
                await asyncio.sleep(0.01)
            answer: dict[str, Any] = (await client.get(f"/stats/requests/{engine.seen[1].request_id}")).json()
            engine.abort(engine.seen[1].request_id)
            second.cancel()
            return answer

    details = asyncio.run(main())
    assert details["diverged"]["message"] == 0 and details["request"]["route"] == "chat"


@pytest.mark.parametrize(("agent", "name"), [
    ("claude-cli/1.0 (external)", "claude-code"), ("OpenAI/Python 1.50", "openai-python"), ("curl/8.5", "curl"),
    ("x\x1b[31m", ":7"),
])
def test_a_client_that_does_not_name_itself_is_called_by_its_agent_or_port(agent: str, name: str) -> None:
    from starlette.requests import Request

    scope = {"type": "http", "headers": [(b"user-agent", agent.encode())], "client": ("127.0.0.1", 7)}
    assert guessed_name(Request(scope)) == name


