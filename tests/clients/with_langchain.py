"""langchain-openai against the demo model: invoke, stream with usage, tools and back, responses, embeddings, overflow."""

import sys

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

url, window = sys.argv[1], int(sys.argv[2])
where = {"base_url": f"{url}/v1", "api_key": "none", "model": "demo"}
model = ChatOpenAI(**where, temperature=0, stream_usage=True, max_retries=0)


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f'{{"city": "{city}", "temperature": 21}}'


assert model.invoke("Hello!").content
chunks = list(model.stream("Hello!"))
assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) > 0

bound = model.bind_tools([get_weather])
turns = [HumanMessage("What is the weather in Paris?")]
first = bound.invoke(turns)
assert [call["name"] for call in first.tool_calls] == ["get_weather"] and first.tool_calls[0]["args"] == {"city": "Paris"}
turns += [first, ToolMessage(get_weather.invoke(first.tool_calls[0]["args"]), tool_call_id=first.tool_calls[0]["id"])]
assert bound.invoke(turns).content
streamed = None
for chunk in bound.stream(turns[:1]):
    streamed = chunk if streamed is None else streamed + chunk
assert streamed.tool_calls[0]["args"] == {"city": "Paris"}
assert model.bind_tools([get_weather], tool_choice="get_weather").invoke(turns[:1]).tool_calls

assert ChatOpenAI(**where, use_responses_api=True, max_retries=0).invoke("Hello!").text
vectors = OpenAIEmbeddings(**where, check_embedding_ctx_length=False).embed_documents(["one", "two"])
assert len(vectors) == 2 and abs(sum(x * x for x in vectors[0]) - 1) < 1e-4
try:
    model.invoke("apple " * window * 2)
except openai.BadRequestError as error:
    assert "maximum context length" in str(error)
else:
    raise AssertionError("an overflow was not refused")
