"""The arithmetic of sampling as pure tensor functions: no state, no host synchronisation.

Every function treats each row on its own, so a row's result does not depend on its company. A fused kernel may
replace `weights`, `filter_threshold` and `draw` as long as it keeps `uniform`'s numbers.

Notation: x are adjusted logits [L, V] float32, m their row maximum, T the temperature; the unnormalised weight of a
token is w = exp((x - m) / T), so the best token weighs exactly 1.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

NEG_INF = float("-inf")
MASK_64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment (Steele, Lea, Flood 2014)
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
UNIFORM_BITS = 52  # one fewer than float64 holds, so that u * total stays below total after rounding
UNIFORM_STEP: float = 2.0**-52
LOGPROB_CHUNK = 1 << 24  # elements a log-probability workspace may hold at once


def signed(value: int) -> int:
    """The int64 with the same 64 bits as `value` modulo 2**64."""
    value &= MASK_64
    return value - 2**64 if value >= 2**63 else value


def mix_int(value: int) -> int:
    """splitmix64's finaliser on a Python integer; returns 0…2**64-1."""
    value &= MASK_64
    value = ((value ^ (value >> 30)) * MIX_1) & MASK_64
    value = ((value ^ (value >> 27)) * MIX_2) & MASK_64
    return value ^ (value >> 31)


def row_key(seed: int, sample_index: int) -> int:
    """The int64 that starts a row's random stream; distinct samples of one request get unrelated streams."""
    return signed(mix_int(mix_int(seed) + GOLDEN * (sample_index + 1)))


