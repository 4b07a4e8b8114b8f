"""How often training sees each skill, and what surrounds the plain tasks: system prompts, idle tools, long conversations."""

from __future__ import annotations

from random import Random

from workstation.demo.tasks import SKILLS, Task, generate, recall
from workstation.demo.tasks.about_facts import DEFINITIONS, QUESTIONS
from workstation.demo.tasks.base import Message, between, casual, pick
from workstation.demo.tasks.conversation import mixed
from workstation.demo.tasks.greeting import WHAT_I_AM
from workstation.demo.tasks.tool_pool import invented_tool

# Documents of each skill among the short ones. Arithmetic and the skills that read letters need the most practice.
WEIGHTS = {
    "greeting": 2.0,
    "arithmetic": 16.0,
    "sorting": 10.0,
    "reversing": 8.0,
    "counting": 8.0,
    "spelling": 7.0,
    "copying": 6.0,
    "extraction": 10.0,
    "tools": 12.0,
    "thinking": 8.0,
    "infilling": 8.0,
    "recall": 6.0,
    "about_ws": 6.0,
    "limits": 3.0,
    "conversation": 10.0,
}
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are the demo model of ws.",
    "You are a helpful AI assistant.",
    "Be brief.",
    "Answer briefly.",
    "You are a friendly assistant.",
    "You are an assistant that helps users.",
    "Be precise and brief.",
    "You are a coding assistant.",
    "You are a careful assistant that answers questions.",
    "Follow the user's instructions.",
)
_SYSTEM_SHARE = 0.25
_NOTES_SHARE = 0.03
_PLAIN_SHARE = 0.01
_IDLE_TOOLS_SHARE = 0.03
_LONG_KINDS = tuple(
    SKILLS[skill]
    for skill in (
        "arithmetic",
        "arithmetic",
        "sorting",
        "reversing",
        "counting",
        "spelling",
        "copying",
        "extraction",
        "about_ws",
        "greeting",
        "limits",
    )
)
_CUMULATIVE = [sum(list(WEIGHTS.values())[: index + 1]) for index in range(len(WEIGHTS))]


def short_task(rng: Random) -> Task:
    """A training task by the weights above, sometimes behind a system prompt or beside tools that it does not need."""
    if rng.random() < _PLAIN_SHARE:
        return plain_text(rng)
    skill = rng.choices(list(WEIGHTS), cum_weights=_CUMULATIVE)[0]
    task = generate(skill, rng, "train")
    if task.raw:
        return task
    if not task.tools and skill in ("greeting", "about_ws", "conversation") and rng.random() < _IDLE_TOOLS_SHARE:
        task.tools = [invented_tool(rng, "train").schema(rng) for _ in range(between(rng, 1, 2))]
    _with_system(rng, task)
    return task


def long_task(rng: Random) -> Task:
    """A long document, 500 to about 6,000 tokens: many questions on one passage, or a conversation of many turns."""
    if rng.random() < 0.65:
        task = recall.questioned(rng, "train", int(30 * 10 ** rng.random()), between(rng, 8, 30))
    else:
        task = mixed(rng, "train", between(rng, 12, 90), _LONG_KINDS)
        _with_system(rng, task)
    casual(rng, task)
    return task


def _with_system(rng: Random, task: Task) -> None:
    kind = rng.random()
    if kind < _SYSTEM_SHARE + _NOTES_SHARE:
        content = pick(rng, SYSTEM_PROMPTS) if kind < _SYSTEM_SHARE else recall.filler_text(rng, between(rng, 2, 30))
        first: Message = {"role": "system", "content": content}
        task.messages = [first, *task.messages]


def plain_text(rng: Random) -> Task:
    """Sentences about ws without any turns, so that completion of bare text stays readable. All of it is trained."""
    sentences = [
        *DEFINITIONS.values(),
        *(answer for _, answer in QUESTIONS if answer.endswith(".")),
        WHAT_I_AM,
        "Hello, my name is demo.",
    ]
    return Task("plain", [], "", raw=" ".join(rng.sample(sentences, between(rng, 2, 6))))
