"""What /v1/chat/completions refuses, and how it says so."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import FakeEngine, post, served_model, write_byte_level_folder

from workstation.server.options import ServedModel

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hello world"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served_model(write_byte_level_folder(tmp_path_factory.mktemp("refusals")))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("guided_decoding_backend", "outlines"),
        ("functions", [{}]),
        ("audio", {}),
        ("modalities", ["audio"]),
        ("prediction", {}),
        ("best_of", 3),
        ("suffix", "x"),
        ("echo", True),
        ("chat_template", "{{ 1 }}"),
        ("documents", [{}]),
        ("logits_processors", ["os.system"]),
        ("vllm_xargs", {"a": 1}),
        ("thinking_token_budget", 5),
        ("prompt_embeds", "AAAA"),
        ("request_id", "x"),
        ("kv_transfer_params", {"a": 1}),
        ("web_search_options", {}),
        ("reasoning_effort", "high"),
        ("tool_choice", "required"),
        ("early_stopping", True),
        ("temprature", 1),
        ("foo", None),
        ("truncate_prompt_tokens", 0),
        ("length_penalty", 2.0),
    ],
)
def test_what_is_not_supported_is_refused_by_name(model: ServedModel, field: str, value: Any) -> None:
    reply = post(CHAT, FakeEngine(), model, {"messages": HI, field: value})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)
    assert field in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        (["x"], "messages[0]"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "bot", "content": "x"}], "messages[0].role"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y"}}]}],
            "messages[0].content[0].type",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[NaN]"}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
        ([{"role": "user", "content": "x", "shout": True}], "messages[0].shout"),
        ("hello", "messages"),
        (None, "messages"),
        ([{"role": "user", "content": "x"}] * 10_001, "messages"),
    ],
)
def test_bad_messages_are_named(model: ServedModel, messages: Any, param: str) -> None:
    reply = post(CHAT, FakeEngine(), model, {"messages": messages})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_a_prompt_beyond_the_window_is_refused_in_openais_words(model: ServedModel) -> None:
    engine = FakeEngine(window=64)
    reply = post(CHAT, engine, model, {"messages": [{"role": "user", "content": "x y " * 60}], "stream": True})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    assert "This model's maximum context length is 64 tokens" in reply.json()["error"]["message"]
    assert engine.seen == []


def test_text_far_beyond_the_window_is_refused_before_it_is_tokenised(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("tokenised")

    monkeypatch.setattr(type(model.tokenizer), "encode_chat", never)
    reply = post(CHAT, FakeEngine(window=64), model, {"messages": [{"role": "user", "content": "x" * 70_000}]})
    assert reply.json()["error"]["code"] == "context_length_exceeded"
