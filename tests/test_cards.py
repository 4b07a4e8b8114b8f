"""The table of GPUs: complete, sourced, and found by the names people and drivers use."""

from __future__ import annotations

import pytest

from workstation.cards import BY_NAME, CARDS, Card, find_card, recognise
from workstation.errors import ConfigError
from workstation.memory import GIB


def test_there_are_at_least_20_cards_with_names_of_their_own() -> None:
    assert len(BY_NAME) == len(CARDS) >= 20


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_row_names_its_sources_and_stays_within_what_is_physical(card: Card) -> None:
    assert card.source and bool(card.seen_source) == (not card.is_derived)
    assert 0.9 * card.memory_gib <= card.total_bytes / GIB < card.memory_gib
    assert 200e9 < card.bandwidth <= 8e12
    assert card.dense8 is None or (card.fp8 and card.dense16 and 1.9 < card.dense8 / card.dense16 < 2.1)


def test_the_derived_share_is_not_above_what_cards_of_known_total_show() -> None:
    known = [(card.seen_gib / card.memory_gib, card) for card in CARDS if card.seen_gib is not None]
    assert min(share for share, card in known if card.ecc) > 0.925 - 1e-9
    assert min(share for share, card in known if not card.ecc) > 0.98 - 1e-9


def test_fp8_and_fp4_follow_the_generation() -> None:
    assert [(BY_NAME[name].fp8, BY_NAME[name].fp4) for name in ("a100-80gb", "l40s", "h200", "rtx-5090", "b200")] == [
        (False, False), (True, False), (True, False), (True, True), (True, True)]


@pytest.mark.parametrize(("given", "name"), [
    ("rtx-pro-6000", "rtx-pro-6000"), ("RTX 4090", "rtx-4090"), ("NVIDIA H200", "h200"),
    ("RTX PRO 6000 Blackwell", "rtx-pro-6000"), ("rtx_5090", "rtx-5090"),
])
def test_a_card_is_found_in_the_usual_spellings(given: str, name: str) -> None:
    assert find_card(given).name == name


def test_an_unknown_card_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'rtx-pro-6000'"):
        find_card("rtx-pro-600")
    with pytest.raises(ConfigError, match="--vram 24G works for any other"):
        find_card("?")


@pytest.mark.parametrize(("driver", "name"), [
    ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"),
    ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-40GB", "a100-40gb"), ("NVIDIA A100 80GB PCIe", "a100-80gb"),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000"), ("NVIDIA L40S", "l40s"),
    ("NVIDIA GeForce RTX 4080 SUPER", "rtx-4080-super"), ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
])
def test_a_card_is_recognised_by_its_drivers_name(driver: str, name: str) -> None:
    card = recognise(driver)
    assert card is not None and card.name == name


@pytest.mark.parametrize("driver", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce GTX 1080", ""])
def test_a_card_that_is_not_in_the_table_is_not_guessed(driver: str) -> None:
    assert recognise(driver) is None
