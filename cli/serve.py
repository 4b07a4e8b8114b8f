"""`ws serve MODEL`: decide everything, refuse what cannot work, then hand over to the server."""

from __future__ import annotations

import inspect
import os
import secrets
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workstation.catalog import check_sampling
from workstation.cli.flags import with_flags
from workstation.cli.plan import Launch, form_of, note, plan_launch, settle
from workstation.cli.serve_settings import REMOVED_FLAGS, SERVE_SETTINGS
from workstation.errors import ConfigError
from workstation.settings import Settings

if TYPE_CHECKING:
    from workstation.engine.request import EngineInfo
    from workstation.server.options import ServedModel, ServerOptions

_POSITIONAL = [
    inspect.Parameter(
        "model_name", inspect.Parameter.KEYWORD_ONLY, default=None,
        annotation=Annotated[str | None, typer.Argument(metavar="MODEL", help="Catalogue name, folder or hub id.")],
    ),
    inspect.Parameter(
        "model", inspect.Parameter.KEYWORD_ONLY, default=None,
        annotation=Annotated[str | None, typer.Option(help="The same as MODEL.")],
    ),
    inspect.Parameter(
        "dashboard", inspect.Parameter.KEYWORD_ONLY, default=False,
        annotation=Annotated[bool, typer.Option("--dashboard", help="Watch it here; q asks whether it stops or goes on.")],
    ),
    inspect.Parameter(
        "detach", inspect.Parameter.KEYWORD_ONLY, default=False,
        annotation=Annotated[bool, typer.Option("--detach", help="Return when the server is ready; `ws stop` stops it.")],
    ),
]  # fmt: skip


def _command(**given: Any) -> None:
    """Serve a model over an OpenAI-compatible API.

    Flags carry vLLM's names. Each may also be a variable (WS_MAX_MODEL_LEN) or a key of the model's `serve` table in
    models.toml; flags win over variables, variables over models.toml. vLLM's other flags are refused with a sentence.
    """
    model = chosen_model(given.pop("model_name"), given.pop("model"), os.environ)
    dashboard, detach = given.pop("dashboard"), given.pop("detach")
    answer_removed({flag.name: given.pop(flag.name) for flag in REMOVED_FLAGS})
    settings, _ = settle(model, given, os.environ)
    from workstation.server.serve import bind

    bind(settings["host"], settings["port"]).close()  # a taken port is told before minutes go into a download
    if dashboard or detach:
        in_background(model, given, settings, dashboard=dashboard, detach=detach)
        return
    run(plan_launch(model, given, os.environ))


command = with_flags(_command, _POSITIONAL, SERVE_SETTINGS, REMOVED_FLAGS)


def in_background(model: str, given: Mapping[str, Any], settings: Settings, *, dashboard: bool, detach: bool) -> None:
    """`--dashboard` and `--detach`: the server in a process of its own, watched or left there."""
    from workstation.cli import detached
    from workstation.cli.dashboard import check_terminal

    if dashboard and detach:
        raise ConfigError("--dashboard stays and --detach leaves; give one", param="detach")
    if dashboard:
        check_terminal()
    keys = api_keys(settings)
    server = detached.start(model, given, settings, keys)
    if dashboard:
        detached.watch(server, keys[0] if keys else None)
    else:
        detached.leave(server)


def chosen_model(positional: str | None, flag: str | None, environment: Mapping[str, str]) -> str:
    """MODEL, --model or WS_MODEL. Raises ConfigError when none, or two different ones, are given."""
    if positional and flag and positional != flag:
        raise ConfigError(f"two models are named: {positional!r} and --model {flag!r}", param="model")
    model = positional or flag or environment.get("WS_MODEL")
    if not model:
        raise ConfigError("name a model: `ws serve demo`; `ws models` lists the catalogue", param="model")
    return model


def answer_removed(given: Mapping[str, Any]) -> None:
    """Flags that vLLM removed: harmless ones get a sentence, the others are refused with one."""
    for flag in REMOVED_FLAGS:
        if given.get(flag.name) is None:
            continue
        if not flag.harmless:
            raise ConfigError(f"{flag.flag} is gone from vLLM and does not exist here: {flag.sentence}", param=flag.name)
        note(f"{flag.flag} is not needed: {flag.sentence}")


def api_keys(settings: Settings) -> tuple[str, ...]:
    """The keys clients must send. A bind beyond loopback without one gets a fresh key, printed once."""
    from workstation.server.options import is_loopback

    keys: tuple[str, ...] = settings["api_key"]
    if keys or is_loopback(settings["host"]):
        return keys
    key = f"ws-{secrets.token_urlsafe(24)}"
    note(f"{settings['host']} is reachable from other machines, so clients need this API key: {key}")
    return (key,)


