"""/v1/responses on a fake engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fakes import FakeEngine, api_client, post, served_model, write_byte_level_folder

from workstation.engine.request import EngineRequest
from workstation.errors import InvalidRequestError
from workstation.server.app import create_app
from workstation.server.errors import HTTPRequestError
from workstation.server.options import ServedModel, ServerOptions
from workstation.server.responses.store import ResponseStore

PATH = "/v1/responses"
TOOLS = [{"type": "function", "name": "add", "description": "x", "strict": False,
          "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}]
CALL = '<think>\nI add.\n</think>\n\nOk.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served_model(write_byte_level_folder(tmp_path_factory.mktemp("responses")))


def saying(model: ServedModel, text: str, *, end: bool = True) -> Callable[[EngineRequest, int], list[int]]:
    ids = model.tokenizer.encode(text, add_special_tokens=False) + [model.eos_token_ids[0]] * end
    return lambda request, index: ids


def ask(engine: FakeEngine, model: ServedModel, /, **body: Any) -> httpx.Response:
    return post(PATH, engine, model, {"input": "hello world", **body})


def prompt(engine: FakeEngine, model: ServedModel) -> str:
    return model.tokenizer.decode(engine.seen[-1].prompt_token_ids)


def events(text: str) -> list[dict[str, Any]]:
    """The data of each event: named as its type says, numbered from 0."""
    out = []
    for number, block in enumerate(text.strip().split("\n\n")):
        name, data = block.split("\n")
        parsed = json.loads(data.removeprefix("data: "))
        assert (parsed["type"], parsed["sequence_number"]) == (name.removeprefix("event: "), number)
        out.append(parsed)
    return out


def session(engine: FakeEngine, model: ServedModel, *steps: Callable[[httpx.AsyncClient, list[Any]], Any]) -> list[Any]:
    """Steps against one server; each gets the answers of those before it."""

    async def go() -> list[Any]:
        answers: list[Any] = []
        async with api_client(create_app(engine, model)) as client:
            for step in steps:
                answers.append(await step(client, answers))
        return answers

    return asyncio.run(go())


def test_a_response_has_openais_shape(model: ServedModel) -> None:
    engine = FakeEngine(reply=saying(model, CALL), num_cached_tokens=4)
    body = ask(engine, model, tools=TOOLS, instructions="Be brief.", metadata={"a": "b"}).json()
    assert (body["object"], body["status"], body["error"], body["incomplete_details"]) == ("response", "completed", None, None)
    assert body["id"].startswith("resp_")
    thought, text, call = body["output"]
    assert (thought["type"], thought["content"][0]["text"], thought["summary"]) == ("reasoning", "I add.", [])
    assert (text["type"], text["role"], text["content"][0]["type"], text["content"][0]["text"]) == (
        "message", "assistant", "output_text", "Ok.")
    assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", "add", {"a": 1})
    assert call["call_id"] != call["id"]
    assert {item["status"] for item in body["output"]} == {"completed"}
    usage = body["usage"]
    assert (usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]) == (len(engine.seen[0].prompt_token_ids), 4)
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]
    assert prompt(engine, model).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello world<|im_end|>")


@pytest.mark.parametrize("step", [1, 7, 100])
def test_a_stream_has_every_event_clients_parse(model: ServedModel, step: int) -> None:
    engine = FakeEngine(reply=saying(model, CALL), tokens_per_step=step)
    found = events(ask(engine, model, tools=TOOLS, stream=True).text)
    kinds = [event["type"].removeprefix("response.") for event in found]
    once = [kind for position, kind in enumerate(kinds) if position == 0 or kinds[position - 1] != kind]
    message = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
               "output_item.done"]
    thought = [kind.replace("output_text", "reasoning_text") for kind in message]
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert once == ["created", "in_progress", *thought, *message, *call, "completed"]
    assert found[0]["response"]["status"] == "in_progress"
    last = found[-1]["response"]
    assert [event["item"] for event in found if event["type"] == "response.output_item.done"] == last["output"]
    for event in found:
        if event["type"].endswith(".delta"):
            assert event["item_id"] == last["output"][event["output_index"]]["id"]
    assert "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta") == "Ok."
    assert last["usage"]["output_tokens"] > 0
    whole = ask(FakeEngine(reply=saying(model, CALL), tokens_per_step=step), model, tools=TOOLS).json()
    assert whole["usage"] == last["usage"]
    assert [item["type"] for item in whole["output"]] == [item["type"] for item in last["output"]]


def test_a_limit_makes_a_response_incomplete(model: ServedModel) -> None:
    engine = FakeEngine(reply=saying(model, "one two three"))
    body = ask(engine, model, max_output_tokens=2).json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert events(ask(engine, model, max_output_tokens=2, stream=True).text)[-1]["type"] == "response.incomplete"


def test_items_of_earlier_turns_are_rendered(model: ServedModel) -> None:
    engine = FakeEngine(reply=saying(model, "2"))
    items = [
        {"role": "developer", "content": "Be brief."}, {"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}],
         "encrypted_content": None},
        {"type": "message", "role": "assistant", "id": "msg", "status": "completed", "phase": None,
         "content": [{"type": "output_text", "text": "Ok.", "annotations": []}]},
        {"type": "function_call", "call_id": "c", "name": "add", "arguments": '{"a": 1}', "id": "fc", "status": "completed"},
        {"type": "function_call", "call_id": "d", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "2"},
        {"type": "function_call_output", "call_id": "d", "output": [{"type": "input_text", "text": "3"}]},
    ]
    assert ask(engine, model, input=items, tools=TOOLS).status_code == 200
    assert ("system\nBe brief.<|im_end|>\n<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\nOk."
            '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
            '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
            "<|im_end|>\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>tool\n3<|im_end|>") in prompt(engine, model)


def test_tools_of_other_types_are_skipped(model: ServedModel) -> None:
    engine = FakeEngine(reply=saying(model, "x"))
    tools = [*TOOLS, {"type": "web_search"}, {"type": "custom", "name": "apply_patch", "format": {}},
             {"type": "image_generation"}, {"type": "namespace", "name": "mcp", "tools": []}, {"type": "local_shell"}, {}]
    assert ask(engine, model, tools=tools).status_code == 200
    assert "apply_patch" not in prompt(engine, model)
    assert ask(engine, model, tools=[{"type": "web_search"}], tool_choice="auto").status_code == 200


def test_an_empty_probe_is_answered(model: ServedModel) -> None:
    for given in ([], "", None):
        assert ask(FakeEngine(), model, input=given, max_output_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_goes_on_from_a_response(model: ServedModel, stream: bool) -> None:
    engine = FakeEngine(reply=saying(model, CALL))

    async def first(client: httpx.AsyncClient, _: list[Any]) -> str:
        reply = await client.post(PATH, json={"input": "hello", "tools": TOOLS, "stream": stream, "instructions": "Old."})
        return str((events(reply.text)[-1]["response"] if stream else reply.json())["id"])

    async def second(client: httpx.AsyncClient, answers: list[Any]) -> httpx.Response:
        item = {"type": "function_call_output", "call_id": "x", "output": "2"}
        return await client.post(PATH, json={"input": [item], "previous_response_id": answers[0], "instructions": "New."})

    async def look(client: httpx.AsyncClient, answers: list[Any]) -> httpx.Response:
        return await client.get(f"{PATH}/{answers[0]}")

    async def forget(client: httpx.AsyncClient, answers: list[Any]) -> httpx.Response:
        return await client.delete(f"{PATH}/{answers[0]}")

    first_id, _, looked, deleted, gone = session(engine, model, first, second, look, forget, look)
    text = prompt(engine, model)
    assert text.startswith("<|im_start|>system\nNew.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nOk.")
    assert text.endswith("<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n")
    assert (looked.json()["id"], looked.json()["status"]) == (first_id, "completed")
    assert deleted.json() == {"id": first_id, "object": "response", "deleted": True}
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "response_not_found")


def test_what_is_not_stored_cannot_be_continued(model: ServedModel) -> None:
    async def first(client: httpx.AsyncClient, _: list[Any]) -> str:
        return str((await client.post(PATH, json={"input": "hello", "store": False})).json()["id"])

    async def second(client: httpx.AsyncClient, answers: list[Any]) -> httpx.Response:
        return await client.post(PATH, json={"input": "and?", "previous_response_id": answers[0]})

    _, reply = session(FakeEngine(reply=saying(model, "x")), model, first, second)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "previous_response_id")


def test_a_running_response_can_be_looked_at_and_cancelled(model: ServedModel) -> None:
    engine = FakeEngine(reply=saying(model, "one two " * 500, end=False), delay=0.01)

    async def go() -> tuple[Any, Any]:
        async with api_client(create_app(engine, model)) as client:
            running = asyncio.ensure_future(client.post(PATH, json={"input": "hello"}))
            deadline = asyncio.get_running_loop().time() + 10
            while not engine.active and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(0.05)
            response_id = engine.seen[0].request_id
            looked = await client.get(f"{PATH}/{response_id}")
            cancelled = await client.post(f"{PATH}/{response_id}/cancel", headers={"content-type": "application/json"})
            running.cancel()
            return looked.json(), cancelled.json()

    looked, cancelled = asyncio.run(go())
    assert (looked["status"], cancelled["status"]) == ("in_progress", "cancelled")
    assert engine.aborted == [engine.seen[0].request_id]


def test_the_store_keeps_the_newest_within_its_bounds() -> None:
    store = ResponseStore(max_responses=3, max_bytes=2000)
    for number in range(5):
        store.keep({"id": f"r{number}"}, [{"role": "user", "content": "x" * 10}])
    assert len(store) == 3
    store.conversation("r2")
    store.keep({"id": "big"}, [{"role": "user", "content": "x" * 1900}])
    assert store.get("big")["id"] == "big"
    assert store.bytes <= 2000
    with pytest.raises(HTTPRequestError):
        store.get("r4")
    store.keep({"id": "huge"}, [{"role": "user", "content": "x" * 3000}])
    with pytest.raises(InvalidRequestError):
        store.conversation("huge")
    assert store.get("big")


def test_an_overflow_is_told_where_each_client_looks(model: ServedModel) -> None:
    engine = FakeEngine(window=64)
    reply = ask(engine, model, input="x y " * 60)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "maximum context length" in reply.json()["error"]["message"]
    streamed = ask(engine, model, input="x y " * 60, stream=True)
    found = events(streamed.text)
    assert [event["type"] for event in found] == ["response.created", "response.failed"]
    assert found[-1]["response"]["error"]["code"] == "context_length_exceeded"
    assert not engine.seen


def test_silence_is_broken_by_in_progress_events(model: ServedModel) -> None:
    engine = FakeEngine(reply=saying(model, "x"), first_delay=0.4)
    options = ServerOptions(first_byte_seconds=0.05, keep_alive_seconds=0.1)
    found = [event["type"] for event in events(post(PATH, engine, model, {"input": "a", "stream": True}, options).text)]
    assert found[:2] == ["response.created", "response.in_progress"]
    assert 2 <= found.count("response.in_progress") <= 6
    assert found.count("response.created") == 1


def test_a_stream_that_breaks_ends_with_failed(model: ServedModel) -> None:
    found = events(ask(FakeEngine(fail_after=2), model, stream=True).text)
    assert found[-1]["type"] == "response.failed"
    assert found[-1]["response"]["error"]["code"] == "engine_dead"


@pytest.mark.parametrize(("choice", "ending"), [
    ("required", '<tool_call>\n{"name": "'), ({"type": "function", "name": "add"}, '{"name": "add", "arguments":'),
    ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "add"}]}, "assistant\n"),
])
def test_tool_choice_has_this_dialects_words(model: ServedModel, choice: Any, ending: str) -> None:
    engine = FakeEngine(reply=saying(model, "x"))
    assert ask(engine, model, tools=TOOLS, tool_choice=choice).status_code == 200
    assert prompt(engine, model).endswith(ending)


@pytest.mark.parametrize(("body", "place"), [
    ({"input": 5}, "input"), ({"input": [5]}, "input[0]"), ({"input": [{"type": "foo"}]}, "input[0].type"),
    ({"input": [{"role": "tool", "content": ""}]}, "input[0].role"), ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
    ({"input": [{"type": "function_call", "name": "a", "arguments": "{"}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call", "name": "a", "arguments": "{}"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "output": ""}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input[0].output"),
    ({"instructions": 5}, "instructions"), ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 5000}, "completion"), ({"previous_response_id": "nope"}, "previous_response_id"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"), ({"tool_choice": "any"}, "tool_choice"),
    ({"tool_choice": {"type": "web_search"}}, "tool_choice"), ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"reasoning": {"effort": 5}}, "reasoning.effort"), ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"temperature": 200}, "temperature"), ({"top_p": 0}, "top_p"), ({"foo": 1}, "foo"),
    ({"conversation": "c"}, "conversation"),
])
def test_what_is_wrong_is_refused_by_name(model: ServedModel, body: dict[str, Any], place: str) -> None:
    reply = ask(FakeEngine(), model, **body)
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
    assert place in reply.json()["error"]["message"]


RAW = ["-1", "0", "4097", "2147483648", "9223372036854775808", "1e400", "NaN", "0.5", '"5"', "true", "null", "[]", "{}", "[[]]",
       '[""]', '{"type": 5}', '[{"type": 5}]', "[null]", "1" * 400]
FIELDS = ["model", "input", "instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "previous_response_id",
          "store", "stream", "temperature", "text", "tool_choice", "tools", "top_p", "include", "user", "reasoning"]


def test_the_edges_of_every_field_are_valid_or_refused(model: ServedModel) -> None:
    engine = FakeEngine()

    async def go() -> None:
        async with api_client(create_app(engine, model)) as client:
            for field in FIELDS:
                base = {"input": "a", "max_output_tokens": 2}
                rest = json.dumps({name: value for name, value in base.items() if name != field})[1:-1]
                for value in RAW:
                    body = f'{{{rest}{"," if rest else ""}"{field}":{value}}}'
                    reply = await client.post(PATH, content=body, headers={"content-type": "application/json"})
                    assert reply.status_code in (200, 400, 404), (body, reply.text)
                    if reply.status_code != 200:
                        message = reply.json()["error"]["message"]
                        excused = (field.split("_")[0], "not valid JSON", "maximum context length")
                        assert any(text in message for text in excused), (body, message)

    asyncio.run(go())
    assert not engine.active
