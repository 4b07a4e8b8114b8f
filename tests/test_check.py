"""`ws check`: configurations that parse and carry the true figures; handshakes that notice what would break a client."""

from __future__ import annotations

import asyncio
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import FakeEngine, served_model, write_byte_level_folder
from typer.testing import CliRunner

from workstation.cli import check, check_probe
from workstation.cli.check_clients import CLIENTS, Facts, find_client
from workstation.cli.check_probe import Event, Failed
from workstation.cli.main import application
from workstation.errors import ConfigError
from workstation.server.app import create_app
from workstation.server.options import ServedModel, ServerOptions

FACTS = Facts("http://127.0.0.1:8123", "some-model", 40_960, fills=True)
KEYED = Facts("http://127.0.0.1:8123", "some-model", 40_960, keyed=True)


class InProcess(httpx.BaseTransport):
    """A blocking transport to an ASGI app."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(app=self._app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport) as client:
                return await client.request(request.method, request.url, headers=request.headers, content=request.read())

        answer = asyncio.run(go())
        headers = [(name, value) for name, value in answer.headers.items() if name != "content-length"]
        return httpx.Response(answer.status_code, headers=headers, content=answer.content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level_folder(tmp_path_factory.mktemp("check"))


@pytest.fixture(scope="module")
def model(folder: Path) -> ServedModel:
    return served_model(folder)


def scripted(model: ServedModel, call: str = '{"city": "Paris"}}\n</tool_call>') -> Callable[[Any, int], list[int]]:
    """Says hello, and goes on with a call that the prompt has begun."""
    def reply(request: Any, index: int) -> list[int]:
        prompt = model.tokenizer.decode(request.prompt_token_ids)
        text = call if prompt.rstrip().endswith('"arguments":') else "hello world"
        return [*model.tokenizer.encode(text, add_special_tokens=False), model.eos_token_ids[0]]

    return reply


def lines(model: ServedModel, name: str, monkeypatch: pytest.MonkeyPatch, *, engine: FakeEngine | None = None,
          options: ServerOptions | None = None,
          change: Callable[[httpx.Response], httpx.Response] | None = None) -> dict[str, Any]:
    """The outcome of `ws check NAME --json`, by check, and the exit code under "rc"."""
    app = create_app(engine or FakeEngine(reply=scripted(model)), model, options)
    transport = InProcess(app)
    if change is not None:
        handle = transport.handle_request
        monkeypatch.setattr(transport, "handle_request", lambda request: change(handle(request)))
    client = httpx.Client
    monkeypatch.setattr(httpx, "Client", lambda **given: client(transport=transport, **given))
    done = CliRunner().invoke(application(["check"]), ["check", name, "--json", "--url", "http://localhost:8000"])
    found = json.loads(done.stdout)
    return {"rc": done.exit_code, **{line["name"]: (line["state"], line["says"]) for line in found["checks"]}}


# ── configurations ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", CLIENTS)
def test_every_configuration_names_the_server_and_the_model_and_never_a_key(name: str) -> None:
    for facts in (FACTS, KEYED):
        text = "\n".join(part for _, part in CLIENTS[name].config(facts))
        assert "127.0.0.1:8123" in text
        assert "some-model" in text or name == "openwebui"  # it lists the server's models by itself
        assert ("WS_API_KEY" in text) or not facts.keyed


@pytest.mark.parametrize("name", sorted(set(CLIENTS) - {"openwebui", "openai", "anthropic", "langchain", "litellm"}))
def test_clients_that_cannot_ask_for_the_window_are_told_it(name: str) -> None:
    assert "40960" in "\n".join(part for _, part in CLIENTS[name].config(FACTS))


def test_codex_configuration_is_toml_for_the_only_dialect_it_speaks() -> None:
    config = tomllib.loads(CLIENTS["codex"].config(KEYED)[0][1])
    assert config["model_context_window"] == 40_960 and config["model"] == "some-model"
    assert config["model_providers"][config["model_provider"]] == {
        "name": "ws", "base_url": "http://127.0.0.1:8123/v1", "wire_api": "responses", "env_key": "WS_API_KEY"}


def test_claude_code_is_given_every_model_variable() -> None:
    text = CLIENTS["claude"].config(FACTS)[0][1]
    values = dict(line.removeprefix("export ").split("=", 1) for line in text.splitlines() if line.startswith("export"))
    models = {name for name, value in values.items() if value == "some-model"}
    assert models == {"ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_OPUS_MODEL", "ANTHROPIC_DEFAULT_SONNET_MODEL",
                      "ANTHROPIC_DEFAULT_HAIKU_MODEL", "ANTHROPIC_DEFAULT_FABLE_MODEL", "ANTHROPIC_SMALL_FAST_MODEL",
                      "CLAUDE_CODE_SUBAGENT_MODEL"}
    assert values["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:8123"
    assert values["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "40960" and int(values["CLAUDE_CODE_MAX_OUTPUT_TOKENS"]) < 40_960


@pytest.mark.parametrize(("name", "path"), [
    ("opencode", ("provider", "ws", "models", "some-model", "limit", "context")),
    ("zed", ("language_models", "openai_compatible", "ws", "available_models", 0, "max_tokens")),
    ("aider", ("openai/some-model", "max_input_tokens")),
])
def test_json_configurations_hold_the_window_where_the_client_reads_it(name: str, path: tuple[Any, ...]) -> None:
    value = json.loads(CLIENTS[name].config(FACTS)[0][1])
    for step in path:
        value = value[step]
    assert value == 40_960


def test_open_webui_reaches_loopback_by_the_hosts_network_or_a_bridge_with_a_key() -> None:
    host, bridge = (text for _, text in CLIENTS["openwebui"].config(FACTS))
    assert "--network host" in host and "OPENAI_API_BASE_URL=http://127.0.0.1:8123/v1" in host
    assert "--add-host host.docker.internal:host-gateway" in bridge and "http://host.docker.internal:8123/v1" in bridge
    assert "--host 172.17.0.1" in bridge and bridge.count("$WS_API_KEY") == 2


def test_an_unknown_client_is_refused_with_the_names_and_cursor_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="codex, claude"):
        find_client("nobody")
    with pytest.raises(ConfigError, match="cannot reach this machine"):
        find_client("cursor")
    assert find_client("Claude-Code")[0] == "claude"


# ── handshakes ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["codex", "claude", "zed", "openai"])
def test_a_good_server_passes_every_check(model: ServedModel, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = lines(model, name, monkeypatch)
    assert found.pop("rc") == 0
    assert {state for state, _ in found.values()} == {"ok"}, found
    assert "4096 tokens" in found["models"][1]


def test_what_the_model_cannot_do_is_skipped_and_no_failure(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    found = lines(model, "continue", monkeypatch)
    assert found["fill"][0] == "skipped" and found["rc"] == 0


@pytest.mark.parametrize("name", ["codex", "claude", "aider"])
def test_arguments_that_are_no_json_fail_the_tools_check_alone(
        model: ServedModel, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = lines(model, name, monkeypatch, engine=FakeEngine(reply=scripted(model, '{"city": Par}}\n</tool_call>')))
    assert found.pop("rc") == 1
    assert {line for line, (state, _) in found.items() if state == "failed"} == {"tools"} and "Par" in found["tools"][1]


def test_a_template_without_tools_fails_the_tools_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = "{%- for message in messages %}{{ message.role + ': ' + message.content }}{% endfor %}"
    bare = served_model(write_byte_level_folder(tmp_path, chat_template=plain))
    found = lines(bare, "cline", monkeypatch, engine=FakeEngine(reply=scripted(bare)))
    assert found["rc"] == 1 and found["tools"][0] == "failed" and "template" in found["tools"][1]


@pytest.mark.parametrize(("name", "old", "new", "failing"), [
    ("aider", b"data: [DONE]\n\n", b"", {"stream", "tools", "usage"}),
    ("aider", b"maximum context length", b"limit", {"overflow"}),
    ("aider", b'"index":0,"function"', b'"function"', {"tools"}),
    ("aider", b'"cached_tokens"', b'"cached"', {"usage"}),
    ("claude", b"prompt is too long", b"too long", {"overflow"}),
    ("claude", b'"tool_use","stop_sequence"', b'"end_turn","stop_sequence"', {"tools"}),
    ("claude", b'{"type":"message_stop"}', b'{"type":"ping"}', {"stream", "tools", "usage"}),
    ("codex", b"context_length_exceeded", b"too_long", {"overflow"}),
    ("codex", b'"call_id"', b'"call"', {"tools"}),
])
def test_a_server_that_strays_from_the_dialect_fails_that_check(
        model: ServedModel, name: str, old: bytes, new: bytes, failing: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def change(answer: httpx.Response) -> httpx.Response:
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content.replace(old, new))

    found = lines(model, name, monkeypatch, change=change)
    assert found.pop("rc") == 1
    assert {line for line, (state, _) in found.items() if state == "failed"} == failing, found


def test_refused_claude_ids_and_a_dead_engine_are_causes(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    found = lines(model, "claude", monkeypatch, options=ServerOptions(map_claude_models=False))
    assert found["names"][0] == "failed" and "model variable" in found["names"][1]
    monkeypatch.undo()
    found = lines(model, "aider", monkeypatch, engine=FakeEngine(fail_after=0))
    assert found["rc"] == 1 and "engine process died" in found["usage"][1]


def test_a_wrong_key_is_told_at_once(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = InProcess(create_app(FakeEngine(), model, ServerOptions(api_keys=("secret",))))
    with httpx.Client(transport=transport, base_url="http://localhost:8000") as client, pytest.raises(Exception, match="401"):
        check.open_probe(client, "http://localhost:8000")


def test_a_stream_that_is_silent_for_long_fails_and_signs_of_life_count() -> None:
    quiet = [Event("", "x", 0.1), Event("", "x", 12.0)]
    with pytest.raises(Failed, match=r"silent for 11\.9 s"):
        check_probe.spoken(quiet, 0, 12.0)
    alive = [Event(":", "keep-alive", 5.0), Event(":", "keep-alive", 10.0), Event("", "x", 12.0)]
    assert "2 signs of life" in check_probe.spoken(alive, 2, 12.0)


def test_events_are_told_apart_by_name_data_and_comment() -> None:
    text = ": keep-alive\n\nevent: ping\ndata: {}\n\ndata: one\ndata: two\n\n"
    found = [(event.name, event.data) for event in check_probe.events(iter(text.splitlines()), 0.0)]
    assert found == [(":", "keep-alive"), ("ping", "{}"), ("", "one\ntwo")]