def sampling_overrides(launch: Launch) -> dict[str, float | int]:
    """Default sampling over generation_config.json: models.toml's, then --override-generation-config."""
    given = check_sampling(launch.settings["override_generation_config"] or {}, "--override-generation-config")
    return {**(launch.model.entry.sampling if launch.model.entry else {}), **given}


def served_names(launch: Launch) -> tuple[str, ...]:
    """What the API's `model` field may say: the names given, or the model's own."""
    given: tuple[str, ...] = launch.settings["served_model_name"]
    if given:
        return given
    entry = launch.model.entry
    aliases = (entry.model,) if entry is not None and not entry.is_bundled and not entry.model.startswith("/") else ()
    return (launch.model.name, *aliases)


def server_options(settings: Settings) -> ServerOptions:
    """The HTTP side's part of the settings, in its own names."""
    from workstation.server.options import ServerOptions

    return ServerOptions(
        host=settings["host"], port=settings["port"], api_keys=api_keys(settings), allowed_hosts=settings["allowed_hosts"],
        allowed_origins=settings["allowed_origins"], priority_scheduling=settings["scheduling_policy"] == "priority",
        drain_seconds=settings["shutdown_timeout"], access_log=settings["access_log"],
        map_claude_models=settings["map_claude_models"], metrics_prefix=settings["metrics_prefix"],
        show_text=settings["show_text"],
        request_metrics=settings["enable_per_request_metrics"],
    )  # fmt: skip


def model_loader(launch: Launch) -> Callable[[], ServedModel]:
    """What the server calls, in a thread, while the engine loads: tokenizer, default sampling, names."""
    overrides, template = sampling_overrides(launch), chat_template(launch.settings["chat_template"])

    def load() -> ServedModel:
        from workstation.architecture import read_shape
        from workstation.server.served_model import load_served_model

        shape, pooling = read_shape(launch.model.folder), launch.settings["pooling"]
        return load_served_model(
            launch.model.folder, served_names(launch), config_eos=shape.eos_token_ids,
            pooling=None if pooling == "auto" else pooling, generates=not shape.headless,
            sampling=overrides, use_generation_config=launch.settings["generation_config"] == "auto",
            chat_template=template, root=launch.asked, tool_parser=launch.settings["tool_call_parser"],
            reasoning_parser=launch.settings["reasoning_parser"],
        )  # fmt: skip

    return load


def chat_template(path: str | None) -> str | None:
    """The text of --chat-template's file. Raises ConfigError."""
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {path!r} cannot be read: {error}", param="chat_template") from None


def ready_text(url: str, model: str, info: EngineInfo, keyed: bool) -> str:
    """What a person reads when the server is ready: where, on what, how much room, and a command to paste."""
    from workstation.memory import gib

    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is 417 + 385?"}}]}}'
    key = ["-H", "Authorization: Bearer YOUR_KEY"] if keyed else []
    curl = ["curl", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json", *key, "-d", body]
    kind = "FP8 KV cache" if info.kv_cache_dtype == "fp8" else "KV cache"
    room = f"{info.num_blocks * info.block_size} tokens of {kind} ({gib(info.kv_bytes)})"
    return (
        f"{model} is ready at {url}/v1 after {info.ready_seconds:.1f} s: {info.device_name}, {info.dtype}, {room}, "
        f"{info.max_model_len} tokens a sequence\n\n{shlex.join(curl)}\n"
    )


def run(launch: Launch) -> None:
    """Start the engine's process and the server; return after a clean drain."""
    import logging

    from workstation.cli.progress import StartBar
    from workstation.server.log_book import LogBook
    from workstation.server.serve import run as serve
    from workstation.server.supervisor import EngineProcess

    logging.basicConfig(level=logging.WARNING, format="ws: %(message)s")
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.WARNING)  # the log book lets our loggers say more than a terminal wants
    options, loader = server_options(launch.settings), model_loader(launch)
    with StartBar() as bar, LogBook() as book:
        engine = EngineProcess(replace(launch.config, online=True), on_loading=bar.update, on_said=book.add)

        def ready(server: Any) -> None:
            bar.close()
            note(ready_text(server.base_url, server.model, engine.info, bool(options.api_keys)))

        serve(options, engine, loader, name=served_names(launch)[0], folder=str(launch.model.folder.resolve()),
              form=form_of(launch), book=book, on_ready=ready)
