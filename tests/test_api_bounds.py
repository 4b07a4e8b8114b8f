"""Every number and list of a request at its edges: valid or a 400 that names the field; never a 500, never a broken engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fakes import FakeEngine, api_client, served_model, write_byte_level_folder

from workstation.server.app import create_app
from workstation.server.options import ServedModel
from workstation.server.schemas import ChatRequest, CompletionRequest, TokenizeRequest

FLOATS = ["presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p", "length_penalty"]
INTS = [
    "n",
    "top_k",
    "seed",
    "max_tokens",
    "min_tokens",
    "prompt_logprobs",
    "priority",
    "truncate_prompt_tokens",
    "logprobs",
    "best_of",
    "max_completion_tokens",
    "top_logprobs",
]
LISTS = [
    "stop",
    "stop_token_ids",
    "bad_words",
    "allowed_token_ids",
    "logit_bias",
    "tools",
    "chat_template_kwargs",
    "stream_options",
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_choice",
]
OTHERS = [
    "model",
    "ignore_eos",
    "skip_special_tokens",
    "stream",
    "cache_salt",
    "use_beam_search",
    "return_token_ids",
    "user",
    "echo",
    "suffix",
    "add_special_tokens",
    "tool_choice",
    "reasoning_effort",
    "add_generation_prompt",
    "continue_final_message",
    "messages",
    "prompt",
    "guided_regex",
    "guided_grammar",
    "guided_whitespace_pattern",
    "guided_decoding_backend",
]
RAW = [
    "-1",
    "0",
    "1",
    "20",
    "21",
    "64",
    "65",
    "4096",
    "4097",
    "2147483647",
    "2147483648",
    "9223372036854775808",
    "1e300",
    "1e400",
    "-0.0",
    "NaN",
    "Infinity",
    "-Infinity",
    "0.5",
    '"5"',
    '""',
    "true",
    "false",
    "null",
    "[]",
    "{}",
    "[-1]",
    "[640]",
    "[[]]",
    '[""]',
    '["a"]',
    '{"5": 1}',
    '{"-1": 1}',
    '{"640": 1}',
    '{"x": 1}',
    '{"5": 101}',
    '{"5": null}',
    "1" * 400,
]
HUGE = [
    "[" + "0," * 999_999 + "0]",
    "[" + '"a",' * 999_999 + '"a"]',
    "[" + "[]," * 199_999 + "[]]",
    "{" + ",".join(f'"{index}":0' for index in range(200_000)) + "}",
]
BASES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "a", "max_tokens": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served_model(write_byte_level_folder(tmp_path_factory.mktemp("bounds")))


def check(engine: FakeEngine, model: ServedModel, cases: list[tuple[str, str, bytes]]) -> None:
    """POST each (path, field, body) to one app; every answer is a success or an error of the field."""

    async def go() -> None:
        async with api_client(create_app(engine, model)) as client:
            for path, field, body in cases:
                reply = await client.post(path, content=body, headers={"content-type": "application/json"})
                place = f"{path} {field} {body[:120]!r}: {reply.status_code} {reply.text[:200]}"
                assert reply.status_code in (200, 400, 404), place
                excused = ("is not valid JSON", "maximum context length")
                if reply.status_code != 200 and not any(text in reply.text for text in excused):
                    error = reply.json()["error"]
                    assert field in (error["param"] or "") or field in error["message"], place
                    assert len(error["message"]) < 600, place
            alive = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
            assert alive.status_code == 200

    asyncio.run(go())
    assert not engine.active


def bodies(field: str, values: list[str]) -> list[tuple[str, str, bytes]]:
    made = []
    for path, base in BASES.items():
        rest = json.dumps({name: value for name, value in base.items() if name != field})[1:-1]
        made += [(path, field, f'{{{rest}{"," if rest else ""}"{field}":{value}}}'.encode()) for value in values]
    return made


@pytest.mark.parametrize("field", FLOATS + INTS + LISTS + OTHERS)
def test_the_edges_of_a_field_are_valid_or_refused(model: ServedModel, field: str) -> None:
    check(FakeEngine(), model, bodies(field, RAW))


# One of each kind by default: a list, a table, what holds text, a number.
@pytest.mark.parametrize("field", [
    "stop", "logit_bias", "messages", "n", pytest.param("prompt", marks=pytest.mark.long),
    pytest.param("allowed_token_ids", marks=pytest.mark.long),
])
def test_a_million_items_are_refused(model: ServedModel, field: str) -> None:
    check(FakeEngine(), model, bodies(field, HUGE))


def test_the_table_covers_every_field_of_the_schemas() -> None:
    known = {*FLOATS, *INTS, *LISTS, *OTHERS}
    switches = {
        "include_stop_str_in_output",
        "spaces_between_special_tokens",
        "skip_reading_prefix_cache",
        "return_tokens_as_token_ids",
        "parallel_tool_calls",
        "include_reasoning",
        "return_token_strs",
        "timings_per_token",
    }
    fields = {*ChatRequest.model_fields, *CompletionRequest.model_fields, *TokenizeRequest.model_fields}
    assert fields - known - switches == set()


@pytest.mark.parametrize("field", FLOATS)
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_numbers_that_are_no_numbers_are_refused(model: ServedModel, field: str, value: str) -> None:
    async def go() -> int:
        async with api_client(create_app(FakeEngine(), model)) as client:
            body = f'{{"prompt":"a","{field}":{value}}}'.encode()
            return (
                await client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
            ).status_code

    assert asyncio.run(go()) == 400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"5",
        b"\xff\xfe",
        b'{"prompt":"\xff"}',
        b'{"prompt":"\\ud800"}',
        b"{}}",
        b'{"a":' * 70 + b"1" + b"}" * 70,
        b"[" * 1_000_000,
        b'{"prompt":' + b"[" * 100 + b"]" * 100 + b"}",
        b'{"prompt":"' + b'\\"' * 500_000,
    ],
)
def test_a_body_that_is_no_request_is_a_400(model: ServedModel, body: bytes) -> None:
    async def go() -> Any:
        async with api_client(create_app(FakeEngine(), model)) as client:
            return await client.post("/v1/completions", content=body, headers={"content-type": "application/json"})

    reply = asyncio.run(go())
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_brackets_inside_strings_are_not_depth(model: ServedModel) -> None:
    async def go() -> Any:
        async with api_client(create_app(FakeEngine(), model)) as client:
            return await client.post("/v1/completions", json={"prompt": "[" * 500 + '\\"[{', "max_tokens": 1})

    assert asyncio.run(go()).status_code == 200


@pytest.mark.parametrize(
    "text",
    [" ", "\x00", "\u202e", "\ufdd0", "\ufdef", "<|im_end|>", "<|im_start|>system", "</think>", "\ufeff", "a\u0300" * 50],
)
def test_odd_text_is_answered(model: ServedModel, text: str) -> None:
    engine = FakeEngine()

    async def go() -> list[int]:
        async with api_client(create_app(engine, model)) as client:
            chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
            return [
                (await client.post("/v1/completions", json={"prompt": text, "max_tokens": 2})).status_code,
                (await client.post("/v1/chat/completions", json=chat)).status_code,
            ]

    assert asyncio.run(go()) == [200, 200]
    assert engine.seen[1].prompt_token_ids.count(model.eos_token_ids[0]) == 1
