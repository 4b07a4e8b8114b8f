"""/v1/chat/completions on a fake engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, post, served_model, sse_events, write_byte_level_folder

from workstation.engine.request import EngineRequest
from workstation.server.options import ServedModel, ServerOptions

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hello world"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served_model(write_byte_level_folder(tmp_path_factory.mktemp("chat")))


def saying(model: ServedModel, text: str, *, end: bool = True) -> Callable[[EngineRequest, int], list[int]]:
    """An engine's reply: a fixed text, then eos."""
    ids = model.tokenizer.encode(text, add_special_tokens=False) + [model.eos_token_ids[0]] * end
    return lambda request, index: ids


def chat(engine: FakeEngine, model: ServedModel, /, **body: Any) -> Any:
    return post(CHAT, engine, model, {"messages": HI, **body})


def test_an_answer_has_openais_shape(model: ServedModel) -> None:
    engine = FakeEngine(reply=saying(model, "hello there"), num_cached_tokens=3)
    body = chat(engine, model, model="fake").json()
    choice = body["choices"][0]
    assert body["object"] == "chat.completion"
    assert body["model"] == "fake"
    assert choice["message"] == {"role": "assistant", "content": "hello there", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    prompt = len(engine.seen[0].prompt_token_ids)
    output = len(model.tokenizer.encode("hello there")) + 1  # the eos counts
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_the_engine_gets_the_rendered_prompt(model: ServedModel) -> None:
    engine = FakeEngine()
    chat(engine, model, max_tokens=2)
    assert model.tokenizer.decode(engine.seen[0].prompt_token_ids) == (
        "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n"
    )
    assert engine.seen[0].eos_token_ids == list(model.eos_token_ids)


def test_max_tokens_defaults_to_what_the_window_leaves(model: ServedModel) -> None:
    engine = FakeEngine(reply=saying(model, "x"), window=200)
    chat(engine, model)
    assert engine.seen[0].params.max_tokens == 200 - len(engine.seen[0].prompt_token_ids)


def test_max_completion_tokens_wins_over_max_tokens(model: ServedModel) -> None:
    engine = FakeEngine()
    assert chat(engine, model, max_tokens=3, max_completion_tokens=5).json()["usage"]["completion_tokens"] == 5


def test_a_stream_says_the_same_as_an_answer(model: ServedModel) -> None:
    text = "Grüße 日本語 🙂 end"
    engine = FakeEngine(reply=saying(model, text))
    whole = chat(engine, model).json()
    chunks = sse_events(chat(engine, model, stream=True, stream_options={"include_usage": True}).text)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]) == text
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_stream_without_options_has_no_usage(model: ServedModel) -> None:
    chunks = sse_events(chat(FakeEngine(), model, stream=True, max_tokens=2).text)
    assert all("usage" not in chunk for chunk in chunks)


def test_continuous_usage_grows_chunk_by_chunk(model: ServedModel) -> None:
    reply = chat(
        FakeEngine(reply=saying(model, "one two three")),
        model,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in sse_events(reply.text)]
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_text_usage_and_engine_work(model: ServedModel, stream: bool, include: bool) -> None:
    engine = FakeEngine(reply=saying(model, "one two three four five six", end=False), tokens_per_step=4, delay=0.001)
    reply = chat(
        engine,
        model,
        stop=["thr"],
        stream=stream,
        include_stop_str_in_output=include,
        logprobs=True,
        stream_options={"include_usage": True} if stream else None,
    )
    expected = "one two thr" if include else "one two "
    if stream:
        chunks = sse_events(reply.text)
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
        last, usage = chunks[-2]["choices"][0], chunks[-1]["usage"]
        tokens = [
            entry["token"] for chunk in chunks[:-1] for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
        ]
    else:
        body = reply.json()
        last, usage = body["choices"][0], body["usage"]
        text, tokens = last["message"]["content"], [entry["token"] for entry in last["logprobs"]["content"]]
    assert text == expected
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "thr")
    counted = model.tokenizer.encode("one two three")
    needed = next(size for size in range(len(counted) + 1) if "thr" in model.tokenizer.decode(counted[:size]))
    assert usage["completion_tokens"] == needed
    assert "".join(tokens).startswith(expected)  # a token may begin in the text and end in the stop string
    assert len("".join(tokens[:-1])) < len(expected)
    assert engine.aborted == [engine.seen[0].request_id]


def test_a_stop_token_is_counted_and_not_shown(model: ServedModel) -> None:
    ids = model.tokenizer.encode("one two three")
    reply = chat(FakeEngine(reply=lambda request, index: ids), model, stop_token_ids=[ids[1]]).json()
    assert reply["choices"][0]["message"]["content"] == model.tokenizer.decode(ids[:1])
    assert reply["choices"][0]["stop_reason"] == ids[1]
    assert reply["usage"]["completion_tokens"] == 2


