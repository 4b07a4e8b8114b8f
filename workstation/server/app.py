"""`create_app`: the routes, wired to one engine and one model. No globals: everything hangs on the `Api` object."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from workstation import __version__
from workstation.engine.client import EngineClient
from workstation.engine.request import Grammar
from workstation.errors import InvalidRequestError, WorkstationError
from workstation.server import errors, openapi, wire
from workstation.server.anthropic import schema as anthropic
from workstation.server.anthropic.incoming import count_tokens, prepare_messages
from workstation.server.anthropic.outgoing import MessageStream, answer_message
from workstation.server.anthropic.schema import CountRequest, MessagesRequest
from workstation.server.body import parse_json, read_body, validate
from workstation.server.callers import guessed_name, history_key, own_name, route_name
from workstation.server.card import Card
from workstation.server.chat import prepare_chat
from workstation.server.chat_answer import answer_chat, stream_chat
from workstation.server.completions import answer_completion, prepare_completion, stream_completion
from workstation.server.embeddings import answer_embeddings, prepare_embeddings
from workstation.server.gate import ClientGone, Gate, until_disconnect
from workstation.server.generation import Generation
from workstation.server.grammar_check import GrammarCheck
from workstation.server.guard import Guard
from workstation.server.infill import (
    INFILL_HARMLESS,
    FimRequest,
    InfillRequest,
    answer_infill,
    prepare_fim,
    prepare_infill,
    stream_infill,
)
from workstation.server.job import Job
from workstation.server.log_book import LogBook
from workstation.server.metrics import Metrics
from workstation.server.options import ServedModel, ServerOptions
from workstation.server.prefix_history import PrefixHistory
from workstation.server.prepare import Service
from workstation.server.probes import Probes
from workstation.server.responses.routes import ResponsesRoutes
from workstation.server.schemas import (
    HARMLESS_FIELDS,
    REFUSED_IN_CHAT,
    REFUSED_IN_COMPLETIONS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from workstation.server.stats_desk import StatsDesk
from workstation.server.stats_routes import StatsRoutes
from workstation.server.streaming import EventStream, Voice
from workstation.server.tokenize import detokenize, tokenize

Result = TypeVar("Result")
SMALL_BODY_BYTES = 64 * 1024


class Api:
    """The routes' shared state and their handlers."""

    def __init__(self, engine: EngineClient, model: ServedModel, options: ServerOptions, book: LogBook) -> None:
        self.service = Service(engine, model, options)
        self.gate = Gate(engine)
        card = Card(engine)
        self.metrics = Metrics(engine, model.name, self.service.window, card, prefix=options.metrics_prefix)
        self.history = PrefixHistory(engine.info.block_size)
        decode = model.tokenizer.decode if options.show_text else None
        desk = StatsDesk(engine, model.name, self.metrics, self.gate, self.history, card, decode)
        self.stats = StatsRoutes(desk, Gate(engine), options, book)
        self.probes = Probes(self.service)
        self.responses = ResponsesRoutes(self)
        self.grammars = GrammarCheck(model.folder)
        self.pool = ThreadPoolExecutor(options.tokenizer_threads, thread_name_prefix="tokenise")

    async def close(self) -> None:
        """End the tokenising threads and the process that tries grammars."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        await self.grammars.close()

    def _check_open(self) -> None:
        """Asked before a body is read, and again after it was prepared: the server may have begun to drain meanwhile."""
        try:
            self.gate.check_open()
        except WorkstationError as error:
            self.metrics.reject(error)
            raise

    async def _prepared(self, request: Request, work: Callable[[dict[str, Any]], Result]) -> Result:
        """Parse, validate, render and tokenise.

        Off the event loop, so that one huge prompt delays nobody's tokens; but token ids in a body of ordinary size are ready
        before a thread would have woken up.
        """
        options = self.service.options
        body = await read_body(request, options)
        try:
            if len(body) > SMALL_BODY_BYTES:
                return await self._in_thread(lambda: work(parse_json(body, options.max_json_depth)))
            payload = parse_json(body, options.max_json_depth)
            return work(payload) if _holds_ids(payload) else await self._in_thread(lambda: work(payload))
        except WorkstationError as error:
            self.metrics.reject(error)
            raise

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self.pool, work)

    async def chat(self, request: Request) -> Response:
        def prepare(payload: dict[str, Any]) -> Job:
            body = validate(payload, ChatRequest, harmless=HARMLESS_FIELDS, refused=REFUSED_IN_CHAT)
            return prepare_chat(self.service, body, own_name(request))

        generation = await self.generation(request, prepare)
        if generation.job.stream:
            return self.stream(stream_chat(generation))
        return await self.whole(request, answer_chat(generation), generation.job)

    async def completions(self, request: Request) -> Response:
        def prepare(payload: dict[str, Any]) -> Job:
            body = validate(payload, CompletionRequest, harmless=HARMLESS_FIELDS, refused=REFUSED_IN_COMPLETIONS)
            return prepare_completion(self.service, body, own_name(request))

        generation = await self.generation(request, prepare)
        if generation.job.stream:
            return self.stream(stream_completion(generation))
        return await self.whole(request, answer_completion(generation), generation.job)

    async def fim(self, request: Request) -> Response:
        """Mistral answers in the shape of chat."""
        def prepare(payload: dict[str, Any]) -> Job:
            return prepare_fim(self.service, validate(payload, FimRequest, harmless=HARMLESS_FIELDS), own_name(request))

        generation = await self.generation(request, prepare)
        if generation.job.stream:
            return self.stream(stream_chat(generation))
        return await self.whole(request, answer_chat(generation), generation.job)

    async def infill(self, request: Request) -> Response:
        def prepare(payload: dict[str, Any]) -> Job:
            return prepare_infill(self.service, validate(payload, InfillRequest, harmless=INFILL_HARMLESS), own_name(request))

        generation = await self.generation(request, prepare)
        if generation.job.stream:
            return self.stream(stream_infill(generation))
        return await self.whole(request, answer_infill(generation), generation.job)

    async def embeddings(self, request: Request) -> Response:
        def prepare(payload: dict[str, Any]) -> tuple[Job, EmbeddingRequest]:
            body = validate(payload, EmbeddingRequest)
            return self._labelled(request, prepare_embeddings(self.service, body, own_name(request))), body

        self._check_open()
        job, body = await self._prepared(request, prepare)
        self._check_open()
        return await self.whole(request, answer_embeddings(self.service, self.metrics, job, body), job)

    async def messages(self, request: Request) -> Response:
        def prepare(payload: dict[str, Any]) -> Job:
            body = validate(payload, MessagesRequest, harmless=anthropic.HARMLESS, refused=anthropic.REFUSED)
            return prepare_messages(self.service, body, own_name(request))

        generation = await self.generation(request, prepare)
        if generation.job.stream:
            writer = MessageStream(generation)
            return self.stream(writer.events(), writer)
        return await self.whole(request, answer_message(generation), generation.job)

    async def count_tokens(self, request: Request) -> Response:
        def count(payload: dict[str, Any]) -> bytes:
            body = validate(payload, CountRequest, harmless=anthropic.COUNT_HARMLESS, refused=anthropic.REFUSED)
            return wire.encode(count_tokens(self.service, body))

        return _json(await self._prepared(request, count))

    async def generation(self, request: Request, prepare: Callable[[dict[str, Any]], Job]) -> Generation:
        """A request's body, checked and ready to run. Raises what can be refused."""
        self._check_open()
        if not self.service.model.generates:
            raise InvalidRequestError(f"{self.service.model.name} was saved without a head and makes embeddings only; use "
                                      "/v1/embeddings", param="model")
        job = await self._prepared(request, lambda payload: self._admitted(request, prepare(payload)))
        await self._constrain(job)
        self._check_open()
        return Generation(self.service.engine, job, self.service.model.tokenizer, self.metrics)

    async def _constrain(self, job: Job) -> None:
        """Give the engine the job's grammar, once that has been tried."""
        if job.constraint is None:
            return
        try:
            source = await self.grammars.approve(job.constraint, self.service.logits_width)
        except WorkstationError as error:
            self.metrics.reject(error)
            raise
        for item in job.requests:
            item.grammar = Grammar(source, job.constraint.matched)

    def _admitted(self, request: Request, job: Job) -> Job:
        """The job with what the dashboard wants to know: who asked, where, and why the prefix cache will miss."""
        self._labelled(request, job)
        self.history.admit(job, history_key(request, job.requests[0].label))
        return job

    def _labelled(self, request: Request, job: Job) -> Job:
        for item in job.requests:
            item.label = item.label or guessed_name(request)
            item.route = route_name(request.url.path)
        return job

    def stream(self, events: AsyncGenerator[bytes, None], voice: Voice | None = None) -> Response:
        return EventStream(events, self.gate, self.service.options, voice)

    async def whole(self, request: Request, work: Coroutine[Any, Any, bytes], job: Job) -> Response:
        """An answer in one piece."""
        try:
            answer = _json(await self.gate.run(work, until_disconnect(request.receive)))
        except ClientGone:
            return Response(status_code=499)  # nobody reads it; the log shows why
        if job.divergence is not None:
            answer.headers["x-ws-prefix"] = job.divergence.header()
        return answer

    async def models(self, request: Request) -> Response:
        return _json(wire.encode({"object": "list", "data": [self._card(name) for name in self.service.model.names],
                                  "models": []}))

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if not name:
            return await self.models(request)
        return _json(wire.encode(self._card(self.service.check_model(name))))

    def _card(self, name: str) -> dict[str, Any]:
        """Clients look for the window under six names, and some for whether the model is loaded and reads images."""
        model, window = self.service.model, self.service.window
        return {"id": name, "object": "model", "created": model.created, "owned_by": "ws", "root": model.root or model.name,
                "parent": None, "max_model_len": window, "context_length": window, "context_window": window,
                "max_input_tokens": window, "meta": {"n_ctx": window}, "status": {"value": "loaded"},
                "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]}}

    async def tokenize(self, request: Request) -> Response:
        return _json(await self._prepared(
            request, lambda payload: wire.encode(tokenize(self.service, validate(payload, TokenizeRequest)))))

    async def detokenize(self, request: Request) -> Response:
        return _json(await self._prepared(
            request, lambda payload: wire.encode(detokenize(self.service, validate(payload, DetokenizeRequest)))))

    async def health(self, request: Request) -> Response:
        """Answered from what the engine last said, never by a call into it."""
        health = self.service.engine.health()
        state = "draining" if self.gate.draining else health.state
        body = {"status": "ok" if state == "ready" else state, "heartbeat_age": round(health.heartbeat_age, 3),
                "restarts": health.restarts}
        if health.cause and state != "ready":
            body["cause"] = health.cause
        if health.progress is not None:
            body["progress"] = round(health.progress, 4)
        return Response(wire.encode(body), 200 if state == "ready" else 503, media_type="application/json")

    async def version(self, request: Request) -> Response:
        return _json(wire.encode({"version": __version__}))

    async def openapi(self, request: Request) -> Response:
        return _json(await self._in_thread(openapi.document))

    async def prometheus(self, request: Request) -> Response:
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _holds_ids(payload: dict[str, Any]) -> bool:
    """Whether the prompt begins like a list of token ids, which needs no tokeniser."""
    prompt = payload.get("prompt")
    return isinstance(prompt, list) and bool(prompt) and type(prompt[0]) is int


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def create_app(engine: EngineClient, model: ServedModel, options: ServerOptions | None = None,
               book: LogBook | None = None) -> FastAPI:
    """The ASGI application. `app.state.api.gate` drains it; `book` holds what `/stats/log` answers."""
    options = options or ServerOptions()
    if not model.names:
        raise InvalidRequestError("a served model needs a name", param="served_model_name")
    api = Api(engine, model, options, book or LogBook())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await api.close()

    app = FastAPI(title="ws", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan,
                  redirect_slashes=False)
    app.state.api = api
    for method, path, handler in _routes(api):
        route = Route(path, handler)  # not FastAPI's own, whose dependencies and models we do not use and would pay for
        endless = path.endswith("/stream")  # a HEAD of which would never be answered
        route.methods = {"GET", "HEAD"} if method == "GET" and not endless else {method}
        app.router.routes.append(route)
    errors.install(app)
    app.add_middleware(Guard, options=options)
    if options.allowed_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(options.allowed_origins), allow_methods=["GET", "POST"],
                           allow_headers=["authorization", "content-type", "x-client"])
    return app


