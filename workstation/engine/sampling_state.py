"""How each row is sampled: parameters in a device table, sparse adjustments on the host, penalty counts on the device.

A *row* is a sequence's fixed slot in GPU state. The host writes rows at any time; `flush()`, called once when a step
begins, uploads what changed in one small copy a kind and never waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntFlag

import numpy as np
import numpy.typing as npt
import torch

from workstation.engine.request import SamplingParams
from workstation.engine.sampling_math import row_key, signed
from workstation.errors import InvalidRequestError

Ints = npt.NDArray[np.int64]

KEY, TOP_K, INVERSE_TEMPERATURE, TOP_P, MIN_P, PRESENCE, FREQUENCY, REPETITION = range(8)
COLUMNS = 8
SMALLEST_REPETITION = 1e-30  # keeps a masked logit's product with the penalty away from -inf * 0
LARGEST_BIAS = 100.0

IN_PROMPT = 1 << 30  # set in a penalty count when the prompt holds the token; the lower bits count the output


class RowFlag(IntFlag):
    """What a row needs beyond an argmax; the plan of a step looks only at these."""

    NONE = 0
    RANDOM = 1
    ORDERED = 2  # top_k or top_p
    TOP_P = 4
    MIN_P = 8
    PENALTIES = 16
    ALLOWED = 32
    SPARSE = 64  # bias or bans
    LOGPROBS = 128


@dataclass(slots=True)
class RowRules:
    """A row's sparse adjustments, host only.

    Attributes:
        bias: token → value added.  banned: never drawn (single-token bad words).
        step_banned: replaced by `set_banned`.  until_min: banned while the output is shorter than
        min_tokens.  allowed: if set, only these.  top_k: for the step's plan.  logprobs: top entries asked for, or None.
    """

    bias: dict[int, float] = field(default_factory=dict)
    banned: frozenset[int] = frozenset()
    step_banned: frozenset[int] = frozenset()
    until_min: frozenset[int] = frozenset()
    min_tokens: int = 0
    allowed: list[int] | None = None
    top_k: int = 0
    logprobs: int | None = None


def upload(array: Ints | npt.NDArray[np.float32], device: torch.device) -> torch.Tensor:
    """A host array on the device without waiting. The pinned buffer is held by torch until the copy is done."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def check_candidates(params: SamplingParams, stop_ids: Iterable[int]) -> None:
    """Refuse at admission what can never be sampled: an allow-list of which bans and min_tokens leave nothing.

    stop_ids: EOS and stop ids that min_tokens holds back. Raises InvalidRequestError.
    """
    if params.allowed_token_ids is None:
        return
    banned = {word[0] for word in params.bad_word_ids if len(word) == 1}
    if params.min_tokens > 0:
        banned.update(stop_ids)
    if banned.issuperset(params.allowed_token_ids):
        raise InvalidRequestError("allowed_token_ids must hold a token that bad_words and min_tokens do not ban, got "
                                  f"{len(params.allowed_token_ids)} ids, all banned", param="allowed_token_ids")


def needs_history(params: SamplingParams) -> bool:
    """Whether the bans of a step depend on the last tokens: bad words of two tokens or more."""
    return any(len(word) > 1 for word in params.bad_word_ids)


def banned_next(bad_word_ids: Sequence[Sequence[int]], output_token_ids: Sequence[int]) -> list[int]:
    """Tokens that would complete a bad word of two tokens or more, given the output so far."""
    return [word[-1] for word in bad_word_ids
            if len(word) > 1 and list(output_token_ids[-(len(word) - 1):]) == list(word[:-1])]


