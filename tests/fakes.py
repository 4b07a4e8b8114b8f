"""Stand-ins at the edges: a tokenizer folder made on the spot, and an engine that answers without a model."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from workstation.engine.client import EngineState, Health
from workstation.engine.request import (
    EngineInfo,
    EngineRequest,
    EngineStats,
    RequestTimes,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from workstation.engine.snapshot import BlockRow, Look, Picture, RequestDetail, RequestRow, SampleDetail
from workstation.errors import EngineDeadError, OverloadedError
from workstation.server.app import create_app
from workstation.server.options import ServedModel, ServerOptions
from workstation.server.served_model import model_formats
from workstation.text.tokenizer import Tokenizer as WsTokenizer

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAG_TOKENS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
CHAT_TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if tools %}{{ '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking %}{{ '<think>\\n' }}{% endif %}{% endif %}"""
_CORPUS = [
    "The quick brown fox jumps over the lazy dog. ",
    "hello world, how are you today? ",
    "Grüße aus Köln, naïve café. ",
    "日本語のテキスト ",
    "def add(a, b):\n    return a + b\n",
    "one two three four five six seven eight nine ten ",
] * 20


def write_byte_level_folder(
    path: Path, *, vocab_size: int = 600, chat_template: str | None = CHAT_TEMPLATE, **config: object
) -> Path:
    """A byte-level BPE like Qwen's: any text can be encoded, control tokens and tags are added tokens."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(text, normalized=False) for text in SPECIAL_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in TAG_TOKENS])
    tokenizer.save(str(path / "tokenizer.json"))
    _write_config(path, {"eos_token": "<|im_end|>", "chat_template": chat_template, **config})
    return path


def write_sentencepiece_folder(path: Path, *, single: str = "<s> $A", **config: object) -> Path:
    """A BPE with byte fallback and space marks, as Llama 2 and Mistral have."""
    path.mkdir(parents=True, exist_ok=True)
    words = ["▁hello", "▁world", "▁the", "▁a", "lo", "wor", "▁caf", "é", "▁", *map(chr, range(33, 127))]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(words)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.save(str(path / "tokenizer.json"))
    _write_config(path, {"bos_token": "<s>", "eos_token": "</s>", **config})
    return path


def _write_config(path: Path, config: dict[str, object]) -> None:
    kept = {key: value for key, value in config.items() if value is not None}
    (path / "tokenizer_config.json").write_text(json.dumps(kept))


def echo_reply(request: EngineRequest, index: int) -> list[int]:
    """The prompt again and again, shifted by the sample's index: deterministic and long enough for any max_tokens."""
    ids = request.prompt_token_ids
    shift = index % len(ids)
    return (ids[shift:] + ids[:shift]) * 4096


