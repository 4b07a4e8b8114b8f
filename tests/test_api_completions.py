"""/v1/completions, /tokenize and /detokenize on a fake engine."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import FakeEngine, post, served_model, sse_events, write_byte_level_folder

from workstation.server.options import ServedModel, ServerOptions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served_model(write_byte_level_folder(tmp_path_factory.mktemp("completions")))


def complete(engine: FakeEngine, model: ServedModel, /, **body: Any) -> Any:
    return post("/v1/completions", engine, model, body)


def test_sixteen_tokens_are_the_default(model: ServedModel) -> None:
    body = complete(FakeEngine(), model, prompt="hello world").json()
    assert body["object"] == "text_completion"
    assert body["usage"]["completion_tokens"] == 16
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("shape", ["string", "strings", "ids", "lists of ids"])
def test_a_prompt_may_have_four_shapes(model: ServedModel, shape: str) -> None:
    first, second = model.tokenizer.encode("hello world"), model.tokenizer.encode("one two")
    prompt: Any = {
        "string": "hello world",
        "strings": ["hello world", "one two"],
        "ids": first,
        "lists of ids": [first, second],
    }[shape]
    engine = FakeEngine()
    body = complete(engine, model, prompt=prompt, max_tokens=2).json()
    expected = [first, second] if shape in ("strings", "lists of ids") else [first]
    assert [request.prompt_token_ids for request in engine.seen] == expected
    assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert len({request.request_id for request in engine.seen}) == len(expected)


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        "",
        [],
        [[]],
        [""],
        {},
        5,
        True,
        [1, "a"],
        ["a", 1],
        [[1], "a"],
        [[1], [2.5]],
        [True],
        [None],
        [-1],
        [640],
        [2**31],
        [2**63],
        [1e300],
        ["5", [5]],
    ],
)
def test_a_bad_prompt_is_named(model: ServedModel, prompt: Any) -> None:
    reply = complete(FakeEngine(), model, prompt=prompt)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt")


def test_an_id_between_tokenizer_and_logits_width_is_fine(model: ServedModel) -> None:
    assert model.tokenizer.vocab_size < 639
    assert complete(FakeEngine(), model, prompt=[639], max_tokens=1).status_code == 200


def test_prompts_and_samples_are_numbered_prompt_by_prompt(model: ServedModel) -> None:
    engine = FakeEngine(reply=lambda request, index: [request.prompt_token_ids[0]] * (index + 1) + [model.eos_token_ids[0]])
    body = complete(engine, model, prompt=["a", "b"], n=2).json()
    assert [choice["text"] for choice in body["choices"]] == ["a", "aa", "b", "bb"]
    texts = [""] * 4
    for chunk in sse_events(complete(engine, model, prompt=["a", "b"], n=2, stream=True).text):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["a", "aa", "b", "bb"]


def test_samples_times_prompts_are_limited(model: ServedModel) -> None:
    reply = post(
        "/v1/completions", FakeEngine(), model, {"prompt": ["a"] * 9, "n": 8}, ServerOptions(max_sequences_per_request=64)
    )
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "n")
    assert "72" in reply.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_shows_the_prompt_first_with_its_logprobs(model: ServedModel, stream: bool) -> None:
    reply = complete(FakeEngine(), model, prompt="hello world", echo=True, logprobs=2, max_tokens=2, stream=stream)
    choices = [event["choices"][0] for event in sse_events(reply.text)] if stream else reply.json()["choices"]
    text = "".join(choice["text"] for choice in choices)
    merged: dict[str, list[Any]] = {name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    for choice in choices:
        for name, values in merged.items():
            values += (choice["logprobs"] or {}).get(name) or []
    assert text == "hello worldhello world"
    assert "".join(merged["tokens"]) == text
    assert merged["text_offset"] == [
        text.index(token, offset) for token, offset in zip(merged["tokens"], merged["text_offset"], strict=True)
    ]
    assert merged["token_logprobs"][0] is None
    assert merged["top_logprobs"][0] is None
    assert all(value is not None for value in merged["token_logprobs"][1:])


@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_zero_with_echo_scores_the_prompt_only(model: ServedModel, stream: bool) -> None:
    reply = complete(FakeEngine(), model, prompt="hello world", echo=True, logprobs=1, max_tokens=0, stream=stream)
    body = sse_events(reply.text)[0] if stream else reply.json()
    assert body["choices"][0]["text"] == "hello world"
    assert len(body["choices"][0]["logprobs"]["tokens"]) == 2
    if not stream:
        assert body["usage"]["completion_tokens"] == 0
        assert body["choices"][0]["finish_reason"] == "length"


def test_max_tokens_zero_without_echo_is_refused(model: ServedModel) -> None:
    assert complete(FakeEngine(), model, prompt="a", max_tokens=0).json()["error"]["param"] == "max_tokens"


def test_logprobs_zero_names_the_chosen_token_only(model: ServedModel) -> None:
    logprobs = complete(FakeEngine(), model, prompt="hello world", logprobs=0, max_tokens=2).json()["choices"][0]["logprobs"]
    assert [list(top) for top in logprobs["top_logprobs"]] == [["hello"], [" world"]]


def test_tokens_can_be_written_as_ids(model: ServedModel) -> None:
    body = complete(
        FakeEngine(), model, prompt=[74, 75], logprobs=1, max_tokens=1, return_tokens_as_token_ids=True, return_token_ids=True
    )
    choice = body.json()["choices"][0]
    assert choice["logprobs"]["tokens"] == ["token_id:74"]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([74], [74, 75])


def test_an_impossible_token_is_written_as_a_number(model: ServedModel) -> None:
    from workstation.engine.request import TokenLogprobs
    from workstation.server.logprobs import LogprobWriter

    writer = LogprobWriter(model.tokenizer)
    entry = TokenLogprobs([74, 75], [float("-inf"), -0.5], 9)
    assert writer.chat([entry]).content[0].logprob == -9999.0
    assert writer.completion([74], [entry], [0]).token_logprobs == [-9999.0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suffix", "x"),
        ("best_of", 3),
        ("messages", []),
        ("tools", [{}]),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logprobs", True),
        ("max_completion_tokens", 3),
        ("top_logprobs", 3),
    ],
)
def test_what_is_not_supported_is_refused_by_name(model: ServedModel, field: str, value: Any) -> None:
    reply = complete(FakeEngine(), model, prompt="a", **{field: value})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)


def test_prompt_and_answer_must_fit_the_window_together(model: ServedModel) -> None:
    engine = FakeEngine(window=32)
    assert complete(engine, model, prompt=[5] * 16, max_tokens=16).status_code == 200
    reply = complete(engine, model, prompt=[5] * 16, max_tokens=17)
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    assert "you requested 33 tokens (16 in the prompt, 17 in the completion)" in reply.json()["error"]["message"]
    assert complete(engine, model, prompt=[5] * 32).json()["error"]["code"] == "context_length_exceeded"
    assert complete(engine, model, prompt=[5] * 30).json()["usage"]["completion_tokens"] == 2  # the default shrinks to fit


def test_one_failing_prompt_ends_them_all_and_aborts_the_rest(model: ServedModel) -> None:
    engine = FakeEngine(error_after=1, delay=0.001)
    reply = complete(engine, model, prompt=["a", "b", "c"], max_tokens=50)
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "engine_error")
    assert not engine.active


def test_tokenize_has_vllms_shape(model: ServedModel) -> None:
    body = post("/tokenize", FakeEngine(), model, {"prompt": "hello world", "return_token_strs": True}).json()
    assert body == {
        "count": 2,
        "max_model_len": 4096,
        "tokens": model.tokenizer.encode("hello world"),
        "token_strs": ["hello", "Ġworld"],
    }


def test_tokenize_renders_messages(model: ServedModel) -> None:
    body = post("/tokenize", FakeEngine(), model, {"messages": [{"role": "user", "content": "a"}]}).json()
    assert model.tokenizer.decode(body["tokens"]) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "a", "tools": []}, "tools"),
        ({"prompt": "a", "model": "x"}, "model"),
        ({"prompt": "a", "what": 1}, "what"),
        ({"messages": []}, "messages"),
    ],
)
def test_tokenize_refuses_by_name(model: ServedModel, body: Any, param: str) -> None:
    reply = post("/tokenize", FakeEngine(), model, body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (404 if param == "model" else 400, param)


def test_detokenize_gives_the_text_back(model: ServedModel) -> None:
    ids = model.tokenizer.encode("hello <|im_end|> world")
    assert post("/detokenize", FakeEngine(), model, {"tokens": ids}).json() == {"prompt": "hello <|im_end|> world"}


@pytest.mark.parametrize("tokens", [None, "5", ["5"], [-1], [640], [2**63], [True], [1.5], [0] * 70_000])
def test_detokenize_refuses_what_is_no_token(model: ServedModel, tokens: Any) -> None:
    reply = post("/detokenize", FakeEngine(), model, {"tokens": tokens})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].startswith("tokens")
