"""`ws eval`: score the demo model, or another one in its folder format, on held-out tasks, skill by skill; compare forms."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from workstation.errors import ConfigError

ITEMS, COMPARED_ITEMS = 200, 20


def command(
    model: Annotated[str, typer.Argument(help="The demo, or a folder trained on the same tasks.")] = "demo",
    items: Annotated[int | None, typer.Option(
        min=1, max=100_000, help="Held-out tasks a skill: 200 unless given, with --compare 20.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Which held-out tasks.")] = 0,
    skill: Annotated[list[str] | None, typer.Option(help="Only these; repeat.")] = None,
    misses: Annotated[int, typer.Option(min=0, max=5, help="Wrong answers shown a skill.")] = 0,
    device: Annotated[str | None, typer.Option(help="auto, cuda, cuda:N or cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16 or float32.")] = None,
    num_threads: Annotated[str | None, typer.Option(metavar="N", help="CPU threads.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Compare quantised forms with the 16-bit weights.")] = False,
    form: Annotated[list[str] | None, typer.Option(
        help="With --compare, only these: fp8, int8, int4, int4-g64, int4-g32, nf4, kv-fp8; repeat.")] = None,
    text: Annotated[Path | None, typer.Option(
        metavar="FILE", help="With --compare, read this text instead of the demo's tasks: for any model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a model on tasks with checkable answers that training never saw, or compare its quantised forms."""
    from workstation.demo import evaluate, tasks

    skills = tuple(skill or tasks.SKILLS)
    unknown = [name for name in skills if name not in tasks.SKILLS]
    if unknown:
        raise ConfigError(f"--skill {unknown[0]!r} is not one of {', '.join(tasks.SKILLS)}", param="skill")
    flags = {"device": device, "dtype": dtype, "num_threads": num_threads}
    if compare:
        _compare(model, flags, form, items or COMPARED_ITEMS, seed, skills, text, as_json)
        return
    if form or text:
        raise ConfigError(f"--{'form' if form else 'text'} goes with --compare", param="form" if form else "text")
    from workstation.cli.offline import start
    from workstation.cli.plan import plan_launch

    launch = plan_launch(model, flags, os.environ)
    encode = encoder(launch.model.folder)
    answer = answerer(start(launch), evaluate.MAX_NEW_TOKENS)
    scores = evaluate.evaluate(encode, answer, items or ITEMS, seed, skills)
    if as_json:
        typer.echo(json.dumps(evaluate.as_json(scores), indent=2))
        return
    typer.echo(evaluate.report(scores))
    for result in scores.values():
        for miss in result.misses[:misses]:
            typer.echo(f"\n[{result.skill}] expected {miss.expected!r}, got {miss.got!r}\n{miss.prompt}")


def _compare(
    model: str, flags: dict[str, Any], forms: list[str] | None, items: int, seed: int, skills: tuple[str, ...],
    text: Path | None, as_json: bool,
) -> None:
    from workstation.cli import compare

    rows = compare.compare(model, flags, forms=forms or tuple(compare.FORMS), items=items, seed=seed, skills=skills, text=text)
    typer.echo(json.dumps(compare.as_json(rows), indent=2) if as_json else compare.table(rows))


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