@dataclass
class FakeEngine:
    """An EngineClient without a model.

    Attributes:
        reply: (request, sample index) → token ids it would generate for ever; an eos or stop id ends a sample.
        delay: seconds between steps.  fail_after: raise EngineDeadError after so many steps.
        error_after: end with an error event after so many steps.  overloaded: refuse every request.
        tokens_per_step: how many tokens an event carries.
        seen: every request, in order.  aborted: ids of requests left early or aborted.  active: ids running now.
        dropped: (request id, sample index) of samples ended one by one.
        looks: what dashboards asked for.
    """

    window: int = 4096
    logits_width: int = 640
    reply: Callable[[EngineRequest, int], list[int]] = echo_reply
    delay: float = 0.0
    first_delay: float = 0.0
    fail_after: int | None = None
    error_after: int | None = None
    overloaded: bool = False
    tokens_per_step: int = 1
    num_cached_tokens: int = 0
    state: EngineState = "ready"
    seen: list[EngineRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    active: set[str] = field(default_factory=set)
    dropped: set[tuple[str, int]] = field(default_factory=set)
    looks: list[Look] = field(default_factory=list)
    states: bytes = bytes([1] * 6 + [2] * 2 + [3] * 8 + [0] * 48)

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            model="fake",
            max_model_len=self.window,
            logits_width=self.logits_width,
            hidden_size=8,
            num_blocks=64,
            max_num_seqs=256,
            dtype="float32",
            device="cpu",
        )

    def health(self) -> Health:
        return Health(self.state, heartbeat_age=0.1)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.active),
            blocks_free=48,
            blocks_cached=8,
            blocks_held=8,
            blocks_total=64,
            prompt_tokens=sum(len(request.prompt_token_ids) for request in self.seen),
            prefix_queries=10,
            prefix_hits=4,
        )

    async def look(self, look: Look) -> Picture:
        if self.state != "ready":
            raise EngineDeadError(f"the engine is {self.state}")
        self.looks.append(look)
        rows = [self._row(request) for request in self.seen if request.request_id in self.active]
        picture = Picture(look.number, self.stats(), self.states, rows, len(rows))
        picture.stats.time = time.monotonic()
        for row in rows:
            if row.id == look.request_id:
                ids = next(request.prompt_token_ids for request in self.seen if request.request_id == row.id)
                sample = SampleDetail(0, row.prompt, row.computed, [[1, 2, 3]], last=ids[:look.tokens and 2])
                picture.detail = RequestDetail(row, self._params(row.id), 16, [sample], ids[len(ids) - look.tokens:])
        if look.first:
            last = min(look.last, len(self.states))
            picture.blocks = [BlockRow(block, self.states[block - 1], 1, False) for block in range(look.first, last + 1)]
        return picture

    def _params(self, request_id: str) -> SamplingParams:
        return next(request.params for request in self.seen if request.request_id == request_id)

    def _row(self, request: EngineRequest) -> RequestRow:
        prompt = len(request.prompt_token_ids)
        return RequestRow(request.request_id, request.label, "decode", 1, prompt, self.num_cached_tokens, prompt, 4, 3, 0,
                          request.arrival, request.arrival, request.arrival + 0.1, request.route)

    async def start(self) -> None:
        self.state = "ready"

    async def stop(self) -> None:
        self.state = "dead"

    def abort(self, request_id: str, index: int | None = None) -> None:
        if index is not None:
            self.dropped.add((request_id, index))
        elif request_id in self.active:
            self.active.discard(request_id)
            self.aborted.append(request_id)

    async def generate(self, request: EngineRequest) -> AsyncIterator[TokenEvent]:
        if self.overloaded:
            raise OverloadedError("the queue is full", retry_after=7)
        self.seen.append(request)
        self.active.add(request.request_id)
        try:
            await asyncio.sleep(self.first_delay)
            async for event in self._events(request) if request.pooling is None else self._pooled(request):
                if event.finished:
                    self.active.discard(request.request_id)
                yield event
        finally:
            if request.request_id in self.active:
                self.abort(request.request_id)

    async def _pooled(self, request: EngineRequest) -> AsyncIterator[TokenEvent]:
        """[H] = the prompt's length, then its first ids: easy to recognise, and not of length 1."""
        await asyncio.sleep(self.delay)
        if self.fail_after is not None:
            self.active.discard(request.request_id)
            raise EngineDeadError("the engine process died with this request in flight")
        ids = request.prompt_token_ids
        vector = struct.pack("<8f", len(ids), *(float(token) for token in [*ids, *[0] * 7][:7]))
        times = RequestTimes(request.arrival, *[time.monotonic()] * 3)
        yield TokenEvent(request.request_id, finish_reason="stop", finished=True, embedding=vector, times=times,
                         num_cached_tokens=self.num_cached_tokens)

    async def _events(self, request: EngineRequest) -> AsyncIterator[TokenEvent]:
        count = request.beam.beam_width if request.beam is not None else request.params.n
        limit = request.beam.max_tokens if request.beam is not None else request.params.max_tokens
        samples = [_Sample(request, index, self.reply(request, index), limit or 16) for index in range(count)]
        started = time.monotonic()
        step = 0
        while any(sample.finish_reason is None for sample in samples):
            await asyncio.sleep(self.delay)
            if self.fail_after is not None and step >= self.fail_after:
                self.active.discard(request.request_id)
                raise EngineDeadError("the engine process died with this request in flight")
            for sample in [sample for sample in samples if sample.finish_reason is None]:
                dropped = (request.request_id, sample.index) in self.dropped
                event = sample.drop() if dropped else sample.step(self.tokens_per_step)
                event.num_cached_tokens = self.num_cached_tokens
                if self.error_after is not None and step >= self.error_after:
                    event = TokenEvent(request.request_id, finish_reason="error", finished=True, error="logits were not finite")
                    yield event
                    return
                if step == 0 and sample.index == 0 and request.params.prompt_logprobs is not None:
                    event.prompt_logprobs = [
                        None,
                        *(_logprobs(token, request.params.prompt_logprobs) for token in request.prompt_token_ids[1:]),
                    ]
                event.finished = all(other.finish_reason is not None for other in samples)
                now = time.monotonic()
                event.times = RequestTimes(request.arrival, started, started, now if event.finished else 0.0)
                yield event
            step += 1


