"""/v1/messages and /v1/messages/count_tokens on a fake engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from fakes import FakeEngine, api_client, post, served_model, write_byte_level_folder

from workstation.engine.request import EngineRequest
from workstation.server.anthropic.incoming import without_billing_line
from workstation.server.app import create_app
from workstation.server.options import ServedModel, ServerOptions

PATH = "/v1/messages"
HI = [{"role": "user", "content": "hello world"}]
TOOLS = [{"name": "add", "description": "x", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}]
CALL = '<think>\nI add.\n</think>\n\nOk.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served_model(write_byte_level_folder(tmp_path_factory.mktemp("messages")))


def saying(model: ServedModel, text: str, *, end: bool = True) -> Callable[[EngineRequest, int], list[int]]:
    ids = model.tokenizer.encode(text, add_special_tokens=False) + [model.eos_token_ids[0]] * end
    return lambda request, index: ids


def ask(engine: FakeEngine, model: ServedModel, /, **body: Any) -> Any:
    return post(PATH, engine, model, {"max_tokens": 200, "messages": HI, **body})


def prompt(engine: FakeEngine, model: ServedModel) -> str:
    return model.tokenizer.decode(engine.seen[-1].prompt_token_ids)


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, data) of each event; the data repeats the name."""
    out = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        parsed = json.loads(data.removeprefix("data: "))
        assert parsed["type"] == name.removeprefix("event: ")
        out.append((parsed["type"], parsed))
    return out


def test_an_answer_has_anthropics_shape(model: ServedModel) -> None:
    engine = FakeEngine(reply=saying(model, CALL), num_cached_tokens=4)
    body = ask(engine, model, tools=TOOLS, model="claude-sonnet-9").json()
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "fake")
    assert body["id"].startswith("msg")
    assert (body["stop_reason"], body["stop_sequence"]) == ("tool_use", None)
    thought, text, call = body["content"]
    assert (thought["type"], thought["thinking"]) == ("thinking", "I add.")
    assert thought["signature"]
    assert text == {"type": "text", "text": "Ok."}
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "add", {"a": 1})
    assert call["id"].startswith("toolu_")
    usage = body["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len(engine.seen[0].prompt_token_ids)
    assert (usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]) == (4, 0)


@pytest.mark.parametrize("step", [1, 7, 100])
def test_a_stream_has_every_event_in_order(model: ServedModel, step: int) -> None:
    engine = FakeEngine(reply=saying(model, CALL), tokens_per_step=step)
    found = events(ask(engine, model, tools=TOOLS, stream=True).text)
    names = [name for name, _ in found]
    assert names[:2] == ["message_start", "ping"]
    assert names[-2:] == ["message_delta", "message_stop"]
    start = found[0][1]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    blocks: list[dict[str, Any]] = []
    opened = None
    for name, data in found[2:-2]:
        if name == "content_block_start":
            assert opened is None
            assert data["index"] == len(blocks)
            opened = data["index"]
            blocks.append({**data["content_block"], "json": ""})
        elif name == "content_block_delta":
            assert data["index"] == opened
            kind, value = data["delta"]["type"], data["delta"]
            if kind == "input_json_delta":
                blocks[-1]["json"] += value["partial_json"]
            else:
                field = kind.removesuffix("_delta")
                blocks[-1][field] += value[field]
        else:
            assert (name, data["index"]) == ("content_block_stop", opened)
            opened = None
    assert opened is None
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use"]
    assert (blocks[0]["thinking"], blocks[1]["text"], json.loads(blocks[2]["json"])) == ("I add.", "Ok.", {"a": 1})
    assert found[-2][1]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert found[-2][1]["usage"]["output_tokens"] > 0


@pytest.mark.parametrize(("text", "extra", "reason", "sequence"), [
    ("hello", {}, "end_turn", None), ("one two three", {"max_tokens": 2}, "max_tokens", None),
    ("one two three", {"stop_sequences": ["two"]}, "stop_sequence", "two"),
])
def test_why_an_answer_ended(model: ServedModel, text: str, extra: dict[str, Any], reason: str, sequence: str | None) -> None:
    body = ask(FakeEngine(reply=saying(model, text)), model, **extra).json()
    assert (body["stop_reason"], body["stop_sequence"]) == (reason, sequence)


def test_a_tool_is_used_and_its_result_comes_back(model: ServedModel) -> None:
    engine = FakeEngine(reply=saying(model, "2"))
    messages = [*HI, {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "Ok."},
        {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}, "cache_control": {"type": "ephemeral"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "2"}]},
            {"type": "tool_result", "tool_use_id": "toolu_2", "content": "3", "is_error": True},
            {"type": "text", "text": "and?"}, {"type": "text", "text": "well?"}]}]
    reply = ask(engine, model, messages=messages, tools=TOOLS)
    assert reply.status_code == 200, reply.text
    text = prompt(engine, model)
    assert 'Ok.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' in text
    assert ("<|im_start|>tool\n2<|im_end|>\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>user\nand?\nwell?<|im_end|>") in text
    assert '"name": "add"' in text.split("<|im_start|>tools")[1]


