"""Several turns of mixed skills in one conversation: the later turns must be as good as the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from workstation.demo.tasks import recall
from workstation.demo.tasks.about_ws import about_ws
from workstation.demo.tasks.arithmetic import arithmetic
from workstation.demo.tasks.base import Message, Split, Task, between, pick, user
from workstation.demo.tasks.extraction import extraction
from workstation.demo.tasks.greeting import NAME_UNKNOWN, ask_my_name, greeting, introduction
from workstation.demo.tasks.letters import copying, spelling
from workstation.demo.tasks.lexicon import name
from workstation.demo.tasks.limits import limits
from workstation.demo.tasks.ordering import counting, reversing, sorting
from workstation.demo.tasks.thinking import with_thought

Generator = Callable[[Random, Split], Task]

_KINDS: tuple[Generator, ...] = (
    arithmetic,
    arithmetic,
    sorting,
    reversing,
    counting,
    spelling,
    copying,
    extraction,
    about_ws,
    about_ws,
    greeting,
    greeting,
    limits,
)


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
    who = name(rng, split) if rng.random() < 0.15 else ""
    for turn in range(turns - 1):
        task = introduction(rng, split, who) if who and turn == 0 else _next(rng, split, facts, kinds, who)
        messages += [*task.messages, {"role": "assistant", "content": task.answer}]
    task = _next(rng, split, facts, kinds, who)
    if rng.random() < 0.1:
        task = with_thought(task)
        task.thinking = True
        task.untrained_turns = sum(message["role"] == "assistant" for message in messages)
    task.skill = "conversation"
    task.messages = messages + task.messages
    return task


def _next(rng: Random, split: Split, facts: list[recall.Fact], kinds: Sequence[Generator], who: str) -> Task:
    if who and rng.random() < 0.4:
        return ask_my_name(rng, split, who)
    if facts and rng.random() < 0.4:
        question, answer = recall.ask(rng, split, pick(rng, facts))
        return Task("recall", user(question), answer, thought="I look it up in the text.")
    task = pick(rng, kinds)(rng, split)
    while task.answer == NAME_UNKNOWN or task.answer.startswith("Nice to meet you"):  # would contradict a name told before
        task = pick(rng, kinds)(rng, split)
    return task
