"""/v1/messages: body → the request behind every dialect."""

from __future__ import annotations

import logging
from typing import Any

from workstation.errors import InvalidRequestError
from workstation.server.anthropic.schema import RENAMED, CountRequest, MessagesRequest
from workstation.server.body import show
from workstation.server.dialogue import Dialogue, Shape, dialogue_ids, prepare_dialogue, renamed
from workstation.server.job import Job
from workstation.server.messages import MAX_MESSAGES
from workstation.server.prepare import Service
from workstation.server.schemas import SamplingRequest
from workstation.server.structured import Output, output_format
from workstation.server.tools import Mode, Tool, Tools, check_count, check_name, chosen, function_tool

log = logging.getLogger("workstation.server")
BILLING_LINE = "x-anthropic-billing-header"
_ROLES = ("user", "assistant", "system")
_CHOICES: dict[str, Mode] = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}
_THINKING = ("enabled", "disabled", "adaptive")
_THINKING_SWITCHES = ("enable_thinking", "thinking")
_UNREAD = frozenset({"image", "document", "search_result", "container_upload"})
_announced: set[str] = set()


def prepare_messages(service: Service, body: MessagesRequest, label: str) -> Job:
    """Everything that can be refused is refused here, before a stream starts."""
    model = served_name(service, body.model)
    dialogue = to_dialogue(service, body)
    user = (body.metadata or {}).get("user_id")
    sampling = SamplingRequest(model=model, stop=body.stop_sequences, stream=body.stream, temperature=body.temperature,
                               top_p=body.top_p, top_k=body.top_k, user=user if isinstance(user, str) else None)
    if body.max_tokens < 1:
        raise InvalidRequestError(f"max_tokens must be at least 1, got {show(body.max_tokens)}", param="max_tokens")
    shown = (body.thinking or {}).get("type") != "disabled"
    shape = Shape("msg_", body.max_tokens, reasoning=shown, clamp=True, output=_output(body))
    try:
        return prepare_dialogue(service, sampling, dialogue, shape, label)
    except InvalidRequestError as error:
        raise renamed(error, RENAMED) from None


def _output(body: MessagesRequest) -> Output | None:
    """`output_config.format`, or the older `output_format`."""
    newer = output_format((body.output_config or {}).get("format"), "output_config.format")
    older = output_format(body.output_format, "output_format")
    if newer is not None and older is not None:
        raise InvalidRequestError("output_format cannot be combined with output_config.format", param="output_format")
    return newer or older


def count_tokens(service: Service, body: CountRequest) -> dict[str, int]:
    """{input_tokens}: of the prompt that the same body would make."""
    served_name(service, body.model)
    return {"input_tokens": len(dialogue_ids(service, to_dialogue(service, body)))}


def served_name(service: Service, name: str | None) -> str:
    """The model that answers. Raises ModelNotFoundError."""
    if name and name.startswith("claude-") and name not in service.model.names and service.options.map_claude_models:
        if len(_announced) < 64 and name not in _announced:
            _announced.add(name)
            log.warning("%r is answered by %s (--no-map-claude-models refuses it)", name[:80], service.model.name)
        return service.model.name
    return service.check_model(name)


def to_dialogue(service: Service, body: CountRequest) -> Dialogue:
    """The conversation. Raises InvalidRequestError naming the place, `messages[2].content[0].text`."""
    if not body.messages or len(body.messages) > MAX_MESSAGES:
        raise InvalidRequestError(f"messages must hold 1 to {MAX_MESSAGES} messages, got {len(body.messages)}",
                                  param="messages")
    messages = _system(body.system)
    for index, message in enumerate(body.messages):
        messages += _messages(message, f"messages[{index}]")
    last = messages[-1]
    continued = last["role"] == "assistant" and bool(last["content"]) and "tool_calls" not in last
    if continued:
        last["content"] = last["content"].rstrip()
    return Dialogue(messages, _tools(body), _kwargs(service, body), add_generation_prompt=not continued, continued=continued)


