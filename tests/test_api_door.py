"""The door: keys, hosts, origins, content types, sizes, unknown paths. Every refusal in OpenAI's error shape."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fakes import FakeEngine, api_client, served_model, write_byte_level_folder

from workstation.server.app import create_app
from workstation.server.options import ServedModel, ServerOptions

KEYED = ServerOptions(host="0.0.0.0", api_keys=("secret-key", "second"))
BODY = {"prompt": "a", "max_tokens": 1}
ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/fake"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/stats"), ("GET", "/stats/stream"), ("GET", "/stats/blocks"), ("GET", "/stats/requests/{id}"),
    ("POST", "/stats/requests/{id}/abort"), ("GET", "/stats/log"), ("GET", "/stats/gpu"),
    ("POST", "/v1/responses"), ("GET", "/v1/responses/{response_id}"), ("DELETE", "/v1/responses/{response_id}"),
    ("POST", "/v1/responses/{response_id}/cancel"), ("POST", "/v1/fim/completions"), ("POST", "/infill"), ("GET", "/props"),
    ("POST", "/chat/completions"), ("POST", "/completions"), ("POST", "/responses"), ("GET", "/models"),
    ("POST", "/fim/completions"), ("GET", "/"), ("GET", "/api/hello"), ("POST", "/api/event_logging/batch"),
    ("POST", "/api/event_logging/v2/batch"), ("POST", "/v1/embeddings"), ("POST", "/embeddings"),
    ("GET", "/openapi.json"),
]
ANTHROPIC = [("POST", "/v1/messages"), ("POST", "/v1/messages/count_tokens")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served_model(write_byte_level_folder(tmp_path_factory.mktemp("door")))


def ask(
    model: ServedModel,
    method: str,
    path: str,
    options: ServerOptions | None = None,
    engine: FakeEngine | None = None,
    **request: Any,
) -> httpx.Response:
    async def go() -> httpx.Response:
        async with api_client(create_app(engine or FakeEngine(), model, options)) as client:
            return await client.request(method, path, **request)

    return asyncio.run(go())


def refused(reply: httpx.Response, status: int, code: str) -> None:
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["code"] == code
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert reply.headers["x-request-id"]


def test_health_alone_is_public(model: ServedModel) -> None:
    app = create_app(FakeEngine(), model, KEYED)
    assert {*ROUTES, *ANTHROPIC, ("GET", "/health")} == {
        (method, route.path.replace("{name:path}", "fake")) for route in app.routes for method in route.methods - {"HEAD"}
    }  # type: ignore[attr-defined]
    for method, path in ANTHROPIC:
        assert ask(model, method, path, KEYED, json={}).json()["error"]["type"] == "authentication_error"
    assert ask(model, "GET", "/health", KEYED).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *ROUTES,
        ("GET", "/nowhere"),
        ("OPTIONS", "/v1/models"),
        ("HEAD", "/v1/models"),
        ("GET", "//health"),
        ("GET", "/health/"),
        ("GET", "/%2fhealth"),
        ("GET", "/HEALTH"),
        ("GET", "/health/../v1/models"),
    ],
)
@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer ", "secret-key", "Basic secret-key", "Bearer secret-ke", "Bearer schlüssel"]
)
def test_without_the_key_every_path_is_closed(model: ServedModel, method: str, path: str, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header.encode()}
    reply = ask(model, method, path, KEYED, headers=headers)
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", ["secret-key", "second"])
def test_any_of_the_keys_opens(model: ServedModel, key: str) -> None:
    assert (
        ask(model, "POST", "/v1/completions", KEYED, json=BODY, headers={"authorization": f"Bearer {key}"}).status_code == 200
    )


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:8000", "127.0.0.53", "[::1]:8000", "[::1]", "LOCALHOST:1"]
)
def test_loopback_names_are_hosts(model: ServedModel, host: str) -> None:
    assert ask(model, "GET", "/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "10.0.0.1",
        "0.0.0.0",
        "localhost/x",
        "localhost?x",
        "localhost@evil.example",
        "",
        "localhost, evil.example",
        "localhost:80x",
        "[::2]",
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/nowhere"])
def test_other_hosts_are_refused_on_a_loopback_bind(model: ServedModel, host: str, path: str) -> None:
    refused(ask(model, "GET", path, headers={"host": host}), 403, "host_not_allowed")


def test_an_allowed_host_is_accepted(model: ServedModel) -> None:
    options = ServerOptions(allowed_hosts=("box.lan",))
    assert ask(model, "GET", "/v1/models", options, headers={"host": "box.lan:8000"}).status_code == 200


def test_any_host_is_accepted_beyond_loopback_where_the_key_guards(model: ServedModel) -> None:
    headers = {"host": "box.lan", "authorization": "Bearer second"}
    assert ask(model, "GET", "/v1/models", KEYED, headers=headers).status_code == 200


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1:8000", "https://localhost", "http://[::1]:5173"])
def test_pages_of_this_machine_may_call(model: ServedModel, origin: str) -> None:
    reply = ask(model, "POST", "/v1/completions", json=BODY, headers={"origin": origin})
    assert reply.status_code == 200
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "https://localhost.evil.example"},
        {"origin": "file://"},
        {"origin": "http://[oops"},
        {"origin": ""},
        {"sec-fetch-site": "cross-site"},
    ],
)
def test_pages_of_other_sites_may_not(model: ServedModel, headers: dict[str, str]) -> None:
    refused(ask(model, "POST", "/v1/completions", json=BODY, headers=headers), 403, "origin_not_allowed")


def test_a_named_origin_gets_cors_headers_and_its_preflight(model: ServedModel) -> None:
    options = ServerOptions(allowed_origins=("https://chat.example",))
    reply = ask(model, "POST", "/v1/completions", options, json=BODY, headers={"origin": "https://chat.example"})
    assert reply.headers["access-control-allow-origin"] == "https://chat.example"
    preflight = ask(
        model,
        "OPTIONS",
        "/v1/completions",
        options,
        headers={"origin": "https://chat.example", "access-control-request-method": "POST"},
    )
    assert preflight.status_code == 200
    assert (
        ask(model, "POST", "/v1/completions", options, json=BODY, headers={"origin": "https://other.example"}).status_code
        == 403
    )


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonx",
        "text/json",
        "",
    ],
)
def test_posts_must_be_json(model: ServedModel, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    refused(ask(model, "POST", "/v1/completions", content=b'{"prompt":"a"}', headers=headers), 415, "unsupported_media_type")


def test_a_charset_beside_json_is_fine(model: ServedModel) -> None:
    reply = ask(
        model,
        "POST",
        "/v1/completions",
        content=b'{"prompt":"a","max_tokens":1}',
        headers={"content-type": "Application/JSON; charset=utf-8"},
    )
    assert reply.status_code == 200


def test_a_claimed_length_over_the_cap_is_refused_at_once(model: ServedModel) -> None:
    reply = ask(
        model,
        "POST",
        "/v1/completions",
        ServerOptions(max_body_bytes=100),
        content=b'{"prompt":"' + b"a" * 200 + b'"}',
        headers={"content-type": "application/json"},
    )
    refused(reply, 413, "body_too_large")
    assert reply.headers["connection"] == "close"


def test_a_streamed_body_is_counted_not_believed(model: ServedModel) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield b" " * 1000

    reply = ask(
        model,
        "POST",
        "/v1/completions",
        ServerOptions(max_body_bytes=5000),
        content=endless(),
        headers={"content-type": "application/json"},
    )
    refused(reply, 413, "body_too_large")
    assert sent < 20


def test_a_body_that_never_ends_is_a_timeout(model: ServedModel) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    reply = ask(
        model,
        "POST",
        "/v1/completions",
        ServerOptions(body_timeout=0.05),
        content=slow(),
        headers={"content-type": "application/json"},
    )
    refused(reply, 408, "body_timeout")


def test_giant_headers_are_refused(model: ServedModel) -> None:
    refused(ask(model, "GET", "/v1/models", headers={"x-big": "a" * 70_000}), 431, "headers_too_large")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/index.html", 404),
        ("GET", "/v1", 404),
        ("POST", "/v1/rerank", 404),
        ("GET", "/v1/models/", 200),
        ("GET", "/v1/models/nope", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models/fake", 405),
        ("POST", "/health", 405),
        ("GET", "/docs", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
    ],
)
def test_unknown_paths_and_methods_are_json_errors(model: ServedModel, method: str, path: str, status: int) -> None:
    reply = ask(model, method, path, json={}) if method == "POST" else ask(model, method, path)
    assert reply.status_code == status
    if status != 200:
        assert reply.json()["error"]["message"]


def test_an_unknown_model_gets_one_answer_whatever_it_is(model: ServedModel) -> None:
    for name in ("nope", "../../etc/passwd", "/etc/passwd", "fake\x00", "FAKE", "x" * 5000):
        reply = ask(model, "POST", "/v1/completions", json={**BODY, "model": name})
        refused(reply, 404, "model_not_found")
        assert reply.json()["error"]["param"] == "model"


def test_every_name_of_the_model_is_served(model: ServedModel) -> None:
    for name in ("fake", "alias", None, ""):
        assert ask(model, "POST", "/v1/completions", json={**BODY, "model": name}).json()["model"] == (name or "fake")


def test_models_tell_the_window_under_every_name_clients_read(model: ServedModel) -> None:
    card = ask(model, "GET", "/v1/models").json()["data"][0]
    assert {card[name] for name in ("max_model_len", "context_length", "context_window", "max_input_tokens")} == {4096}
    assert card["meta"]["n_ctx"] == 4096
    assert ask(model, "GET", "/v1/models/alias").json()["id"] == "alias"


@pytest.mark.parametrize("state", ["starting", "restarting", "dead", "draining"])
def test_health_and_requests_say_when_the_engine_is_not_ready(model: ServedModel, state: Any) -> None:
    engine = FakeEngine(state=state)
    assert ask(model, "GET", "/health", engine=engine).status_code == 503
    assert ask(model, "GET", "/health", engine=engine).json()["status"] == state
    reply = ask(model, "POST", "/v1/completions", engine=engine, json=BODY)
    assert reply.status_code == 503
    assert ("retry-after" in reply.headers) == (state != "dead")


def test_a_fault_of_ours_tells_an_id_and_nothing_else(model: ServedModel) -> None:
    class Broken(FakeEngine):
        def stats(self) -> Any:
            raise RuntimeError("secret detail")

    reply = ask(model, "GET", "/metrics", engine=Broken())
    assert reply.status_code == 500
    assert "secret" not in reply.text
    assert reply.json()["error"]["message"].startswith("internal error")


def test_metrics_carry_vllms_names_with_our_prefix(model: ServedModel) -> None:
    async def go() -> str:
        async with api_client(create_app(FakeEngine(num_cached_tokens=1), model)) as client:
            await client.post("/v1/completions", json={"prompt": "hello world", "max_tokens": 3, "n": 2})
            await client.post("/v1/completions", json={"prompt": "a", "temperature": -1})
            return (await client.get("/metrics")).text

    text = asyncio.run(go())
    labels = 'engine="0",model_name="fake"'
    for line in (
        f"ws:num_requests_running{{{labels}}} 0.0",
        f"ws:kv_cache_usage_perc{{{labels}}} 0.125",
        f"ws:prefix_cache_hits_total{{{labels}}} 4.0",
        'ws:request_success_total{engine="0",finished_reason="length",model_name="fake"} 1.0',
        f"ws:time_to_first_token_seconds_count{{{labels}}} 1.0",
        f"ws:inter_token_latency_seconds_count{{{labels}}} 4.0",
        f"ws:request_generation_tokens_sum{{{labels}}} 6.0",
        f"ws:request_prompt_tokens_sum{{{labels}}} 2.0",
        f"ws:e2e_request_latency_seconds_count{{{labels}}} 1.0",
        f"ws:request_prefill_kv_computed_tokens_sum{{{labels}}} 1.0",
        f"ws:request_params_n_sum{{{labels}}} 2.0",
        f"ws:request_params_max_tokens_sum{{{labels}}} 3.0",
    ):
        assert line in text, line
    assert 'reason="invalid"} 1.0' in text


def test_two_apps_have_metrics_of_their_own(model: ServedModel) -> None:
    create_app(FakeEngine(), model)
    assert "time_to_first_token_seconds_count" in ask(model, "GET", "/metrics").text
