"""Thinking between <think> marks before the answer, when the template's `enable_thinking` or the user's words ask for it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from workstation.demo.tasks.about_ws import about_ws
from workstation.demo.tasks.arithmetic import arithmetic
from workstation.demo.tasks.base import Split, Task, Wordings, pick
from workstation.demo.tasks.extraction import extraction
from workstation.demo.tasks.greeting import greeting
from workstation.demo.tasks.letters import copying, spelling
from workstation.demo.tasks.ordering import counting, reversing, sorting

_KINDS: tuple[Callable[[Random, Split], Task], ...] = (
    arithmetic,
    arithmetic,
    arithmetic,
    arithmetic,
    sorting,
    reversing,
    counting,
    spelling,
    copying,
    extraction,
    about_ws,
    greeting,
)
_FIRST = Wordings(
    ("", "please ", "hey, ", "ok, ", "first of all, "),
    ("think before you answer", "think first", "think step by step", "think about it", "think carefully", "think it through"),
    (". ", ": ", ".\n"),
)
_AFTER = Wordings(
    (" ", "\n"),
    (
        "think before you answer",
        "think first",
        "think step by step",
        "think carefully",
        "think it through",
        "please think first",
    ),
    (".", "", "!"),
)


def with_thought(task: Task) -> Task:
    """The task whose answer starts with its thought."""
    task.answer = f"<think>\n{task.thought}\n</think>\n\n{task.answer}"
    task.check = "thinking"
    return task


def thinking(rng: Random, split: Split) -> Task:
    """A single question of another skill; half of them ask by the template, half in words."""
    task = with_thought(pick(rng, _KINDS)(rng, split))
    task.skill = "thinking"
    turn = task.messages[-1]
    kind = rng.random()
    if kind < 0.5:
        task.thinking = True
    elif kind < 0.75:
        turn["content"] = _FIRST.pick(rng, split) + turn["content"]
    else:
        turn["content"] += _AFTER.pick(rng, split)
    return task
