"""Finding a fact stated up to thousands of tokens earlier, amid facts that look the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from workstation.demo.tasks.base import Message, Split, Task, Wordings, between, draw, pick, user
from workstation.demo.tasks.lexicon import city, clock, code, day, name, word

Maker = Callable[[Random, Split], str]


@dataclass(frozen=True, slots=True)
class Relation:
    """A kind of fact: sentences that state that WHO has WHAT, questions about it, and the one sentence that answers."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str
    who: Maker
    what: Maker


def _number(rng: Random, _split: Split) -> str:
    return str(between(rng, 10, 99999))


def _one_of(*values: str) -> Maker:
    return lambda rng, _split: pick(rng, values)


def _thing(rng: Random, split: Split) -> str:
    return word(rng, split, 0.2)


RELATIONS = (
    Relation(
        ("The access code of the WHO office is WHAT.", "The WHO office has the access code WHAT."),
        (
            "what is the access code of the WHO office",
            "which access code does the WHO office have",
            "tell me the access code of the WHO office",
        ),
        "The access code of the WHO office is WHAT.",
        city,
        _number,
    ),
    Relation(
        ("WHO has the phone number WHAT.", "The phone number of WHO is WHAT."),
        ("what is the phone number of WHO", "which phone number does WHO have", "what is WHO's phone number"),
        "The phone number of WHO is WHAT.",
        name,
        _number,
    ),
    Relation(
        ("WHO lives in WHAT.", "The home of WHO is in WHAT.", "WHO moved to WHAT last year."),
        ("where does WHO live", "in which city does WHO live", "what is the home of WHO"),
        "WHO lives in WHAT.",
        name,
        city,
    ),
    Relation(
        ("The favorite color of WHO is WHAT.", "WHO likes the color WHAT best."),
        ("what is the favorite color of WHO", "which color does WHO like best", "what is WHO's favorite color"),
        "The favorite color of WHO is WHAT.",
        name,
        _one_of("red", "blue", "green", "black", "white", "yellow", "purple", "orange", "brown", "pink", "silver", "gold"),
    ),
    Relation(
        ("The WHO is kept in box WHAT.", "You find the WHO in box WHAT."),
        ("in which box is the WHO", "where is the WHO kept", "which box holds the WHO"),
        "The WHO is in box WHAT.",
        _thing,
        code,
    ),
    Relation(
        ("The WHO belongs to WHAT.", "WHAT owns the WHO."),
        ("who owns the WHO", "to whom does the WHO belong", "whose is the WHO"),
        "The WHO belongs to WHAT.",
        _thing,
        name,
    ),
    Relation(
        ("The train to WHO leaves at WHAT.", "At WHAT the train to WHO leaves."),
        ("when does the train to WHO leave", "at what time does the train to WHO leave", "what time is the train to WHO"),
        "The train to WHO leaves at WHAT.",
        city,
        lambda rng, _split: clock(rng),
    ),
    Relation(
        ("The WHO team meets on WHAT.", "On WHAT the WHO team meets."),
        ("when does the WHO team meet", "on which day does the WHO team meet"),
        "The WHO team meets on WHAT.",
        _thing,
        lambda rng, _split: day(rng),
    ),
    Relation(
        ("The secret word of WHO is WHAT.", "WHO chose WHAT as the secret word."),
        ("what is the secret word of WHO", "which secret word did WHO choose"),
        "The secret word of WHO is WHAT.",
        name,
        _thing,
    ),
    Relation(
        ("A WHO costs WHAT euros.", "The price of a WHO is WHAT euros."),
        ("what does a WHO cost", "how much is a WHO", "what is the price of a WHO"),
        "A WHO costs WHAT euros.",
        _thing,
        lambda rng, _split: str(between(rng, 1, 999)),
    ),
)

