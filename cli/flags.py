"""Settings tables → Typer options, so that a setting is written down once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from workstation.cli.serve_settings import RemovedFlag
from workstation.settings import Setting

_METAVAR = {"text": "TEXT", "int": "N", "float": "X", "length": "N", "list": "TEXT", "json": "JSON"}


def with_flags(
    function: Callable[..., None],
    positional: list[inspect.Parameter],
    table: tuple[Setting, ...],
    removed: tuple[RemovedFlag, ...] = (),
) -> Callable[..., None]:
    """The function with one keyword-only option a setting; untyped options arrive as None."""
    parameters = [*positional, *(_option(setting) for setting in table), *(_removed(flag) for flag in removed)]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return function


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def _option(setting: Setting) -> inspect.Parameter:
    options: dict[str, Any] = {
        "help": setting.help + _suffix(setting), "hidden": setting.only is not None, "show_default": False,
    }  # fmt: skip
    if setting.kind == "bool":
        no_form = f"--no-{setting.flag[2:]}"
        return _parameter(setting.name, bool | None, typer.Option(f"{setting.flag}/{no_form}", **options))
    kind = list[str] | None if setting.kind == "list" else str | None
    options["metavar"] = "|".join(setting.choices) or _METAVAR[setting.kind]
    return _parameter(setting.name, kind, typer.Option(setting.flag, *setting.short, **options))


def _suffix(setting: Setting) -> str:
    return "" if setting.default in (None, ()) else f" [{str(setting.default).lower()}]"


def _removed(flag: RemovedFlag) -> inspect.Parameter:
    kind = str | None if flag.takes_value else bool | None
    return _parameter(flag.name, kind, typer.Option(flag.flag, hidden=True))
