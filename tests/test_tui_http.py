"""The dashboard's own HTTP: against a real socket that answers byte by byte, wrongly, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from workstation.tui import http
from workstation.tui.client import Client
from workstation.tui.frame import BadAnswerError
from workstation.tui.http import Answer, Connections, HTTPFault, reason

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def talk(handler: Handler, test: Callable[[Connections], Awaitable[None]], headers: dict[str, str] | None = None) -> None:
    async def main() -> None:
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        door = Connections(f"http://127.0.0.1:{port}", headers or {})
        try:
            await test(door)
        finally:
            await door.close()
            server.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def answering(*answers: bytes, requests: list[str] | None = None, opened: list[int] | None = None) -> Handler:
    """Each connection gives these answers to the requests that come over it, then closes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if opened is not None:
            opened.append(1)
        for answer in answers:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            if requests is not None:
                requests.append(head.decode())
            for byte in answer:
                writer.write(bytes([byte]))
            await writer.drain()
        writer.close()

    return handle


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


def test_a_body_of_known_length_comes_and_the_connection_is_used_again() -> None:
    opened: list[int] = []

    async def test(door: Connections) -> None:
        assert [await door.request("GET", "/a") for _ in range(3)] == [Answer(200, b"hi")] * 3

    talk(answering(OK, OK, OK, opened=opened), test)
    assert len(opened) == 1


def test_a_connection_that_was_closed_meanwhile_is_opened_again() -> None:
    opened: list[int] = []

    async def test(door: Connections) -> None:
        for _ in range(3):
            assert (await door.request("GET", "/a")).body == b"hi"
            await asyncio.sleep(0.02)

    talk(answering(OK, opened=opened), test)
    assert len(opened) == 3


def test_a_body_in_chunks_comes_whole() -> None:
    async def test(door: Connections) -> None:
        assert await door.request("GET", "/") == Answer(404, b"hello world")

    talk(answering(b"HTTP/1.1 404 No\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\n"), test)


def test_a_body_that_ends_with_its_connection_comes_whole() -> None:
    async def test(door: Connections) -> None:
        assert (await door.request("GET", "/")).body == b"all of it"

    talk(answering(b"HTTP/1.0 200 OK\r\n\r\nall of it"), test)


def test_the_key_and_the_host_are_sent_and_a_post_says_its_length() -> None:
    requests: list[str] = []

    async def test(door: Connections) -> None:
        await door.request("POST", "/stats/requests/a/abort", b"{}")

    talk(answering(OK, requests=requests), test, {"Authorization": "Bearer secret"})
    assert requests[0].startswith("POST /stats/requests/a/abort HTTP/1.1\r\nHost: 127.0.0.1:")
    assert "Authorization: Bearer secret\r\n" in requests[0] and "Content-Length: 2\r\n" in requests[0]


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Le",
                                    b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nshort", b"\x00" * 200_000,
                                    b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", b"",
                                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"])
def test_what_is_not_http_is_a_fault_in_words(answer: bytes) -> None:
    async def test(door: Connections) -> None:
        with pytest.raises(HTTPFault):
            await door.request("GET", "/")

    talk(answering(answer), test)


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "SECONDS", 0.05)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def test(door: Connections) -> None:
        with pytest.raises(TimeoutError):
            await door.request("GET", "/")

    talk(silent, test)


@pytest.mark.parametrize("url", ["http://[::bad", "http://h:x", "ftp://h", "http://", "http://h\r\nx"])
def test_a_url_that_cannot_be_asked_is_refused(url: str) -> None:
    with pytest.raises(BadAnswerError, match=r"is not a URL that can be asked|no server"):
        asyncio.run(Client(url).frame(4))


def test_a_key_that_no_header_may_hold_is_refused() -> None:
    for key in ("a\r\nx: y", "schlüssel"):
        with pytest.raises(HTTPFault, match="characters"):
            Connections("http://h", {"Authorization": f"Bearer {key}"})


@pytest.mark.parametrize(("error", "words"), [
    (OSError(111, "Connect call failed ('127.0.0.1', 8000)"), "Connection refused"),
    (OSError("Multiple exceptions: [Errno 111] Connect call failed ('::1', 8000, 0, 0), [Errno 111]"), "Connection refused"),
    (OSError(-2, "Name or service not known"), "Name or service not known"), (OSError(), "OSError"),
])  # fmt: skip
def test_a_connection_that_fails_says_why_in_two_words(error: OSError, words: str) -> None:
    assert reason(error) == words
