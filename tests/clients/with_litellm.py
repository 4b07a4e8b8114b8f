"""LiteLLM against the demo model: two providers, stream, tools, embeddings, Anthropic's dialect, overflow by its class."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would be fetched from the internet

import litellm

url, window = sys.argv[1], int(sys.argv[2])
HI = [{"role": "user", "content": "Hello!"}]
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather of a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
for provider in ("hosted_vllm", "openai"):
    where = {"model": f"{provider}/demo", "api_base": f"{url}/v1", "api_key": "none", "num_retries": 0}
    assert litellm.completion(messages=HI, **where).choices[0].message.content
    chunks = list(litellm.completion(messages=HI, stream=True, stream_options={"include_usage": True}, **where))
    assert litellm.stream_chunk_builder(chunks, messages=HI).usage.completion_tokens > 0
    ask = [{"role": "user", "content": "What is the weather in Paris?"}]
    first = litellm.completion(messages=ask, tools=[TOOL], temperature=0, **where).choices[0]
    call = first.message.tool_calls[0]
    assert first.finish_reason == "tool_calls" and json.loads(call.function.arguments) == {"city": "Paris"}
    turns = [*ask, first.message, {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 21}'}]
    assert litellm.completion(messages=turns, tools=[TOOL], temperature=0, **where).choices[0].message.content
    try:
        litellm.completion(messages=[{"role": "user", "content": "apple " * window * 2}], **where)
    except litellm.ContextWindowExceededError:
        pass
    else:
        raise AssertionError("an overflow was not refused")
assert len(litellm.embedding(model="openai/demo", input=["one"], api_base=f"{url}/v1", api_key="none").data) == 1
answer = litellm.completion(model="anthropic/demo", messages=HI, api_base=url, api_key="none", max_tokens=30)
assert answer.choices[0].message.content
assert litellm.responses(model="openai/demo", input="Hello!", api_base=f"{url}/v1", api_key="none").output
