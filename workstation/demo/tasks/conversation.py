"""Several turns of mixed skills in one conversation: the later turns must be as good as the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from workstation.demo.tasks import recall
from workstation.demo.tasks.about_ws import about_ws
from workstation.demo.tasks.arithmetic import arithmetic
from workstation.demo.tasks.base import Message, Split, Task, between, pick, user
from workstation.demo.tasks.extraction import extraction
from workstation.demo.tasks.greeting import greeting
from workstation.demo.tasks.letters import copying, spelling
from workstation.demo.tasks.limits import limits
from workstation.demo.tasks.ordering import counting, reversing, sorting
from workstation.demo.tasks.thinking import with_thought

Generator = Callable[[Random, Split], Task]

_KINDS: tuple[Generator, ...] = (
    arithmetic, arithmetic, sorting, reversing, counting, spelling, copying, extraction, about_ws, about_ws, greeting, greeting, limits,
)  # fmt: skip


def conversation(rng: Random, split: Split) -> Task:
    """Two or three turns, sometimes with facts told first and asked for last; one in ten thinks before its last answer."""
    return mixed(rng, split, between(rng, 2, 3), _KINDS)


def mixed(rng: Random, split: Split, turns: int, kinds: Sequence[Generator]) -> Task:
    """`turns` questions of the given kinds; the task's answer is that of the last."""
    messages: list[Message] = []
    facts: list[recall.Fact] = []
    if rng.random() < 0.3:
        text, facts = recall.passage(rng, split, between(rng, 1, 4))
        messages = recall.told(rng, text)
    for _ in range(turns - 1):
        task = _next(rng, split, facts, kinds)
        messages += [*task.messages, {"role": "assistant", "content": task.answer}]
    task = _next(rng, split, facts, kinds)
    if rng.random() < 0.1:
        task = with_thought(task)
        task.thinking = True
        task.untrained_turns = sum(message["role"] == "assistant" for message in messages)
    task.skill = "conversation"
    task.messages = messages + task.messages
    return task


def _next(rng: Random, split: Split, facts: list[recall.Fact], kinds: Sequence[Generator]) -> Task:
    if facts and rng.random() < 0.4:
        question, answer = recall.ask(rng, split, pick(rng, facts))
        return Task("recall", user(question), answer, thought="I look it up in the text.")
    return pick(rng, kinds)(rng, split)
