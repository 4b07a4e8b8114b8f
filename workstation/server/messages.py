"""OpenAI chat messages → what chat templates expect: plain text content, known roles, parsed tool arguments."""

from __future__ import annotations

import json
from typing import Any

from workstation.errors import InvalidRequestError
from workstation.server.body import show
from workstation.server.tools import MAX_TOOLS

MAX_MESSAGES = 10_000
_ROLES = ("system", "developer", "user", "assistant", "tool")
_KNOWN = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning"})
# What clients send back from earlier answers, and nothing here depends on.
_IGNORED = frozenset({"refusal", "annotations", "audio", "function_call", "id", "cache_control", "provider_specific_fields"})
_PART_KEYS = frozenset({"type", "text", "cache_control", "annotations"})


def template_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checked messages. Raises InvalidRequestError whose param names the place, `messages[3].content`."""
    if not messages:
        raise InvalidRequestError("messages must hold at least one message", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequestError(f"messages holds {len(messages)} messages; the limit is {MAX_MESSAGES}", param="messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role")
    if role not in _ROLES:
        raise InvalidRequestError(f"{where}.role must be one of {', '.join(_ROLES)}, got {show(role)}", param=f"{where}.role")
    for key, value in message.items():
        if key not in _KNOWN and not (key in _IGNORED and (value is None or key != "audio")):
            raise InvalidRequestError(f"{where}: unknown field {show(key)}", param=f"{where}.{key[:64]}")
    out: dict[str, Any] = {"role": "system" if role == "developer" else role,
                           "content": _content(message.get("content"), role, f"{where}.content")}
    for key in ("name", "tool_call_id", "reasoning_content", "reasoning"):
        value = message.get(key)
        if value is not None:
            out[key] = _text(value, f"{where}.{key}")
    if "reasoning" in out:
        out.setdefault("reasoning_content", out.pop("reasoning"))
    if message.get("tool_calls"):
        out["tool_calls"] = _tool_calls(message["tool_calls"], role, f"{where}.tool_calls")
    return out


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{where} must be a string, got {show(value)}", param=where)
    return value


def _content(value: Any, role: str, where: str) -> str:
    """A string, or an array of text parts joined; only an assistant's content may be null."""
    if value is None and role == "assistant":
        return ""
    if isinstance(value, list):
        return "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(value))
    if not isinstance(value, str):
        raise InvalidRequestError(f"{where} must be a string or an array of text parts, got {show(value)}", param=where)
    return value


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise InvalidRequestError(f"{where} must be an object with a type, got {show(part)}", param=where)
    if part["type"] != "text":
        raise InvalidRequestError(f"{where}.type {show(part['type'])} is not supported: this model reads text only",
                                  param=f"{where}.type")
    if unknown := part.keys() - _PART_KEYS:
        raise InvalidRequestError(f"{where}: unknown field {show(min(unknown))}", param=where)
    return _text(part.get("text"), f"{where}.text")


def _tool_calls(value: Any, role: str, where: str) -> list[dict[str, Any]]:
    """Calls an assistant made earlier; arguments become an object, which is what templates print."""
    if role != "assistant":
        raise InvalidRequestError(f"{where} belongs to assistant messages only", param=where)
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise InvalidRequestError(f"{where} must be an array of at most {MAX_TOOLS} calls, got {show(value)}", param=where)
    return [_tool_call(call, f"{where}[{index}]") for index, call in enumerate(value)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise InvalidRequestError(f"{where} must be an object with a function", param=where)
    arguments = call_arguments(function.get("arguments"), f"{where}.function.arguments")
    out = {"type": "function", "function": {"name": _text(function.get("name"), f"{where}.function.name"),
                                            "arguments": arguments}}
    if call.get("id") is not None:
        out["id"] = _text(call["id"], f"{where}.id")
    return out


def call_arguments(arguments: Any, where: str) -> dict[str, Any]:
    """The object a call's arguments are, given as one or as JSON text. Raises InvalidRequestError."""
    arguments = arguments or "{}"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise InvalidRequestError(f"{where} must be a JSON object in a string, got {show(arguments)}",
                                      param=where) from None
    if not isinstance(arguments, dict):
        raise InvalidRequestError(f"{where} must hold a JSON object, got {show(arguments)}", param=where)
    return arguments


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
