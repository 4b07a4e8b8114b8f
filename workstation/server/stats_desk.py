"""StatsDesk: asks the engine on behalf of every dashboard, at most ten times a second, and only while somebody asks."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from workstation import __version__
from workstation.engine.client import EngineClient
from workstation.engine.snapshot import Look, Picture
from workstation.errors import EngineDeadError, OverloadedError
from workstation.server import wire
from workstation.server.card import Card
from workstation.server.errors import HTTPRequestError
from workstation.server.gate import Gate
from workstation.server.metrics import Metrics
from workstation.server.prefix_history import PrefixHistory
from workstation.server.stats import (
    VERSION,
    AbortAnswer,
    BatchStats,
    BlocksAnswer,
    GpuAnswer,
    ModelStats,
    RequestAnswer,
    RequestText,
    SampleStats,
    ServerStats,
    Snapshot,
    SpeedStats,
    Spread,
    block_stats,
    loading_stats,
    request_stats,
    timeline,
)
from workstation.server.stats_rates import Rates

LOOK_PERIOD = 0.1
HEAT_SECONDS = 3.0
SHOWN_TOKENS, SHOWN_CHARACTERS = 256, 400  # of a prompt and of each answer, at most, where text is shown
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
                   "seed", "n", "max_tokens", "min_tokens", "ignore_eos", "logprobs")


class StatsDesk:
    """One for a server. All dashboards share its newest picture; nothing runs while nobody asks.

    Args:
        decode: makes text of ids, where the server may show it; without it no text leaves.
    """

    def __init__(self, engine: EngineClient, model_name: str, metrics: Metrics, gate: Gate,
                 history: PrefixHistory | None = None, card: Card | None = None,
                 decode: Callable[[list[int]], str] | None = None) -> None:
        self._decode = decode
        self._engine = engine
        self._model_name = model_name
        self._metrics = metrics
        self._gate = gate
        self._history = history or PrefixHistory()
        self._started = time.monotonic()
        self._lock = asyncio.Lock()
        self._looked = -LOOK_PERIOD
        self._picture: Picture | None = None
        self._warm_until = 0.0
        self._rates = Rates()
        self._card = card or Card(engine)
        self.looks = 0

    # ── pictures ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _look(self, look: Look) -> Picture:
        """One question at a time, a tenth of a second apart. Raises as EngineClient.look does."""
        async with self._lock:
            await self._pause()
            return await self._ask(look)

    async def _pause(self) -> None:
        wait = self._looked + LOOK_PERIOD - time.monotonic()
        if wait > 0:
            await asyncio.sleep(wait)

    async def _ask(self, look: Look) -> Picture:
        self._looked = time.monotonic()
        self.looks += 1
        if self._picture is None:
            self._rates.feed(self._engine.stats())  # the last beat: rates from the first picture on
        self._picture = picture = await self._engine.look(look)
        self._rates.feed(picture.stats)
        return picture

    async def _newest(self, heat: bool) -> Picture:
        """A picture at most a tenth of a second old, or the last one when the engine cannot answer.

        Heat costs the engine a walk over its cached blocks, so pictures hold it only for some seconds after somebody asked.
        """
        if heat:
            self._warm_until = time.monotonic() + HEAT_SECONDS
        async with self._lock:
            if self._picture is None or time.monotonic() - self._looked >= LOOK_PERIOD:
                try:
                    return await self._ask(Look(heat=time.monotonic() < self._warm_until))
                except (EngineDeadError, OverloadedError):
                    if self._picture is None:
                        return Picture(0, self._engine.stats(), b"", [], 0)
            return self._picture

    async def snapshot(self, cells: int, heat: bool = False) -> Snapshot:
        """One frame; answered in every state of the engine, with the last picture there was."""
        picture = await self._newest(heat)
        info, stats, health = self._engine.info, picture.stats, self._engine.health()
        made = stats.time or time.monotonic()
        card, cards = await self._card.stats()
        return Snapshot(
            version=VERSION, time=round(time.time() - (time.monotonic() - made), 3),
            server=ServerStats("draining" if self._gate.draining else health.state, round(time.monotonic() - self._started, 1),
                               __version__, health.restarts, round(health.heartbeat_age, 2), health.cause,
                               loading_stats(health)),
            model=ModelStats(self._model_name, info.architecture, info.dtype, info.device, info.device_name, info.max_model_len,
                             info.max_num_seqs, info.max_num_batched_tokens, info.weight_bytes, info.kv_bytes, info.plan,
                             info.kv_cache_dtype, info.quantization, info.measured),
            gpu=card, process_bytes=_resident(getattr(self._engine, "pid", None)),
            blocks=block_stats(picture, info.block_size, cells),
            batch=BatchStats(stats.running, stats.waiting, picture.preempted, stats.steps, round(stats.step_seconds, 6),
                             stats.step_tokens, info.max_num_batched_tokens, stats.step_prompt_tokens),
            speed=self._speed(picture), requests=[request_stats(row, made) for row in picture.rows],
            requests_total=picture.requests, look_seconds=round(picture.seconds, 6), cards=cards)

    def _speed(self, picture: Picture) -> SpeedStats:
        stats, rates = picture.stats, self._rates
        return SpeedStats(
            stats.computed_prompt_tokens, stats.generated_tokens, stats.cached_tokens, rates.of("computed_prompt_tokens"),
            rates.of("generated_tokens"), rates.of("evictions"), rates.of("preemptions"),
            round(stats.prefix_hits / stats.prefix_queries, 4) if stats.prefix_queries else None,
            *(Spread(*seen.quantiles((0.5, 0.99))) for seen in (self._metrics.ttft, self._metrics.itl, self._metrics.e2e)))

    async def stream(self, cells: int, rate: float, heat: bool = False) -> AsyncGenerator[bytes, None]:
        """Frames as server-sent events until the server is about to leave. A frame is made only when the last one was taken."""
        period = 1.0 / rate
        due = time.monotonic()
        while not (self._gate.draining and self._gate.in_flight == 0):
            yield wire.sse(await self.snapshot(cells, heat))
            due = max(due + period, time.monotonic())
            await asyncio.sleep(due - time.monotonic())

    # ── details ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def blocks(self, first: int, last: int) -> BlocksAnswer:
        """Single blocks. Raises as EngineClient.look does."""
        picture = await self._look(Look(first=first, last=last))
        return BlocksAnswer(VERSION, picture.stats.blocks_total, picture.blocks)

    async def request(self, request_id: str) -> RequestAnswer:
        """Details of a live request; 404 when there is none of that id."""
        picture = await self._look(Look(request_id=request_id, tokens=SHOWN_TOKENS if self._decode is not None else 0))
        detail = picture.detail
        if detail is None:
            raise _no_request(request_id)
        now = picture.stats.time
        samples = [SampleStats(item.index, item.tokens, item.computed, item.tables, item.finished) for item in detail.samples]
        text = None
        if self._decode is not None:
            ends = [self._decode(ids)[-SHOWN_CHARACTERS:] for ids in (detail.prompt, *(item.last for item in detail.samples))]
            text = RequestText(ends[0], ends[1:])
        return RequestAnswer(VERSION, request_stats(detail.row, now), detail.max_tokens, timeline(detail.row, now),
                             {name: getattr(detail.params, name) for name in SAMPLING_FIELDS}, samples,
                             self._history.of(request_id), text)

    async def abort(self, request_id: str) -> AbortAnswer:
        """End a live request; its client gets an error. 404 when there is none of that id."""
        picture = await self._look(Look(request_id=request_id))
        if picture.detail is None:
            raise _no_request(request_id)
        self._engine.abort(request_id)
        return AbortAnswer(request_id, True)

    async def cards(self) -> GpuAnswer:
        """The machine's cards, and who is on the engine's."""
        return await self._card.answer(VERSION)


def _no_request(request_id: str) -> HTTPRequestError:
    return HTTPRequestError(404, "request_not_found", f"no live request has the id {request_id[:80]!r}")


def _resident(pid: int | None) -> int | None:
    """Resident bytes of a process; None where the system does not say."""
    if pid is None:
        return None
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None
