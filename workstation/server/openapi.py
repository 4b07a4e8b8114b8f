"""The OpenAPI document (https://spec.openapis.org/oas/v3.1.0), made when first asked for from the bodies that routes check."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from workstation import __version__
from workstation.engine.request import MAX_LOGPROBS, MAX_N, MAX_SEED
from workstation.server import wire
from workstation.server.anthropic import schema as anthropic_schema
from workstation.server.infill import INFILL_HARMLESS, FimRequest, InfillRequest
from workstation.server.log_book import LEVELS
from workstation.server.responses import schema as responses_schema
from workstation.server.schemas import (
    HARMLESS_FIELDS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from workstation.server.stats import MAX_CELLS

INT_MAX = 2**31 - 1
# Of SamplingParams, which checks them: (lowest, highest); an open end below is left out.
LIMITS: dict[str, tuple[float, float]] = {
    "n": (1, MAX_N), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "repetition_penalty": (0, 100),
    "temperature": (0, 100), "top_p": (0, 1), "top_k": (-1, INT_MAX), "min_p": (0, 1), "seed": (-MAX_SEED - 1, MAX_SEED),
    "min_tokens": (0, INT_MAX), "prompt_logprobs": (0, MAX_LOGPROBS), "top_logprobs": (0, MAX_LOGPROBS),
    "logprobs": (0, MAX_LOGPROBS), "max_tokens": (0, INT_MAX),
}  # fmt: skip
OPEN_BELOW = ("repetition_penalty", "top_p")
JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"
_REF = "#/components/schemas/{model}"


@dataclass(frozen=True, slots=True)
class Operation:
    """What a route takes and gives.

    Attributes:
        body: its pydantic model; None without a body, BaseModel for an object of any kind.  harmless: dropped fields.
        query: name → (low, high) of a whole number, or the words it may be.  kinds: media types of a good answer.
    """

    summary: str
    body: type[BaseModel] | None = None
    harmless: frozenset[str] = frozenset()
    query: tuple[tuple[str, tuple[int, int] | tuple[str, ...]], ...] = ()
    kinds: tuple[str, ...] = (JSON,)


_BOTH = (JSON, EVENTS)
_CELLS: tuple[tuple[str, tuple[int, int]], ...] = (("cells", (1, MAX_CELLS)), ("heat", (0, 1)))
_RESPONSE = "a response that is kept"
OPENAI: dict[tuple[str, str], Operation] = {
    ("post", "/chat/completions"): Operation("Answer a conversation.", ChatRequest, HARMLESS_FIELDS, kinds=_BOTH),
    ("post", "/completions"): Operation("Continue a text.", CompletionRequest, HARMLESS_FIELDS, kinds=_BOTH),
    ("post", "/responses"): Operation("Answer in the shape of responses.", responses_schema.ResponsesRequest,
                                      responses_schema.HARMLESS, kinds=_BOTH),
    ("get", "/models"): Operation("The names the server answers to, and the window."),
    ("post", "/fim/completions"): Operation("Fill in the middle, in Mistral's shape.", FimRequest, HARMLESS_FIELDS,
                                            kinds=_BOTH),
    ("post", "/embeddings"): Operation("Vectors of texts.", EmbeddingRequest),
}
OPERATIONS: dict[tuple[str, str], Operation] = {
    **OPENAI, **{(method, f"/v1{path}"): operation for (method, path), operation in OPENAI.items()},
    ("post", "/infill"): Operation("Fill in the middle, in llama.cpp's shape.", InfillRequest, INFILL_HARMLESS, kinds=_BOTH),
    ("post", "/v1/messages"): Operation("Answer in Anthropic's shape.", anthropic_schema.MessagesRequest,
                                        anthropic_schema.HARMLESS, kinds=_BOTH),
    ("post", "/v1/messages/count_tokens"): Operation("Tokens of a prompt, in Anthropic's shape.", anthropic_schema.CountRequest,
                                                     anthropic_schema.COUNT_HARMLESS),
    ("get", "/v1/responses/{response_id}"): Operation(f"Read {_RESPONSE}."),
    ("delete", "/v1/responses/{response_id}"): Operation(f"Forget {_RESPONSE}."),
    ("post", "/v1/responses/{response_id}/cancel"): Operation("End a response that is being made."),
    ("get", "/v1/models/{name}"): Operation("One name the server answers to."),
    ("post", "/tokenize"): Operation("Token ids of a text or of messages.", TokenizeRequest),
    ("post", "/detokenize"): Operation("The text of token ids.", DetokenizeRequest),
    ("get", "/props"): Operation("Window, template and formats, in llama.cpp's shape."),
    ("get", "/health"): Operation("Whether requests are served; needs no key."),
    ("get", "/version"): Operation("The version."),
    ("get", "/metrics"): Operation("Prometheus metrics.", kinds=(TEXT,)),
    ("get", "/openapi.json"): Operation("This document."),
    ("get", "/"): Operation("Who is here."), ("get", "/api/hello"): Operation("Who is here."),
    ("post", "/api/event_logging/batch"): Operation("Taken and thrown away.", BaseModel),
    ("post", "/api/event_logging/v2/batch"): Operation("Taken and thrown away.", BaseModel),
    ("get", "/stats"): Operation("What the dashboard draws, once.", query=_CELLS),
    ("get", "/stats/stream"): Operation("What the dashboard draws, again and again.", query=(*_CELLS, ("hz", (1, 10))),
                                        kinds=(EVENTS,)),
    ("get", "/stats/blocks"): Operation("Single KV blocks.", query=(("from", (1, 2**31 - 1)), ("to", (1, 2**31 - 1)))),
    ("get", "/stats/requests/{id}"): Operation("One running request."),
    ("post", "/stats/requests/{id}/abort"): Operation("End a running request."),
    ("get", "/stats/log"): Operation("Lines of the log.", query=(
        ("level", tuple(LEVELS)), ("lines", (1, 200)), ("after", (0, 10**9 - 1)))),
    ("get", "/stats/gpu"): Operation("The cards of this machine."),
}  # fmt: skip


@cache
def document() -> bytes:
    """The document, encoded. Its schemas are those of the bodies' models, so nothing is said twice."""
    return wire.encode({
        "openapi": "3.1.0",
        "info": {"title": "ws", "version": __version__, "description": "OpenAI's API, Anthropic's messages, and what vLLM and "
                 "llama.cpp added. A field that is not listed is refused with a 400 that names it."},
        "security": [{}, {"bearer": []}, {"key": []}],
        "paths": _paths(), "components": {"schemas": _schemas(), "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer"}, "key": {"type": "apiKey", "in": "header", "name": "x-api-key"}}},
    })


