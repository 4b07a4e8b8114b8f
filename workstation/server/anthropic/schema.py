"""Bodies of /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from typing import Any

from workstation.server.schemas import AnthropicMessages, ObjectList, Strict, StringList


class CountRequest(Strict):
    """What decides the prompt."""

    model: str | None = None
    messages: AnthropicMessages
    system: str | ObjectList | None = None
    tools: ObjectList | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None


class MessagesRequest(CountRequest):
    max_tokens: int
    stop_sequences: StringList | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None


# Hints to Anthropic's own service; they change nothing about what this server computes or keeps.
HARMLESS = frozenset({"service_tier", "context_management", "cache_control", "betas", "inference_geo", "speed", "diagnostics",
                      "user_profile_id", "workspace_id"})
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "mcp_servers": (([],), "this server calls no tools itself"), "container": ((), "this server runs no code"),
}
# Fields that only /v1/messages has and clients also send to count_tokens.
COUNT_HARMLESS = HARMLESS | {"max_tokens", "stream", "temperature", "top_p", "top_k", "stop_sequences", "metadata"}
# What the shared request calls them → what this dialect does.
RENAMED = {"stop": "stop_sequences"}
