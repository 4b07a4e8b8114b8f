"""The only place with URLs: frames, details, blocks, the log and aborts of one server, over HTTP."""

from __future__ import annotations

import json
from typing import Any, Protocol
from urllib.parse import quote

from workstation.tui.frame import BadAnswerError, Frame, clean, parse, read
from workstation.tui.http import Answer, Connections, HTTPFault
from workstation.tui.shapes import BlocksAnswer, CardsAnswer, DetailsAnswer, LogAnswer


class Source(Protocol):
    """Where frames come from: a server, or a recording. Everything raises BadAnswerError with one line for the user."""

    url: str

    async def frame(self, cells: int, heat: bool = False) -> Frame: ...

    async def details(self, request_id: str) -> dict[str, Any]: ...

    async def blocks(self, first: int, last: int) -> dict[str, Any]: ...

    async def cards(self) -> dict[str, Any]: ...

    async def log(self, lines: int, level: str = "info") -> list[dict[str, Any]]: ...

    async def abort(self, request_id: str) -> None: ...


class Recorder(Protocol):
    """Takes every frame's body."""

    def write(self, body: bytes) -> None: ...


class Door(Protocol):
    """What carries requests: Connections, or a test's stand-in."""

    async def request(self, method: str, path: str, body: bytes = b"") -> Answer: ...

    async def close(self) -> None: ...


class Client:
    """Talks to one server.

    Args:
        url: the server's root.  api_key: sent as a bearer token.  recorder: given every frame.  door: for tests.
    Raises:
        BadAnswerError: the URL is malformed.
    """

    def __init__(self, url: str, api_key: str | None = None, *, recorder: Recorder | None = None,
                 door: Door | None = None) -> None:
        self.url = url
        self._recorder = recorder
        try:
            self._door = door or Connections(url, {"Authorization": f"Bearer {api_key}"} if api_key else {})
        except HTTPFault as error:
            raise BadAnswerError(f"{clean(url)} is not a URL that can be asked: {clean(error)}") from None

    async def frame(self, cells: int, heat: bool = False) -> Frame:
        """The newest frame."""
        body = await self._body("GET", f"/stats?cells={cells}{'&heat=1' if heat else ''}")
        frame = parse(body)
        if self._recorder is not None:
            self._recorder.write(body)
        return frame

    async def details(self, request_id: str) -> dict[str, Any]:
        """A live request's details."""
        return await self._answer(f"/stats/requests/{quote(request_id, safe='')}", DetailsAnswer)

    async def blocks(self, first: int, last: int) -> dict[str, Any]:
        """Single blocks."""
        return await self._answer(f"/stats/blocks?from={first}&to={last}", BlocksAnswer)

    async def cards(self) -> dict[str, Any]:
        """The machine's cards and the processes on the engine's."""
        return await self._answer("/stats/gpu", CardsAnswer)

    async def log(self, lines: int, level: str = "info") -> list[dict[str, Any]]:
        """The log's newest lines of a level and graver, oldest first."""
        found: list[dict[str, Any]] = (await self._answer(f"/stats/log?lines={lines}&level={level}", LogAnswer))["lines"]
        return found

    async def abort(self, request_id: str) -> None:
        """End a request."""
        await self._body("POST", f"/stats/requests/{quote(request_id, safe='')}/abort")

    async def close(self) -> None:
        await self._door.close()

    async def _answer(self, path: str, shape: Any) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = read(await self._body("GET", path), shape)
        except ValueError:
            raise BadAnswerError(f"{self.url} sent something else than {path.partition('?')[0]} promises") from None
        return answer

    async def _body(self, method: str, path: str) -> bytes:
        try:
            answer = await self._door.request(method, path, b"{}" if method == "POST" else b"")
        except TimeoutError:
            raise BadAnswerError(f"{self.url} does not answer in time") from None
        except HTTPFault as error:
            raise BadAnswerError(f"no server answers at {self.url}: {clean(error)}") from None
        if answer.status == 200:
            return answer.body
        raise BadAnswerError(complaint(self.url, path, answer))


def complaint(url: str, path: str, answer: Answer) -> str:
    """One line for an answer that is not a success."""
    if answer.status == 401:
        return f"{url} wants another API key (--api-key or WS_API_KEY)"
    if answer.status == 404 and path.startswith("/stats?"):
        return f"{url} has no /stats: not a ws server, or an old one"
    try:
        said = clean(json.loads(answer.body)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        said = clean(answer.body[:80].decode(errors="replace"))
    return f"{url} answered {answer.status}: {said}"
