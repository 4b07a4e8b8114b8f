"""/v1/chat/completions: body → Job."""

from __future__ import annotations

from typing import Any

from workstation.engine.request import MAX_LOGPROBS
from workstation.errors import InvalidRequestError
from workstation.server.body import show
from workstation.server.dialogue import Dialogue, Shape, prepare_dialogue
from workstation.server.job import Job
from workstation.server.messages import template_messages
from workstation.server.prepare import Service
from workstation.server.schemas import ChatRequest, TokenizeRequest
from workstation.server.structured import requested_output
from workstation.server.tools import Tools, chat_tool_list, chat_tools

MAX_TEMPLATE_KWARGS = 32
MAX_TEMPLATE_TEXT = 1024
# Switches clients send to every model; off means nothing to a template without them.
_HARMLESS_WHEN_OFF = frozenset({"enable_thinking", "thinking"})


def prepare_chat(service: Service, body: ChatRequest, label: str) -> Job:
    """Everything that can be refused is refused here, before a stream starts."""
    usage_at_end, usage_always = body.wants_usage()
    shape = Shape("chatcmpl", _max_tokens(body), logprobs=_logprobs(body), usage_at_end=usage_at_end, usage_always=usage_always,
                  reasoning=body.include_reasoning is not False, output=requested_output(body))
    tools = chat_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    return prepare_dialogue(service, body, dialogue(service, body, tools, body.reasoning_effort), shape, label)


def dialogue(service: Service, body: ChatRequest | TokenizeRequest, tools: Tools, effort: str | None) -> Dialogue:
    """The conversation of a body with messages. Raises InvalidRequestError."""
    continued = bool(body.continue_final_message)
    prompt = body.add_generation_prompt if body.add_generation_prompt is not None else not continued
    return Dialogue(template_messages(body.messages or []), tools, template_kwargs(service, body.chat_template_kwargs, effort),
                    add_generation_prompt=prompt, continued=continued, add_special_tokens=bool(body.add_special_tokens))


def tokenize_dialogue(service: Service, body: TokenizeRequest) -> Dialogue:
    """The conversation of a /tokenize body."""
    return dialogue(service, body, Tools([tool for tool, _ in chat_tool_list(body.tools)] or None), None)


def template_kwargs(service: Service, given: dict[str, Any] | None, effort: str | None) -> dict[str, Any]:
    """Variables for the template: names it reads, plain values. Raises InvalidRequestError."""
    template = service.model.tokenizer.chat_template
    known = template.names if template is not None else frozenset()
    out: dict[str, Any] = {}
    if len(given or {}) > MAX_TEMPLATE_KWARGS:
        raise InvalidRequestError(f"chat_template_kwargs holds {len(given or {})} entries; the limit is {MAX_TEMPLATE_KWARGS}",
                                  param="chat_template_kwargs")
    for name, value in (given or {}).items():
        _check_template_value(name, value)
        if name in known:
            out[name] = value
        elif not (name in _HARMLESS_WHEN_OFF and value is False):
            raise InvalidRequestError(f"chat_template_kwargs: this model's template does not read {show(name)}; it reads "
                                      f"{', '.join(sorted(known)) or 'none'}", param="chat_template_kwargs")
    if effort is not None and effort != "none":
        if "reasoning_effort" not in known:
            raise InvalidRequestError("reasoning_effort is not used by this model's template", param="reasoning_effort")
        out["reasoning_effort"] = effort
    return out


def _check_template_value(name: str, value: Any) -> None:
    short = isinstance(value, str) and len(value) <= MAX_TEMPLATE_TEXT
    plain = short or value is None or isinstance(value, (bool, int, float))
    if not name.isidentifier() or not plain:
        raise InvalidRequestError(f"chat_template_kwargs[{show(name)}] must be null, true, false, a number or a string of at "
                                  f"most {MAX_TEMPLATE_TEXT} characters, got {show(value)}", param="chat_template_kwargs")


def _max_tokens(body: ChatRequest) -> int | None:
    newer = body.max_completion_tokens
    if newer is not None and newer < 1:
        raise InvalidRequestError(f"max_completion_tokens must be at least 1, got {newer}", param="max_completion_tokens")
    return newer if newer is not None else body.max_tokens


def _logprobs(body: ChatRequest) -> int | None:
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        raise InvalidRequestError(f"top_logprobs must be between 0 and {MAX_LOGPROBS}, got {body.top_logprobs}",
                                  param="top_logprobs")
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None
