"""`ws`: the command line. Commands import what they need when they run, so that help stays instant."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from workstation.errors import WorkstationError

if TYPE_CHECKING:
    from typer import Typer

# Command → its module, the function's name in it, and whether it shows its help when nothing is given.
COMMANDS = {
    "serve": ("serve", "command", False), "chat": ("chat", "command", False), "generate": ("generate", "command", True),
    "top": ("top", "command", False), "ps": ("processes", "ps", False), "stop": ("processes", "stop", False),
    "estimate": ("estimate", "command", True), "models": ("models", "command", False), "show": ("show", "command", True),
    "pull": ("pull", "command", True), "rm": ("rm", "command", True), "check": ("check", "command", True),
    "doctor": ("doctor", "command", False), "quantize": ("quantize", "command", True),
    "eval": ("evaluate", "command", False), "bench": ("bench", "app", False),
}  # fmt: skip


def application(names: Iterable[str]) -> Typer:
    """The command line with these commands. One that is asked for by name need not wait for the others to be imported."""
    import typer

    from workstation.cli.root import root

    made = typer.Typer(
        name="ws", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
        rich_markup_mode=None,  # plain text shows whole flag names at any width, and rich need not be imported
        help="The LLM server for one big GPU: paged KV, continuous batching, an OpenAI-compatible API.",
        epilog="Settings come from flags, then WS_… variables (WS_MAX_MODEL_LEN), then models.toml, then defaults.",
    )  # fmt: skip
    made.callback()(root)
    for name in names:
        module, attribute, help_alone = COMMANDS[name]
        found = getattr(import_module(f"workstation.cli.{module}"), attribute)
        if isinstance(found, typer.Typer):
            made.add_typer(found, name=name)
        else:
            made.command(name, no_args_is_help=help_alone)(found)
    return made


def dashed(arguments: Sequence[str]) -> list[str]:
    """`--max_model_len` means `--max-model-len`, as vLLM's parser has it; what follows `--` is left alone."""
    result: list[str] = []
    for place, argument in enumerate(arguments):
        if argument == "--":
            return [*result, *arguments[place:]]
        name, sign, value = argument.partition("=")
        result.append(name.replace("_", "-") + sign + value if name.startswith("--") else argument)
    return result


def top(url: str | None = None) -> NoReturn:
    """`ws top` without options. It needs no parser, whose import takes as long as half of Textual's: frames come first."""
    from workstation.cli.dashboard import watch

    watch(url, os.environ.get("WS_API_KEY"))
    raise SystemExit(0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. A deliberate error becomes one line on stderr and its exit code."""
    try:
        try:
            given = dashed(sys.argv[1:] if arguments is None else arguments)
            if given[:1] == ["top"] and not any(word.startswith("-") for word in given) and len(given) <= 2:
                top(*given[1:])
            application(given[:1] if given and given[0] in COMMANDS else COMMANDS)(args=given)
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
