"""/v1/embeddings: texts or token ids → vectors, in OpenAI's shape with vLLM's additions."""

from __future__ import annotations

import asyncio
import base64
import time

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from workstation.engine.client import EngineClient
from workstation.engine.request import EngineRequest, SamplingParams
from workstation.errors import ContextLengthError, EngineError, InvalidRequestError, WorkstationError
from workstation.server import prepare, wire
from workstation.server.body import show
from workstation.server.generation import closing_events
from workstation.server.job import Job
from workstation.server.metrics import Metrics
from workstation.server.prepare import Service
from workstation.server.schemas import EmbeddingRequest

MOST_INPUTS = 2048  # OpenAI's limit
MOST_AT_ONCE = 64  # of one HTTP request in the engine, so that a long list fills neither its queue nor all its rows
ENCODINGS = ("float", "base64")
Vector = npt.NDArray[np.float32]


class Embedding(Struct):
    """embedding: numbers, or base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class Embeddings(Struct):
    data: list[Embedding]
    model: str
    usage: wire.Usage
    object: str = "list"


def prepare_embeddings(service: Service, body: EmbeddingRequest, label: str) -> Job:
    """One engine request an input. Everything that can be refused is refused here."""
    model = service.check_model(body.model)
    if body.encoding_format not in (None, *ENCODINGS):
        raise InvalidRequestError(f"encoding_format must be float or base64, got {show(body.encoding_format)}",
                                  param="encoding_format")
    _check_dimensions(service, body.dimensions)
    items = prepare.prompt_items(body.input, "input")
    if len(items) > MOST_INPUTS:
        raise InvalidRequestError(f"input holds {len(items)} texts; the limit is {MOST_INPUTS}", param="input")
    keep = service.window if body.truncate_prompt_tokens == -1 else body.truncate_prompt_tokens
    prompts = [prepare.prompt_ids(service, item, "input", add_special=body.add_special_tokens is not False) for item in items]
    prompts = [prepare.truncated(service, ids, keep, None) for ids in prompts]
    for ids in prompts:
        _check_length(service, len(ids))
    public_id = prepare.new_id("embd")
    params = SamplingParams(max_tokens=1)
    requests = prepare.engine_requests(service, body, public_id, prompts, [params] * len(prompts), [None] * len(prompts),
                                       prepare.clean_label(label, body.user))
    for request in requests:
        request.pooling = service.model.pooling.pooling
    return Job(public_id, model, int(time.time()), requests, 1)


def _check_dimensions(service: Service, wanted: int | None) -> None:
    size, sizes = service.engine.info.hidden_size, service.model.pooling.sizes
    if wanted is None or wanted == size or (sizes is None and 1 <= wanted <= size) or (sizes and wanted in sizes):
        return
    if sizes == ():
        raise InvalidRequestError(f"dimensions={show(wanted)} is not supported: its config.json does not say (is_matryoshka, "
                                  f"matryoshka_dimensions) that its {size} numbers may be cut", param="dimensions")
    limit = f"between 1 and {size}" if sizes is None else f"one of {', '.join(map(str, sizes))} or {size}"
    raise InvalidRequestError(f"dimensions must be {limit}, got {show(wanted)}", param="dimensions")


def _check_length(service: Service, length: int) -> None:
    if length == 0:
        raise InvalidRequestError("input is empty; send at least one token", param="input")
    if length > service.window:
        raise ContextLengthError(f"This model's maximum context length is {service.window} tokens. However, your input "
                                 f"resulted in {length} tokens. Please reduce the length of the input.", param="input",
                                 tokens=length, limit=service.window)


async def answer_embeddings(service: Service, metrics: Metrics, job: Job, body: EmbeddingRequest) -> bytes:
    """The whole answer, encoded. Leaving early aborts what is in the engine.

    Raises OverloadedError, EngineDeadError, EngineError, or InvalidRequestError when the engine refuses at admission.
    """
    work = _Work(service.engine, metrics, job)
    vectors = await work.run()
    usage = wire.Usage(work.prompt_tokens, 0, work.prompt_tokens, wire.TokenDetails(work.cached_tokens))
    normalise, size = service.model.pooling.normalise, body.dimensions
    as_text = body.encoding_format == "base64"
    return await asyncio.to_thread(lambda: wire.encode(Embeddings(
        [Embedding(place, _shown(finished(vector, size, normalise), as_text)) for place, vector in enumerate(vectors)],
        job.model, usage)))


def finished(hidden: Vector, size: int | None, normalise: bool) -> Vector:
    """The first `size` numbers of a hidden state [H] float32, then scaled to length 1."""
    cut = hidden[:size]
    length = float(np.linalg.norm(cut))
    return cut / np.float32(length) if normalise and length > 0.0 else cut


def _shown(vector: Vector, as_text: bool) -> list[float] | str:
    if as_text:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers


class _Work:
    """The requests of a job on their way through the engine."""

    def __init__(self, engine: EngineClient, metrics: Metrics, job: Job) -> None:
        self._engine = engine
        self._metrics = metrics
        self._job = job
        self._left = iter(enumerate(job.requests))
        self._found: dict[int, Vector] = {}
        self._spans: list[tuple[float, float]] = []
        self.prompt_tokens = sum(len(request.prompt_token_ids) for request in job.requests)
        self.cached_tokens = 0

    async def run(self) -> list[Vector]:
        """A hidden state [H] float32 a request, in order."""
        outcome = "abort"
        tasks = [asyncio.ensure_future(self._drain()) for _ in self._job.requests[:MOST_AT_ONCE]]
        try:
            await asyncio.gather(*tasks)
            outcome = "stop"
        except WorkstationError as error:
            outcome = "error"
            self._metrics.reject(error)
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._metrics.finish(self._job, outcome, 0, self._spans)
        return [self._found[place] for place in range(len(self._job.requests))]

    async def _drain(self) -> None:
        for place, request in self._left:
            self._found[place] = await self._embed(request)

    async def _embed(self, request: EngineRequest) -> Vector:
        async with closing_events(self._engine.generate(request)) as events:
            async for event in events:
                now = time.monotonic()
                if event.embedding is None:
                    raise EngineError(event.error or "the engine aborted this request")
                self._metrics.first_token(request, event, now)
                self._metrics.last_token(event)
                self.cached_tokens += event.num_cached_tokens
                self._spans.append((now, now))
                return np.frombuffer(event.embedding, dtype="<f4")
        raise EngineError("the engine ended this request without a last event")