def test_the_last_words_of_the_assistant_are_continued(model: ServedModel) -> None:
    engine = FakeEngine(reply=saying(model, "three"))
    ask(engine, model, messages=[*HI, {"role": "assistant", "content": "one two "}])
    assert prompt(engine, model).endswith("<|im_start|>assistant\none two")


BILLING = "x-anthropic-billing-header: cc_version=2.1; cch=abc12;"


@pytest.mark.parametrize(("system", "kept"), [
    ("plain", "plain"), (f"{BILLING}\nYou are X.", "You are X."), ([{"type": "text", "text": BILLING}, {
        "type": "text", "text": "You are X.", "cache_control": {"type": "ephemeral"}}], "You are X."),
    (f"a\n{BILLING}\nb", "a\nb"), (f"say {BILLING}", f"say {BILLING}"),
])
def test_the_billing_line_of_the_system_text_is_left_out(model: ServedModel, system: Any, kept: str) -> None:
    engine = FakeEngine(reply=saying(model, "x"))
    ask(engine, model, system=system)
    assert prompt(engine, model).startswith(f"<|im_start|>system\n{kept}<|im_end|>\n<|im_start|>user")


@pytest.mark.parametrize("text", ["", " ", "\n\n a \n", "x-anthropic", "line\r\nline\u2028line\x0c",
                                  "X-Anthropic-Billing-Header: a", "x-anthropic-version: 1\nb"])
def test_nothing_else_of_the_system_text_is_altered(text: str) -> None:
    assert without_billing_line(text) == text
    assert without_billing_line(f"{BILLING}\n{text}") == text
    assert without_billing_line(BILLING) is None


def test_billing_lines_in_other_places_stay(model: ServedModel) -> None:
    engine = FakeEngine(reply=saying(model, "x"))
    ask(engine, model, messages=[{"role": "user", "content": BILLING}])
    assert BILLING in prompt(engine, model)


def test_count_tokens_counts_the_prompt_of_the_same_body(model: ServedModel) -> None:
    engine = FakeEngine(reply=saying(model, "x"))
    body = {"model": "claude-x", "messages": HI, "system": "Be brief.", "tools": TOOLS}
    ask(engine, model, **body)
    reply = post(f"{PATH}/count_tokens?beta=true", engine, model, body)
    assert reply.json() == {"input_tokens": len(engine.seen[0].prompt_token_ids)}
    assert len(engine.seen) == 1


def test_claude_models_can_be_refused(model: ServedModel) -> None:
    body = {"max_tokens": 5, "messages": HI, "model": "claude-x"}
    reply = post(PATH, FakeEngine(), model, body, ServerOptions(map_claude_models=False))
    assert (reply.status_code, reply.json()["error"]["type"]) == (404, "not_found_error")
    assert post("/v1/chat/completions", FakeEngine(), model, {"messages": HI, "model": "claude-x"}).status_code == 404


def test_a_prompt_that_is_too_long_is_refused_in_anthropics_words(model: ServedModel) -> None:
    for content in ("x y " * 60, "x" * 100_000):
        reply = ask(FakeEngine(window=64), model, messages=[{"role": "user", "content": content}])
        assert reply.status_code == 400
        error = reply.json()
        assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
        assert error["error"]["message"].startswith("prompt is too long: ")
        assert error["error"]["message"].endswith(" tokens > 64 maximum")


def test_more_max_tokens_than_the_window_leaves_end_at_the_window(model: ServedModel) -> None:
    engine = FakeEngine(reply=saying(model, "a b " * 99), window=64)
    body = ask(engine, model, max_tokens=32_000).json()
    assert body["usage"]["output_tokens"] == 64 - len(engine.seen[0].prompt_token_ids)
    assert body["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(("choice", "ending"), [
    ({"type": "any"}, '<tool_call>\n{"name": "'), ({"type": "tool", "name": "add"}, '{"name": "add", "arguments":'),
    ({"type": "auto"}, "assistant\n"), ({"type": "none"}, "assistant\n"),
])
def test_tool_choice_has_anthropics_words(model: ServedModel, choice: dict[str, Any], ending: str) -> None:
    engine = FakeEngine(reply=saying(model, "x"))
    assert ask(engine, model, tools=TOOLS, tool_choice=choice).status_code == 200
    assert prompt(engine, model).endswith(ending)


def test_tools_that_anthropic_runs_itself_are_skipped(model: ServedModel) -> None:
    engine = FakeEngine(reply=saying(model, "x"))
    tools = [*TOOLS, {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}]
    assert ask(engine, model, tools=tools).status_code == 200
    assert "web_search" not in prompt(engine, model)


def test_thoughts_are_not_shown_when_thinking_is_disabled(model: ServedModel) -> None:
    body = ask(FakeEngine(reply=saying(model, CALL)), model, tools=TOOLS, thinking={"type": "disabled"}).json()
    assert [block["type"] for block in body["content"]] == ["text", "tool_use"]
    engine = FakeEngine(reply=saying(model, "x"))
    ask(engine, model, thinking={"type": "enabled", "budget_tokens": 1024})
    assert prompt(engine, model).endswith("assistant\n<think>\n")


