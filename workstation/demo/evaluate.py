"""Scores a demo model on held-out tasks, skill by skill. Knows no engine: text comes from a callback.

`python -m workstation.demo.evaluate FOLDER` scores with transformers; `ws eval demo` does it with the engine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from workstation.demo.tasks import SKILLS, Task, generate
from workstation.demo.template import document, prompt_text

MAX_NEW_TOKENS = 200  # the longest held-out answer has about 160
Generate = Callable[[list[list[int]]], list[str]]


@dataclass(frozen=True, slots=True)
class Miss:
    prompt: str
    expected: str
    got: str


@dataclass(frozen=True, slots=True)
class SkillScore:
    """right of total tasks answered exactly; `misses` holds the first few wrong answers."""

    skill: str
    right: int
    total: int
    misses: tuple[Miss, ...]

    @property
    def share(self) -> float:
        return self.right / self.total


def held_out(skill: str, n: int, seed: int = 0) -> list[Task]:
    """`n` tasks of a skill from the side that training never drew from; fixed by the seed. KeyError for an unknown skill."""
    rng = Random(f"{skill}:{seed}")
    return [generate(skill, rng, "held_out") for _ in range(n)]


def held_out_documents(
    encode: Callable[[str], list[int]], n: int, seed: int = 0, skills: Sequence[str] = tuple(SKILLS),
) -> list[tuple[list[int], int]]:
    """The tasks `evaluate` would draw with their right answers: (token ids, index of the answer's first token)."""
    found = []
    for skill in skills:
        for task in held_out(skill, n, seed):
            prompt = prompt_text(task)
            start = encode(prompt)
            found.append((start + encode(document(task).removeprefix(prompt)), len(start)))
    return found


def score(tasks: Sequence[Task], texts: Sequence[str], misses: int = 5) -> dict[str, SkillScore]:
    """Scores per skill. `texts[i]` is what the model wrote for `tasks[i]`, with markup and without the end token."""
    if len(tasks) != len(texts):
        raise ValueError(f"{len(tasks)} tasks but {len(texts)} texts")
    pairs: dict[str, list[tuple[Task, str]]] = {}
    for task, text in zip(tasks, texts, strict=True):
        pairs.setdefault(task.skill, []).append((task, text))
    scores = {}
    for skill, answered in pairs.items():
        wrong = [(task, text) for task, text in answered if not task.is_right(text)]
        shown = tuple(Miss(prompt_text(task)[-600:], task.answer, text) for task, text in wrong[:misses])
        scores[skill] = SkillScore(skill, len(answered) - len(wrong), len(answered), shown)
    return scores


def evaluate(
    encode: Callable[[str], list[int]],
    generate_text: Generate,
    n: int = 200,
    seed: int = 0,
    skills: Sequence[str] = tuple(SKILLS),
) -> dict[str, SkillScore]:
    """Draws `n` held-out tasks a skill, lets the model answer all, and scores.

    Args:
        encode: prompt text → token ids, in which the template's special tokens are recognised.
        generate_text: token-id prompts → texts, greedy, at most MAX_NEW_TOKENS, without special tokens but with
            <think> and <tool_call>.
    """
    tasks = [task for skill in skills for task in held_out(skill, n, seed)]
    return score(tasks, generate_text([encode(prompt_text(task)) for task in tasks]))


def average(scores: dict[str, SkillScore]) -> float:
    """The mean over skills of the share of exact answers."""
    return sum(result.share for result in scores.values()) / len(scores)


def report(scores: dict[str, SkillScore]) -> str:
    """A table for people."""
    lines = [f"{result.skill:<14}{result.right:>5} / {result.total:<5}{result.share:>8.1%}" for result in scores.values()]
    return "\n".join([*lines, f"{'average':<14}{'':>13}{average(scores):>8.1%}"])


def as_json(scores: dict[str, SkillScore]) -> dict[str, Any]:
    return {
        "average": average(scores),
        "skills": {name: asdict(result) | {"share": result.share} for name, result in scores.items()},
    }


def transformers_generator(
    folder: Path, device: str, dtype: str = "bfloat16", batch_tokens: int = 400_000
) -> tuple[Callable[[str], list[int]], Generate]:
    """Encoder and greedy batched generation by transformers, for use without the engine."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
    pad = tokenizer.pad_token_id

    def batch(prompts: list[list[int]]) -> list[str]:
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, temperature=None
        )
        return [str(text) for text in tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]

    def generate_all(prompts: list[list[int]]) -> list[str]:
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        texts = [""] * len(prompts)
        while order:
            longest = len(prompts[order[-1]]) + MAX_NEW_TOKENS
            taken = [order.pop() for _ in range(min(len(order), max(1, batch_tokens // longest)))]
            for index, text in zip(taken, batch([prompts[index] for index in taken]), strict=True):
                texts[index] = text
        return texts

    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]), generate_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=200, help="held-out tasks a skill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--skills", nargs="*", default=list(SKILLS))
    parser.add_argument("--json", type=Path, help="write the scores here")
    options = parser.parse_args()
    scores = evaluate(
        *transformers_generator(options.folder, options.device, options.dtype, 20_000),
        options.items,
        options.seed,
        options.skills,
    )
    print(report(scores))
    if options.json:
        options.json.write_text(json.dumps(as_json(scores), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