def test_min_tokens_keeps_a_stop_string_from_ending_early(model: ServedModel) -> None:
    engine = FakeEngine(reply=saying(model, "a.b.c"))
    assert chat(engine, model, stop=["."], min_tokens=2).json()["choices"][0]["message"]["content"] == "a.b"


def test_n_samples_come_with_their_own_index(model: ServedModel) -> None:
    words = ["one", "two", "three"]
    engine = FakeEngine(reply=lambda request, index: [*model.tokenizer.encode(words[index]), model.eos_token_ids[0]])
    body = chat(engine, model, n=3).json()
    assert [(choice["index"], choice["message"]["content"]) for choice in body["choices"]] == list(enumerate(words))
    assert len(engine.seen) == 1
    texts = {0: "", 1: "", 2: ""}
    for chunk in sse_events(chat(engine, model, n=3, stream=True).text):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    assert list(texts.values()) == words


@pytest.mark.parametrize("stream", [False, True])
def test_one_stopped_sample_ends_alone(model: ServedModel, stream: bool) -> None:
    words = ["a.bbbbbbbbbb", "abcdefghijkl"]
    engine = FakeEngine(reply=lambda request, index: [*model.tokenizer.encode(words[index]), model.eos_token_ids[0]])
    reply = chat(engine, model, n=2, stop=["."], stream=stream)
    if stream:
        texts = ["", ""]
        for chunk in sse_events(reply.text):
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    else:
        texts = [choice["message"]["content"] for choice in reply.json()["choices"]]
    assert texts == ["a", "abcdefghijkl"]
    assert engine.dropped == {(engine.seen[0].request_id, 0)}
    assert engine.aborted == []


def test_logprobs_name_token_bytes_and_alternatives(model: ServedModel) -> None:
    content = chat(FakeEngine(reply=saying(model, "hé")), model, logprobs=True, top_logprobs=2).json()["choices"][0][
        "logprobs"
    ]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "hé"
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert content[0]["token"] == "h"
    assert content[0]["logprob"] == -0.5


def test_token_ids_are_returned_when_asked(model: ServedModel) -> None:
    ids = model.tokenizer.encode("one two")
    engine = FakeEngine(reply=lambda request, index: ids)
    body = chat(engine, model, return_token_ids=True).json()
    assert body["prompt_token_ids"] == engine.seen[0].prompt_token_ids
    assert body["choices"][0]["token_ids"] == ids
    chunks = sse_events(chat(engine, model, return_token_ids=True, stream=True).text)
    assert [index for chunk in chunks for index in chunk["choices"][0].get("token_ids", [])] == ids


def test_prompt_logprobs_have_vllms_shape(model: ServedModel) -> None:
    body = chat(FakeEngine(), model, prompt_logprobs=1, max_tokens=1).json()
    assert body["prompt_logprobs"][0] is None
    assert set(next(iter(body["prompt_logprobs"][1].values()))) == {"logprob", "rank", "decoded_token"}


def test_every_sampling_field_reaches_the_engine(model: ServedModel) -> None:
    engine = FakeEngine()
    fields = {
        "n": 2,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.25,
        "temperature": 0.75,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.25,
        "seed": 11,
        "stop": ["zzz"],
        "stop_token_ids": [5],
        "bad_words": ["hello"],
        "ignore_eos": True,
        "min_tokens": 1,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "include_stop_str_in_output": True,
        "logit_bias": {"7": 2.5},
        "allowed_token_ids": [1, 2, 3],
        "skip_reading_prefix_cache": True,
        "prompt_logprobs": 3,
        "max_tokens": 4,
    }
    assert chat(engine, model, **fields, logprobs=True, top_logprobs=2, cache_salt="s", user="me").status_code == 200
    params = engine.seen[0].params
    for name, value in {**fields, "logit_bias": {7: 2.5}, "logprobs": 2}.items():
        assert getattr(params, name) == value, name
    assert params.bad_word_ids == model.tokenizer.bad_word_ids(["hello"])
    assert (engine.seen[0].cache_salt, engine.seen[0].label) == ("s", "me")


def test_defaults_of_the_model_apply_where_the_request_is_silent(tmp_path: Path) -> None:
    model = served_model(write_byte_level_folder(tmp_path), default_sampling={"temperature": 0.25, "top_k": 9})
    engine = FakeEngine()
    chat(engine, model, max_tokens=1, temperature=0.5)
    assert (engine.seen[0].params.temperature, engine.seen[0].params.top_k, engine.seen[0].params.top_p) == (0.5, 9, 1.0)


def test_the_client_header_labels_the_request(model: ServedModel) -> None:
    engine = FakeEngine()
    post(CHAT, engine, model, {"messages": HI, "max_tokens": 1, "user": "u"}, headers={"X-Client": "ide\x1b[31m" + "x" * 99})
    assert engine.seen[0].label.startswith("ide[31mx")
    assert len(engine.seen[0].label) <= 64


