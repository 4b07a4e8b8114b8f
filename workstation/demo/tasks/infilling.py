"""Filling in the middle of a line of simple Python whose rest decides what is missing."""

from __future__ import annotations

from random import Random

from workstation.demo.tasks.base import Split, Task, between, draw, pick
from workstation.demo.tasks.lexicon import word

FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"

# Snippets with one «hole»; lower-case names in braces are drawn afresh. Each hole can be read off the rest of the snippet.
SNIPPETS = (
    "def add({a}, {b}):\n    return «{a} + {b}»\n",
    "def add({a}, {b}):\n    total = «{a} + {b}»\n    return total\n",
    "def subtract({a}, {b}):\n    return «{a} - {b}»\n",
    "def multiply({a}, {b}):\n    return «{a} * {b}»\n",
    "def divide({a}, {b}):\n    return «{a} / {b}»\n",
    "def difference({a}, {b}):\n    result = «{a} - {b}»\n    return result\n",
    "def area({a}, {b}):\n    return «{a} * {b}»\n",
    "def double({a}):\n    return «{a} * 2»\n",
    "def square({a}):\n    return «{a} * {a}»\n",
    "def negate({a}):\n    return «-{a}»\n",
    "def largest({a}, {b}):\n    return «max({a}, {b})»\n",
    "def smallest({a}, {b}):\n    return «min({a}, {b})»\n",
    "def length({a}):\n    return «len({a})»\n",
    "def is_empty({a}):\n    return «len({a}) == 0»\n",
    "def is_even({a}):\n    return «{a} % 2 == 0»\n",
    "def is_odd({a}):\n    return «{a} % 2 == 1»\n",
    "def is_positive({a}):\n    return «{a} > 0»\n",
    "def is_negative({a}):\n    return «{a} < 0»\n",
    "def first({a}):\n    return «{a}[0]»\n",
    "def last({a}):\n    return «{a}[-1]»\n",
    "def backwards({a}):\n    return «{a}[::-1]»\n",
    "def upper({a}):\n    return «{a}.upper()»\n",
    "def lower({a}):\n    return «{a}.lower()»\n",
    "def total({a}):\n    return «sum({a})»\n",
    "for {a} in {b}:\n    print(«{a}»)\n",
    "for {a} in «{b}»:\n    print({a}, len({b}))\n",
    "for «{a}» in {b}:\n    print({a})\n",
    "for {a} in range({n}):\n    print(«{a}»)\n",
    "{b} = []\nfor {a} in range({n}):\n    «{b}.append({a})»\n",
    "{b} = []\n{b}.«append»({n})\nprint({b})\n",
    "{b} = 0\nfor {a} in {c}:\n    {b} += «{a}»\nprint({b})\n",
    "{b} = 0\nfor {a} in {c}:\n    «{b}» += {a}\nprint({b})\n",
    "{b} = 0\nwhile {b} < {n}:\n    «{b} += 1»\n",
    "{a} = {n}\nprint(«{a}»)\n",
    "{a} = {n}\n{b} = {m}\nprint({a}, «{b}»)\n",
    "{a} = {n}\n{b} = {m}\nprint(«{a} + {b}», 'is the sum of', {a}, 'and', {b})\n",
    "{a}, {b} = {b}, «{a}»\n",
    "{b} = [{a} * {a} for «{a}» in range({n})]\n",
    "{b} = [{a} * 2 for {a} in «{c}»]\nprint({b}, {c})\n",
    "{b} = {{x}: {n}}\nprint({b}[«{x}»])\n",
    "{b} = dict()\n{b}[{x}] = {n}\nprint(«{b}»[{x}])\n",
    "if {a} > {b}:\n    print({a})\nelse:\n    print(«{b}»)\n",
    "if {a} is «None»:\n    raise ValueError('{a} is None')\n",
    "def {f}({a}, {b}):\n    return {a} + {b}\n\nprint(«{f}»({n}, {m}))\n",
    "def {f}({a}):\n    print({a})\n\n{f}(«{n}»)  # prints {n}\n",
    "def {f}({a}):\n    return «{a}»\n",
    "class Item:\n    def __init__(self, {a}, {b}):\n        self.{a} = {a}\n        self.{b} = «{b}»\n",
    "class Item:\n    def __init__(self, {a}, {b}):\n        self.{a} = «{a}»\n        self.{b} = {b}\n",
    "class Item:\n    def __init__(self, {a}):\n        self.«{a}» = {a}\n",
    "class Item:\n    def __init__(self, {a}):\n        self.{a} = {a}\n\n    def get_{a}(self):\n        return «self.{a}»\n",
    "with open({x}) as {a}:\n    text = «{a}.read()»\n",
    "import «json»\n\n{a} = json.loads({b})\n",
    "import json\n\n{a} = «json.loads»({b})  # text to object\n",
    "import json\n\n{a} = «json.dumps»({b})  # object to text\n",
    "import «math»\n\n{a} = math.sqrt({n})\n",
    "from random import «randint»\n\n{a} = randint(1, {n})\n",
    "try:\n    {a} = int({b})\n«except» ValueError:\n    {a} = 0\n",
    "assert {f}({n}) == {m}, «'{f} is wrong'»\n\nassert {g}({n}) == {m}, '{g} is wrong'\n",
    "print(f'{a} = {«{a}»}')\n",
    "{a} = input('{a}: ')\nprint(len(«{a}»))\n",
    "{a} = sorted({b})\nprint(«{a}»[0])\n",
    "{b}.sort()\nprint(«{b}»[0])\n",
    "{a} = '{w}'\nassert {a} == «'{w}'»\n",
    "{a} = {n}\nassert {a} == «{n}»\n",
    "{a} = [{n}, {m}]\nassert {a}[0] == «{n}»\n",
    "{a} = [{n}, {m}]\nassert {a}[1] == «{m}»\n",
)


