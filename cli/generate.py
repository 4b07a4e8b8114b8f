"""`ws generate MODEL PROMPT`: one answer without a server, through the same engine."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from workstation.errors import ConfigError, StartupError


def command(
    model: Annotated[str, typer.Argument(help="Catalogue name, folder or hub id.")],
    prompt: Annotated[str | None, typer.Argument(help="The question; read from stdin when left out.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 512,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; the model's default unless given.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cuda, cuda:N or cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16 or float32.")] = None,
    max_model_len: Annotated[str | None, typer.Option(metavar="N", help="Tokens of prompt and output.")] = None,
    url: Annotated[str | None, typer.Option(help="Ask this server instead of loading the model here.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="WS_API_KEY", help="Key of that server.")] = None,
) -> None:
    """Answer one prompt and exit. stdout holds the answer and nothing else."""
    text = prompt if prompt is not None else sys.stdin.read()
    if not text.strip():
        raise ConfigError("the prompt is empty: give it after the model's name, or on stdin", param="prompt")
    if raw and system is not None:
        raise ConfigError("--system needs the chat template; leave out --raw", param="system")
    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    sampling = {name: value for name, value in given.items() if value is not None}
    here = {"device": device, "dtype": dtype, "max_model_len": max_model_len}
    if url is None:
        typer.echo(answer_here(model, here, text, system, sampling, raw=raw))
        return
    typed = [name for name, value in here.items() if value is not None]
    if typed:
        raise ConfigError(f"--{typed[0].replace('_', '-')} is the server's to decide; leave it out with --url", param=typed[0])
    typer.echo(answer_there(url, api_key, model, text, system, sampling, raw=raw))


def turns(text: str, system: str | None) -> list[dict[str, str]]:
    """The conversation of one question."""
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": text}]


def answer_here(
    model: str, flags: dict[str, Any], text: str, system: str | None, sampling: dict[str, Any], *, raw: bool
) -> str:
    """Load the model in this process and answer. What was typed wins over the model's default sampling."""
    from workstation.cli.offline import load

    llm = load(model, flags)
    params = llm.get_default_sampling_params().clone(**sampling)
    if raw:
        outputs = llm.generate([text], params, use_tqdm=False)
    else:
        outputs = llm.chat(turns(text, system), params, use_tqdm=False)
    return str(outputs[0].outputs[0].text)


def answer_there(
    url: str, key: str | None, model: str, text: str, system: str | None, sampling: dict[str, Any], *, raw: bool
) -> str:
    """Ask a running server. Raises StartupError with its sentence."""
    import httpx

    from workstation.cli.chat import error_text
    from workstation.cli.servers import bearer, root_of

    route = "completions" if raw else "chat/completions"
    question = {"prompt": text} if raw else {"messages": turns(text, system)}
    body = {"model": model, **question, **sampling}
    try:
        answer = httpx.post(f"{root_of(url)}/v1/{route}", json=body, headers=bearer(key), timeout=600.0)
    except httpx.HTTPError as error:
        raise StartupError(f"no server answers at {url}: {error}") from error
    if answer.status_code != 200:
        raise StartupError(f"the server answered {answer.status_code}: {error_text(answer.text)}")
    choice = answer.json()["choices"][0]
    return str(choice["text"] if raw else choice["message"]["content"])
