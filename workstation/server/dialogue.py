"""The one request behind every dialect: a conversation with tools, and how it is to be answered."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from typing import Any

from workstation.errors import InvalidRequestError
from workstation.parsers.values import ToolSchemas
from workstation.server import prepare
from workstation.server.constraint import dialogue_constraint, thinking
from workstation.server.job import Job
from workstation.server.parsing import Parsing
from workstation.server.prefix_history import message_digests
from workstation.server.prepare import Service
from workstation.server.schemas import SamplingRequest
from workstation.server.structured import Output
from workstation.server.tools import Tools

TAIL_TOKENS = 24


@dataclass(slots=True)
class Dialogue:
    """A conversation in the chat template's terms.

    Attributes:
        messages: checked (see messages.py).  tools: the request's, with its choice among them.  kwargs: template variables.
        add_generation_prompt, continued, add_special_tokens: as in chat completions.
    """

    messages: list[dict[str, Any]]
    tools: Tools = field(default_factory=Tools)
    kwargs: dict[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continued: bool = False
    add_special_tokens: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """How the answer is to look.

    Attributes:
        prefix: of its id.  max_tokens: None for what the window leaves.  reasoning: thoughts are shown.
        output: what its text must look like.
        prompt_field: what the prompt is called in an error.  clamp: max_tokens is lowered to what the window leaves.
    """

    prefix: str
    max_tokens: int | None
    logprobs: int | None = None
    usage_at_end: bool = False
    usage_always: bool = False
    reasoning: bool = True
    prompt_field: str = "messages"
    clamp: bool = False
    output: Output | None = None


def prepare_dialogue(service: Service, body: SamplingRequest, dialogue: Dialogue, shape: Shape, label: str) -> Job:
    """Everything that can be refused is refused here, before a stream starts."""
    model = service.check_model(body.model)
    ids = dialogue_ids(service, dialogue)
    tail = service.model.tokenizer.decode(ids[-TAIL_TOKENS:])
    thought = thinking(service.model.formats, tail)
    if dialogue.continued and thought == "may":
        thought = "none"
    parsing = _parsing(service, dialogue, thought == "inside", shape)
    opening: list[int] = []
    if parsing is not None and parsing.opening:
        opening = service.model.tokenizer.encode(parsing.opening, add_special_tokens=False)
        ids = ids + opening
    ids = prepare.truncated(service, ids, body.truncate_prompt_tokens, shape.max_tokens)
    if len(ids) < len(opening):
        raise InvalidRequestError(f"truncate_prompt_tokens must leave at least the {len(opening)} tokens that begin the "
                                  f"demanded call, got {len(ids)}", param="truncate_prompt_tokens")
    wanted = shape.max_tokens
    if shape.clamp and wanted is not None:
        wanted = min(wanted, max(service.window - len(ids), 1))
    max_tokens = prepare.room(service, len(ids), wanted, None, shape.prompt_field)
    params = prepare.sampling_params(service, body, max_tokens=max_tokens, logprobs=shape.logprobs,
                                     prompt_logprobs=body.prompt_logprobs)
    beam = prepare.beam_params(body, max_tokens, shape.logprobs)
    prepare.check_fan_out(service, params.n, 1)
    constraint = dialogue_constraint(service.model, shape.output, dialogue.tools, thought, beam=beam is not None,
                                     matched=len(opening))
    public_id = prepare.new_id(shape.prefix)
    requests = prepare.engine_requests(service, body, public_id, [service.check_ids(ids, shape.prompt_field)], [params], [beam],
                                       prepare.clean_label(label, body.user))
    return Job(public_id, model, int(time.time()), requests, params.n, stream=bool(body.stream),
               usage_at_end=shape.usage_at_end, usage_always=shape.usage_always, logprobs=shape.logprobs is not None,
               prompt_logprobs=body.prompt_logprobs is not None, return_token_ids=bool(body.return_token_ids),
               tokens_as_ids=bool(body.return_tokens_as_token_ids), timings_always=bool(body.timings_per_token),
               request_metrics=service.options.request_metrics, messages=message_digests(dialogue.messages), parsing=parsing,
               constraint=constraint)


def renamed(error: InvalidRequestError, names: dict[str, str]) -> InvalidRequestError:
    """The error with the field's name as the dialect has it."""
    new = names.get(error.param or "")
    if new is not None:
        error.message = error.message.replace(error.param or "", new, 1)
        error.param = new
    return error


