"""Questions about `ws` itself. What is held out is the wording: for definitions the pairing of a frame with a term."""

from __future__ import annotations

from random import Random

from workstation.demo.tasks.about_facts import DEFINITIONS, QUESTIONS
from workstation.demo.tasks.base import Split, Task, Wordings, on_side, pick, user

FRAMES = (
    "what is TERM",
    "what is TERM in ws",
    "explain TERM",
    "define TERM",
    "what does TERM mean",
    "can you explain TERM",
    "tell me what TERM is",
    "please explain TERM",
    "what do you know about TERM",
    "what is meant by TERM",
    "describe TERM",
    "do you know what TERM is",
    "I want to know what TERM is",
    "could you tell me what TERM is",
)
_ENDS = ("?", "", ".", " please?", "? Thanks.")
_OPENINGS = (
    "",
    "",
    "hey, ",
    "ok, ",
    "hi, ",
    "quick question: ",
    "tell me, ",
    "please tell me: ",
    "about ws: ",
    "one question: ",
)


def _definitions(split: Split) -> list[tuple[str, str]]:
    """Every frame and term of the side, with the answer."""
    return [
        (frame.replace("TERM", term), answer)
        for term, answer in DEFINITIONS.items()
        for frame in FRAMES
        if on_side(f"define:{frame}:{term}", split)
    ]


_DEFINED = {"train": _definitions("train"), "held_out": _definitions("held_out")}
_ASKED = [(Wordings(_OPENINGS, cores, ("?", "", " please?", "? Thanks.")), answer) for cores, answer in QUESTIONS]
_SHARE = len(DEFINITIONS) / (len(DEFINITIONS) + len(QUESTIONS))


def about_ws(rng: Random, split: Split) -> Task:
    """One of about 110 questions, in one of its wordings."""
    if rng.random() < _SHARE:
        core, answer = pick(rng, _DEFINED[split])
        question = pick(rng, ("", "", "hey, ", "ok, ", "hi, ")) + core + pick(rng, _ENDS)
        question = question[0].upper() + question[1:]
    else:
        wordings, answer = pick(rng, _ASKED)
        question = wordings.pick(rng, split)
    return Task("about_ws", user(question), answer, thought="The user asks about ws.")