def test_silence_is_broken_by_pings_and_the_start_comes_before_the_first_token(model: ServedModel) -> None:
    engine = FakeEngine(reply=saying(model, "x"), first_delay=0.4)
    options = ServerOptions(first_byte_seconds=0.05, keep_alive_seconds=0.1)
    reply = post(PATH, engine, model, {"max_tokens": 5, "messages": HI, "stream": True}, options)
    found = [name for name, _ in events(reply.text)]
    assert found[:2] == ["message_start", "ping"]
    assert 2 <= found.count("ping") <= 6
    assert found.count("message_start") == 1


def test_a_stream_that_breaks_says_so(model: ServedModel) -> None:
    found = events(ask(FakeEngine(fail_after=2), model, stream=True).text)
    assert found[-1][0] == "error"
    assert found[-1][1]["error"]["type"] == "overloaded_error"


def test_errors_before_the_stream_are_plain_answers(model: ServedModel) -> None:
    for stream in (False, True):
        reply = ask(FakeEngine(overloaded=True), model, stream=stream)
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "7")
        assert reply.json()["error"]["type"] == "overloaded_error"


def test_either_key_header_opens_the_door(model: ServedModel) -> None:
    options = ServerOptions(api_keys=("secret",))
    body = {"max_tokens": 5, "messages": HI}
    assert post(PATH, FakeEngine(), model, body, options, {"x-api-key": "secret"}).status_code == 200
    assert post(PATH, FakeEngine(), model, body, options, {"authorization": "Bearer secret"}).status_code == 200
    refused = post(PATH, FakeEngine(), model, body, options, {"x-api-key": "wrong"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")


def _content(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


def _said(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "content": list(blocks)}]}


@pytest.mark.parametrize(("body", "place"), [
    ({"messages": []}, "messages"), ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"), ({"messages": [{"role": "user", "content": 5}]}, "content"),
    ({"messages": [{"role": "user", "content": "", "foo": 1}]}, "messages[0]"), (_content(5), "messages[0].content[0]"),
    (_content({"type": "image", "source": {}}), "content[0].type"), (_content({"type": "text"}), "content[0].text"),
    (_content({"type": "tool_use"}), "content[0].type"), (_content({"type": "tool_result"}), "content[0].tool_use_id"),
    (_content({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}), "content[0].content[0].type"),
    (_said({"type": "tool_use", "id": "a", "name": "b", "input": "c"}), "content[0].input"),
    (_said({"type": "tool_use", "name": "b", "input": {}}), "content[0].id"), (_said({"type": "foo"}), "content[0].type"),
    ({"system": [{"type": "image"}]}, "system[0].type"), ({"system": 5}, "system"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": None}, "max_tokens"), ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
    ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"), ({"tool_choice": {"type": "foo"}}, "tool_choice.type"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "b"}}, "tool_choice"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"thinking": {"type": "foo"}}, "thinking.type"), ({"output_config": {"format": {}}}, "output_config.format"),
    ({"stop_sequences": [""]}, "stop_sequences"), ({"stop_sequences": ["a"] * 65}, "stop_sequences"),
    ({"temperature": -1}, "temperature"),
    ({"mcp_servers": [{}]}, "mcp_servers"), ({"n": 2}, "n"), ({"foo": 1}, "foo"),
])
def test_what_is_wrong_is_refused_by_name(model: ServedModel, body: dict[str, Any], place: str) -> None:
    reply = ask(FakeEngine(), model, **body)
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
    assert place in reply.json()["error"]["message"]


RAW = ["-1", "0", "4097", "2147483648", "9223372036854775808", "1e400", "NaN", "0.5", '"5"', "true", "null", "[]", "{}", "[[]]",
       '[""]', '{"type": 5}', '[{"type": 5}]', "[null]", "1" * 400]
FIELDS = ["model", "messages", "system", "tools", "tool_choice", "thinking", "output_config", "max_tokens", "stop_sequences",
          "stream", "temperature", "top_p", "top_k", "metadata"]


@pytest.mark.parametrize("path", [PATH, f"{PATH}/count_tokens"])
def test_the_edges_of_every_field_are_valid_or_refused(model: ServedModel, path: str) -> None:
    engine = FakeEngine()

    async def go() -> None:
        async with api_client(create_app(engine, model)) as client:
            for field in FIELDS:
                base = {"messages": HI, "max_tokens": 2}
                rest = json.dumps({name: value for name, value in base.items() if name != field})[1:-1]
                for value in RAW:
                    body = f'{{{rest}{"," if rest else ""}"{field}":{value}}}'
                    reply = await client.post(path, content=body, headers={"content-type": "application/json"})
                    assert reply.status_code in (200, 400, 404), (body, reply.text)
                    if reply.status_code != 200:
                        message = reply.json()["error"]["message"]
                        excused = (field.split("_")[0], "not valid JSON", "prompt is too")
                        assert any(text in message for text in excused), (body, message)

    asyncio.run(go())
    assert not engine.active
