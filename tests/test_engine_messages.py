"""Events on their way from the engine to a request's reader: the committer's plain events, the step's message, the inbox."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from engines import make_engine
from tiny import write_tiny

from workstation import LLM
from workstation.engine import wire
from workstation.engine.client import Inbox
from workstation.engine.request import EngineRequest, SamplingParams, TokenEvent, TokenLogprobs
from workstation.errors import EngineDeadError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("messages") / "llama", "llama")


def events_of(folder: Path, params: SamplingParams) -> list[TokenEvent]:
    engine = make_engine(folder)
    engine.submit(EngineRequest("r", [5, 6, 7], params))
    found = []
    while engine.has_work:
        found += engine.step()
    return found


def test_between_its_first_and_its_last_event_a_request_has_plain_ones(folder: Path) -> None:
    events = events_of(folder, SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
    assert [event.plain for event in events] == [False, True, True, True, False]


def test_an_event_with_logprobs_is_not_plain(folder: Path) -> None:
    events = events_of(folder, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=1))
    assert not any(event.plain for event in events)


def test_a_steps_events_arrive_as_they_were_sent_the_plain_ones_first() -> None:
    logprobs = [TokenLogprobs([4, 5], [-0.5, -1.0], 1)]
    whole = TokenEvent("b", 1, [4], logprobs=logprobs, finish_reason="stop", stop_reason=4, finished=True, num_cached_tokens=3)
    plain = [TokenEvent("a", 0, [7], plain=True), TokenEvent("b", 0, [8], plain=True)]
    message = wire.decode_from_engine(wire.encode(wire.step([plain[0], whole, plain[1]])))
    assert isinstance(message, wire.Step)
    assert [*wire.plain_events(message), *message.events] == [*plain, whole]


# ── the inbox ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Desk:
    """Opens inboxes and remembers what became of them."""

    def __init__(self) -> None:
        self.begun: list[Inbox] = []
        self.left: list[bool] = []

    def inbox(self) -> Inbox:
        async def begin(inbox: Inbox) -> None:
            self.begun.append(inbox)

        return Inbox(begin, self.left.append)


def go(test: Callable[[Desk], Awaitable[None]]) -> Desk:
    desk = Desk()
    asyncio.run(asyncio.wait_for(test(desk), 10))  # type: ignore[arg-type]
    return desk


def token(token_id: int, index: int = 0, **fields: object) -> TokenEvent:
    return TokenEvent("r", index, [token_id], **fields)  # type: ignore[arg-type]


def test_a_reader_waits_for_events_and_stops_after_the_last() -> None:
    async def test(desk: Desk) -> None:
        inbox = desk.inbox()
        reader = asyncio.ensure_future(_read(inbox))
        for event in (token(1), token(2), token(3, finish_reason="length", finished=True)):
            await asyncio.sleep(0)
            inbox.put(event)
        assert await reader == [1, 2, 3]

    assert go(test).left == [True]


async def _read(inbox: Inbox) -> list[int]:
    return [token_id async for event in inbox for token_id in event.token_ids]


def test_nothing_is_submitted_before_the_first_event_is_waited_for() -> None:
    async def test(desk: Desk) -> None:
        await desk.inbox().aclose()

    desk = go(test)
    assert (desk.begun, desk.left) == ([], [True])


def test_an_inbox_closed_before_its_last_event_says_so_once() -> None:
    async def test(desk: Desk) -> None:
        inbox = desk.inbox()
        reader = asyncio.ensure_future(anext(inbox))
        await asyncio.sleep(0)
        inbox.put(token(1))
        await reader
        await inbox.aclose()
        await inbox.aclose()

    assert go(test).left == [False]


def test_an_error_comes_after_the_events_before_it_and_ends_the_reading() -> None:
    async def test(desk: Desk) -> None:
        inbox = desk.inbox()
        inbox.put(token(1))
        inbox.put(EngineDeadError("over"))
        assert (await anext(inbox)).token_ids == [1]
        with pytest.raises(EngineDeadError, match="over"):
            await anext(inbox)
        assert await _read(inbox) == []

    assert go(test).left == [True]


def test_a_reader_that_was_cancelled_can_read_on() -> None:
    async def test(desk: Desk) -> None:
        inbox = desk.inbox()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await anext(inbox)
        inbox.put(token(1))
        assert (await anext(inbox)).token_ids == [1]
        assert desk.begun == [inbox]

    go(test)


def test_joined_events_hold_what_the_single_ones_held() -> None:
    async def test(desk: Desk) -> None:
        inbox = desk.inbox()
        first, last = TokenLogprobs([1], [-1.0], 1), TokenLogprobs([3], [-3.0], 1)
        inbox.put(token(1, logprobs=[first], num_cached_tokens=16, prompt_logprobs=[None]))
        inbox.put(token(2, 1))
        inbox.put(token(3, logprobs=[last], finish_reason="stop", stop_reason=3))
        inbox.put(token(4, 1, plain=True))
        inbox.put(token(5, 1, finish_reason="length", finished=True))
        inbox.join_waiting()
        one, other = await anext(inbox), await anext(inbox)
        assert (one.index, one.token_ids, one.logprobs) == (0, [1, 3], [first, last])
        assert (one.finish_reason, one.stop_reason) == ("stop", 3)
        assert (one.num_cached_tokens, one.prompt_logprobs) == (16, [None])
        assert (other.index, other.token_ids, other.finished) == (1, [2, 4, 5], True)

    go(test)


def test_what_ends_a_request_badly_is_not_joined_with_its_tokens() -> None:
    async def test(desk: Desk) -> None:
        inbox = desk.inbox()
        for item in (token(1), token(2), TokenEvent("r", finish_reason="error", error="broken", finished=True)):
            inbox.put(item)
        inbox.join_waiting()
        assert [(event.token_ids, event.error) async for event in inbox] == [([1, 2], None), ([], "broken")]

    go(test)


def test_an_offline_answer_cut_by_a_stop_string_still_says_what_was_cached() -> None:
    llm = LLM("demo", device="cpu", num_threads=1, max_num_seqs=2, num_gpu_blocks_override=64, max_model_len=256)
    prompt = "Copy this: " + "the quick brown fox jumps over the lazy dog " * 4
    whole = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True))[0]
    middle = whole.outputs[0].text[8:14]
    again = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, stop=[middle]))[0]
    assert again.outputs[0].finish_reason == "stop"
    assert again.num_cached_tokens >= 16
