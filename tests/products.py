"""Products of test parameters of which a few members run by default and the rest with `-m long`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest

Member = tuple[int, ...]


def meetings(member: Member, strength: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """The (axis, place) sets of this size that occur together in a member."""
    return combinations(enumerate(member), min(strength, len(member)))


def covering(sizes: Sequence[int], strength: int) -> set[Member]:
    """Members of a product of axes of these sizes, few (greedily), in which every `strength` values of different axes meet."""
    every = list(product(*map(range, sizes)))
    left = {meeting for member in every for meeting in meetings(member, strength)}
    chosen = set()
    while left:
        best = max(every, key=lambda member: sum(meeting in left for meeting in meetings(member, strength)))
        chosen.add(best)
        left.difference_update(meetings(best, strength))
    return chosen


def some_of(
    strength: int = 2, /, *, indirect: Sequence[str] = (), **axes: Sequence[Any] | Mapping[str, Any]
) -> pytest.MarkDecorator:
    """Parametrise by the product of the axes, each a list of values or a table of them by id.

    By default every pair of values of two axes occurs (with a strength of 1: every value), with `-m long` all the rest.
    """
    named = [axis if isinstance(axis, Mapping) else {str(value): value for value in axis} for axis in axes.values()]
    few = covering([len(axis) for axis in named], strength)
    members = [
        pytest.param(
            *(value for _, value in items), id="-".join(key for key, _ in items),
            marks=() if places in few else pytest.mark.long,
        )
        for places, items in zip(
            product(*(range(len(axis)) for axis in named)), product(*(axis.items() for axis in named)), strict=True
        )
    ]
    return pytest.mark.parametrize(tuple(axes), members, indirect=indirect)
