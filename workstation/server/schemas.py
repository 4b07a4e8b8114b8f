"""Request bodies of the OpenAI-compatible routes: strict types, no coercion; ranges are SamplingParams' own business.

Every field is handled, harmless (dropped), or refused by name. A number of the right type in the wrong range is refused when
SamplingParams is built, so offline and HTTP use share one validator.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, WithJsonSchema
from typing_extensions import TypeAliasType

from workstation.errors import InvalidRequestError

# Named aliases, because Annotated with FailFast cannot stand in a union by itself.
TokenList = TypeAliasType("TokenList", Annotated[list[int], FailFast()])
StringList = TypeAliasType("StringList", Annotated[list[str], FailFast()])
_TEXT = {"type": "string", "minLength": 1}
_TEXTS = [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}]
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
# Checked by hand, for the sake of the messages; the schema is what the document says of it.
Prompt = Annotated[Any, WithJsonSchema({"anyOf": [*_TEXTS, _IDS, {"type": "array", "items": _IDS, "minItems": 1}]})]
ObjectList = TypeAliasType("ObjectList", Annotated[list[dict[str, Any]], FailFast()])


def _object(required: list[str], properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


_STRING = {"type": "string"}
_NAME = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"}
_TEXT_PART = _object(["type", "text"], {"type": {"const": "text"}, "text": _STRING, "cache_control": {}, "annotations": {}})
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]}


def _turn(*roles: str) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": {"enum": list(roles)}, "content": _CONTENT}
    if "tool" in roles:
        call = _object(["id", "type", "function"], {"id": _STRING, "type": {"const": "function"}, "function": _object(
            ["name", "arguments"], {"name": _NAME, "arguments": {"type": "string", "contentMediaType": "application/json"}})})
        turn |= {"name": _STRING, "tool_call_id": _STRING, "reasoning_content": _STRING, "reasoning": _STRING,
                 "tool_calls": {"type": "array", "items": call},
                 **{name: {} for name in ("refusal", "annotations", "id", "cache_control", "provider_specific_fields")}}
    return {"type": "array", "minItems": 1, "items": _object(["role", "content"], turn)}


_FUNCTION = _object(["name"], {"name": _NAME, "description": {"type": "string"}, "parameters": {"type": "object"},
                               "strict": {"type": "boolean"}})
_TOOL = _object(["type", "function"], {"type": {"const": "function"}, "function": _FUNCTION})
# Objects whose shape is checked where they are read; the schema is what the document says of it.
ChatMessages = Annotated[ObjectList, WithJsonSchema(_turn("system", "developer", "user", "assistant", "tool"))]
AnthropicMessages = Annotated[ObjectList, WithJsonSchema(_turn("user", "assistant"))]
ChatTools = Annotated[ObjectList, WithJsonSchema({"type": "array", "items": _TOOL})]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class StreamOptions(Strict):
    """include_usage: a last chunk with the usage.  continuous_usage_stats: usage in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # padding against eavesdroppers; we never pad, whatever it says


class PromptRequest(Strict):
    """What every route that runs a prompt takes."""

    model: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None
    user: str | None = None


class SamplingRequest(PromptRequest):
    """What chat and completions have in common; meanings are SamplingParams'."""

    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | StringList | None = None
    stop_token_ids: TokenList | None = None
    bad_words: StringList | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: TokenList | None = None
    skip_reading_prefix_cache: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: StringList | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    guided_decoding_backend: str | None = None
    timings_per_token: bool | None = None

    def wants_usage(self) -> tuple[bool, bool]:
        """(a last usage chunk, usage in every chunk). Raises InvalidRequestError when not streaming."""
        if self.stream_options is None:
            return False, False
        if not self.stream:
            raise InvalidRequestError("stream_options is only allowed when stream is true", param="stream_options")
        return bool(self.stream_options.include_usage), bool(self.stream_options.continuous_usage_stats)


class CompletionRequest(SamplingRequest):
    model_config = ConfigDict(json_schema_extra={"required": ["prompt"]})
    prompt: Prompt = None
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None


class EmbeddingRequest(PromptRequest):
    """encoding_format: float or base64.  dimensions: numbers to keep, for models made to be cut."""

    model_config = ConfigDict(json_schema_extra={"required": ["input"]})
    input: Prompt = None
    encoding_format: Annotated[str | None, WithJsonSchema({"enum": ["float", "base64", None]})] = None
    dimensions: int | None = None


class ChatRequest(SamplingRequest):
    messages: ChatMessages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: ChatTools | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(Strict):
    """vLLM's shape: either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: ObjectList | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: ObjectList | None = None


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: TokenList


# Sent by clients out of habit; they change nothing about what this server computes or keeps.
HARMLESS_FIELDS = frozenset({
    "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options",
})

_TOOLS = "OpenAI has removed it; send tools and tool_choice"
_MEDIA = "this server handles text only"
_OURS = "the server decides this, not a request"

# name → (values that ask for nothing, why any other is refused)
_REFUSED_EVERYWHERE: dict[str, tuple[tuple[Any, ...], str]] = {
    "thinking_token_budget": ((), "the length of thoughts is not limited; use max_tokens"),
    "repetition_detection": ((), "it is not implemented; use repetition_penalty"),
    "logprob_token_ids": ((), "only the most likely tokens are reported; use logprobs"),
    "logits_processors": ((), "requests cannot bring code"), "vllm_xargs": (({},), _OURS),
    "kv_transfer_params": (({},), _OURS), "request_id": ((), "request ids are made by the server"),
    "prompt_embeds": ((), "tensors are not accepted over HTTP"), "lora_request": ((), "adapters have not landed yet"),
    "mm_processor_kwargs": (({},), _MEDIA), "media_io_kwargs": (({},), _MEDIA), "stream_interval": ((1,), _OURS),
    "early_stopping": ((False,), "beam search always runs to max_tokens or the end of every beam"),
}
REFUSED_IN_CHAT: dict[str, tuple[tuple[Any, ...], str]] = {
    **_REFUSED_EVERYWHERE,
    "functions": (([],), _TOOLS), "function_call": (("none", "auto"), _TOOLS),
    "modalities": ((["text"],), _MEDIA), "audio": ((), _MEDIA), "web_search_options": ((), "this server does not browse"),
    "prediction": ((), "predicted output has not landed yet"), "verbosity": (("medium",), "say it in a message"),
    "echo": ((False,), "it exists in /v1/completions only"), "best_of": ((1,), "removed; use n"),
    "chat_template": ((), "templates come from the model folder, never from a request"),
    "documents": (([],), "put them into a message"), "suffix": ((), "it exists in /v1/completions only"),
    "prompt": ((), "it exists in /v1/completions only; send messages"),
}
REFUSED_IN_COMPLETIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    **_REFUSED_EVERYWHERE,
    "messages": ((), "it exists in /v1/chat/completions only; send prompt"),
    "tools": (([],), "it exists in /v1/chat/completions only"),
    "max_completion_tokens": ((), "it exists in /v1/chat/completions only; send max_tokens"),
    "top_logprobs": ((), "it exists in /v1/chat/completions only; send logprobs"),
}
