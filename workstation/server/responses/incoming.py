"""/v1/responses: body → the request behind every dialect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from workstation.errors import InvalidRequestError
from workstation.server.body import show
from workstation.server.dialogue import Dialogue, Shape, prepare_dialogue, renamed
from workstation.server.job import Job
from workstation.server.messages import MAX_MESSAGES, call_arguments
from workstation.server.prepare import Service
from workstation.server.responses.schema import RENAMED, ResponsesRequest
from workstation.server.responses.store import ResponseStore
from workstation.server.schemas import SamplingRequest
from workstation.server.structured import output_format
from workstation.server.tools import Mode, Tools, check_count, check_name, chosen, function_tool

_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TEXT_PARTS = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text"})


@dataclass(frozen=True, slots=True)
class Turn:
    """A request of this dialect, ready to run: the job, the conversation so far, and the body it came from."""

    job: Job
    messages: list[dict[str, Any]]
    body: ResponsesRequest


def prepare_response(service: Service, store: ResponseStore, body: ResponsesRequest, label: str) -> Turn:
    """Everything that can be refused is refused here, before a stream starts."""
    earlier = store.conversation(body.previous_response_id) if body.previous_response_id is not None else []
    said = _Items(body.input).messages
    instructed = [{"role": "system", "content": body.instructions}] if body.instructions else []
    messages = [*earlier, *said]
    limit = body.max_output_tokens
    if limit is not None and limit < 1:
        raise InvalidRequestError(f"max_output_tokens must be at least 1, got {show(limit)}", param="max_output_tokens")
    dialogue = Dialogue([*instructed, *messages] or [{"role": "user", "content": ""}], _tools(body), _kwargs(service, body))
    sampling = SamplingRequest(model=body.model, stream=body.stream, temperature=body.temperature, top_p=body.top_p,
                               user=body.user)
    try:
        output = output_format((body.text or {}).get("format"), "text.format")
        shape = Shape("resp_", limit, prompt_field="input", output=output)
        job = prepare_dialogue(service, sampling, dialogue, shape, label)
    except InvalidRequestError as error:
        raise renamed(error, RENAMED) from None
    return Turn(job, messages, body)


class _Items:
    """Input items → messages. What an assistant thought, said and called in a row is one message."""

    def __init__(self, given: Any) -> None:
        self.messages: list[dict[str, Any]] = []
        self._assistant: dict[str, Any] | None = None
        if isinstance(given, str):
            self.messages.append({"role": "user", "content": given})
        elif isinstance(given, list):
            if len(given) > MAX_MESSAGES:
                raise InvalidRequestError(f"input holds {len(given)} items; the limit is {MAX_MESSAGES}", param="input")
            for index, item in enumerate(given):
                self._add(item, f"input[{index}]")
        elif given is not None:
            raise InvalidRequestError(f"input must be a string or an array of items, got {show(given)}", param="input")

    def _add(self, item: Any, where: str) -> None:
        if not isinstance(item, dict):
            raise InvalidRequestError(f"{where} must be an object, got {show(item)}", param=where)
        kind = item.get("type", "message")
        if kind == "message":
            self._message(item, where)
        elif kind == "function_call":
            self._call(item, call_arguments(item.get("arguments"), f"{where}.arguments"), where)
        elif kind == "custom_tool_call":
            self._call(item, {"input": _string(item.get("input"), f"{where}.input")}, where)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            self._assistant = None
            self.messages.append({"role": "tool", "tool_call_id": _string(item.get("call_id"), f"{where}.call_id"),
                                  "content": _text(item.get("output"), f"{where}.output")})
        elif kind == "reasoning":
            self._reasoning(item, where)
        else:
            raise InvalidRequestError(f"{where}.type {show(kind)} is not supported", param=f"{where}.type")

    def _turn(self) -> dict[str, Any]:
        if self._assistant is None:
            self._assistant = {"role": "assistant", "content": ""}
            self.messages.append(self._assistant)
        return self._assistant

    def _message(self, item: dict[str, Any], where: str) -> None:
        role = item.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise InvalidRequestError(f"{where}.role must be one of {', '.join(_ROLES)}, got {show(role)}",
                                      param=f"{where}.role")
        text = _text(item.get("content"), f"{where}.content")
        if role != "assistant":
            self._assistant = None
            self.messages.append({"role": _ROLES[role], "content": text})
            return
        if self._assistant is not None and "tool_calls" in self._assistant:
            self._assistant = None
        self._turn()["content"] += text

    def _call(self, item: dict[str, Any], arguments: dict[str, Any], where: str) -> None:
        call = {"id": _string(item.get("call_id"), f"{where}.call_id"), "type": "function",
                "function": {"name": _string(item.get("name"), f"{where}.name"), "arguments": arguments}}
        self._turn().setdefault("tool_calls", []).append(call)

    def _reasoning(self, item: dict[str, Any], where: str) -> None:
        """The thought itself where it came along, else its summary; encrypted ones say nothing here."""
        text = _text(item.get("content") or item.get("summary") or "", f"{where}.content")
        self._assistant = None
        if text:
            self._turn()["reasoning_content"] = text


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{where} must be a string, got {show(value)}", param=where)
    return value


def _text(value: Any, where: str) -> str:
    if isinstance(value, list):
        return "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(value))
    return _string(value, where)


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "refusal":
        return _string(part.get("refusal"), f"{where}.refusal")
    if kind not in _TEXT_PARTS:
        raise InvalidRequestError(f"{where}.type must be input_text or output_text, got {show(kind)}: this model reads text "
                                  "only", param=f"{where}.type")
    return _string(part.get("text"), f"{where}.text")


def _tools(body: ResponsesRequest) -> Tools:
    """Functions; tools of other types, which OpenAI's service or the client's own runs, are left out."""
    check_count(body.tools or [])
    listed = [function_tool(tool, tool.get("parameters"), f"tools[{index}]")
              for index, tool in enumerate(body.tools or []) if tool.get("type") == "function"]
    choice = body.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("tools")
        names = [tool.get("name") for tool in allowed if isinstance(tool, dict)] if isinstance(allowed, list) else []
        listed = [item for item in listed if item[0]["function"]["name"] in names]
        choice = choice.get("mode", "auto")
    mode, name = _choice(choice, bool(listed))
    return chosen(listed, mode, name, body.parallel_tool_calls is not False)


def _choice(choice: Any, any_tools: bool) -> tuple[Mode, str | None]:
    if choice is None:
        return ("auto" if any_tools else "none"), None
    if isinstance(choice, str) and choice in ("none", "auto", "required"):
        return cast(Mode, choice), None
    if isinstance(choice, dict) and choice.get("type") == "function":
        return "required", check_name(choice.get("name"), "tool_choice.name")
    raise InvalidRequestError('tool_choice must be none, auto, required, {"type": "function", "name": …} or allowed_tools, got '
                              f"{show(choice)}", param="tool_choice")


def _kwargs(service: Service, body: ResponsesRequest) -> dict[str, Any]:
    """`reasoning.effort`, where the template has a switch for it; "none" also turns thinking off."""
    effort = (body.reasoning or {}).get("effort")
    if effort is None:
        return {}
    effort = _string(effort, "reasoning.effort")
    template = service.model.tokenizer.chat_template
    known = template.names if template is not None else frozenset()
    if effort == "none":
        return {name: False for name in ("enable_thinking", "thinking") if name in known}
    return {"reasoning_effort": effort if effort in ("low", "medium") else "high"} if "reasoning_effort" in known else {}
