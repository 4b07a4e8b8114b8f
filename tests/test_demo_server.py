"""`ws serve demo` as a person meets it: a real process, the real model, the real `openai` client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI
from servers import serving_demo

from workstation.runtime import RunningServer

Server = tuple[Popen[bytes], RunningServer]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_demo(tmp_path_factory.mktemp("demo") / "log") as server:
        yield server


def blocks(base_url: str) -> tuple[int, int, int]:
    """(free, cached, total) KV blocks, from /metrics."""
    found = {}
    for line in httpx.get(f"{base_url}/metrics").text.splitlines():
        if line.startswith("ws:kv_blocks{"):
            found[line.split('state="')[1].split('"')[0]] = int(float(line.rsplit(" ", 1)[1]))
    return found["free"], found["cached"], sum(found.values())


def test_200_streams_at_once_all_end_well_and_every_block_comes_back(demo: Server) -> None:
    base_url = demo[1].base_url

    async def one(client: AsyncOpenAI, number: int) -> tuple[str, int, int]:
        stream = await client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": f"What is {number} + {number + 7}?"}], stream=True,
            max_tokens=5 + number % 20, stream_options={"include_usage": True}, temperature=0.0)
        reason, usage, pieces = "", None, 0
        async for chunk in stream:
            if chunk.choices:
                reason = chunk.choices[0].finish_reason or reason
                pieces += bool(chunk.choices[0].delta.content)
            usage = chunk.usage or usage
        assert usage is not None
        return reason, usage.completion_tokens, pieces

    async def everyone() -> list[tuple[str, int, int]]:
        async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=100) as client:
            return await asyncio.gather(*[one(client, number) for number in range(200)])

    answers = asyncio.run(everyone())
    assert {reason for reason, _, _ in answers} <= {"stop", "length"}
    assert all(count > 0 and pieces > 0 for _, count, pieces in answers)
    deadline = time.monotonic() + 20
    while True:
        free, cached, total = blocks(base_url)
        if free + cached == total:
            break
        assert time.monotonic() < deadline, (free, cached, total)
        time.sleep(0.2)


def test_every_raw_stream_ends_with_done(demo: Server) -> None:
    body = {"model": "demo", "prompt": "What", "max_tokens": 3, "stream": True}
    lines = httpx.post(f"{demo[1].base_url}/v1/completions", json=body).text.strip().splitlines()
    assert lines[-1] == "data: [DONE]"


def test_the_demo_does_sums_and_says_what_it_is(demo: Server) -> None:
    client = OpenAI(base_url=f"{demo[1].base_url}/v1", api_key="none")

    def ask(text: str) -> str:
        answer = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": text}], temperature=0.0)
        return answer.choices[0].message.content or ""

    assert "802" in ask("What is 417 + 385?")
    assert "demo" in ask("Hello! Who are you?")


def test_a_second_turn_reads_the_first_from_the_cache(demo: Server) -> None:
    client = OpenAI(base_url=f"{demo[1].base_url}/v1", api_key="none")
    first: list[Any] = [{"role": "user", "content": "Copy this: " + "the quick brown fox jumps over the lazy dog " * 6}]
    answer = client.chat.completions.create(model="demo", messages=first, temperature=0.0, max_tokens=60)
    said = {"role": "assistant", "content": answer.choices[0].message.content}
    second = [*first, said, {"role": "user", "content": "Thanks."}]
    usage = client.chat.completions.create(model="demo", messages=second, temperature=0.0, max_tokens=5).usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) >= 48


def test_garbage_is_refused_by_name_and_a_neighbour_is_not_disturbed(demo: Server) -> None:
    client = OpenAI(base_url=f"{demo[1].base_url}/v1", api_key="none")

    def sample() -> str:
        return client.completions.create(model="demo", prompt="Sort", max_tokens=12, temperature=1.0, seed=3).choices[0].text

    before = sample()
    for field, value in (("logit_bias", {"4096": 1}), ("stop_token_ids", [9999]), ("temperature", -1), ("top_p", 0),
                         ("max_tokens", 10**9), ("n", 0), ("prompt", [4096])):
        body: dict[str, Any] = {"model": "demo", "prompt": "Sort", field: value}
        with pytest.raises(BadRequestError) as caught:
            client.post("/completions", cast_to=object, body=body)
        assert field.split("_")[0] in str(caught.value)
    assert sample() == before


def test_the_api_process_needs_neither_torch_nor_transformers(demo: Server) -> None:
    maps = Path(f"/proc/{demo[0].pid}/maps").read_text()
    assert "libtorch" not in maps


def test_the_openai_client_gets_embeddings_of_length_one_and_equal_for_equal_texts(demo: Server) -> None:
    client = OpenAI(base_url=f"{demo[1].base_url}/v1", api_key="none", max_retries=0)
    found = client.embeddings.create(model="demo", input=["hello", "goodbye, said the fox", "hello"])  # base64 on the wire
    vectors = [item.embedding for item in found.data]
    assert [abs(sum(x * x for x in vector) - 1.0) < 1e-5 for vector in vectors] == [True] * 3
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-5) and vectors[0] != pytest.approx(vectors[1], abs=1e-2)
    assert found.usage.prompt_tokens == found.usage.total_tokens > 0
    with pytest.raises(BadRequestError, match="maximum context length"):
        client.embeddings.create(model="demo", input=[[5] * 20000])
