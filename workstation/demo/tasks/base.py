"""What a task is, how its answer is checked, and the line between what is trained on and what is held out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from random import Random
from typing import Any, Literal, TypeVar
from zlib import crc32

Split = Literal["train", "held_out"]
Check = Literal["text", "json", "tool_call", "thinking"]
Message = dict[str, Any]

T = TypeVar("T")

_HELD_SHARE = 10  # one in ten keys is held out
_THOUGHT = re.compile(r"\s*<think>\s*\S.*?</think>\s*", re.DOTALL)
_CALL = re.compile(r"<tool_call>\s*(\{.*\})\s*</tool_call>", re.DOTALL)


def held_out(key: str) -> bool:
    """Whether `key` (an operand pair, a name, a wording …) belongs to the held-out side: a fixed hash, no state."""
    return crc32(key.encode()) % _HELD_SHARE == 0


def on_side(key: str, split: Split) -> bool:
    return held_out(key) == (split == "held_out")


@dataclass(slots=True)
class Task:
    """A prompt and the one answer that is right.

    Attributes:
        skill: name of the family, as scored.
        messages: system, user, assistant and tool turns before the answer; empty for a raw prompt.
        answer: the text the model must write, markup included, without the end-of-turn token.
        thought: what a thinking model writes first; used only when the prompt asks for it.
        tools: tool schemas in OpenAI's shape, for the chat template.
        raw: prompt text instead of messages (filling in the middle), special tokens as text.
        thinking: the template's `enable_thinking`.
        check: "text" compares exactly; "json" and "tool_call" compare parsed values; "thinking" wants a thought, then the text.
        untrained_turns: assistant turns in `messages` that training gives no loss (they stand there without their thoughts).
    """

    skill: str
    messages: list[Message]
    answer: str
    thought: str = ""
    tools: list[dict[str, Any]] = field(default_factory=list)
    raw: str = ""
    thinking: bool = False
    check: Check = "text"
    untrained_turns: int = 0

    def is_right(self, text: str) -> bool:
        """Whether the model's text answers the task. Surrounding white space is ignored, nothing else."""
        if self.check == "thinking":
            thought = _THOUGHT.match(text)
            return thought is not None and text[thought.end() :].strip() == self._visible_answer()
        if self.check == "text":
            return text.strip() == self.answer.strip()
        return bool(_parsed(text, self.check) == _parsed(self.answer, self.check))

    def _visible_answer(self) -> str:
        return _THOUGHT.sub("", self.answer, count=1).strip()


def _parsed(text: str, check: Check) -> Any:
    """The JSON value in an answer; the text itself when there is none, so that it equals nothing but itself."""
    if check == "tool_call":
        call = _CALL.fullmatch(text.strip())
        if call is None:
            return text
        text = call.group(1)
    try:
        return json.loads(text)
    except ValueError:
        return text


def user(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


def pick(rng: Random, values: Sequence[T]) -> T:
    """A uniform choice; quicker than `rng.choice`, which matters at a billion tokens."""
    return values[int(rng.random() * len(values))]


def between(rng: Random, low: int, high: int) -> int:
    """A uniform integer in [low, high]."""
    return low + int(rng.random() * (high - low + 1))


def draw(rng: Random, make: Callable[[], T], split: Split, key: Callable[[T], str]) -> T:
    """The first value from `make` whose key stands on the wanted side."""
    for _ in range(10_000):
        value = make()
        if on_side(key(value), split):
            return value
    raise RuntimeError(f"no {split} value in 10000 draws; the generator's range is too small for the split")


class Wordings:
    """Every sentence made of one fragment from each list, split by a hash of the whole sentence.

    The held-out side recombines fragments that training has seen only in other combinations.
    """

    def __init__(self, *parts: Sequence[str]) -> None:
        combined = [_capitalised("".join(fragments)) for fragments in product(*parts)]
        self._train = [text for text in combined if not held_out(f"wording:{text}")]
        self._held = [text for text in combined if held_out(f"wording:{text}")]
        if not self._held or not self._train:
            raise ValueError(f"{len(combined)} wordings cannot be split: {combined[0]!r}")

    def pick(self, rng: Random, split: Split) -> str:
        return pick(rng, self._train if split == "train" else self._held)


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def casual(rng: Random, task: Task) -> None:
    """People often start in lower case: so does one user turn in five, unless its first word is part of an answer."""
    answers = task.answer + "".join(message["content"] for message in task.messages if message["role"] == "assistant")
    for message in task.messages:
        text = message["content"]
        if message["role"] == "user" and text[:1].isalpha() and rng.random() < 0.2:
            first = text.split(None, 1)[0].strip(".,:!?")
            if first not in answers:
                message["content"] = text[0].lower() + text[1:]


ORDER_OPENINGS = (
    "",
    "",
    "please ",
    "can you ",
    "could you please ",
    "hey, ",
    "now ",
    "ok, ",
    "quick task: ",
    "would you ",
    "hi, please ",
    "your task: ",
    "I need you to ",
    "I would like you to ",
)
QUESTION_OPENINGS = (
    "",
    "",
    "tell me: ",
    "quick question: ",
    "hey, ",
    "ok, ",
    "hi, ",
    "please tell me, ",
    "I wonder, ",
    "one question: ",
)


def joined(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
