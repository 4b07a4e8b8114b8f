"""The list of skills by name."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from workstation.demo.tasks.about_ws import about_ws
from workstation.demo.tasks.arithmetic import arithmetic
from workstation.demo.tasks.base import Split, Task, casual
from workstation.demo.tasks.conversation import conversation
from workstation.demo.tasks.extraction import extraction
from workstation.demo.tasks.greeting import greeting
from workstation.demo.tasks.infilling import infilling
from workstation.demo.tasks.letters import copying, spelling
from workstation.demo.tasks.limits import limits
from workstation.demo.tasks.ordering import counting, reversing, sorting
from workstation.demo.tasks.recall import recall
from workstation.demo.tasks.thinking import thinking
from workstation.demo.tasks.tools import tools

SKILLS: dict[str, Callable[[Random, Split], Task]] = {
    "greeting": greeting,
    "arithmetic": arithmetic,
    "sorting": sorting,
    "reversing": reversing,
    "counting": counting,
    "spelling": spelling,
    "copying": copying,
    "extraction": extraction,
    "tools": tools,
    "thinking": thinking,
    "infilling": infilling,
    "recall": recall,
    "about_ws": about_ws,
    "limits": limits,
    "conversation": conversation,
}


def generate(skill: str, rng: Random, split: Split) -> Task:
    """One task of a skill. Raises KeyError for a skill that is not in SKILLS."""
    task = SKILLS[skill](rng, split)
    casual(rng, task)
    return task
