"""Filling in the middle in three shapes, what clients probe for, and paths nobody knows; on a fake engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import FakeEngine, api_client, post, served_model, sse_events, write_byte_level_folder
from tokenizers import AddedToken, Tokenizer

from workstation.engine.request import EngineRequest
from workstation.server.app import create_app
from workstation.server.options import ServedModel

FIM = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>"]


def with_tokens(folder: Path, names: list[str]) -> Path:
    write_byte_level_folder(folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served_model(with_tokens(tmp_path_factory.mktemp("fim"), FIM))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served_model(write_byte_level_folder(tmp_path_factory.mktemp("plain")))


def saying(model: ServedModel, text: str) -> Callable[[EngineRequest, int], list[int]]:
    ids = [*model.tokenizer.encode(text, add_special_tokens=False), model.eos_token_ids[0]]
    return lambda request, index: ids


def prompt(engine: FakeEngine, model: ServedModel) -> str:
    return model.tokenizer.decode(engine.seen[-1].prompt_token_ids)


@pytest.mark.parametrize(("path", "body"), [
    ("/v1/completions", {"prompt": "a = ", "suffix": "\nb"}), ("/v1/fim/completions", {"prompt": "a = ", "suffix": "\nb"}),
    ("/infill", {"input_prefix": "a", "prompt": " = ", "input_suffix": "\nb", "n_predict": 16, "samplers": [],
                 "t_max_predict_ms": 9}),
])
def test_the_middle_is_asked_for_with_the_tokenizers_own_tokens(model: ServedModel, path: str, body: dict[str, Any]) -> None:
    engine = FakeEngine(reply=saying(model, "one"))
    assert post(path, engine, model, body).status_code == 200
    assert prompt(engine, model) == "<|fim_prefix|>a = <|fim_suffix|>\nb<|fim_middle|>"
    assert model.tokenizer.token_id("<|file_sep|>") in engine.seen[0].params.stop_token_ids


@pytest.mark.parametrize(("names", "expected"), [
    (["<fim_prefix>", "<fim_suffix>", "<fim_middle>"], "<fim_prefix>a<fim_suffix>b<fim_middle>"),
    (["[PREFIX]", "[SUFFIX]"], "[SUFFIX]b[PREFIX]a"),
    (["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"], "<｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜>"),
])
def test_each_family_has_its_order(tmp_path: Path, names: list[str], expected: str) -> None:
    model = served_model(with_tokens(tmp_path, names))
    engine = FakeEngine(reply=saying(model, "x"))
    assert post("/v1/completions", engine, model, {"prompt": "a", "suffix": "b"}).status_code == 200
    assert prompt(engine, model) == expected


def test_each_shape_answers_in_its_own_way(model: ServedModel) -> None:
    def engine() -> FakeEngine:
        return FakeEngine(reply=saying(model, "one two"))

    fim = {"prompt": "a", "suffix": "b"}
    assert post("/v1/completions", engine(), model, fim).json()["choices"][0]["text"] == "one two"
    assert post("/v1/fim/completions", engine(), model, fim).json()["choices"][0]["message"]["content"] == "one two"
    chunks = sse_events(post("/v1/fim/completions", engine(), model, {**fim, "stream": True}).text)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "one two"
    infill = {"input_prefix": "a", "input_suffix": "b"}
    whole = post("/infill", engine(), model, infill).json()
    assert (whole["content"], whole["stop"], whole["stop_type"]) == ("one two", True, "eos")
    lines = post("/infill", engine(), model, {**infill, "stream": True}).text.strip().split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(event["content"] for event in events) == "one two"
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]


def test_other_files_are_shown_before_and_nothing_may_be_asked_for(model: ServedModel) -> None:
    engine = FakeEngine(reply=saying(model, "x"))
    body = {"input_prefix": "a", "input_suffix": "b", "n_predict": 0, "input_extra": [{"filename": "f.py", "text": "c"}]}
    assert post("/infill", engine, model, body).json()["content"] == ""
    assert prompt(engine, model) == "<|file_sep|>f.py\nc\n<|file_sep|><|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"


@pytest.mark.parametrize(("path", "body", "param"), [
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"), ("/v1/fim/completions", {"prompt": "a"}, "suffix"),
    ("/infill", {"input_prefix": "a", "input_suffix": "b"}, "input_suffix"),
])
def test_a_model_without_the_tokens_refuses_and_names_them(plain: ServedModel, path: str, body: Any, param: str) -> None:
    reply = post(path, FakeEngine(), plain, body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert "<|fim_prefix|>" in reply.json()["error"]["message"]


@pytest.mark.parametrize(("path", "body", "place"), [
    ("/v1/completions", {"prompt": [1], "suffix": "b"}, "prompt"), ("/v1/completions", {"prompt": "a", "suffix": 5}, "suffix"),
    ("/v1/completions", {"prompt": "a", "suffix": "b", "echo": True}, "echo"),
    ("/v1/fim/completions", {"suffix": "a"}, "prompt"),
    ("/v1/fim/completions", {"prompt": "a", "random_seed": 2**63}, "random_seed"),
    ("/v1/fim/completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"), ("/infill", {"input_prefix": "a"}, "input_suffix"),
    ("/infill", {"input_prefix": "a", "input_suffix": "b", "n_predict": -2}, "n_predict"),
    ("/infill", {"input_prefix": "a", "input_suffix": "b", "input_extra": [{}]}, "input_extra[0].text"),
    ("/infill", {"input_prefix": "a", "input_suffix": "b", "input_extra": [{"text": "x"}] * 300}, "input_extra"),
    ("/infill", {"input_prefix": "a", "input_suffix": "b", "foo": 1}, "foo"),
    ("/infill", {"input_prefix": "x y " * 9000, "input_suffix": "b"}, "context length"),
])
def test_what_is_wrong_is_refused_by_name(model: ServedModel, path: str, body: dict[str, Any], place: str) -> None:
    reply = post(path, FakeEngine(), model, body)
    assert reply.status_code == 400
    assert place in reply.json()["error"]["message"]


def ask(model: ServedModel, method: str, path: str, **fields: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with api_client(create_app(FakeEngine(window=1234), model)) as client:
            return await client.request(method, path, **fields)

    return asyncio.run(go())


def test_the_window_stands_under_every_name_clients_know(model: ServedModel) -> None:
    listed = ask(model, "GET", "/v1/models").json()
    card = listed["data"][0]
    names = ("max_model_len", "context_length", "context_window", "max_input_tokens")
    assert [card[name] for name in names] == [1234] * 4
    assert card["meta"]["n_ctx"] == 1234
    assert (card["status"], card["architecture"]["input_modalities"], listed["models"]) == ({"value": "loaded"}, ["text"], [])
    props = ask(model, "GET", "/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 1234
    assert props["chat_template_caps"]["supports_tools"] is True
    assert (props["tool_call_parser"], props["reasoning_parser"], props["fill_in_the_middle"]) == ("hermes", "think", True)


@pytest.mark.parametrize(("method", "path"), [("HEAD", "/"), ("GET", "/"), ("HEAD", "/api/hello"), ("HEAD", "/v1/models"),
                                              ("POST", "/api/event_logging/batch"), ("GET", "/models")])
def test_probes_get_a_quiet_answer(model: ServedModel, method: str, path: str) -> None:
    assert ask(model, method, path, **({"json": {"events": []}} if method == "POST" else {})).status_code == 200


@pytest.mark.parametrize("path", ["/api/tags", "/api/show", "/api/v1/models", "/v1/nope", "/v1/messages/nope"])
def test_every_other_path_is_unknown(model: ServedModel, path: str) -> None:
    """A server that answers anything is taken for one it is not."""
    for method in ("GET", "POST"):
        reply = ask(model, method, path, **({"json": {}} if method == "POST" else {}))
        assert reply.status_code == 404
        assert "unknown path" in reply.json()["error"]["message"]


def test_base_urls_work_with_and_without_the_version(model: ServedModel) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    assert ask(model, "POST", "/chat/completions", json=body).status_code == 200
    assert ask(model, "POST", "/responses", json={"input": "a", "max_output_tokens": 1}).status_code == 200
