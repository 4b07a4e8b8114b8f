"""Tools and thoughts through /v1/chat/completions, on a fake engine that says what it is told to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import CHAT_TEMPLATE, FakeEngine, post, served_model, sse_events, write_byte_level_folder

from workstation.engine.request import EngineRequest
from workstation.server.options import ServedModel

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hello world"}]
TOOLS = [{"type": "function", "function": {"name": name, "description": "x", "strict": True, "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}}}} for name in ("add", "now")]
TWO_CALLS = ('<think>\nI add.\n</think>\n\nOk.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
             '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served_model(write_byte_level_folder(tmp_path_factory.mktemp("tools")))


def saying(model: ServedModel, text: str, *, end: bool = True) -> Callable[[EngineRequest, int], list[int]]:
    ids = model.tokenizer.encode(text, add_special_tokens=False) + [model.eos_token_ids[0]] * end
    return lambda request, index: ids


def chat(model: ServedModel, text: str, /, *, end: bool = True, engine: FakeEngine | None = None, **body: Any) -> Any:
    engine = engine or FakeEngine(reply=saying(model, text, end=end))
    return post(CHAT, engine, model, {"messages": HI, **body})


def streamed(reply: Any) -> tuple[dict[str, Any], str | None, list[dict[str, Any]]]:
    """A stream's message as a client puts it together, its finish_reason, and the raw chunks."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "reasoning": "", "tool_calls": []}
    reason = None
    chunks = sse_events(reply.text)
    for chunk in chunks:
        choice = chunk["choices"][0]
        reason = choice["finish_reason"] or reason
        for name in ("content", "reasoning_content", "reasoning"):
            message[name] += choice["delta"].get(name, "")
        for call in choice["delta"].get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(message["tool_calls"])
                assert call["type"] == "function"
                assert call["function"]["name"]
                message["tool_calls"].append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
            else:
                assert set(call) == {"index", "function"}
                assert set(call["function"]) == {"arguments"}
            message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return message, reason, chunks


def test_calls_thoughts_and_text_stand_in_their_own_fields(model: ServedModel) -> None:
    choice = chat(model, TWO_CALLS, tools=TOOLS).json()["choices"][0]
    message = choice["message"]
    assert (choice["finish_reason"], message["content"]) == ("tool_calls", "Ok.")
    assert message["reasoning_content"] == message["reasoning"] == "I add."
    assert [(call["type"], call["function"]) for call in message["tool_calls"]] == [
        ("function", {"name": "add", "arguments": '{"a": 1}'}), ("function", {"name": "now", "arguments": "{}"})]
    assert len({call["id"] for call in message["tool_calls"]}) == 2


def test_an_answer_that_only_calls_has_no_content(model: ServedModel) -> None:
    text = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert chat(model, text, tools=TOOLS).json()["choices"][0]["message"]["content"] is None


@pytest.mark.parametrize("step", [1, 3, 50])
def test_a_stream_says_the_same_in_openais_shape(model: ServedModel, step: int) -> None:
    engine = FakeEngine(reply=saying(model, TWO_CALLS), tokens_per_step=step)
    message, reason, chunks = streamed(chat(model, "", engine=engine, tools=TOOLS, stream=True))
    assert reason == "tool_calls"
    assert (message["content"], message["reasoning_content"], message["reasoning"]) == ("Ok.", "I add.", "I add.")
    assert [(call["name"], call["arguments"]) for call in message["tool_calls"]] == [("add", '{"a": 1}'), ("now", "{}")]
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_a_call_cut_by_the_limit_ends_with_length(model: ServedModel) -> None:
    choice = chat(model, TWO_CALLS, end=False, tools=TOOLS, max_tokens=60).json()["choices"][0]
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_without_parallel_calls_the_answer_ends_with_the_first(model: ServedModel, stream: bool) -> None:
    engine = FakeEngine(reply=saying(model, TWO_CALLS + " more" * 50), delay=0.001)
    reply = chat(model, "", engine=engine, tools=TOOLS, parallel_tool_calls=False, stream=stream)
    if stream:
        message, reason, _ = streamed(reply)
    else:
        message, reason = reply.json()["choices"][0]["message"], reply.json()["choices"][0]["finish_reason"]
    assert (len(message["tool_calls"]), reason) == (1, "tool_calls")
    assert engine.aborted == [engine.seen[0].request_id]


