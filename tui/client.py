"""The only place with URLs: frames, details, blocks, the log and aborts of one server, over HTTP."""

from __future__ import annotations

from typing import Any, Protocol
from urllib.parse import quote

import httpx

from workstation.tui.frame import BadAnswerError, Frame, clean, parse, read
from workstation.tui.shapes import BlocksAnswer, CardsAnswer, DetailsAnswer, LogAnswer

TIMEOUT = httpx.Timeout(3.0, read=5.0)


class Source(Protocol):
    """Where frames come from: a server, or a recording. Everything raises BadAnswerError with one line for the user."""

    url: str

    async def frame(self, cells: int, heat: bool = False) -> Frame: ...

    async def details(self, request_id: str) -> dict[str, Any]: ...

    async def blocks(self, first: int, last: int) -> dict[str, Any]: ...

    async def cards(self) -> dict[str, Any]: ...

    async def log(self, lines: int) -> list[dict[str, Any]]: ...

    async def abort(self, request_id: str) -> None: ...


class Recorder(Protocol):
    """Takes every frame's body."""

    def write(self, body: bytes) -> None: ...


class Client:
    """Talks to one server.

    Args:
        url: the server's root.  api_key: sent as a bearer token.  recorder: given every frame.  transport: for tests.
    Raises:
        BadAnswerError: the URL is malformed.
    """

    def __init__(self, url: str, api_key: str | None = None, *, recorder: Recorder | None = None,
                 transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.url = url
        self._recorder = recorder
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            # Plain http needs no certificates, and loading them would cost a tenth of a second.
            self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT, transport=transport,
                                           verify=url.startswith("https://"))
        except httpx.InvalidURL as error:
            raise BadAnswerError(f"{clean(url)} is not a URL: {clean(error)}") from None
        except UnicodeEncodeError:
            raise BadAnswerError("the API key holds characters that no header may hold") from None

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

    async def log(self, lines: int) -> list[dict[str, Any]]:
        """The log's newest lines, oldest first."""
        found: list[dict[str, Any]] = (await self._answer(f"/stats/log?lines={lines}", LogAnswer))["lines"]
        return found

    async def abort(self, request_id: str) -> None:
        """End a request."""
        await self._body("POST", f"/stats/requests/{quote(request_id, safe='')}/abort")

    async def close(self) -> None:
        await self._http.aclose()

    async def _answer(self, path: str, shape: Any) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = read(await self._body("GET", path), shape)
        except ValueError:
            raise BadAnswerError(f"{self.url} sent something else than {path.partition('?')[0]} promises") from None
        return answer

    async def _body(self, method: str, path: str) -> bytes:
        try:
            answer = await self._http.request(method, path, json={} if method == "POST" else None)
        except httpx.TimeoutException:
            raise BadAnswerError(f"{self.url} does not answer in time") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise BadAnswerError(f"no server answers at {self.url}: {clean(error) or type(error).__name__}") from None
        if answer.status_code == 200:
            return answer.content
        raise BadAnswerError(complaint(self.url, path, answer))


def complaint(url: str, path: str, answer: httpx.Response) -> str:
    """One line for an answer that is not a success."""
    if answer.status_code == 401:
        return f"{url} wants another API key (--api-key or WS_API_KEY)"
    if answer.status_code == 404 and path.startswith("/stats?"):
        return f"{url} has no /stats: not a ws server, or an old one"
    try:
        said = clean(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = clean(answer.text)[:80]
    return f"{url} answered {answer.status_code}: {said}"
