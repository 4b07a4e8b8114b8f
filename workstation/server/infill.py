"""/v1/fim/completions in Mistral's shape and /infill in llama.cpp's, on top of completions with a suffix."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from workstation.errors import InvalidRequestError
from workstation.server import wire
from workstation.server.body import show
from workstation.server.completions import prepare_completion
from workstation.server.dialogue import renamed
from workstation.server.generation import Generation
from workstation.server.job import Job
from workstation.server.prepare import Service
from workstation.server.schemas import CompletionRequest, ObjectList, Strict, StringList

DEFAULT_MAX_TOKENS = 128
MAX_EXTRA = 256
INFILL_HARMLESS = frozenset({
    "samplers", "cache_prompt", "t_max_prompt_ms", "t_max_predict_ms", "n_indent", "response_fields", "id_slot", "n_keep",
    "lora", "penalize_nl", "return_tokens", "timings_per_token", "top_n_sigma", "n_probs",
})
FIM_RENAMED = {"seed": "random_seed"}
INFILL_RENAMED = {"max_tokens": "n_predict", "suffix": "input_suffix", "prompt": "input_prefix"}


class FimRequest(Strict):
    """Mistral's body."""

    model: str | None = None
    prompt: str
    suffix: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    random_seed: int | None = None
    stop: str | StringList | None = None
    stream: bool | None = None


class InfillRequest(Strict):
    """llama.cpp's body. `prompt` is what stands on the cursor's line before it."""

    model: str | None = None
    input_prefix: str
    input_suffix: str
    input_extra: ObjectList | None = None
    prompt: str | None = None
    n_predict: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: StringList | None = None
    stream: bool | None = None


def prepare_fim(service: Service, body: FimRequest, label: str) -> Job:
    """Raises InvalidRequestError naming the field as this dialect has it."""
    limit = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    asked = CompletionRequest(model=body.model, prompt=body.prompt, suffix=body.suffix or "", max_tokens=limit,
                              min_tokens=body.min_tokens, temperature=body.temperature, top_p=body.top_p, seed=body.random_seed,
                              stop=body.stop, stream=body.stream)
    try:
        return prepare_completion(service, asked, label, fill=True)
    except InvalidRequestError as error:
        raise renamed(error, FIM_RENAMED) from None


def prepare_infill(service: Service, body: InfillRequest, label: str) -> Job:
    """As above. n_predict 0 computes the prompt only, so that it stands in the cache."""
    extra = body.input_extra or []
    if len(extra) > MAX_EXTRA:
        raise InvalidRequestError(f"input_extra holds {len(extra)} files; the limit is {MAX_EXTRA}", param="input_extra")
    files = [(_string(item.get("filename", ""), f"input_extra[{index}].filename"),
              _string(item.get("text"), f"input_extra[{index}].text")) for index, item in enumerate(extra)]
    limit = DEFAULT_MAX_TOKENS if body.n_predict in (None, -1) else body.n_predict
    asked = CompletionRequest(model=body.model, prompt=body.input_prefix + (body.prompt or ""), suffix=body.input_suffix,
                              max_tokens=limit or 1, temperature=body.temperature, top_k=body.top_k, top_p=body.top_p,
                              min_p=body.min_p, seed=body.seed, stop=body.stop, stream=body.stream)
    try:
        job = prepare_completion(service, asked, label, fill=True, extra=files)
    except InvalidRequestError as error:
        raise renamed(error, INFILL_RENAMED) from None
    job.hide_output = limit == 0
    return job


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{where} must be a string, got {show(value)}", param=where)
    return value


async def answer_infill(generation: Generation) -> bytes:
    """The whole answer in llama.cpp's shape."""
    pieces: list[str] = []
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            pieces.append(delta.text)
    return wire.encode(_final(generation, "".join(pieces)))


async def stream_infill(generation: Generation) -> AsyncGenerator[bytes, None]:
    """Pieces, then an event with the figures."""
    hidden = generation.job.hide_output
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            if delta.text and not hidden:
                yield wire.sse({"content": delta.text, "stop": False, "index": 0})
    yield wire.sse(_final(generation, ""))


def _final(generation: Generation, text: str) -> dict[str, Any]:
    usage, choice = generation.usage(), generation.choices[0]
    kind = {"length": "limit"}.get(choice.finish_reason or "", "word" if isinstance(choice.stop_reason, str) else "eos")
    return {"content": "" if generation.job.hide_output else text, "stop": True, "index": 0, "model": generation.job.model,
            "stop_type": kind, "stopping_word": choice.stop_reason if kind == "word" else "", "truncated": False,
            "tokens_predicted": usage.completion_tokens, "tokens_evaluated": usage.prompt_tokens,
            "tokens_cached": usage.prompt_tokens_details.cached_tokens, "timings": generation.timings()}