def test_priority_needs_the_priority_policy(model: ServedModel) -> None:
    engine = FakeEngine()
    assert chat(engine, model, priority=3, max_tokens=1).json()["error"]["param"] == "priority"
    assert (
        post(
            CHAT, engine, model, {"messages": HI, "priority": 3, "max_tokens": 1}, ServerOptions(priority_scheduling=True)
        ).status_code
        == 200
    )
    assert engine.seen[0].priority == 3


def test_beam_search_reaches_the_engine(model: ServedModel) -> None:
    engine = FakeEngine()
    body = chat(engine, model, use_beam_search=True, n=3, max_tokens=4, length_penalty=0.5)
    assert len(body.json()["choices"]) == 3
    beam = engine.seen[0].beam
    assert beam is not None
    assert (beam.beam_width, beam.max_tokens, beam.length_penalty) == (3, 4, 0.5)


@pytest.mark.parametrize(
    "field", [{"top_p": 0.5}, {"stop": ["x"]}, {"logprobs": True}, {"stream": True}, {"presence_penalty": 1.0}]
)
def test_beam_search_refuses_what_it_does_not_use(model: ServedModel, field: dict[str, Any]) -> None:
    reply = chat(FakeEngine(), model, use_beam_search=True, n=2, max_tokens=4, **field)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, next(iter(field)))


def test_text_parts_are_joined_and_developer_becomes_system(model: ServedModel) -> None:
    engine = FakeEngine()
    messages = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "world", "cache_control": {}}],
        },
    ]
    post(CHAT, engine, model, {"messages": messages, "max_tokens": 1})
    assert model.tokenizer.decode(engine.seen[0].prompt_token_ids).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello world<|im_end|>"
    )


def test_earlier_tool_calls_are_rendered_with_their_arguments(model: ServedModel) -> None:
    engine = FakeEngine()
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    assert post(CHAT, engine, model, {"messages": messages, "max_tokens": 1}).status_code == 200
    text = model.tokenizer.decode(engine.seen[0].prompt_token_ids)
    assert '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' in text
    assert "<|im_start|>tool\n2<|im_end|>" in text


def test_with_tool_choice_none_tools_are_shown_and_calls_stay_text(model: ServedModel) -> None:
    text = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    engine = FakeEngine(reply=saying(model, text))
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    message = chat(engine, model, tools=tools, tool_choice="none").json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": text, "refusal": None}
    assert '"name": "add"' in model.tokenizer.decode(engine.seen[0].prompt_token_ids)


def test_template_variables_pass_when_the_template_reads_them(model: ServedModel) -> None:
    engine = FakeEngine()
    chat(engine, model, chat_template_kwargs={"enable_thinking": True}, max_tokens=1)
    assert model.tokenizer.decode(engine.seen[0].prompt_token_ids).endswith("assistant\n<think>\n")
    for kwargs in ({"unknown": 1}, {"enable_thinking": [1]}, {"messages": "x"}, {"enable_thinking": "x" * 2000}):
        assert chat(engine, model, chat_template_kwargs=kwargs).json()["error"]["param"] == "chat_template_kwargs"


def test_a_final_message_is_continued(model: ServedModel) -> None:
    engine = FakeEngine()
    messages = [*HI, {"role": "assistant", "content": "one two"}]
    post(CHAT, engine, model, {"messages": messages, "continue_final_message": True, "max_tokens": 1})
    assert model.tokenizer.decode(engine.seen[0].prompt_token_ids).endswith("assistant\none two")
    reply = post(CHAT, engine, model, {"messages": messages, "continue_final_message": True, "add_generation_prompt": True})
    assert reply.json()["error"]["param"] == "continue_final_message"


def test_harmless_fields_are_taken(model: ServedModel) -> None:
    fields = {
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "k",
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
        "reasoning_effort": None,
        "functions": None,
        "modalities": ["text"],
        "structured_outputs": None,
        "tool_choice": "auto",
    }
    assert chat(FakeEngine(), model, max_tokens=1, **fields).status_code == 200


def test_truncation_keeps_the_end_of_the_prompt(model: ServedModel) -> None:
    engine = FakeEngine(window=64)
    chat(engine, model, truncate_prompt_tokens=5, max_tokens=1)
    assert len(engine.seen[0].prompt_token_ids) == 5
    post(
        CHAT,
        engine,
        model,
        {"messages": [{"role": "user", "content": "x y " * 60}], "truncate_prompt_tokens": -1, "max_tokens": 10},
    )
    assert len(engine.seen[1].prompt_token_ids) == 54


def test_no_answer_is_sent_when_the_client_is_refused_by_the_engine(model: ServedModel) -> None:
    for stream in (False, True):
        reply = chat(FakeEngine(overloaded=True), model, stream=stream)
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "7")
        assert reply.json()["error"]["code"] == "overloaded"
