"""Generated documents as packs: a fixed number of tokens, document after document, with what the loss covers marked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workstation.demo.mixture import long_task, short_task
from workstation.demo.tasks import Task
from workstation.demo.template import END_OF_TEXT, IM_END, IM_START, document

SHORT_LIMIT = 640  # tokens; longer documents go into long packs, because attention's cost follows a pack's longest document
LONG_LIMIT = 6_144
_ENCODE_TOGETHER = 512


@dataclass(frozen=True, slots=True)
class Pack:
    """One micro-batch.

    Attributes:
        tokens: [T] uint16.  positions: [T] int16, from 0 in each document.
        starts: [documents + 1] int32, where documents begin.
        inputs: [N] int32, indices whose next token the loss covers.  targets: [N] uint16, those next tokens.
        longest: tokens of the longest document a pack of this kind may hold.
    """

    tokens: NDArray[np.uint16]
    positions: NDArray[np.int16]
    starts: NDArray[np.int32]
    inputs: NDArray[np.int32]
    targets: NDArray[np.uint16]
    longest: int


class Packer:
    """Draws tasks, encodes them and fills packs of `size` tokens. Deterministic for a seed."""

    def __init__(self, tokenizer: Any, size: int, seed: int) -> None:
        self._tokenizer = tokenizer
        self._size = size
        self._rng = Random(seed)
        self._marks = Marks(tokenizer)
        self._waiting: dict[bool, list[tuple[NDArray[np.uint16], int]]] = {False: [], True: []}

    def pack(self, long: bool) -> Pack:
        """The next pack of long (500 to 6,144 tokens) or of short documents."""
        limit = LONG_LIMIT if long else SHORT_LIMIT
        chosen, room = [], self._size
        for ids, skipped in self._documents(long):
            if len(ids) > room:
                chosen.append((ids[:room], skipped))
                break
            chosen.append((ids, skipped))
            room -= len(ids)
            if not room:
                break
        return self._packed(chosen, limit)

    def _documents(self, long: bool) -> Iterator[tuple[NDArray[np.uint16], int]]:
        """Documents without end; what is too long for its kind waits for the other."""
        make: Callable[[Random], Task] = long_task if long else short_task
        waiting = self._waiting[long]
        while True:
            while waiting:
                yield waiting.pop()
            tasks = [make(self._rng) for _ in range(8 if long else _ENCODE_TOGETHER)]
            encoded = self._tokenizer.encode_batch_fast([document(task) for task in tasks], add_special_tokens=False)
            for task, encoding in zip(tasks, encoded, strict=True):
                ids = np.array(encoding.ids, dtype=np.uint16)[:LONG_LIMIT]
                self._waiting[len(ids) > SHORT_LIMIT].append((ids, task.untrained_turns))

    def _packed(self, chosen: list[tuple[NDArray[np.uint16], int]], limit: int) -> Pack:
        tokens = np.concatenate([ids for ids, _ in chosen])
        starts = np.cumsum([0, *(len(ids) for ids, _ in chosen)], dtype=np.int32)
        lengths = np.diff(starts)
        positions = (np.arange(self._size) - np.repeat(starts[:-1], lengths)).astype(np.int16)
        targets_at = self._marks.trained(tokens, starts, np.array([skipped for _, skipped in chosen]))
        return Pack(tokens, positions, starts, (targets_at - 1).astype(np.int32), tokens[targets_at], limit)


class Marks:
    """Finds the tokens the model must write: assistant turns up to <|im_end|>; FIM middles and bare text to <|endoftext|>."""

    def __init__(self, tokenizer: Any) -> None:
        self._start, self._end = tokenizer.token_to_id(IM_START), tokenizer.token_to_id(IM_END)
        self._over, self._middle = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id("<|fim_middle|>")
        self._openers = (self._start, tokenizer.token_to_id("<|fim_prefix|>"))
        self._assistant = tokenizer.token_to_id("assistant")
        if self._assistant is None:
            raise ValueError("the tokenizer must know 'assistant' as one token")

    def trained(self, tokens: NDArray[np.uint16], starts: NDArray[np.int32], skipped: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices of the trained tokens.

        Args:
            tokens: [T], documents in a row.  starts: [documents + 1].
            skipped: [documents], how many first assistant turns get no loss.
        """
        size = len(tokens)
        opened = np.flatnonzero((tokens[:-1] == self._start) & (tokens[1:] == self._assistant))
        document_of = np.searchsorted(starts, opened, side="right") - 1
        before = np.searchsorted(opened, starts[:-1])  # assistant turns ahead of each document
        ordinal = np.arange(len(opened)) - before[document_of]
        first = np.concatenate([opened[ordinal >= skipped[document_of]] + 3, np.flatnonzero(tokens == self._middle) + 1])
        plain = starts[:-1][~np.isin(tokens[starts[:-1]], self._openers)]  # bare text is trained from its second token on
        first = np.concatenate([first, plain + 1])
        first = np.sort(first[first < size])
        closed = np.flatnonzero((tokens == self._end) | (tokens == self._over))
        after = np.searchsorted(closed, first)
        last = np.where(after < len(closed), closed[np.minimum(after, len(closed) - 1)], size - 1)
        covered = np.zeros(size + 1, dtype=np.int32)
        covered[first] += 1
        np.subtract.at(covered, last + 1, 1)
        return np.flatnonzero(np.cumsum(covered[:-1]) > 0)


def produce(tokenizer_file: Path, size: int, seed: int, pattern: tuple[bool, ...], put: Callable[[Pack], None]) -> None:
    """A worker: packs without end, long or short as the pattern says, handed to `put` (which may block)."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    packer = Packer(Tokenizer.from_file(str(tokenizer_file)), size, seed)
    while True:
        for long in pattern:
            put(packer.pack(long))


def documents_in(pack: Pack) -> list[NDArray[np.uint16]]:
    """The documents of a pack; the last may be cut."""
    return [pack.tokens[start:end] for start, end in pairwise(pack.starts.tolist())]