def infilling(rng: Random, split: Split) -> Task:
    """A raw prompt with the three FIM tokens; the answer is the missing middle. The set of names is what is held out."""
    snippet = draw(rng, lambda: _filled(rng, split), split, lambda text: f"code:{text}")
    front, rest = snippet.split("«", 1)
    middle, back = rest.split("»", 1)
    if rng.random() < 0.25:
        front = _context(rng) + front
    return Task("infilling", [], middle, raw=f"{FIM_PREFIX}{front}{FIM_SUFFIX}{back}{FIM_MIDDLE}")


def _filled(rng: Random, split: Split) -> str:
    snippet = pick(rng, SNIPPETS)
    taken: set[str] = set()
    for letter in "abcfgw":
        spot = "{" + letter + "}"
        if spot in snippet:
            snippet = snippet.replace(spot, _identifier(rng, split, taken))
    taken_numbers = rng.sample(range(2, 100), 2)
    snippet = snippet.replace("{n}", str(taken_numbers[0])).replace("{m}", str(taken_numbers[1]))
    return snippet.replace("{x}", f"'{_identifier(rng, split, taken)}'")


def _identifier(rng: Random, split: Split, taken: set[str]) -> str:
    """A fresh variable name: a letter, a word, or two words with an underscore."""
    while True:
        kind = rng.random()
        if kind < 0.15:
            made = chr(between(rng, 97, 122))
        elif kind < 0.8:
            made = word(rng, split, 0.2)
        else:
            made = f"{word(rng, split, 0.2)}_{word(rng, 'train', 0.2)}"
        if made not in taken and made not in _RESERVED:
            taken.add(made)
            return made


_RESERVED = {
    "as",
    "in",
    "is",
    "if",
    "or",
    "and",
    "not",
    "for",
    "def",
    "class",
    "print",
    "object",
    "list",
    "open",
    "min",
    "max",
    "sum",
    "len",
}
_CONTEXT = (
    "x = 1\n",
    "import os\n\n",
    "import sys\n\n",
    "# example\n",
    '"""A module."""\n\n',
    "name = 'demo'\n",
    "count = 0\n",
)


def _context(rng: Random) -> str:
    return pick(rng, _CONTEXT)