class PenaltyCounts:
    """How often each token was seen, for rows with penalties only. Memory: 4 bytes * V a slot, grown by doubling."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.table = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._free: list[int] = []
        self._slots: dict[int, int] = {}
        self._fills: dict[int, tuple[Ints, Ints]] = {}

    def slot(self, row: int) -> int:
        return self._slots[row]

    def release(self, row: int) -> None:
        slot = self._slots.pop(row, None)
        if slot is not None:
            self._fills.pop(slot, None)
            self._free.append(slot)

    def fill(self, row: int, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Note what a row has seen; the device learns it at `flush`."""
        tokens, counts = np.unique(np.asarray(output, dtype=np.int64), return_counts=True)
        both = np.union1d(np.asarray(prompt, dtype=np.int64), tokens)
        values = np.zeros(len(both), dtype=np.int64)
        values[np.searchsorted(both, tokens)] = counts
        values[np.isin(both, np.asarray(prompt, dtype=np.int64))] |= IN_PROMPT
        self._fills[self._take(row)] = (both, values)

    def fork(self, source: int, target: int) -> None:
        """Copy on the device, behind every step launched so far. Pending fills must have been flushed."""
        slot = self._take(target)
        self.table[slot].copy_(self.table[self._slots[source]])

    def flush(self) -> None:
        if not self._fills:
            return
        slots = np.fromiter(self._fills, dtype=np.int64)
        flat = np.concatenate([slot * self.vocab_size + tokens for slot, (tokens, _) in self._fills.items()])
        values = np.concatenate([values for _, values in self._fills.values()])
        sent = upload(np.concatenate([slots, flat, values]), self.device)
        where, what = sent[len(slots) : len(slots) + len(flat)], sent[len(slots) + len(flat) :]
        self.table.index_fill_(0, sent[: len(slots)], 0)
        self.table.view(-1).index_copy_(0, where, what.to(torch.int32))
        self._fills.clear()

    def add(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Count one new token in each slot. slots, tokens: [P] int64 on the device; slots distinct."""
        flat = slots * self.vocab_size + tokens
        self.table.view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))

    def _take(self, row: int) -> int:
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._slots[row] = slot
        return slot

    def _grow(self) -> None:
        old = self.table.shape[0]
        new = max(1, 2 * old)
        table = torch.zeros(new, self.vocab_size, dtype=torch.int32, device=self.device)
        table[:old].copy_(self.table)
        self.table = table
        self._free.extend(range(new - 1, old - 1, -1))


class SamplingState:
    """Sampling parameters by row.

    Attributes:
        table: [max_rows, 8] int64 on the device; columns KEY and TOP_K are integers, the rest float64 bits.
        counts: penalty counts, allocated for rows that use penalties.
        flags: [max_rows] host array of RowFlag bits.  rules: host-only rules by row.
        version: changes whenever a step's plan could.
    """

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.max_rows = max_rows
        self.vocab_size = vocab_size
        self.table = torch.zeros(max_rows, COLUMNS, dtype=torch.int64, device=self.device)
        self.counts = PenaltyCounts(vocab_size, self.device)
        self.flags = np.zeros(max_rows, dtype=np.int64)
        self.rules: dict[int, RowRules] = {}
        self.waiting_for_min: set[int] = set()
        self.version = 0
        self._host = np.zeros((max_rows, COLUMNS), dtype=np.int64)
        self._seeds: dict[int, int] = {}
        self._changed: set[int] = set()

    def set_row(
        self, row: int, params: SamplingParams, seed: int, sample_index: int = 0,
        prompt_token_ids: Sequence[int] = (), output_token_ids: Sequence[int] = (), stop_ids: Sequence[int] = (),
    ) -> None:
        """Give a row its rules; whatever it held before is forgotten.

        seed: any integer; with sample_index and the token's position it decides every draw of the row.
        prompt_token_ids, output_token_ids: what the penalties see (a preempted sequence comes back with its output).
        stop_ids: EOS and stop ids that min_tokens holds back; ids without a logit are ignored.
        Raises InvalidRequestError, the row untouched, for ids the model has no logit for.
        """
        self._check_row(row)
        params.check_token_ids(self.vocab_size)
        if params.has_penalties:
            self._check_ids("prompt_token_ids", prompt_token_ids)
            self._check_ids("output_token_ids", output_token_ids)
        self.clear_row(row)
        rules = self._rules(params, stop_ids)
        self.rules[row] = rules
        self._seeds[row] = seed
        self._write_parameters(row, params, rules.top_k, row_key(seed, sample_index))
        if params.has_penalties:
            self.counts.fill(row, prompt_token_ids, output_token_ids)
        self._set_flags(row, params, rules)

    def clear_row(self, row: int) -> None:
        """Forget a row; its penalty slot is free at once. Clearing an empty row does nothing."""
        self._check_row(row)
        if self.rules.pop(row, None) is None:
            return
        self.counts.release(row)
        self.waiting_for_min.discard(row)
        self._seeds.pop(row)
        self.flags[row] = 0
        self.version += 1

    def fork_row(self, source: int, target: int, sample_index: int) -> None:
        """Make `target` another sample of `source`: same rules and counts (as after every step launched so far),
        its own random stream."""
        if source == target or source not in self.rules:
            raise ValueError(f"cannot fork row {source} into row {target}")
        self._check_row(target)
        self.flush()
        self.clear_row(target)
        rules = self.rules[source]
        self.rules[target] = RowRules(**{name: getattr(rules, name) for name in RowRules.__slots__})
        self._seeds[target] = self._seeds[source]
        self._host[target] = self._host[source]
        self._host[target, KEY] = row_key(self._seeds[source], sample_index)
        self._changed.add(target)
        self.flags[target] = self.flags[source]
        if self.flags[source] & RowFlag.PENALTIES:
            self.counts.fork(source, target)
        if source in self.waiting_for_min:
            self.waiting_for_min.add(target)
        self.version += 1

    def set_banned(self, row: int, token_ids: Iterable[int]) -> None:
        """Ban tokens until the next call (multi-token bad words). Raises InvalidRequestError for unknown ids."""
        banned = frozenset(token_ids)
        self._check_ids("bad_words", list(banned))
        rules = self.rules[row]
        if banned == rules.step_banned:
            return
        rules.step_banned = banned
        self._mark_sparse(row)
        self.version += 1

    def flush(self) -> None:
        """Upload what changed since the last call; call it when a step begins."""
        self.counts.flush()
        if not self._changed:
            return
        rows = np.fromiter(self._changed, dtype=np.int64)
        sent = upload(np.concatenate([rows[:, None], self._host[rows]], axis=1), self.device)
        self.table.index_copy_(0, sent[:, 0].contiguous(), sent[:, 1:])
        self._changed.clear()

    def _check_row(self, row: int) -> None:
        if not 0 <= row < self.max_rows:
            raise ValueError(f"row must be between 0 and {self.max_rows - 1}, got {row}")

    def _check_ids(self, name: str, ids: Sequence[int]) -> None:
        array = np.asarray(ids, dtype=np.int64)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            wrong = array[(array < 0) | (array >= self.vocab_size)][0]
            raise InvalidRequestError(f"{name} must be token ids between 0 and {self.vocab_size - 1}, got {wrong}",
                                      param=name)

    def _rules(self, params: SamplingParams, stop_ids: Sequence[int]) -> RowRules:
        return RowRules(
            bias={token: min(max(value, -LARGEST_BIAS), LARGEST_BIAS) for token, value in params.logit_bias.items()},
            banned=frozenset(word[0] for word in params.bad_word_ids if len(word) == 1),
            until_min=frozenset(token for token in stop_ids if 0 <= token < self.vocab_size),
            min_tokens=params.min_tokens,
            allowed=None if params.allowed_token_ids is None else sorted(set(params.allowed_token_ids)),
            top_k=params.top_k if params.top_k < self.vocab_size else 0,
            logprobs=params.logprobs,
        )

    def _write_parameters(self, row: int, params: SamplingParams, top_k: int, key: int) -> None:
        """Temperature 0 is stored as an inverse of 0, which marks a greedy row; top_k 1 is greedy too, so that ties
        end the same way every time."""
        greedy = params.greedy or top_k == 1
        numbers = self._host[row].view(np.float64)
        self._host[row, KEY] = signed(key)
        self._host[row, TOP_K] = top_k
        numbers[INVERSE_TEMPERATURE] = 0.0 if greedy else 1.0 / params.temperature
        numbers[TOP_P] = params.top_p
        numbers[MIN_P] = params.min_p
        numbers[PRESENCE] = params.presence_penalty
        numbers[FREQUENCY] = params.frequency_penalty
        numbers[REPETITION] = max(params.repetition_penalty, SMALLEST_REPETITION)
        self._changed.add(row)

    def _set_flags(self, row: int, params: SamplingParams, rules: RowRules) -> None:
        flags = RowFlag.NONE
        if not (params.greedy or rules.top_k == 1):
            flags |= RowFlag.RANDOM
            flags |= RowFlag.ORDERED if rules.top_k > 0 or params.top_p < 1.0 else 0
            flags |= RowFlag.TOP_P if params.top_p < 1.0 else 0
            flags |= RowFlag.MIN_P if params.min_p > 0.0 else 0
        flags |= RowFlag.PENALTIES if params.has_penalties else 0
        flags |= RowFlag.ALLOWED if rules.allowed is not None else 0
        flags |= RowFlag.LOGPROBS if rules.logprobs is not None else 0
        self.flags[row] = flags
        self._mark_sparse(row)
        if rules.min_tokens > 0 and rules.until_min:
            self.waiting_for_min.add(row)
        self.version += 1

    def _mark_sparse(self, row: int) -> None:
        rules = self.rules[row]
        if rules.bias or rules.banned or rules.step_banned:
            self.flags[row] |= RowFlag.SPARSE
        else:
            self.flags[row] &= ~int(RowFlag.SPARSE)


__all__ = ["RowFlag", "RowRules", "SamplingState", "banned_next", "check_candidates", "needs_history", "upload"]
