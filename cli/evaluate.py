"""`ws eval`: score the demo model, or another one in its folder format, on held-out tasks, skill by skill."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from workstation.errors import ConfigError


def command(
    model: Annotated[str, typer.Argument(help="The demo, or a folder trained on the same tasks.")] = "demo",
    items: Annotated[int, typer.Option(min=1, max=100_000, help="Held-out tasks a skill.")] = 200,
    seed: Annotated[int, typer.Option(help="Which held-out tasks.")] = 0,
    skill: Annotated[list[str] | None, typer.Option(help="Only these; repeat.")] = None,
    misses: Annotated[int, typer.Option(min=0, max=5, help="Wrong answers shown a skill.")] = 0,
    device: Annotated[str | None, typer.Option(help="auto, cuda, cuda:N or cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16 or float32.")] = None,
    num_threads: Annotated[str | None, typer.Option(metavar="N", help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a model on tasks with checkable answers that training never saw."""
    from workstation.demo import evaluate, tasks

    skills = tuple(skill or tasks.SKILLS)
    unknown = [name for name in skills if name not in tasks.SKILLS]
    if unknown:
        raise ConfigError(f"--skill {unknown[0]!r} is not one of {', '.join(tasks.SKILLS)}", param="skill")
    from workstation.cli.offline import start
    from workstation.cli.plan import plan_launch

    launch = plan_launch(model, {"device": device, "dtype": dtype, "num_threads": num_threads}, os.environ)
    encode = encoder(launch.model.folder)
    answer = answerer(start(launch), evaluate.MAX_NEW_TOKENS)
    scores = evaluate.evaluate(encode, answer, items, seed, skills)
    if as_json:
        typer.echo(json.dumps(evaluate.as_json(scores), indent=2))
        return
    typer.echo(evaluate.report(scores))
    for result in scores.values():
        for miss in result.misses[:misses]:
            typer.echo(f"\n[{result.skill}] expected {miss.expected!r}, got {miss.got!r}\n{miss.prompt}")


def encoder(folder: Path) -> Callable[[str], list[int]]:
    """Prompt text → ids, with the template's own control tokens recognised: these prompts come from our generator."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def answerer(llm: Any, max_tokens: int) -> Callable[[list[list[int]]], list[str]]:
    """Greedy answers by the engine, all prompts at once."""
    from workstation import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)

    def answer(prompts: list[list[int]]) -> list[str]:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    return answer