def _paths() -> dict[str, dict[str, Any]]:
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method] = _operation(method, path, operation)
    return paths


def _operation(method: str, path: str, operation: Operation) -> dict[str, Any]:
    error = {"description": "Refused.", "content": {JSON: {"schema": {"$ref": _REF.format(model="Error")}}}}
    content = {kind: {"schema": {"type": "object"} if kind == JSON else {"type": "string"}} for kind in operation.kinds}
    made: dict[str, Any] = {
        "summary": operation.summary, "operationId": f"{method} {path}",
        "responses": {"200": {"description": "Done.", "content": content}, "4XX": error, "503": error},
    }
    parameters = [*(_parameter(name, "path", {"type": "string", "minLength": 1}) for name in _holes(path)),
                  *(_parameter(name, "query", _query_schema(limits)) for name, limits in operation.query)]
    if parameters:
        made["parameters"] = parameters
    if operation.body is not None:
        plain = operation.body is BaseModel
        schema = {"type": "object"} if plain else {"$ref": _REF.format(model=operation.body.__name__)}
        made["requestBody"] = {"required": not plain, "content": {JSON: {"schema": schema}}}
    return made


def _holes(path: str) -> list[str]:
    return [part[1:-1] for part in path.split("/") if part.startswith("{")]


def _parameter(name: str, where: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": where, "required": where == "path", "schema": schema}


def _query_schema(limits: tuple[int, int] | tuple[str, ...]) -> dict[str, Any]:
    if isinstance(limits[0], str):
        return {"type": "string", "enum": list(limits)}
    return {"type": "integer", "minimum": limits[0], "maximum": limits[1]}


def _schemas() -> dict[str, Any]:
    """The bodies by name, harmless fields with them, and the error."""
    harmless = {operation.body: operation.harmless for operation in OPERATIONS.values()
                if operation.body not in (None, BaseModel)}
    models = [(model, "validation") for model in harmless if model is not None]
    _, found = models_json_schema(models, ref_template=_REF)  # type: ignore[arg-type]
    schemas: dict[str, Any] = found["$defs"]
    for model, names in harmless.items():
        if model is not None:
            properties = schemas[model.__name__]["properties"]
            for name in LIMITS.keys() & properties.keys():
                _bound(name, properties[name])
            properties |= _dropped(names)
    message = {"type": "object", "required": ["message"], "properties": {"message": {"type": "string"}}}
    schemas["Error"] = {"type": "object", "required": ["error"], "properties": {"error": message}}
    return schemas


def _bound(name: str, schema: dict[str, Any]) -> None:
    """Write a number's limits into its schema, or into its branch beside null."""
    low, high = LIMITS[name]
    for branch in schema.get("anyOf", [schema]):
        if branch.get("type") in ("integer", "number"):
            branch |= {"exclusiveMinimum" if name in OPEN_BELOW else "minimum": low, "maximum": high}


def _dropped(names: Iterable[str]) -> dict[str, Any]:
    return {name: {"description": "Accepted and dropped."} for name in sorted(names)}