def _logprobs(token: int, top: int) -> TokenLogprobs:
    """The chosen token first, then `top` neighbours of it; figures that are easy to recognise."""
    others = [token, *(other for other in range(max(0, token - top), token))][:top]
    return TokenLogprobs([token, *others], [-0.5, *(-0.5 - position for position in range(len(others)))], 1)


class _Sample:
    def __init__(self, request: EngineRequest, index: int, ids: list[int], limit: int) -> None:
        self.request, self.index, self.ids, self.limit = request, index, ids[:limit], limit
        self.position = 0
        self.finish_reason: str | None = None

    def drop(self) -> TokenEvent:
        self.finish_reason = "abort"
        return TokenEvent(self.request.request_id, index=self.index, finish_reason="abort")

    def step(self, count: int) -> TokenEvent:
        params = self.request.params
        event = TokenEvent(self.request.request_id, index=self.index)
        while count and self.finish_reason is None:
            token = self.ids[self.position]
            event.token_ids.append(token)
            self.position += 1
            count -= 1
            if self.position > params.min_tokens:
                if token in params.stop_token_ids:
                    self.finish_reason, event.stop_reason = "stop", token
                elif token in self.request.eos_token_ids and not params.ignore_eos:
                    self.finish_reason = "stop"
            if self.finish_reason is None and self.position >= len(self.ids):
                self.finish_reason = "length"
        if params.logprobs is not None:
            event.logprobs = [_logprobs(token, params.logprobs) for token in event.token_ids]
        event.finish_reason = self.finish_reason  # type: ignore[assignment]
        return event


def served_model(folder: Path, **changes: object) -> ServedModel:
    tokenizer = WsTokenizer.from_folder(folder)
    values: dict[str, object] = {
        "names": ("fake", "alias"),
        "tokenizer": tokenizer,
        "eos_token_ids": (tokenizer.eos_token_id,),
        "window": 4096,
        "formats": model_formats(tokenizer),
    }
    return ServedModel(**{**values, **changes})  # type: ignore[arg-type]


def api_client(app: FastAPI, **options: object) -> httpx.AsyncClient:
    """A client that talks to the app in-process, as a browserless program on this machine would."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost:8000", **options)  # type: ignore[arg-type]


def post(path: str, engine: FakeEngine, model: ServedModel, body: Any, options: ServerOptions | None = None,
         headers: dict[str, str] | None = None) -> httpx.Response:
    """One POST to an app made for it."""

    async def go() -> httpx.Response:
        async with api_client(create_app(engine, model, options)) as client:
            return await client.post(path, json=body, headers=headers or {})

    return asyncio.run(go())


def sse_events(text: str) -> list[dict[str, Any]]:
    """The JSON of every server-sent event; the stream must end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
