"""Tools of a request and its choice among them, checked; the same for every dialect."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, cast

from workstation.errors import InvalidRequestError
from workstation.server.body import show

MAX_TOOLS = 512
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
Mode = Literal["none", "auto", "required"]
_CHOICES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`mode`: may the answer call tools, must it, or not.  `name`: the only tool it may call.  `parallel`: several calls."""

    mode: Mode = "auto"
    name: str | None = None
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class ToolRule:
    """What the template is not told of a tool: whether its schema must be kept in any case, and where the request has it."""

    strict: bool
    place: str


Tool = tuple[dict[str, Any], ToolRule]


@dataclass(frozen=True, slots=True)
class Tools:
    """Tools as the template gets them (OpenAI's shape, None when there are none), a rule each, and the choice."""

    listed: list[dict[str, Any]] | None = None
    choice: ToolChoice = ToolChoice("none")
    rules: tuple[ToolRule, ...] = ()


def function_tool(given: dict[str, Any], parameters: Any, where: str, schema_field: str = "parameters") -> Tool:
    """One function in OpenAI's shape, from an object with its name, description and `strict`.

    Raises InvalidRequestError naming the part of `where` that is wrong.
    """
    name, description, strict = given.get("name"), given.get("description"), given.get("strict")
    check_name(name, f"{where}.name")
    if not isinstance(strict, (bool, type(None))):
        raise InvalidRequestError(f"{where}.strict must be true or false, got {show(strict)}", param=f"{where}.strict")
    function: dict[str, Any] = {"name": name}
    if description is not None:
        if not isinstance(description, str):
            raise InvalidRequestError(f"{where}.description must be a string, got {show(description)}",
                                      param=f"{where}.description")
        function["description"] = description
    if parameters is not None:
        if not isinstance(parameters, dict):
            raise InvalidRequestError(f"{where}.{schema_field} must be a JSON schema, an object, got {show(parameters)}",
                                      param=f"{where}.{schema_field}")
        function["parameters"] = parameters
    return {"type": "function", "function": function}, ToolRule(strict is True, f"{where}.{schema_field}")


def check_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequestError(f"{where} must be 1 to 128 letters, digits or the signs _ . : / -, got {show(name)}",
                                  param=where)
    return name


def check_count(tools: list[Any]) -> None:
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(f"tools holds {len(tools)} tools; the limit is {MAX_TOOLS}", param="tools")


def chat_tools(tools: list[dict[str, Any]] | None, choice: Any, parallel: bool | None) -> Tools:
    """The `tools`, `tool_choice` and `parallel_tool_calls` of chat completions. Raises InvalidRequestError."""
    listed = chat_tool_list(tools)
    mode, name = _chat_choice(choice, bool(listed))
    return chosen(listed, mode, name, parallel is not False)


def chat_tool_list(tools: list[dict[str, Any]] | None) -> list[Tool]:
    check_count(tools or [])
    return [_chat_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools or [])]


def _chat_tool(tool: dict[str, Any], where: str) -> Tool:
    if tool.get("type") != "function":
        raise InvalidRequestError(f"{where}.type must be function, got {show(tool.get('type'))}", param=f"{where}.type")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise InvalidRequestError(f"{where}.function must be an object, got {show(function)}", param=f"{where}.function")
    return function_tool(function, function.get("parameters"), f"{where}.function")


def _chat_choice(choice: Any, any_tools: bool) -> tuple[Mode, str | None]:
    if choice is None:
        return ("auto" if any_tools else "none"), None
    if isinstance(choice, str) and choice in _CHOICES:
        return cast(Mode, choice), None
    if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("function"), dict):
        return "required", check_name(choice["function"].get("name"), "tool_choice.function.name")
    raise InvalidRequestError(f'tool_choice must be none, auto, required or {{"type": "function", "function": {{"name": …}}}}, '
                              f"got {show(choice)}", param="tool_choice")


def chosen(tools: list[Tool], mode: Mode, name: str | None, parallel: bool) -> Tools:
    """Put a choice and tools together. Raises InvalidRequestError when they contradict each other."""
    if not tools:
        if mode == "required":
            raise InvalidRequestError("tool_choice asks for a call, but tools is empty", param="tool_choice")
        return Tools()
    if name is not None and name not in [tool["function"]["name"] for tool, _ in tools]:
        raise InvalidRequestError(f"tool_choice names {show(name)}, which is not among the tools", param="tool_choice")
    listed, rules = zip(*tools, strict=True)
    return Tools(list(listed), ToolChoice(mode, name, parallel and name is None), rules)
