"""Finished responses, kept in memory so that a conversation can go on from them; bounded in number and bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workstation.errors import InvalidRequestError
from workstation.server import wire
from workstation.server.body import show
from workstation.server.errors import HTTPRequestError

MAX_RESPONSES = 512
MAX_BYTES = 64 * 1024 * 1024


@dataclass(slots=True)
class _Kept:
    response: dict[str, Any]
    messages: list[dict[str, Any]]
    size: int


class ResponseStore:
    """The newest responses by id. The ones not used for longest go first.

    Args:
        max_responses, max_bytes: the bound. A response larger than it all is not kept.
    """

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._running: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[], None]]] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def begin(self, response_id: str, show_it: Callable[[], dict[str, Any]], cancel: Callable[[], None]) -> None:
        """A response is being made: how to look at it, and how to end it."""
        self._running[response_id] = (show_it, cancel)

    def end(self, response_id: str) -> None:
        self._running.pop(response_id, None)

    def keep(self, response: dict[str, Any], messages: list[dict[str, Any]]) -> None:
        """Keep a finished response and the conversation up to it."""
        size = len(wire.encode(response)) + len(wire.encode(messages))
        if size > self._max_bytes:
            return
        self._kept[response["id"]] = _Kept(response, messages, size)
        self.bytes += size
        while len(self._kept) > self._max_responses or self.bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.bytes -= oldest.size

    def conversation(self, response_id: str) -> list[dict[str, Any]]:
        """The messages that end with a response. Raises InvalidRequestError when it is not kept."""
        found = self._kept.get(response_id)
        if found is None:
            raise InvalidRequestError(f"previous_response_id: no response {show(response_id)} is kept here; send its items as "
                                      "input", param="previous_response_id")
        self._kept.move_to_end(response_id)
        return found.messages

    def get(self, response_id: str) -> dict[str, Any]:
        """A response, finished or not. Raises HTTPRequestError 404."""
        if response_id in self._running:
            return self._running[response_id][0]()
        if response_id not in self._kept:
            raise _unknown(response_id)
        return self._kept[response_id].response

    def cancel(self, response_id: str) -> dict[str, Any]:
        """End a response that is being made; a finished one is left as it is. Raises HTTPRequestError 404."""
        running = self._running.get(response_id)
        if running is None:
            return self.get(response_id)
        running[1]()
        return {**running[0](), "status": "cancelled"}

    def delete(self, response_id: str) -> dict[str, Any]:
        """Forget a finished response. Raises HTTPRequestError 404."""
        found = self._kept.pop(response_id, None)
        if found is None:
            raise _unknown(response_id)
        self.bytes -= found.size
        return {"id": response_id, "object": "response", "deleted": True}


def _unknown(response_id: str) -> HTTPRequestError:
    return HTTPRequestError(404, "response_not_found", f"no response {show(response_id)} is kept here")