@pytest.mark.parametrize(("choice", "opening", "rest"), [
    ("required", '<tool_call>\n{"name": "', 'add", "arguments": {"a": 2}}\n</tool_call>'),
    ({"type": "function", "function": {"name": "add"}}, '<tool_call>\n{"name": "add", "arguments":',
     ' {"a": 2}}\n</tool_call>'),
])
@pytest.mark.parametrize("stream", [False, True])
def test_a_demanded_call_is_begun_for_the_model(model: ServedModel, choice: Any, opening: str, rest: str, stream: bool) -> None:
    engine = FakeEngine(reply=saying(model, rest))
    reply = chat(model, "", engine=engine, tools=TOOLS, tool_choice=choice, stream=stream)
    assert model.tokenizer.decode(engine.seen[0].prompt_token_ids).endswith("<|im_start|>assistant\n" + opening)
    if stream:
        message, reason, _ = streamed(reply)
        found = [(call["name"], call["arguments"]) for call in message["tool_calls"]]
    else:
        message, reason = reply.json()["choices"][0]["message"], reply.json()["choices"][0]["finish_reason"]
        found = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
    assert (found, reason) == ([("add", '{"a": 2}')], "tool_calls")


def test_a_demanded_call_comes_after_a_thought_that_the_prompt_opened(model: ServedModel) -> None:
    engine = FakeEngine(reply=saying(model, 'Hm.\n</think>\n\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'))
    reply = chat(model, "", engine=engine, tools=TOOLS, tool_choice="required", chat_template_kwargs={"enable_thinking": True})
    message = reply.json()["choices"][0]["message"]
    assert (message["reasoning"], message["tool_calls"][0]["function"]["name"]) == ("Hm.", "now")
    assert model.tokenizer.decode(engine.seen[0].prompt_token_ids).endswith("<think>\n")
    assert engine.seen[0].grammar is not None and engine.seen[0].grammar.matched == 0


def test_a_thought_that_the_prompt_opened_is_a_thought(model: ServedModel) -> None:
    reply = chat(model, "I see.\n</think>\n\n4", chat_template_kwargs={"enable_thinking": True}).json()
    message = reply["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("I see.", "4")


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_are_left_out_on_request(model: ServedModel, stream: bool) -> None:
    reply = chat(model, "<think>I see.</think>4", include_reasoning=False, stream=stream)
    assert "I see" not in reply.text


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_earlier_thoughts_reach_the_template_under_either_name(tmp_path: Path, name: str) -> None:
    template = "{% for m in messages %}{{ m.role }}:{{ m.reasoning_content }}|{{ m.content }};{% endfor %}"
    model = served_model(write_byte_level_folder(tmp_path, chat_template=template))
    engine = FakeEngine()
    messages = [*HI, {"role": "assistant", "content": "a", name: "hm"}, *HI]
    assert post(CHAT, engine, model, {"messages": messages, "max_tokens": 1}).status_code == 200
    assert "assistant:hm|a;" in model.tokenizer.decode(engine.seen[0].prompt_token_ids)


@pytest.mark.parametrize(("written", "template"), [
    ('[{"a": 1}]', "{% for c in m.tool_calls %}[{{ c.function.arguments | tojson }}]{% endfor %}"),
    ('json{"a": 1}', "{% for c in m.tool_calls %}{{ 'json' + c.function.arguments }}{% endfor %}"),
])
def test_earlier_arguments_come_in_the_form_the_template_wants(tmp_path: Path, written: str, template: str) -> None:
    whole = ("{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.tool_calls %}add wsprobefn" + template
             + "{% endif %};{% endfor %}")
    whole = whole.replace("add wsprobefn", "{{ m.tool_calls[0].function.name }}")
    model = served_model(write_byte_level_folder(tmp_path, chat_template=whole))
    engine = FakeEngine()
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c",
                                                                                   "content": "2"}]
    assert post(CHAT, engine, model, {"messages": messages, "max_tokens": 1}).status_code == 200
    assert f"assistant:add{written};" in model.tokenizer.decode(engine.seen[0].prompt_token_ids)


