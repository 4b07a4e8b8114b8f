"""`ws chat` and `ws generate` against an answering machine in place of a server."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from commands import main_ends

from workstation.cli.chat import Conversation, first_model, repl
from workstation.cli.servers import bearer, root_of
from workstation.errors import StartupError


def sse(*chunks: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


class FakeServer:
    """Answers chat requests with prepared streams and keeps the bodies."""

    def __init__(self, *answers: httpx.Response) -> None:
        self.answers, self.bodies = list(answers), list[dict[str, Any]]()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        self.bodies.append(json.loads(request.content))
        return self.answers.pop(0)


def talk_to(server: FakeServer, **options: Any) -> Conversation:
    return Conversation(httpx.Client(transport=httpx.MockTransport(server), base_url="http://test"), "m", options)


def test_an_answer_is_written_as_it_comes_and_the_next_turn_carries_it() -> None:
    greeting, sum_ = sse(piece("Hel"), piece("lo"), {"choices": []}), sse(piece("4"))
    server = FakeServer(httpx.Response(200, content=greeting), httpx.Response(200, content=sum_))
    talk, out = talk_to(server, temperature=0), io.StringIO()
    talk.set_system("Be brief.")
    talk.say("hi", out)
    talk.say("2+2?", out)
    assert out.getvalue() == "Hello\n4\n"
    assert [turn["content"] for turn in server.bodies[1]["messages"]] == ["Be brief.", "hi", "Hello", "2+2?"]
    assert server.bodies[0]["stream"] is True and server.bodies[0]["temperature"] == 0


def test_the_servers_refusal_is_shown_and_the_turn_taken_back() -> None:
    talk = talk_to(FakeServer(httpx.Response(400, json={"error": {"message": "too long"}})))
    with pytest.raises(StartupError, match="400: too long"):
        talk.say("hi", io.StringIO())
    assert talk.messages == []


def test_an_error_event_in_the_stream_is_an_error() -> None:
    broken = sse(piece("half"), {"error": {"message": "the engine died"}})
    talk = talk_to(FakeServer(httpx.Response(200, content=broken)))
    with pytest.raises(StartupError, match="the engine died"):
        talk.say("hi", io.StringIO())


class Interrupted(httpx.SyncByteStream):
    """A stream during which somebody presses Ctrl-C; knows whether it was closed."""

    closed = False

    def __iter__(self) -> Iterator[bytes]:
        yield b"data: " + json.dumps(piece("half")).encode() + b"\n\n"
        raise KeyboardInterrupt

    def close(self) -> None:
        self.closed = True


def test_ctrl_c_stops_the_answer_closes_the_stream_and_keeps_the_half() -> None:
    stream = Interrupted()
    talk, out = talk_to(FakeServer(httpx.Response(200, stream=stream))), io.StringIO()
    talk.say("hi", out)
    assert stream.closed
    assert out.getvalue() == "half [stopped]\n"
    assert talk.messages[-1] == {"role": "assistant", "content": "half"}


def test_the_conversation_goes_on_after_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = httpx.Response(503, json={"error": {"message": "busy"}})
    talk = talk_to(FakeServer(refused, httpx.Response(200, content=sse(piece("yes")))))
    lines = iter(["one", "/system Be kind.", "/what", "two", "/reset", "", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    repl(talk)
    said = capsys.readouterr()
    assert "503: busy" in said.err and "/reset forgets" in said.err
    assert said.out == "yes\n"
    assert talk.messages == [{"role": "system", "content": "Be kind."}]


def test_generate_asks_a_server_when_one_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bodies: list[dict[str, Any]] = []

    def post(url: str, *, json: dict[str, Any], headers: dict[str, str], timeout: float) -> httpx.Response:
        bodies.append({"url": url, **json, **headers})
        choice = {"text": "raw"} if url.endswith("/v1/completions") else {"message": {"content": "chat"}}
        return httpx.Response(200, json={"choices": [choice]})

    monkeypatch.setattr(httpx, "post", post)
    main_ends("generate", "m", "hi", "--url", "http://h:1/v1", "--api-key", "k", "--seed", "3", "--system", "s")
    main_ends("generate", "m", "hi", "--url", "http://h:1", "--raw", "--max-tokens", "5")
    assert capsys.readouterr().out == "chat\nraw\n"
    assert [turn["role"] for turn in bodies[0]["messages"]] == ["system", "user"]
    assert (bodies[0]["seed"], bodies[0]["Authorization"], "temperature" in bodies[0]) == (3, "Bearer k", False)
    assert (bodies[1]["prompt"], bodies[1]["max_tokens"]) == ("hi", 5)


def test_the_model_is_the_servers_first_one() -> None:
    assert first_model(talk_to(FakeServer()).client) == "m"


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_a_url_is_the_servers_root_whatever_was_typed(url: str) -> None:
    assert root_of(url) == "http://h:1"


def test_of_several_keys_a_client_sends_the_first() -> None:
    assert bearer("a, b") == {"Authorization": "Bearer a"}
    assert bearer(None) == {}
