"""Engines on tiny random folders, and running requests through them to the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workstation.config import EngineConfig
from workstation.engine.engine import Engine
from workstation.engine.request import EngineRequest, SamplingParams, TokenEvent, TokenLogprobs
from workstation.engine.start import build_engine


@dataclass
class Answer:
    """One sample, put together from its events."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    reason: str = ""
    stop_reason: int | str | None = None
    cached: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: str | None = None
    preemptions: int = 0


def make_engine(folder: Path | str, **changes: Any) -> Engine:
    """A CPU engine with a small pool; `changes` are EngineConfig fields."""
    settings: dict[str, Any] = {"device": "cpu", "max_num_seqs": 8, "num_blocks": 200, "num_threads": 1}
    return build_engine(EngineConfig(str(folder), **{**settings, **changes}))


def submit(engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams], **fields: Any) -> None:
    for number, (prompt, given) in enumerate(zip(prompts, params, strict=True)):
        engine.submit(EngineRequest(str(number), prompt, given, **fields))


def drain(engine: Engine) -> dict[tuple[str, int], Answer]:
    """Step to the end, proving the books after every step, and that each request ends exactly once."""
    answers: dict[tuple[str, int], Answer] = {}
    ended: set[str] = set()
    while engine.has_work:
        for event in engine.step():
            assert event.request_id not in ended, "an event after the last one"
            take(answers.setdefault((event.request_id, event.index), Answer()), event)
            if event.finished:
                ended.add(event.request_id)
        engine.check()
    assert {request_id for request_id, _ in answers} == ended
    return answers


def take(answer: Answer, event: TokenEvent) -> None:
    answer.tokens += event.token_ids
    answer.logprobs += event.logprobs or []
    answer.cached = event.num_cached_tokens
    answer.preemptions = max(answer.preemptions, event.num_preemptions)
    answer.prompt_logprobs = event.prompt_logprobs or answer.prompt_logprobs
    if event.finish_reason:
        answer.reason, answer.stop_reason, answer.error = event.finish_reason, event.stop_reason, event.error


def run(folder: Path | str, prompts: Sequence[list[int]], params: Sequence[SamplingParams] | SamplingParams,
        **changes: Any) -> list[list[int]]:
    """Tokens of every sample, in order, from a fresh engine."""
    given = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    engine = make_engine(folder, **changes)
    submit(engine, prompts, given)
    answers = drain(engine)
    return [answers[key].tokens for key in sorted(answers, key=lambda key: (int(key[0]), key[1]))]