def test_a_system_turn_in_the_middle_keeps_its_place_where_the_template_refuses_it(tmp_path: Path) -> None:
    refusing = ("{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('no') }}{% endif %}"
                "{% endfor %}")
    model = served_model(write_byte_level_folder(tmp_path, chat_template=refusing + CHAT_TEMPLATE))
    engine = FakeEngine()
    messages = [{"role": "system", "content": "a"}, *HI, {"role": "system", "content": "b"}]
    assert post(CHAT, engine, model, {"messages": messages, "max_tokens": 1}).status_code == 200
    text = model.tokenizer.decode(engine.seen[0].prompt_token_ids)
    assert "hello world<|im_end|>\n<|im_start|>user\nb<|im_end|>" in text


def test_a_template_that_reads_tools_off_the_system_message_gets_them_there(tmp_path: Path) -> None:
    template = ("{% for message in messages %}{{ message.role }}:{{ message.content }}{% if 'tools' in message %}<|tool|>"
                "{{ message['tools'] }}<|/tool|>{% endif %};{% endfor %}")
    model = served_model(write_byte_level_folder(tmp_path, chat_template=template))
    engine = FakeEngine(reply=saying(model, '<|tool_call|>[{"name": "add", "arguments": {"a": 1}}]<|/tool_call|>'))
    choice = chat(model, "", engine=engine, tools=TOOLS).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    text = model.tokenizer.decode(engine.seen[0].prompt_token_ids)
    assert text.startswith('system:<|tool|>[{"name": "add"')
    assert text.endswith("<|/tool|>;user:hello world;")


def test_a_model_whose_template_shows_no_tools_refuses_them(tmp_path: Path) -> None:
    model = served_model(write_byte_level_folder(tmp_path, chat_template="{{ messages[0].content }}"))
    reply = chat(model, "x", tools=TOOLS)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tools")
    assert chat(model, "x", tools=TOOLS, tool_choice="none").status_code == 200


@pytest.mark.parametrize(("body", "param"), [
    ({"tools": [{}]}, "tools[0].type"), ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "x" * 129}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, "tools[0].function.parameters"),
    ({"tools": [{"type": "function", "function": {"name": "a", "description": 1}}]}, "tools[0].function.description"),
    ({"tools": TOOLS * 300}, "tools"), ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
    ({"tool_choice": "required"}, "tool_choice"), ({"tools": [], "tool_choice": "required"}, "tool_choice"),
])
def test_a_wrong_tool_is_refused_by_name(model: ServedModel, body: dict[str, Any], param: str) -> None:
    reply = chat(model, "x", **body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_special_marks_reach_the_parser_though_special_tokens_are_skipped(tmp_path: Path) -> None:
    folder = write_byte_level_folder(tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text())
    for token in raw["added_tokens"]:
        token["special"] = True
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    model = served_model(folder)
    message = chat(model, TWO_CALLS, tools=TOOLS).json()["choices"][0]["message"]
    assert (len(message["tool_calls"]), message["reasoning"]) == (2, "I add.")


def test_logprobs_and_ids_come_once_each_beside_calls(model: ServedModel) -> None:
    ids = [*model.tokenizer.encode(TWO_CALLS, add_special_tokens=False), model.eos_token_ids[0]]
    reply = chat(model, TWO_CALLS, tools=TOOLS, stream=True, logprobs=True, return_token_ids=True)
    chunks = sse_events(reply.text)
    assert [index for chunk in chunks for index in chunk["choices"][0].get("token_ids", [])] == ids
    entries = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert len(entries) == len(ids) - 1  # the token that ends an answer is not shown