def dialogue_ids(service: Service, dialogue: Dialogue) -> list[int]:
    """Ids of the prompt. Raises InvalidRequestError or ContextLengthError."""
    tools, formats = dialogue.tools.listed, service.model.formats
    if tools and dialogue.tools.choice.mode != "none" and not (formats.calls and formats.takes_tools):
        raise InvalidRequestError("tools cannot be used with this model: its chat template does not show them, or the way it "
                                  "writes calls is not known (--tool-call-parser names one)", param="tools")
    service.check_text(_length(dialogue.messages) + len(str(tools or "")), "messages")
    messages = [_for_template(service, message) for message in dialogue.messages]
    if tools and formats.tools_in_system:
        messages = _with_tools_in_system(messages, tools)
    try:
        return _encoded(service, dialogue, messages)
    except InvalidRequestError:
        in_place = _systems_as_users(messages)
        if in_place == messages:
            raise
        try:
            return _encoded(service, dialogue, in_place)
        except InvalidRequestError:
            pass
        raise


def _encoded(service: Service, dialogue: Dialogue, messages: list[dict[str, Any]]) -> list[int]:
    return service.model.tokenizer.encode_chat(
        messages, tools=dialogue.tools.listed, add_generation_prompt=dialogue.add_generation_prompt,
        continue_final_message=dialogue.continued, template_kwargs=dialogue.kwargs,
        add_special_tokens=dialogue.add_special_tokens)


def _with_tools_in_system(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Phi: the system message, made where there is none, holds the functions as JSON text."""
    text = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    if not messages or messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    return [{**messages[0], "tools": text}, *messages[1:]]


def _length(messages: list[dict[str, Any]]) -> int:
    """Characters of all that people and models wrote."""
    calls = sum(len(str(message["tool_calls"])) for message in messages if "tool_calls" in message)
    return calls + sum(len(message["content"]) + len(message.get("reasoning_content", "")) for message in messages)


def _for_template(service: Service, message: dict[str, Any]) -> dict[str, Any]:
    """A message as this model's template wants it: names of fields and the form of arguments differ."""
    formats = service.model.formats
    out = dict(message)
    if formats.harmony and "reasoning_content" in message:
        out["thinking"] = message["reasoning_content"]
    if formats.short_ids and "tool_call_id" in message:
        out["tool_call_id"] = _short_id(message["tool_call_id"])
    if "tool_calls" in message:
        out["tool_calls"] = [_call_for_template(call, formats.text_arguments, formats.short_ids)
                             for call in message["tool_calls"]]
    return out


def _call_for_template(call: dict[str, Any], as_text: bool, short_ids: bool) -> dict[str, Any]:
    function = call["function"]
    if as_text:
        function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    out = {**call, "function": function}
    if short_ids:
        out["id"] = _short_id(call.get("id", ""))
    return out


def _short_id(text: str) -> str:
    """Nine characters for an id of any length, the same each time."""
    if len(text) == 9 and text.isascii() and text.isalnum():
        return text
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:9]


def _systems_as_users(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For templates that refuse a system turn in the middle: it stays in its place, where the prefix is kept, as a user's."""
    begun = False
    out = []
    for message in messages:
        begun = begun or message["role"] != "system"
        out.append({**message, "role": "user"} if begun and message["role"] == "system" else message)
    return out


def _parsing(service: Service, dialogue: Dialogue, inside: bool, shape: Shape) -> Parsing | None:
    """How the answer is taken apart; None when there is nothing to look for."""
    formats, choice, tokenizer = service.model.formats, dialogue.tools.choice, service.model.tokenizer
    calls = dialogue.tools.listed is not None and choice.mode != "none"
    if not calls and formats.think is None and not formats.harmony:
        return None
    opening = ""
    if calls and choice.mode == "required" and not inside:  # what is certain need not be generated
        opening = formats.opening(choice.name)
    keep = frozenset(index for index in map(tokenizer.token_id, formats.controls()) if index is not None)
    schemas = ToolSchemas(dialogue.tools.listed or ()) if calls else None
    return Parsing(formats, calls, schemas, inside, opening, 1 if calls and not choice.parallel else 0, keep, shape.reasoning)
