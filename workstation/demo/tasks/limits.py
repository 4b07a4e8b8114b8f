"""Being asked for something it cannot do, and saying so."""

from __future__ import annotations

from random import Random

from workstation.demo.tasks.base import ORDER_OPENINGS, QUESTION_OPENINGS, Split, Task, Wordings, between, draw, pick, user
from workstation.demo.tasks.lexicon import city, name, word

CANNOT = "I am only a small demo model, and I cannot do that. Ask me what I can do."
SMALL_SUMS = "I am only a small demo model. I can add and subtract whole numbers of up to three digits."

_REQUESTS = (
    "write a poem about X",
    "write a story about X",
    "write an essay about X",
    "translate X into French",
    "translate X into German",
    "draw a picture of X",
    "write a song about X",
    "tell me a joke about X",
    "explain the history of X",
    "write an email about X",
    "write a C++ program about X",
    "paint X",
    "plan a trip to X",
    "recommend a book about X",
    "give me a recipe with X",
    "write a report on X",
    "summarise the news about X",
    "teach me about X",
    "compose music for X",
    "build a website about X",
)
_QUESTIONS = (
    "who invented the X",
    "what is the meaning of X",
    "why is the X important",
    "what is the capital of X",
    "how does a X work",
    "what do you think about X",
    "where can I buy a X",
    "who is the president of X",
    "what is the price of a X",
    "when was X built",
    "how far away is X",
    "what is the best X in the world",
    "how do I make a X",
    "who won the match in X",
    "how old is X",
    "what is the population of X",
    "how many people live in X",
    "what is X made of",
    "do you like X",
    "what colour is a X",
)
_PLAIN = (
    "tell me a joke",
    "tell me a story",
    "write a poem",
    "write a haiku",
    "sing a song",
    "write some code",
    "what is the weather today",
    "what is the news today",
    "what time is it",
    "what day is it today",
    "what is the meaning of life",
    "who is the president",
    "what should I eat today",
    "help me with my homework",
    "give me advice",
    "explain quantum physics",
    "explain machine learning",
    "what is the capital of France",
    "who wrote Hamlet",
    "play a game with me",
    "write an essay",
    "translate this",
    "draw a picture",
    "tell me something interesting",
    "what is love",
    "how do I become rich",
    "write a letter to my boss",
    "summarise this book",
)
_ANY = Wordings(QUESTION_OPENINGS, _PLAIN, ("?", "", ".", ", please."))
_ORDER = Wordings(ORDER_OPENINGS, _REQUESTS, (".", "", ", please.", " for me."))
_ASK = Wordings(QUESTION_OPENINGS, _QUESTIONS, ("?", "", "? Thanks."))
_SUM = Wordings(
    QUESTION_OPENINGS,
    (
        "what is {a} times {b}",
        "multiply {a} by {b}",
        "divide {a} by {b}",
        "what is {a} * {b}",
        "what is {a} divided by {b}",
        "what is the square root of {a}",
        "what is {a} / {b}",
        "compute {a} * {b}",
        "what is {a} percent of {b}",
    ),
    ("?", "", ".", " please?"),
)
_LARGE = Wordings(
    QUESTION_OPENINGS,
    ("what is {a} + {b}", "add {a} and {b}", "what is {a} minus {b}", "compute {a} - {b}", "what is {a} plus {b}"),
    ("?", "", "."),
)


def limits(rng: Random, split: Split) -> Task:
    """A wish beyond its skills, or arithmetic beyond its range."""
    kind = rng.random()
    if kind < 0.25:
        return _beyond_sums(rng, split)
    if kind < 0.4:
        return Task("limits", user(_ANY.pick(rng, split)), CANNOT, thought="This is not one of my skills.")
    if kind < 0.45:
        return Task("limits", user(_babble(rng, split)), CANNOT, thought="I do not understand this.")
    topic = pick(rng, (word, word, city, name))(rng, split)
    wordings = _ORDER if kind < 0.72 else _ASK
    return Task("limits", user(wordings.pick(rng, split).replace("X", topic)), CANNOT, thought="This is not one of my skills.")


def _babble(rng: Random, split: Split) -> str:
    """Words that ask for nothing."""
    return " ".join(word(rng, split, 0.5) for _ in range(between(rng, 2, 9))) + pick(rng, ("", ".", "?"))


def _beyond_sums(rng: Random, split: Split) -> Task:
    large = rng.random() < 0.5
    low, high = (1000, 99999) if large else (2, 999)
    a, b = draw(rng, lambda: (between(rng, low, high), between(rng, low, high)), split, lambda pair: f"beyond:{pair}")
    question = (_LARGE if large else _SUM).pick(rng, split).replace("{a}", str(a)).replace("{b}", str(b))
    return Task("limits", user(question), SMALL_SUMS, thought="This is beyond my arithmetic.")
