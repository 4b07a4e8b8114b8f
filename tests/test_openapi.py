"""The OpenAPI document says what the routes are and take; in the long tests schemathesis tries to break them with it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fakes import FakeEngine, api_client, served_model
from test_api_infill import FIM, with_tokens

from workstation.engine.request import SamplingParams
from workstation.errors import InvalidRequestError
from workstation.server.app import create_app
from workstation.server.openapi import LIMITS, OPEN_BELOW, OPENAI, OPERATIONS, document
from workstation.server.options import ServedModel, ServerOptions

CASES = 250  # of each mode
GENERATING = ("/v1/chat", "/v1/completions", "/v1/messages", "/v1/embeddings", "/v1/responses", "/infill", "/v1/fim")
LEFT_OUT = {("get", "/stats/stream"), *OPENAI}  # an answer without an end; the same routes without /v1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served_model(with_tokens(tmp_path_factory.mktemp("openapi"), FIM))


def read(model: ServedModel, options: ServerOptions | None = None) -> httpx.Response:
    async def go() -> httpx.Response:
        async with api_client(create_app(FakeEngine(), model, options)) as client:
            return await client.get("/openapi.json")

    return asyncio.run(go())


def refs(value: Any) -> Iterator[str]:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if key == "$ref":
            yield item
        yield from refs(item)


def test_the_document_names_every_route_and_no_other(model: ServedModel) -> None:
    app = create_app(FakeEngine(), model)
    routes = {(method.lower(), route.path.replace(":path}", "}"))  # type: ignore[attr-defined]
              for route in app.routes for method in route.methods - {"HEAD"}}  # type: ignore[attr-defined]
    told = {(method, path) for path, item in read(model).json()["paths"].items() for method in item}
    assert told == routes


def test_bodies_list_the_fields_that_are_taken_and_refuse_others() -> None:
    made = json.loads(document())
    for (method, path), operation in OPERATIONS.items():
        if operation.body is None or not operation.body.model_fields:
            continue
        name = made["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        schema = made["components"]["schemas"][name]
        assert set(schema["properties"]) == {*operation.body.model_fields, *operation.harmless}
        assert schema["additionalProperties"] is False


@pytest.mark.parametrize("name", sorted(set(LIMITS) - {"max_tokens", "logprobs", "top_logprobs"}))  # the routes read these
def test_limits_in_the_document_are_those_that_are_checked(name: str) -> None:
    low, high = LIMITS[name]
    other = {"min_tokens": {"max_tokens": None}}.get(name, {})
    for value in (low, high):
        if value == low and name in OPEN_BELOW:
            with pytest.raises(InvalidRequestError):
                SamplingParams(**{name: value})
        else:
            SamplingParams(**{name: value, **other})
    for value in (low - 1, high + 1):
        with pytest.raises(InvalidRequestError):
            SamplingParams(**{name: value, **other})


def test_every_reference_leads_somewhere_and_every_hole_is_a_parameter() -> None:
    made = json.loads(document())
    assert {ref.rpartition("/")[2] for ref in refs(made)} <= set(made["components"]["schemas"])
    for path, item in made["paths"].items():
        for operation in item.values():
            holes = {found["name"] for found in operation.get("parameters", []) if found["in"] == "path"}
            assert holes == {part[1:-1] for part in path.split("/") if part.startswith("{")}


def test_the_document_needs_the_key_like_any_route(model: ServedModel) -> None:
    assert read(model, ServerOptions(api_keys=("secret",))).status_code == 401


# ── schemathesis ────────────────────────────────────────────────────────────────────────────────────────────────────


class Attack:
    """Sends generated cases of one operation to an app of its own, and looks at every answer."""

    def __init__(self, model: ServedModel, method: str, path: str) -> None:
        self.engine = FakeEngine()
        self.sent = 0
        self.answers: Counter[int] = Counter()
        self._kinds = OPERATIONS[method, path].kinds
        self._loop = asyncio.new_event_loop()
        self._client = api_client(create_app(self.engine, model))

    def close(self) -> None:
        self._loop.run_until_complete(self._client.aclose())
        self._loop.close()

    def send(self, case: Any) -> None:
        self.sent += 1
        raw = case.as_transport_kwargs(base_url="http://localhost:8000")
        sent = {name: raw[name] for name in ("method", "url", "headers", "params", "json", "cookies") if name in raw}
        if isinstance(sent.get("json"), dict) and isinstance(sent["json"].get("model"), str):
            sent["json"] = {**sent["json"], "model": "fake"}  # or nearly all would end at a name that nobody serves
        if isinstance(raw.get("data"), (bytes, str)):
            sent["content"] = raw["data"]
        try:
            answer = self._loop.run_until_complete(asyncio.wait_for(self._client.request(**sent), 20))
        except (httpx.InvalidURL, httpx.LocalProtocolError, UnicodeEncodeError):
            return  # no client can send this
        self.engine.seen.clear()
        self.answers[answer.status_code] += 1
        self._check(answer)

    def _check(self, answer: httpx.Response) -> None:
        assert answer.status_code < 500, f"{answer.status_code}: {answer.text[:500]}"
        kind = answer.headers.get("content-type", "").partition(";")[0]
        if answer.status_code == 200:
            assert kind in self._kinds
        else:
            assert kind == "application/json"
            assert answer.json()["error"]["message"]


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")  # the library's, about strategies
@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize(("method", "path"), sorted(set(OPERATIONS) - LEFT_OUT), ids=lambda part: part)
def test_nothing_sent_by_the_document_or_against_it_breaks_a_route(
        model: ServedModel, method: str, path: str, mode: str) -> None:
    """No 5xx, no hang, an answer of the promised kind, and an engine without a request left in it."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable

    operation = schemathesis.openapi.from_dict(json.loads(document()))[path][method]
    cases = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))
    many = settings(max_examples=CASES, deadline=None, database=None, phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck))
    attack = Attack(model, method, path)
    try:
        many(given(case=cases)(attack.send))()
    except Unsatisfiable:
        assert mode == "negative", "the document describes nothing that can be sent"
    finally:
        attack.close()
    assert not attack.engine.active
    assert attack.sent >= CASES or OPERATIONS[method, path].body is None
    if (mode, method) == ("positive", "post") and path.startswith(GENERATING) and "{" not in path:
        assert attack.answers[200] > CASES // 20, attack.answers  # some get past every check, to the engine and back
