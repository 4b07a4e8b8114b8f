"""The chat template in Python: what training renders a billion times. `chat_template.jinja` is the same for everyone else.

A tool is written as one line of JSON; thinking adds a sentence to the system turn, so that the model itself opens <think>.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from workstation.demo.tasks.base import Message, Task

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
THINK_SENTENCE = "Think before you answer."
GENERATION_PROMPT = f"{IM_START}assistant\n"


def jinja_source() -> str:
    """The chat template as shipped beside the model."""
    return resources.files("workstation.demo").joinpath("chat_template.jinja").read_text(encoding="utf-8")


def prompt_text(task: Task) -> str:
    """The task's prompt up to the first token the model writes; equals the Jinja template with add_generation_prompt."""
    if task.raw:
        return task.raw
    return render(task.messages, task.tools, task.thinking) + GENERATION_PROMPT


def document(task: Task) -> str:
    """Prompt and answer, closed by the token that ends generation."""
    return prompt_text(task) + task.answer + (END_OF_TEXT if task.raw else IM_END)


def render(messages: list[Message], tools: list[dict[str, Any]], thinking: bool) -> str:
    """Messages whose contents are strings, in ChatML. Tool calls stand in the content as markup."""
    parts = []
    if messages and messages[0]["role"] == "system":
        parts.append(messages[0]["content"])
        messages = messages[1:]
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        parts.append(f"You can call these tools:\n<tools>\n{listed}\n</tools>")
    if thinking:
        parts.append(THINK_SENTENCE)
    system = "\n\n".join(parts)
    text = f"{IM_START}system\n{system}{IM_END}\n" if system else ""
    return text + "".join(map(_turn, messages))


def _turn(message: Message) -> str:
    content = message["content"]
    if message["role"] == "tool":
        return f"{IM_START}user\n<tool_response>\n{content}\n</tool_response>{IM_END}\n"
    return f"{IM_START}{message['role']}\n{content}{IM_END}\n"
