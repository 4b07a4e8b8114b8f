"""The memory ledger: what a start took, by the plan's parts, from a made-up card and allocator."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import make_engine

from workstation import gpu
from workstation.catalog import demo_folder
from workstation.engine.ledger import MemoryLedger
from workstation.memory import MemoryPlan

GIB = 2**30


class Card:
    """torch's allocator and the card's memory: bytes of tensors, of the allocator, of everybody."""

    def __init__(self) -> None:
        self.tensors = self.peak = self.reserved = 0
        self.taken = 3 * GIB  # another process's

    def take(self, count: int, *, tensors: bool = True) -> None:
        self.taken += count
        if tensors:
            self.tensors += count
            self.reserved += count
            self.peak = max(self.peak, self.tensors)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    answers: dict[str, Any] = {
        "memory_allocated": lambda device: card.tensors, "memory_reserved": lambda device: card.reserved,
        "max_memory_allocated": lambda device: card.peak, "mem_get_info": lambda device: (90 * GIB - card.taken, 90 * GIB),
        "reset_peak_memory_stats": lambda device: setattr(card, "peak", card.tensors), "synchronize": lambda device: None,
        "empty_cache": lambda: None, "get_device_properties": lambda device: SimpleNamespace(uuid="1")}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(gpu, "used_bytes", lambda: {"GPU-1": card.taken})
    return card


def started(card: Card) -> MemoryLedger:
    ledger = MemoryLedger(torch.device("cuda"))
    card.take(GIB, tensors=False)  # CUDA's context
    for count in (8, 20):
        with ledger.part("workspace"):
            card.take(count * GIB)
    ledger.move("workspace", "weights", 8 * GIB)
    ledger.move("workspace", "kv", 19 * GIB)
    with ledger.working():
        card.take(2 * GIB)
        card.tensors -= 2 * GIB
    with ledger.capturing():
        card.take(3 * GIB)
        card.take(GIB // 2, tensors=False)  # what the driver keeps of graphs
    return ledger


def plan() -> MemoryPlan:
    return MemoryPlan(*(number * GIB for number in (8, 19, 3, 0, 0, 1, 3, 0, 80)), num_blocks=10, block_size=16,
                      max_model_len=100, max_num_batched_tokens=100)


def test_every_part_is_told_apart(card: Card) -> None:
    assert started(card).close(plan()) == {
        "weights": 8 * GIB, "kv": 19 * GIB, "workspace": 3 * GIB, "graphs": 7 * GIB // 2, "context": GIB}


def test_a_line_holds_the_parts_against_the_plan(card: Card, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ws.engine"):
        started(card).close(plan())
    assert "workspace 3.00 GiB, 3.00 GiB; weights 8.00 GiB, 8.00 GiB" in caplog.text
    assert "graphs 3.00 GiB, 3.50 GiB" in caplog.text


def test_the_context_is_left_out_where_the_card_does_not_tell(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "used_bytes", dict)
    assert "context" not in started(card).close(plan())


def test_without_a_gpu_nothing_is_measured() -> None:
    assert make_engine(demo_folder(), num_blocks=600).info.measured == {}