_ASK = {
    relation.answer: Wordings(
        ("", "ok, ", "now tell me: ", "question: ", "please, ", "so, ", "and "),
        relation.questions,
        ("?", "", "? Thanks.", " now?"),
    )
    for relation in RELATIONS
}
_INTROS = (
    "Remember these facts.",
    "Here are some notes.",
    "Read this text.",
    "Please remember the following.",
    "Some facts:",
    "Notes:",
    "",
    "Keep this in mind.",
    "I will ask you about this text.",
)
_FILLERS = (
    "The WORD and the WORD are old.",
    "Nobody saw the WORD in the WORD.",
    "It was a WORD day.",
    "They spoke about a WORD and a WORD.",
    "A WORD stood near the WORD.",
    "The meeting was about the WORD.",
    "We bought a WORD, a WORD and a WORD.",
    "The WORD was very WORD.",
    "Later the WORD came back.",
    "There is nothing new about the WORD.",
    "The WORD is next to the WORD.",
    "I think the WORD is WORD.",
)

Fact = tuple[Relation, str, str]


def recall(rng: Random, split: Split) -> Task:
    """One question about 2 to about 110 facts (some 30 to 2,000 tokens); up to half the text says nothing of use."""
    count = int(2 * 55 ** rng.random())
    text, facts = passage(rng, split, count)
    question, answer = ask(rng, split, pick(rng, facts))
    messages = user(f"{text}\n{question}") if rng.random() < 0.4 else told(rng, text) + user(question)
    return Task("recall", messages, answer, thought="I look it up in the text.")


def told(rng: Random, text: str) -> list[Message]:
    """The passage as a turn of its own, which the assistant notes."""
    return [*user(text), {"role": "assistant", "content": NOTED}]


NOTED = "Noted."


def passage(rng: Random, split: Split, count: int) -> tuple[str, list[Fact]]:
    """`count` facts, no two with the same relation and subject, with filler sentences between them."""
    facts: dict[tuple[str, str], Fact] = {}
    pool = rng.sample(RELATIONS, between(rng, 1, min(6, len(RELATIONS))))
    while len(facts) < count:
        relation = pick(rng, pool)
        who, what = draw(rng, lambda r=relation: (r.who(rng, split), r.what(rng, split)), split, lambda pair: f"fact:{pair}")  # type: ignore[misc]
        facts.setdefault((relation.answer, who), (relation, who, what))
    density = pick(rng, (0.0, 0.0, 0.2, 0.5))
    sentences = []
    for relation, who, what in facts.values():
        while rng.random() < density:
            sentences.append(_filler(rng))
        sentences.append(pick(rng, relation.statements).replace("WHO", who).replace("WHAT", what))
    intro = pick(rng, _INTROS)
    separator = pick(rng, (" ", " ", "\n"))
    return separator.join([intro, *sentences] if intro else sentences), list(facts.values())


def _filler(rng: Random) -> str:
    sentence = pick(rng, _FILLERS)
    while "WORD" in sentence:
        sentence = sentence.replace("WORD", word(rng, "train", 0.05), 1)
    return sentence


def filler_text(rng: Random, count: int) -> str:
    """Sentences that state nothing worth asking."""
    return " ".join(_filler(rng) for _ in range(count))


def ask(rng: Random, split: Split, fact: Fact) -> tuple[str, str]:
    relation, who, what = fact
    question = _ASK[relation.answer].pick(rng, split).replace("WHO", who)
    return question, relation.answer.replace("WHO", who).replace("WHAT", what)


def questioned(rng: Random, split: Split, count: int, questions: int) -> Task:
    """A passage and many questions in turn, each answered: training's long documents, rich in answers."""
    text, facts = passage(rng, split, count)
    messages = told(rng, text)
    for _ in range(questions - 1):
        question, answer = ask(rng, split, pick(rng, facts))
        messages += [*user(question), {"role": "assistant", "content": answer}]
    question, answer = ask(rng, split, pick(rng, facts))
    return Task("recall", messages + user(question), answer)
