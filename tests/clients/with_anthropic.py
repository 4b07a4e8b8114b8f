"""Anthropic's Python SDK against the demo model: messages, stream, tools and back, count_tokens, overflow."""

import sys

import anthropic

url, window = sys.argv[1], int(sys.argv[2])
client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
GREEDY = {"temperature": 0}  # no argument of its own in the newest versions
HI = [{"role": "user", "content": "Hello!"}]
TOOL = {"name": "get_weather", "description": "The weather of a city.", "input_schema": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}

assert client.messages.create(model="demo", max_tokens=50, messages=HI).content[0].text
with client.messages.stream(model="claude-sonnet-4-5", max_tokens=50, messages=HI, system="Be brief.") as stream:
    text = "".join(stream.text_stream)
    assert text == stream.get_final_message().content[0].text
assert client.messages.count_tokens(model="demo", messages=HI).input_tokens > 0

ask = [{"role": "user", "content": "What is the weather in Paris?"}]
first = client.messages.create(model="demo", max_tokens=100, messages=ask, tools=[TOOL], extra_body=GREEDY)
call = next(block for block in first.content if block.type == "tool_use")
assert first.stop_reason == "tool_use" and call.input["city"] == "Paris"
result = {"type": "tool_result", "tool_use_id": call.id, "content": '{"temperature": 21, "sky": "sunny"}'}
turns = [*ask, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
second = client.messages.create(model="demo", max_tokens=100, messages=turns, tools=[TOOL], extra_body=GREEDY)
assert second.stop_reason == "end_turn" and second.content[0].text
try:
    client.messages.create(model="demo", max_tokens=10, messages=[{"role": "user", "content": "apple " * window * 2}])
except anthropic.BadRequestError as error:
    assert "prompt is too long" in str(error)
else:
    raise AssertionError("an overflow was not refused")
