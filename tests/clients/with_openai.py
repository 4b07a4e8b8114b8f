"""OpenAI's Python SDK against the demo model: chat, stream, tools and back, completions, responses, embeddings, overflow."""

import json
import sys

import openai

url, window = sys.argv[1], int(sys.argv[2])
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
HI = [{"role": "user", "content": "Hello!"}]
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather of a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}

assert [model.id for model in client.models.list()] == ["demo"]
assert client.chat.completions.create(model="demo", messages=HI).choices[0].message.content
with client.chat.completions.stream(model="demo", messages=HI, stream_options={"include_usage": True}) as stream:
    assert list(stream)
    final = stream.get_final_completion()
assert final.usage.completion_tokens > 0

ask = [{"role": "user", "content": "What is the weather in Paris?"}]
first = client.chat.completions.create(model="demo", messages=ask, tools=[TOOL], temperature=0).choices[0]
assert first.finish_reason == "tool_calls" and json.loads(first.message.tool_calls[0].function.arguments)["city"] == "Paris"
call = first.message.tool_calls[0]
result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 21, "sky": "sunny"}'}
second = client.chat.completions.create(model="demo", messages=[*ask, first.message, result], tools=[TOOL], temperature=0)
assert second.choices[0].finish_reason == "stop" and second.choices[0].message.content

assert client.completions.create(model="demo", prompt="Hello", max_tokens=5).choices[0].text is not None
answer = client.responses.create(model="demo", input="Hello!")
assert answer.output_text and client.responses.create(model="demo", input="Again!", previous_response_id=answer.id).output_text
kinds = [event.type for event in client.responses.create(model="demo", input="Hello!", stream=True)]
assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
assert len(client.embeddings.create(model="demo", input=["one", "two"]).data) == 2
try:
    client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "apple " * window * 2}])
except openai.BadRequestError as error:
    assert error.code == "context_length_exceeded"
else:
    raise AssertionError("an overflow was not refused")
