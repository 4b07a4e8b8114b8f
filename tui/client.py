"""The only place with URLs: frames, details and aborts of one server, over HTTP."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import httpx

from workstation.tui.frame import BadAnswerError, Frame, clean, parse, scrub

TIMEOUT = httpx.Timeout(3.0, read=5.0)


class Client:
    """Talks to one server.

    Args:
        url: the server's root.  api_key: sent as a bearer token.  transport: for tests.
    Raises:
        BadAnswerError: the URL is malformed.
    """

    def __init__(self, url: str, api_key: str | None = None, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.url = url
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            # Plain http needs no certificates, and loading them would cost a tenth of a second.
            self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT, transport=transport,
                                           verify=url.startswith("https://"))
        except httpx.InvalidURL as error:
            raise BadAnswerError(f"{clean(url)} is not a URL: {clean(error)}") from None

    async def frame(self, cells: int) -> Frame:
        """The newest frame. Raises BadAnswerError with one line that says what is wrong."""
        return parse(await self._body("GET", f"/stats?cells={cells}"))

    async def details(self, request_id: str) -> dict[str, Any]:
        """A live request's details. Raises BadAnswerError when it is gone."""
        answer: dict[str, Any] = scrub(json.loads(await self._body("GET", f"/stats/requests/{quote(request_id, safe='')}")))
        return answer

    async def abort(self, request_id: str) -> None:
        """End a request. Raises BadAnswerError when it is gone."""
        await self._body("POST", f"/stats/requests/{quote(request_id, safe='')}/abort")

    async def close(self) -> None:
        await self._http.aclose()

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