def _system(system: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    if system is None:
        return []
    blocks = [system] if isinstance(system, str) else [_text_block(block, f"system[{index}]")
                                                       for index, block in enumerate(system)]
    kept = [text for text in map(without_billing_line, blocks) if text is not None]
    return [{"role": "system", "content": "\n".join(kept)}] if kept else []


def without_billing_line(text: str) -> str | None:
    """A system text without the line that Claude Code changes with every request, which would spoil the prefix cache.

    None when nothing else was there.
    """
    if BILLING_LINE not in text:
        return text
    kept = [line for line in text.split("\n") if not line.startswith(BILLING_LINE)]
    return "\n".join(kept) if kept else None


def _text_block(block: Any, where: str) -> str:
    if not isinstance(block, dict) or block.get("type") != "text":
        kind = block.get("type") if isinstance(block, dict) else block
        raise InvalidRequestError(f"{where}.type must be text, got {show(kind)}", param=f"{where}.type")
    return _string(block.get("text"), f"{where}.text")


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{where} must be a string, got {show(value)}", param=where)
    return value


def _messages(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """One message; results of tools become messages of their own, in their place."""
    role = message.get("role")
    if role not in _ROLES:
        raise InvalidRequestError(f"{where}.role must be one of {', '.join(_ROLES)}, got {show(role)}", param=f"{where}.role")
    if unknown := message.keys() - {"role", "content", "id", "type", "model", "stop_reason", "stop_sequence", "usage"}:
        raise InvalidRequestError(f"{where}: unknown field {show(min(unknown))}", param=f"{where}.{min(unknown)[:64]}")
    content = message.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise InvalidRequestError(f"{where}.content must be a string or an array of blocks, got {show(content)}",
                                  param=f"{where}.content")
    blocks = [_checked(block, f"{where}.content[{index}]") for index, block in enumerate(content)]
    places = [f"{where}.content[{index}]" for index in range(len(blocks))]
    if role == "assistant":
        return [_assistant(blocks, places)]
    return _user(role, blocks, places)


def _checked(block: Any, where: str) -> dict[str, Any]:
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        raise InvalidRequestError(f"{where} must be an object with a type, got {show(block)}", param=where)
    if block["type"] in _UNREAD:
        raise InvalidRequestError(f"{where}.type {show(block['type'])} is not supported: this model reads text only",
                                  param=f"{where}.type")
    return block


def _unknown_block(block: dict[str, Any], where: str) -> InvalidRequestError:
    return InvalidRequestError(f"{where}.type {show(block['type'])} does not belong here", param=f"{where}.type")


def _assistant(blocks: list[dict[str, Any]], places: list[str]) -> dict[str, Any]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block, where in zip(blocks, places, strict=True):
        kind = block["type"]
        if kind == "text":
            texts.append(_string(block.get("text"), f"{where}.text"))
        elif kind == "thinking":
            thoughts.append(_string(block.get("thinking"), f"{where}.thinking"))
        elif kind == "tool_use":
            calls.append(_tool_use(block, where))
        elif kind != "redacted_thinking":
            raise _unknown_block(block, where)
    out: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        out["reasoning_content"] = "".join(thoughts)
    if calls:
        out["tool_calls"] = calls
    return out


def _tool_use(block: dict[str, Any], where: str) -> dict[str, Any]:
    given = block.get("input")
    if not isinstance(given, dict):
        raise InvalidRequestError(f"{where}.input must be an object, got {show(given)}", param=f"{where}.input")
    name = _string(block.get("name"), f"{where}.name")
    return {"id": _string(block.get("id"), f"{where}.id"), "type": "function", "function": {"name": name, "arguments": given}}


def _user(role: str, blocks: list[dict[str, Any]], places: list[str]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for block, where in zip(blocks, places, strict=True):
        if block["type"] == "text":
            text = _string(block.get("text"), f"{where}.text")
            if out and out[-1]["role"] == role:
                out[-1]["content"] += "\n" + text
            else:
                out.append({"role": role, "content": text})
        elif block["type"] == "tool_result" and role == "user":
            out.append({"role": "tool", "tool_call_id": _string(block.get("tool_use_id"), f"{where}.tool_use_id"),
                        "content": _result(block, where)})
        else:
            raise _unknown_block(block, where)
    return out or [{"role": role, "content": ""}]


def _result(block: dict[str, Any], where: str) -> str:
    content = block.get("content")
    if content is None:
        return ""
    if isinstance(content, list):
        return "\n".join(_text_block(_checked(item, f"{where}.content[{index}]"), f"{where}.content[{index}]")
                         for index, item in enumerate(content))
    return _string(content, f"{where}.content")


def _tools(body: CountRequest) -> Tools:
    """Tools with a schema; those that Anthropic's own service runs have none here and are left out."""
    check_count(body.tools or [])
    listed = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or [])
              if tool.get("type") in (None, "custom")]
    choice = body.tool_choice or {}
    kind = choice.get("type", "auto")
    if kind not in _CHOICES:
        raise InvalidRequestError(f"tool_choice.type must be one of {', '.join(_CHOICES)}, got {show(kind)}",
                                  param="tool_choice.type")
    name = check_name(choice.get("name"), "tool_choice.name") if kind == "tool" else None
    return chosen(listed, _CHOICES[kind], name, choice.get("disable_parallel_tool_use") is not True)


def _tool(tool: dict[str, Any], where: str) -> Tool:
    schema = tool.get("input_schema")
    if schema is None:
        raise InvalidRequestError(f"{where}.input_schema is missing", param=f"{where}.input_schema")
    return function_tool(tool, schema, where, "input_schema")


def _kwargs(service: Service, body: CountRequest) -> dict[str, Any]:
    """`thinking` and `output_config.effort`, where the template has a switch for them."""
    template = service.model.tokenizer.chat_template
    known = template.names if template is not None else frozenset()
    out: dict[str, Any] = {}
    if body.thinking is not None:
        kind = body.thinking.get("type")
        if kind not in _THINKING:
            raise InvalidRequestError(f"thinking.type must be one of {', '.join(_THINKING)}, got {show(kind)}",
                                      param="thinking.type")
        out.update({name: kind != "disabled" for name in _THINKING_SWITCHES if name in known})
    config = body.output_config or {}
    effort = config.get("effort")
    if effort is not None and not isinstance(effort, str):
        raise InvalidRequestError(f"output_config.effort must be a string, got {show(effort)}", param="output_config.effort")
    if effort is not None and "reasoning_effort" in known:
        out["reasoning_effort"] = effort if effort in ("low", "medium", "high") else "high"
    return out
