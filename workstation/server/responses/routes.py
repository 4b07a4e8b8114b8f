"""The routes of /v1/responses: create, look, cancel, forget."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from workstation.errors import ContextLengthError
from workstation.server import prepare, wire
from workstation.server.body import validate
from workstation.server.job import Job
from workstation.server.responses.incoming import Turn, prepare_response
from workstation.server.responses.outgoing import ResponseWriter, refused_stream, response_object
from workstation.server.responses.schema import HARMLESS, REFUSED, ResponsesRequest
from workstation.server.responses.store import ResponseStore

if TYPE_CHECKING:
    from workstation.server.app import Api


class ResponsesRoutes:
    """Handlers that share one store. `api` runs the generations, as it does for every dialect."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self.store = ResponseStore()

    async def create(self, request: Request) -> Response:
        turns: list[Turn] = []
        bodies: list[ResponsesRequest] = []

        def prepared(payload: dict[str, Any]) -> Job:
            bodies.append(validate(payload, ResponsesRequest, harmless=HARMLESS, refused=REFUSED))
            turns.append(prepare_response(self._api.service, self.store, bodies[0], request.headers.get("x-client", "")))
            return turns[0].job

        try:
            generation = await self._api.generation(request, prepared)
        except ContextLengthError as error:
            if not bodies or not bodies[0].stream:
                raise
            return self._api.stream(self._refused(bodies[0], error))
        writer = ResponseWriter(generation, turns[0], self.store)
        if generation.job.stream:
            return self._api.stream(writer.events(), writer)
        return await self._api.whole(request, writer.whole(), generation.job)

    async def _refused(self, body: ResponsesRequest, error: ContextLengthError) -> AsyncGenerator[bytes, None]:
        response = response_object(prepare.new_id("resp_"), int(time.time()), self._api.service.model.name, body)
        yield refused_stream(response, error)

    async def retrieve(self, request: Request) -> Response:
        return _json(self.store.get(request.path_params["response_id"]))

    async def cancel(self, request: Request) -> Response:
        return _json(self.store.cancel(request.path_params["response_id"]))

    async def delete(self, request: Request) -> Response:
        return _json(self.store.delete(request.path_params["response_id"]))


def _json(value: Any) -> Response:
    return Response(wire.encode(value), media_type="application/json")
