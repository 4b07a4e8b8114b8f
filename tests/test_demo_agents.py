"""What an agent does, on the real demo model in a real process, in each dialect: call a tool, get its result, answer, to a
schema too."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI
from servers import serving_demo

WEATHER = {"type": "object", "properties": {"city": {"type": "string", "description": "Name of the city"}},
           "required": ["city"]}
QUESTION = "What is the weather in Berlin?"
RESULT = '{"temperature": 21, "condition": "sunny"}'
ANSWER = "The temperature is 21 and the condition is sunny."
CHAT_TOOLS: list[Any] = [{"type": "function", "function": {
    "name": "get_weather", "description": "Get the current weather in a city", "parameters": WEATHER}}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    log = tmp_path_factory.mktemp("agents") / "log"
    with serving_demo(log, "--access-log") as (_, server):
        yield server.base_url, log


@pytest.fixture
def openai_client(served: tuple[str, Path]) -> OpenAI:
    return OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_calls_a_tool_and_answers_from_its_result(openai_client: OpenAI, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    if stream:
        with openai_client.chat.completions.stream(model="demo", messages=messages, tools=CHAT_TOOLS) as events:
            choice = events.get_final_completion().choices[0]
    else:
        choice = openai_client.chat.completions.create(model="demo", messages=messages, tools=CHAT_TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    call = choice.message.tool_calls[0]
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Berlin"})
    messages += [choice.message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"}),
                 {"role": "tool", "tool_call_id": call.id, "content": RESULT}]
    answer = openai_client.chat.completions.create(model="demo", messages=messages, tools=CHAT_TOOLS).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("stop", ANSWER)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_demanded_call_is_made(openai_client: OpenAI, choice: Any) -> None:
    answer = openai_client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": QUESTION}], tools=CHAT_TOOLS, tool_choice=choice)
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert json.loads(calls[0].function.arguments) == {"city": "Berlin"}  # type: ignore[union-attr]


def test_thoughts_are_told_apart(openai_client: OpenAI) -> None:
    answer = openai_client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "What is 417 + 385?"}],
        extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    message = answer.choices[0].message.model_dump()
    assert message["reasoning_content"]
    assert message["reasoning"] == message["reasoning_content"]
    assert "802" in message["content"]
    assert "think>" not in message["content"]


def test_a_tool_the_template_cannot_write_is_refused_by_the_real_client(openai_client: OpenAI) -> None:
    tools: list[Any] = [{"type": "function", "function": {"name": "no spaces"}}]
    with pytest.raises(BadRequestError, match="tools"):
        openai_client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "x"}], tools=tools)


@pytest.mark.parametrize("stream", [False, True])
def test_messages_call_a_tool_and_answer_from_its_result(served: tuple[str, Path], stream: bool) -> None:
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=served[0], api_key="none", max_retries=0)
    tools = [{"name": "get_weather", "description": "Get the current weather in a city", "input_schema": WEATHER}]
    messages: list[Any] = [{"role": "user", "content": QUESTION}]

    def ask() -> Any:
        fields = {"model": "claude-any", "max_tokens": 200, "messages": messages, "tools": tools}
        if not stream:
            return client.messages.create(**fields)
        with client.messages.stream(**fields) as events:
            return events.get_final_message()

    first = ask()
    assert first.stop_reason == "tool_use"
    call = first.content[-1]
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Berlin"})
    messages += [{"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in first.content]},
                 {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": RESULT}]}]
    last = ask()
    assert (last.stop_reason, last.content[0].text) == ("end_turn", ANSWER)
    counted = client.messages.count_tokens(model="claude-any", messages=messages, tools=tools)
    assert counted.input_tokens == last.usage.input_tokens + (last.usage.cache_read_input_tokens or 0)
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(model="demo", max_tokens=5, messages=[{"role": "user", "content": "a b " * 9000}])


@pytest.mark.parametrize("stream", [False, True])
def test_responses_call_a_tool_and_go_on_from_it(openai_client: OpenAI, stream: bool) -> None:
    tools: list[Any] = [{"type": "function", "name": "get_weather", "description": "Get the current weather in a city",
                         "parameters": WEATHER, "strict": False}, {"type": "web_search"}]

    def ask(**fields: Any) -> Any:
        if not stream:
            return openai_client.responses.create(model="demo", tools=tools, **fields)
        with openai_client.responses.stream(model="demo", tools=tools, **fields) as events:
            return events.get_final_response()

    first = ask(input=QUESTION)
    call = first.output[-1]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "get_weather", {"city": "Berlin"})
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": RESULT}]
    last = ask(input=result, previous_response_id=first.id)
    assert (last.status, last.output_text) == ("completed", ANSWER)
    assert openai_client.responses.retrieve(last.id).output_text == ANSWER
    assert openai_client.responses.cancel(last.id).status == "completed"


def test_a_call_is_rendered_again_token_for_token(openai_client: OpenAI) -> None:
    """The turn after a call finds prompt and call in the prefix cache: nothing drifted on its way through the client."""
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather in Paris?"}]
    first = openai_client.chat.completions.create(model="demo", messages=messages, tools=CHAT_TOOLS)
    assert first.usage is not None
    message = first.choices[0].message
    assert message.tool_calls is not None
    messages += [message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"}),
                 {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": RESULT}]
    usage = openai_client.chat.completions.create(model="demo", messages=messages, tools=CHAT_TOOLS).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    known = first.usage.prompt_tokens + first.usage.completion_tokens - 1  # the last token's KV is not computed
    assert (usage.prompt_tokens_details.cached_tokens or 0) == known // 16 * 16


def test_the_demo_fills_in_the_middle(openai_client: OpenAI) -> None:
    answer = openai_client.completions.create(model="demo", prompt="def add(a, b):\n    return ", suffix="\n", max_tokens=16)
    assert answer.choices[0].text == "a + b"


# ── answers to a schema ─────────────────────────────────────────────────────────────────────────────────────────────

SCHEMA: dict[str, Any] = {"type": "object", "properties": {
    "name": {"type": "string", "maxLength": 24}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
    "mood": {"enum": ["good", "bad"]}, "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2}},
    "required": ["name", "age", "mood"], "additionalProperties": False}
FORMAT = {"type": "json_schema", "name": "person", "strict": True, "schema": SCHEMA}
ROUTES: dict[str, dict[str, Any]] = {
    "chat/completions": {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}},
    "completions": {"structured_outputs": {"json": SCHEMA}}, "responses": {"text": {"format": FORMAT}},
    "messages": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
}
NAMES = ("Anna", "Bo", "Mei Ling", "José", "Zed")


def check(text: str) -> None:
    value = json.loads(text)
    assert {"name", "age", "mood"} <= set(value) <= set(SCHEMA["properties"])
    assert isinstance(value["name"], str) and len(value["name"]) <= 24
    assert type(value["age"]) is int and 0 <= value["age"] <= 120
    assert value["mood"] in ("good", "bad")
    assert len(value.get("tags", [])) <= 2 and all(isinstance(tag, str) and len(tag) <= 6 for tag in value.get("tags", []))


def answer(client: httpx.Client, route: str, number: int) -> str:
    """What the model says on a route, at temperature 1."""
    question = f"Give me {NAMES[number % len(NAMES)]}, {number}, as JSON."
    said = [{"role": "user", "content": question}]
    ask = {"completions": {"prompt": question}, "responses": {"input": question}}.get(route, {"messages": said})
    limit = "max_output_tokens" if route == "responses" else "max_tokens"
    reply = client.post(f"/v1/{route}", json={**ask, limit: 400, "temperature": 1.0, **ROUTES[route]})
    assert reply.status_code == 200, reply.text
    body = reply.json()
    if route == "chat/completions":
        text = body["choices"][0]["message"]["content"]
    elif route == "completions":
        text = body["choices"][0]["text"]
    elif route == "responses":
        text = next(item for item in body["output"] if item["type"] == "message")["content"][0]["text"]
    else:
        text = next(block for block in body["content"] if block["type"] == "text")["text"]
    return str(text)


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_answers_to_a_schema(served: tuple[str, Path], route: str) -> None:
    with httpx.Client(base_url=served[0], timeout=60) as client, ThreadPoolExecutor(4) as pool:
        for text in pool.map(lambda number: answer(client, route, number), range(3)):
            check(text)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_100_of_100_answers_on_each_route_are_valid(served: tuple[str, Path]) -> None:
    with httpx.Client(base_url=served[0], timeout=600) as client, ThreadPoolExecutor(16) as pool:
        for route in ROUTES:
            for text in pool.map(lambda number, route=route: answer(client, route, number), range(100)):  # type: ignore[misc]
                check(text)


def test_the_real_client_streams_a_schema_and_calls_a_strict_tool(openai_client: OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Berlin?"}]
    tools: list[Any] = [{"type": "function", "function": {"name": "get_weather", "strict": True, "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"enum": [3, 5]}},
        "required": ["city", "days"], "additionalProperties": False}}}]
    for choice in ("auto", "required"):
        made = openai_client.chat.completions.create(model="demo", messages=messages, tools=tools, tool_choice=choice)  # type: ignore[call-overload]
        call = made.choices[0].message.tool_calls[0]
        assert made.choices[0].finish_reason == "tool_calls"
        arguments = json.loads(call.function.arguments)
        assert set(arguments) == {"city", "days"} and arguments["days"] in (3, 5)
    format_: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    with openai_client.chat.completions.stream(model="demo", messages=messages, response_format=format_) as events:
        check(events.get_final_completion().choices[0].message.content or "")


def test_a_stream_goes_on_while_bombs_are_refused(served: tuple[str, Path]) -> None:
    bombs = ["start: T\nT: " + " & ".join(f"/(?s:.*)a{{{count}}}b(?s:.*)/" for count in range(1, 30)),
             "start: T0\n" + "\n".join(f'T{count}: "a" T{count + 1} "b"' for count in range(9000)) + '\nT9000: "c"']
    came: list[float] = []

    def listen() -> None:
        body = {"prompt": "1, 2, 3,", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{served[0]}/v1/completions", json=body, timeout=60) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    came.append(time.monotonic())
                if ended:
                    return

    ended: list[bool] = []
    with ThreadPoolExecutor(1) as pool:
        listening = pool.submit(listen)
        for bomb in bombs:
            began = time.monotonic()
            reply = httpx.post(f"{served[0]}/v1/completions", json={"prompt": "a", "guided_grammar": bomb}, timeout=60)
            took = time.monotonic() - began
            assert reply.status_code == 400 and reply.json()["error"]["param"] == "guided_grammar"
            assert "cannot be compiled" in reply.json()["error"]["message"]
            if took > 1.0:
                assert sum(began < moment < began + took for moment in came) > 5
        ended.append(True)
        listening.result()
    assert httpx.get(f"{served[0]}/health").json()["restarts"] == 0


def test_no_request_of_a_real_client_met_a_server_error(served: tuple[str, Path]) -> None:
    log = served[1].read_text()
    assert "POST /v1/" in log
    assert '" 5' not in log
    assert '" 404' not in log
