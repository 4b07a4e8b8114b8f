"""`ws generate MODEL PROMPT`: one answer without a server, through the same engine."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from workstation.errors import ConfigError


def command(
    model: Annotated[str, typer.Argument(help="Catalogue name, folder or hub id.")],
    prompt: Annotated[str | None, typer.Argument(help="The question; read from stdin when left out.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 512,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; the model's default unless given.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda, cuda:N or cpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    max_model_len: Annotated[str | None, typer.Option(metavar="N", help="Tokens of prompt and output.")] = None,
) -> None:
    """Answer one prompt and exit. stdout holds the answer and nothing else."""
    text = prompt if prompt is not None else sys.stdin.read()
    if not text.strip():
        raise ConfigError("the prompt is empty: give it after the model's name, or on stdin", param="prompt")
    if raw and system is not None:
        raise ConfigError("--system needs the chat template; leave out --raw", param="system")
    from workstation.cli.offline import load

    llm = load(model, {"device": device, "dtype": dtype, "max_model_len": max_model_len})
    sampling = sampling_for(llm, {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed})
    if raw:
        outputs = llm.generate([text], sampling, use_tqdm=False)
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        outputs = llm.chat([*messages, {"role": "user", "content": text}], sampling, use_tqdm=False)
    typer.echo(outputs[0].outputs[0].text)


def sampling_for(llm: Any, given: dict[str, Any]) -> Any:
    """The model's default sampling with what was typed over it."""
    return llm.get_default_sampling_params().clone(**{name: value for name, value in given.items() if value is not None})