def _mix(value: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64; the masks turn arithmetic shifts into logical ones."""
    value = torch.mul(value ^ ((value >> 30) & (2**34 - 1)), signed(MIX_1))
    value = torch.mul(value ^ ((value >> 27) & (2**37 - 1)), signed(MIX_2))
    return value ^ ((value >> 31) & (2**33 - 1))


def uniform(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One uniform number a row from a counter-based generator: element `position` of the stream `key`.

    keys, positions: [L] int64. Returns [L] float64 in [0, 1 - 2**-52], the same bits on every device.
    """
    bits = _mix(keys + (positions + 1) * signed(GOLDEN))
    fraction: torch.Tensor = ((bits >> (64 - UNIFORM_BITS)) & (2**UNIFORM_BITS - 1)).double()
    return fraction.mul_(UNIFORM_STEP)


def block_width(width: int) -> int:
    """Columns a block for two-level scans: near the root of the row's width and, when possible, a divisor of it."""
    wanted = [512, 256, 128, 64] if width >= 2**16 else [64, 128, 32]
    return next((size for size in wanted if width % size == 0), wanted[0])


def _blocks(rows: torch.Tensor, padding: float) -> torch.Tensor:
    """[L, V] as [L, blocks, columns], the tail filled with `padding`. A view when the width divides."""
    length, width = rows.shape
    columns = block_width(width)
    if width % columns:
        rows = functional.pad(rows, (0, columns - width % columns), value=padding)
    return rows.reshape(length, -1, columns)


def _one_block(blocks: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """blocks [L, B, C], index [L] int64 → [L, C]: each row's own block."""
    length, _, columns = blocks.shape
    return blocks.gather(1, index.view(length, 1, 1).expand(length, 1, columns)).squeeze(1)


def row_max(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest value of each row and the lowest index that holds it.

    x: [L, V]. Returns ([L], [L] int64). A row with NaN returns NaN and a valid index. Two levels, because a reduction
    that also tracks the index is an order of magnitude slower on a CPU.
    """
    blocks = _blocks(x, NEG_INF)
    block_best = blocks.amax(-1)
    value, block = block_best.max(-1)
    column = _one_block(blocks, block).argmax(-1)
    return value, (block * blocks.shape[-1] + column).clamp_(max=x.shape[1] - 1)


def weights(x: torch.Tensor, maximum: torch.Tensor, inverse_temperature: torch.Tensor) -> torch.Tensor:
    """w = exp((x - m) / T). x: [L, V]; maximum, inverse_temperature: [L]. Returns a new [L, V] float32."""
    return torch.sub(x, maximum.unsqueeze(1)).mul_(inverse_temperature.unsqueeze(1)).exp_()


def row_total(w: torch.Tensor) -> torch.Tensor:
    """Sum of each row's weights. w: [L, V] float32, returns [L] float64."""
    return _blocks(w, 0.0).sum(-1, dtype=torch.float64).sum(-1)


def draw(w: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF draw from unnormalised weights, in two levels: pick the block, then the token inside it.

    w: [L, V] float32, at least one weight above zero a row (else some valid id comes back). u: [L] float64 in [0, 1).
    Returns [L] int64. A token of weight zero is never drawn: the first index whose cumulative sum is *above* the
    target is taken, and both targets are kept below their totals.
    """
    blocks = _blocks(w, 0.0)
    columns = blocks.shape[-1]
    cumulative = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = (u * cumulative[:, -1]).unsqueeze(1)
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = _one_block(blocks, block.squeeze(1)).cumsum(-1, dtype=torch.float64)
    # Rounding may leave the rest at or above the block's own total: stay below it, or a masked tail could be hit.
    rest = torch.minimum(target - before, inside[:, -1:] * (1 - UNIFORM_STEP))
    column = torch.searchsorted(inside, rest, right=True)
    return (block * columns + column).squeeze(1).clamp_(max=w.shape[1] - 1)


def cut(w: torch.Tensor, by: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Zero, in place, the weights whose `by` is below the row's threshold. w, by: [R, V] float32; threshold: [R]."""
    return w.mul_(torch.ge(by, threshold.unsqueeze(1), out=torch.empty_like(by)))  # ge into float32: no bool pass


def filter_threshold(
    x: torch.Tensor, w: torch.Tensor, maximum: torch.Tensor, inverse_temperature: torch.Tensor,
    top_k: torch.Tensor, top_p: torch.Tensor, *, largest_k: int, any_top_p: bool,
) -> torch.Tensor:
    """The smallest logit each row keeps under top-k, then top-p over what top-k left. Ties with it are kept.

    x, w: [F, V] float32, w already cut by min-p. maximum, inverse_temperature: [F] float32; top_p: [F] float64;
    top_k: [F] int64, 0 = all. largest_k: the largest top_k when every row has one, else 0. any_top_p: whether some
    top_p is below 1. Returns [F] float32, -inf where nothing is cut.
    """
    ordered = descending(x, largest_k)
    last = ordered.shape[1] - 1
    kth = ordered.gather(1, (top_k - 1).clamp_(0, last).unsqueeze(1)).squeeze(1)
    kth = torch.where(top_k > 0, kth, NEG_INF)
    if not any_top_p:
        return kth
    left = row_total(cut(w.clone(), x, kth))
    mass = weights(ordered, maximum, inverse_temperature).cumsum(-1, dtype=torch.float64)
    enough = torch.searchsorted(mass, (top_p * left).unsqueeze(1)).clamp_(max=last)
    nucleus = ordered.gather(1, enough).squeeze(1)
    return torch.maximum(kth, torch.where(top_p < 1.0, nucleus, NEG_INF))


def descending(x: torch.Tensor, largest_k: int) -> torch.Tensor:
    """Logits in descending order, [F, K]: the first `largest_k` of each row when that is few, else all of them."""
    width = x.shape[1]
    if 0 < largest_k <= max(width // 32, 1):
        return x.topk(largest_k, dim=-1).values
    if x.device.type == "cpu":  # torch's CPU sort carries indices along; NumPy's is several times faster
        return torch.from_numpy(np.sort((-x).numpy(), axis=-1)).neg_()
    return x.sort(dim=-1, descending=True).values


def repeat_penalties(
    x: torch.Tensor, output_counts: torch.Tensor, seen: torch.Tensor,
    repetition: torch.Tensor, frequency: torch.Tensor, presence: torch.Tensor,
) -> torch.Tensor:
    """Repetition penalty (CTRL, Keskar 2019: divide positive logits, multiply negative ones) over prompt and output,
    then OpenAI's frequency and presence penalties over the output.

    x: [P, V] float32; output_counts: [P, V] float32; seen: [P, V] float32, 1 where prompt or output hold the token and
    else 0; the penalties: [P] float32, repetition above 0. Returns [P, V]; a division that overflows ends at the largest finite
    number, so that the row stays drawable.
    """
    factor = torch.addcmul(1 - seen, seen, repetition.unsqueeze(1))
    x = x.clamp(min=0).div_(factor).add_(x.clamp(max=0).mul_(factor))
    x.addcmul_(output_counts, frequency.unsqueeze(1), value=-1)
    x.addcmul_(output_counts.clamp(max=1), presence.unsqueeze(1), value=-1)
    return x.clamp_(max=torch.finfo(torch.float32).max)


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    """Natural log-probabilities of the raw distribution, in chunks of rows that bound the workspace.

    logits: [N, V]; tokens: [N] int64 (clamped into the row before the gather); k: 0…V top entries.
    Returns chosen [N] float32, top values [N, k] float32, top ids [N, k] int64, ranks [N] int64 (1 = most likely;
    ties share the better rank).
    """
    rows = max(1, LOGPROB_CHUNK // logits.shape[1])
    parts = [_token_logprobs(logits[at : at + rows].float(), tokens[at : at + rows], k)
             for at in range(0, max(len(tokens), 1), rows)]
    return tuple(torch.cat(column) if len(parts) > 1 else column[0] for column in zip(*parts, strict=True))


def _token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    total = logits.logsumexp(-1)
    chosen = logits.gather(1, tokens.clamp(0, logits.shape[1] - 1).unsqueeze(1))
    ranks = (logits > chosen).sum(-1) + 1
    top = logits.topk(min(k, logits.shape[1]), dim=-1)
    return chosen.squeeze(1) - total, top.values - total.unsqueeze(1), top.indices, ranks
