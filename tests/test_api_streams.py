"""Streams and disconnects: raw ASGI for the edges, a real server and the real `openai` client for the whole."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import openai
import pytest
import uvicorn
from fakes import FakeEngine, served_model, write_byte_level_folder

from workstation.engine.request import EngineRequest
from workstation.errors import EngineDeadError
from workstation.server.app import create_app
from workstation.server.options import ServedModel, ServerOptions
from workstation.server.protocol import limited_protocol
from workstation.text.tokenizer import Tokenizer

HI = [{"role": "user", "content": "hello world"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served_model(write_byte_level_folder(tmp_path_factory.mktemp("streams")))


class Client:
    """One HTTP exchange on the ASGI app, with the client's moves in the test's hands."""

    def __init__(self, app: Any, body: dict[str, Any], path: str = "/v1/chat/completions", method: str = "POST") -> None:
        self.sent: list[dict[str, Any]] = []
        self.leave = asyncio.Event()
        self.stall = asyncio.Event()
        self.stall.set()
        self._body: bytes | None = json.dumps(body).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.stall.wait()
        self.sent.append(message)

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    async def until(self, check: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not check():
                await asyncio.sleep(0.002)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", [1, 3])
def test_a_client_that_leaves_aborts_its_requests(model: ServedModel, stream: bool, prompts: int) -> None:
    async def go() -> None:
        engine = FakeEngine(delay=0.005)
        body = {"prompt": ["hello world"] * prompts, "max_tokens": 4000, "stream": stream}
        client = Client(create_app(engine, model), body, "/v1/completions")
        await client.until(lambda: len(engine.active) == prompts)
        await asyncio.sleep(0.03)
        client.leave.set()
        await client.until(client.task.done)
        assert not engine.active
        assert sorted(engine.aborted) == sorted(request.request_id for request in engine.seen)

    asyncio.run(go())


def test_a_client_that_leaves_before_the_first_token_aborts_too(model: ServedModel) -> None:
    async def go() -> None:
        engine = FakeEngine(first_delay=30)
        client = Client(create_app(engine, model), {"messages": HI, "stream": True})
        await client.until(lambda: bool(engine.active))
        client.leave.set()
        await client.until(client.task.done)
        assert engine.aborted == [engine.seen[0].request_id]

    asyncio.run(go())


def test_a_silent_stream_gets_headers_and_comments(model: ServedModel) -> None:
    async def go() -> None:
        engine = FakeEngine(first_delay=0.3)
        options = ServerOptions(first_byte_seconds=0.02, keep_alive_seconds=0.05)
        client = Client(create_app(engine, model, options), {"messages": HI, "stream": True, "max_tokens": 2})
        await client.until(lambda: client.status == 200)
        assert "data:" not in client.text
        await client.until(client.task.done)
        assert client.text.count(": keep-alive\n\n") >= 2
        assert client.text.endswith("data: [DONE]\n\n")

    asyncio.run(go())


def test_a_client_that_stops_reading_is_dropped(model: ServedModel) -> None:
    async def go() -> None:
        engine = FakeEngine(delay=0.001)
        options = ServerOptions(write_timeout=0.1, keep_alive_seconds=0.05)
        client = Client(create_app(engine, model, options), {"messages": HI, "stream": True})
        await client.until(lambda: len(client.sent) > 3)
        client.stall.clear()
        await client.until(client.task.done)
        assert engine.aborted == [engine.seen[0].request_id]

    asyncio.run(go())


@pytest.mark.parametrize(
    ("engine", "code"), [(FakeEngine(fail_after=3), "engine_dead"), (FakeEngine(error_after=3), "engine_error")]
)
def test_a_stream_that_breaks_says_so(model: ServedModel, engine: FakeEngine, code: str) -> None:
    async def go() -> str:
        client = Client(create_app(engine, model), {"messages": HI, "stream": True})
        await client.until(client.task.done)
        assert client.status == 200
        assert client.sent[-1]["more_body"] is False
        return client.text

    events = [line.removeprefix("data: ") for line in asyncio.run(go()).split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == code
    assert "choices" in json.loads(events[-3])


@pytest.mark.parametrize(("engine", "status"), [(FakeEngine(fail_after=0), 503), (FakeEngine(error_after=0), 500)])
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_is_an_http_error(
    model: ServedModel, engine: FakeEngine, status: int, stream: bool
) -> None:
    async def go() -> None:
        client = Client(create_app(engine, model), {"messages": HI, "stream": stream})
        await client.until(client.task.done)
        assert client.status == status
        assert "error" in json.loads(client.text)

    asyncio.run(go())


@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_tells_everyone_in_flight(model: ServedModel, stream: bool) -> None:
    async def go() -> None:
        engine = FakeEngine(delay=0.005)
        app = create_app(engine, model)
        client = Client(app, {"messages": HI, "stream": stream})
        await client.until(lambda: bool(client.sent) if stream else bool(engine.active))
        app.state.api.gate.drain()
        refused = Client(app, {"messages": HI, "stream": stream})
        await refused.until(refused.task.done)
        assert refused.status == 503
        app.state.api.gate.cut(EngineDeadError("over"))
        await asyncio.wait_for(app.state.api.gate.empty(), 5)
        await client.until(client.task.done)
        assert '"message":"over"' in client.text
        assert client.text.endswith("data: [DONE]\n\n") == stream
        assert not engine.active

    asyncio.run(go())


def test_who_comes_after_the_cut_is_told_the_same(model: ServedModel) -> None:
    async def go() -> None:
        app = create_app(FakeEngine(), model)
        app.state.api.gate.cut(EngineDeadError("over"))
        for stream in (False, True):
            client = Client(app, {"messages": HI, "stream": stream})
            await client.until(client.task.done)
            assert (client.status, "over" in client.text) == (503, True)

    asyncio.run(go())


def test_others_are_answered_while_a_huge_prompt_is_tokenised(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    answered, encode = threading.Event(), Tokenizer.encode
    waits: list[bool] = []

    def slow(self: Tokenizer, text: str, **options: Any) -> list[int]:
        waits.append(answered.wait(20))  # on the event loop nobody could be answered meanwhile
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", slow)

    async def go() -> None:
        app = create_app(FakeEngine(window=100_000), model)
        huge = Client(app, {"prompt": "ab" * 390_000, "max_tokens": 1}, "/v1/completions")
        while not waits and not huge.task.done():
            health = Client(app, {}, "/health", "GET")
            await health.task
            assert health.status == 200
            answered.set()
        await huge.task
        assert huge.status == 400 and waits == [True]  # too long for the window, found out only by tokenising

    asyncio.run(go())


@contextmanager
def real_server(app: Any, options: ServerOptions | None = None) -> Iterator[str]:
    """uvicorn on a free port, in a thread; yields the base URL."""
    options = options or ServerOptions()
    sock = socket.create_server(("127.0.0.1", 0))
    protocol = limited_protocol(options.max_header_bytes, options.header_timeout)
    server = uvicorn.Server(uvicorn.Config(app, http=protocol, ws="none", log_level="critical", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(15)
        sock.close()


def test_two_hundred_streams_of_the_openai_client_all_finish(model: ServedModel) -> None:
    words = "one two three four five six seven eight"

    def reply(request: EngineRequest, index: int) -> list[int]:
        return [*model.tokenizer.encode(words), model.eos_token_ids[0]]

    engine = FakeEngine(reply=reply, delay=0.002)

    async def one(client: openai.AsyncOpenAI, number: int) -> tuple[str, str | None, int]:
        text, reason, usage = "", None, 0
        stream = await client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": f"number {number}"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
            if chunk.usage is not None:
                usage = chunk.usage.completion_tokens
        return text, reason, usage

    async def all_of_them(url: str) -> list[tuple[str, str | None, int]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(one(client, number) for number in range(200)))

    with real_server(create_app(engine, model)) as url:
        results = asyncio.run(all_of_them(url))
    expected = (words, "stop", len(model.tokenizer.encode(words)) + 1)
    assert results == [expected] * 200
    assert not engine.active
    assert engine.aborted == []


def test_the_openai_client_understands_answers_errors_and_models(model: ServedModel) -> None:
    engine = FakeEngine(num_cached_tokens=2)
    with (
        real_server(create_app(engine, model)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        answer = client.chat.completions.create(model="fake", messages=HI, max_tokens=4, logprobs=True, top_logprobs=1)  # type: ignore[arg-type]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 2
        assert answer.choices[0].logprobs is not None
        legacy = client.completions.create(model="fake", prompt="hello world", max_tokens=3, echo=True)
        assert legacy.choices[0].text.startswith("hello world")
        assert [card.id for card in client.models.list()] == ["fake", "alias"]
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model="fake", messages=HI, temperature=9999)  # type: ignore[arg-type]
        assert bad.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="nope", messages=HI)  # type: ignore[arg-type]
        engine.fail_after = 2
        with pytest.raises(openai.APIError, match="engine process died"):
            list(client.chat.completions.create(model="fake", messages=HI, stream=True))  # type: ignore[arg-type]


def test_closing_the_openai_stream_aborts_the_request(model: ServedModel) -> None:
    engine = FakeEngine(delay=0.005)
    with (
        real_server(create_app(engine, model)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(model="fake", messages=HI, stream=True, max_tokens=4000)  # type: ignore[arg-type]
        next(iter(stream))
        stream.close()
        deadline = time.monotonic() + 30
        while engine.active and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.aborted == [engine.seen[0].request_id]


def _raw(url: str, *pieces: bytes, wait: float = 0.0) -> bytes:
    """Send pieces on a socket and read until the server closes."""
    host, port = url.removeprefix("http://").split(":")
    with closing(socket.create_connection((host, int(port)), timeout=10)) as sock:
        try:
            for piece in pieces:
                sock.sendall(piece)
                time.sleep(wait)
        except (BrokenPipeError, ConnectionResetError):
            pass
        out = b""
        try:
            while chunk := sock.recv(65536):
                out += chunk
        except ConnectionResetError:
            pass
        return out


def test_an_endless_header_is_cut_off(model: ServedModel) -> None:
    with real_server(create_app(FakeEngine(), model)) as url:
        out = _raw(url, b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: ", *[b"a" * 50_000] * 8, wait=0.01)
        assert out == b"" or b"431" in out.split(b"\r\n")[0]
        assert b"200 OK" not in out


def test_headers_that_never_come_close_the_connection(model: ServedModel) -> None:
    options = ServerOptions(header_timeout=0.2)
    with real_server(create_app(FakeEngine(), model, options), options) as url:
        assert _raw(url, b"GET /health HTTP/1.1\r\nhost: loc") == b""
        assert _raw(url) == b""
        assert b"200 OK" in _raw(url, b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")


def test_a_websocket_finds_no_door(model: ServedModel) -> None:
    request = (
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade, close\r\nupgrade: websocket\r\n"
        b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\nsec-websocket-version: 13\r\n\r\n"
    )
    with real_server(create_app(FakeEngine(), model, ServerOptions(host="0.0.0.0", api_keys=("k",)))) as url:
        assert b"101" not in _raw(url, request).split(b"\r\n")[0]
