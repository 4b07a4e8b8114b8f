"""`ws check CLIENT`: that client's configuration with this server's true figures, and its handshake against the live server."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workstation.errors import StartupError

if TYPE_CHECKING:
    from workstation.cli.check_clients import Client, Facts
    from workstation.cli.check_probe import Line, Probe

Check = Callable[["Probe"], str]


def command(
    client: Annotated[str, typer.Argument(help="codex, claude, continue, openwebui, zed, aider, cline, roo, opencode, goose, "
                                               "openai, anthropic, langchain, litellm or llamaindex.")],
    url: Annotated[str | None, typer.Option(help="Such as http://127.0.0.1:8000; the running server unless given.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="WS_API_KEY", show_envvar=True, help="Key of the server.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a client's configuration and run its handshake against the running server; exit code 1 when a check fails."""
    import httpx

    from workstation.cli.check_clients import find_client
    from workstation.cli.servers import bearer, find_server

    name, found = find_client(client)
    base = find_server(url).url
    with httpx.Client(base_url=base, headers=bearer(api_key), timeout=httpx.Timeout(10.0, read=600.0)) as http:
        probe = open_probe(http, base)
        lines = [run(title, check, probe) for title, check in checks(found)]
    config = found.config(probe.facts)
    if as_json:
        typer.echo(json.dumps(_record(name, probe.facts, config, lines), indent=2))
    else:
        _print(found, probe.facts, config, lines)
    if any(line.state == "failed" for line in lines):
        raise typer.Exit(1)


def open_probe(client: Any, base: str) -> Probe:
    """What the server says of itself. Raises StartupError when it does not answer as one."""
    import httpx

    from workstation.cli.chat import error_text
    from workstation.cli.check_clients import Facts
    from workstation.cli.check_probe import Probe

    answers = {}
    for path in ("/v1/models", "/props"):
        try:
            answer = client.get(path)
        except httpx.HTTPError as error:
            raise StartupError(f"no server answers at {base}: {error}") from error
        if answer.status_code != 200:
            raise StartupError(f"{base}{path} answered {answer.status_code}: {error_text(answer.text)}")
        answers[path] = answer.json()
    card, props = answers["/v1/models"]["data"][0], answers["/props"]
    facts = Facts(base, card["id"], card["max_model_len"], keyed="authorization" in client.headers,
                  fills=bool(props.get("fill_in_the_middle")))
    return Probe(client, facts, props)


def checks(client: Client) -> list[tuple[str, Check]]:
    """(name, check) of all the dialects a client speaks, in the order in which it would meet them."""
    from workstation.cli import check_chat as chat
    from workstation.cli import check_messages as messages
    from workstation.cli import check_responses as responses

    dialects: dict[str, list[tuple[str, Check]]] = {
        "chat": [("stream", chat.stream), ("tools", chat.tools), ("usage", chat.usage), ("overflow", chat.overflow),
                 ("keep-alive", chat.keep_alive)],
        "responses": [("probe", responses.probe_input), ("stream", responses.stream), ("tools", responses.tools),
                      ("usage", responses.usage), ("overflow", responses.overflow), ("keep-alive", responses.keep_alive)],
        "messages": [("hello", messages.hello), ("names", messages.names), ("count", messages.count),
                     ("stream", messages.stream), ("tools", messages.tools), ("usage", messages.usage),
                     ("overflow", messages.overflow), ("keep-alive", messages.keep_alive)],
        "fill": [("fill", chat.fill)],
        "props": [("props", chat.props)],
    }
    several = len([name for name in client.dialects if len(dialects[name]) > 1]) > 1
    found: list[tuple[str, Check]] = [("models", models)]
    for dialect in client.dialects:
        found += [(f"{dialect} {name}" if several else name, check) for name, check in dialects[dialect]]
    return found


def models(probe: Probe) -> str:
    """The window under every name that clients look for."""
    from workstation.cli.check_probe import Failed

    card = probe.client.get(f"/v1/models/{probe.facts.model}").json()
    names = ("max_model_len", "context_length", "context_window", "max_input_tokens")
    missing = [name for name in names if card.get(name) != probe.facts.window]
    if missing or card.get("meta", {}).get("n_ctx") != probe.facts.window:
        raise Failed(f"{', '.join(missing) or 'meta.n_ctx'} does not give the window")
    return f"{probe.facts.model}, {probe.facts.window} tokens"


def run(name: str, check: Check, probe: Probe) -> Line:
    """One check's outcome; whatever goes wrong in it is its cause."""
    import httpx

    from workstation.cli.check_probe import Failed, Line, Skipped

    try:
        return Line(name, "ok", check(probe))
    except Failed as failure:
        return Line(name, "failed", str(failure))
    except Skipped as reason:
        return Line(name, "skipped", str(reason))
    except httpx.HTTPError as error:
        return Line(name, "failed", f"the connection broke: {error or type(error).__name__}")
    except (KeyError, IndexError, TypeError, ValueError, StopIteration) as error:
        return Line(name, "failed", f"the answer has not the shape it should have: {type(error).__name__} {error}")


def _record(name: str, facts: Facts, config: list[tuple[str, str]], lines: list[Line]) -> dict[str, Any]:
    return {"client": name, "url": facts.url, "model": facts.model, "window": facts.window,
            "config": [{"where": where, "text": text} for where, text in config], "checks": [asdict(line) for line in lines]}


def _print(client: Client, facts: Facts, config: list[tuple[str, str]], lines: list[Line]) -> None:
    typer.echo(f"{client.title} with {facts.model} at {facts.url}, a window of {facts.window} tokens\n")
    for where, text in config:
        typer.echo(f"# {where}\n{text}\n")
    width = max(len(line.name) for line in lines)
    for line in lines:
        typer.echo(f"{line.state:7}  {line.name:{width}}  {line.says}")
