"""`ws`: the command line. Commands import what they need when they run, so that help stays instant."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from workstation import __version__
from workstation.cli import bench, chat, doctor, estimate, evaluate, generate, models, processes, pull, rm, serve, show, top
from workstation.errors import WorkstationError

app = typer.Typer(
    name="ws", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text shows whole flag names at any width, and rich need not be imported
    help="The LLM server for one big GPU: paged KV, continuous batching, an OpenAI-compatible API.",
    epilog="Settings come from flags, then WS_… variables (WS_MAX_MODEL_LEN), then models.toml, then defaults.",
)  # fmt: skip
app.command("serve")(serve.command)
app.command("chat")(chat.command)
app.command("generate", no_args_is_help=True)(generate.command)
app.command("top")(top.command)
app.command("ps")(processes.ps)
app.command("stop")(processes.stop)
app.command("estimate", no_args_is_help=True)(estimate.command)
app.command("models")(models.command)
app.command("show", no_args_is_help=True)(show.command)
app.command("pull", no_args_is_help=True)(pull.command)
app.command("rm", no_args_is_help=True)(rm.command)
app.command("doctor")(doctor.command)
app.command("eval")(evaluate.command)
app.add_typer(bench.app, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ws {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """The LLM server for one big GPU."""


def dashed(arguments: Sequence[str]) -> list[str]:
    """`--max_model_len` means `--max-model-len`, as vLLM's parser has it; what follows `--` is left alone."""
    result: list[str] = []
    for place, argument in enumerate(arguments):
        if argument == "--":
            return [*result, *arguments[place:]]
        name, sign, value = argument.partition("=")
        result.append(name.replace("_", "-") + sign + value if name.startswith("--") else argument)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. A deliberate error becomes one line on stderr and its exit code."""
    try:
        try:
            app(args=dashed(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()
    except WorkstationError as error:
        print(f"ws: {error.message}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader of our output went away (`ws models | head -1`); the interpreter's last flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
