"""The body of /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import WithJsonSchema

from workstation.server.schemas import ObjectList, Strict, StringList

_INPUT = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}


class ResponsesRequest(Strict):
    """`input` is a string or a list of items; incoming.py checks them."""

    model: str | None = None
    input: Annotated[Any, WithJsonSchema(_INPUT)] = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    reasoning: dict[str, Any] | None = None
    store: bool | None = None
    stream: bool | None = None
    temperature: float | None = None
    text: dict[str, Any] | None = None
    tool_choice: Any = None
    tools: ObjectList | None = None
    top_p: float | None = None
    include: StringList | None = None
    user: str | None = None


# Hints to OpenAI's own service; they change nothing about what this server computes or keeps.
HARMLESS = frozenset({"service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
                      "stream_options", "client_metadata", "access_programs", "moderation", "max_tool_calls"})
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "background": ((False,), "responses are made while the client waits; stream them"),
    "background_options": ((), "responses are made while the client waits; stream them"),
    "conversation": ((), "conversations are continued by previous_response_id"),
    "prompt": ((), "prompt templates are not kept here; send instructions and input"),
    "truncation": (("disabled",), "nothing is cut from a prompt"),
    "top_logprobs": ((0,), "log-probabilities exist in /v1/chat/completions"),
    "context_management": (([],), "nothing is cut from a prompt"),
    "image": ((), "this server handles text only"),
}
# What the shared request calls them → what this dialect does.
RENAMED = {"max_tokens": "max_output_tokens", "messages": "input"}