def _routes(api: Api) -> list[tuple[str, str, Callable[[Request], Awaitable[Response]]]]:
    openai: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
        ("POST", "/chat/completions", api.chat), ("POST", "/completions", api.completions),
        ("POST", "/responses", api.responses.create), ("GET", "/models", api.models), ("POST", "/fim/completions", api.fim),
        ("POST", "/embeddings", api.embeddings),
    ]
    return [
        *openai, *((method, f"/v1{path}", handler) for method, path, handler in openai),  # base URLs with /v1 and without
        ("POST", "/infill", api.infill), ("GET", "/props", api.probes.props), ("GET", "/", api.probes.hello),
        ("GET", "/api/hello", api.probes.hello), ("POST", "/api/event_logging/batch", api.probes.swallow),
        ("POST", "/api/event_logging/v2/batch", api.probes.swallow),
        ("POST", "/v1/messages", api.messages), ("POST", "/v1/messages/count_tokens", api.count_tokens),
        ("GET", "/v1/responses/{response_id}", api.responses.retrieve),
        ("POST", "/v1/responses/{response_id}/cancel", api.responses.cancel),
        ("DELETE", "/v1/responses/{response_id}", api.responses.delete),
        ("GET", "/v1/models/{name:path}", api.one_model),
        ("POST", "/tokenize", api.tokenize), ("POST", "/detokenize", api.detokenize),
        ("GET", "/health", api.health), ("GET", "/version", api.version), ("GET", "/metrics", api.prometheus),
        ("GET", "/openapi.json", api.openapi),
        *api.stats.table(),
    ]


