"""Predicted seconds of a decode step and of a prompt, from bandwidth and matrix rates. Pure arithmetic, no torch.

    step   = max(weights / (b · B), 2 · rows · parameters / (m · R)) + KV / (b · B) + layers · l + rows · r
    prompt = max(weights / (b · B), 2 · tokens · parameters / (m · R) + attention FLOP / (a · R16)) + layers · l

B is the card's bandwidth, R its dense rate for the operands, R16 the 16-bit one. The five constants were fitted to what this
server measured on one H200 (docs/performance.md: 8B in bf16 and FP8, 70B in FP8, 0.6B, batches of 1 to 128, prompts of 2k and
32k); on other cards they are an assumption. Predictions, never measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from workstation.architecture import ModelShape

BANDWIDTH_SHARE = 0.80  # b: of the datasheet's bandwidth
MATRIX_SHARE = 0.60  # m: of the dense rate, in products of a prompt
ATTENTION_SHARE = 0.52  # a: of the dense 16-bit rate, in attention of a prompt
LAYER_SECONDS = 16e-6  # l: norms, RoPE, gaps between kernels
ROW_SECONDS = 5e-6  # r: sampling and attention's fixed part


@dataclass(frozen=True, slots=True)
class Speed:
    """What decides speed on one card: bytes/s, and FLOP/s for the weights' operands and for 16-bit ones (None: unknown)."""

    bandwidth: float
    dense: float | None
    dense16: float | None


def read_bytes(shape: ModelShape, weight_bytes: int, dtype_bytes: int = 2) -> int:
    """Bytes of weights a step reads: all but the embedding, of which a step reads single rows; a tied one is the head."""
    return weight_bytes - (0 if shape.tie_embeddings else shape.vocab_size * shape.hidden_size * dtype_bytes)


def kv_bytes_read(shape: ModelShape, context: float, kv_dtype_bytes: int) -> float:
    """Bytes of KV one decode row reads at `context` tokens; a sliding layer reads its window."""
    token = 2 * shape.num_kv_heads * shape.head_dim * kv_dtype_bytes
    return sum(token * (context if group.kind == "full" else min(context, group.window)) * len(group.layers)
               for group in shape.kv_groups)


def decode_seconds(
    shape: ModelShape, weight_bytes: int, speed: Speed, *, rows: float, context: float, kv_dtype_bytes: int = 2,
) -> float:
    """Predicted seconds of one decode step of `rows` sequences that hold `context` tokens each."""
    bandwidth = BANDWIDTH_SHARE * speed.bandwidth
    products = 2 * rows * _products(shape) / (MATRIX_SHARE * speed.dense) if speed.dense else 0.0
    weights = max(read_bytes(shape, weight_bytes) / bandwidth, products)
    kv = rows * kv_bytes_read(shape, context, kv_dtype_bytes) / bandwidth
    return weights + kv + shape.num_layers * LAYER_SECONDS + rows * ROW_SECONDS


def prompt_seconds(shape: ModelShape, weight_bytes: int, speed: Speed, tokens: float, prompts: int = 1) -> float | None:
    """Predicted seconds from an idle server's first step to the first token of a prompt; None without matrix rates.

    Of several prompts of that length that begin together: to the first token of the last.
    """
    if speed.dense is None or speed.dense16 is None:
        return None
    body = _products(shape) - shape.vocab_size * shape.hidden_size  # the head computes the last token only
    products = 2 * tokens * body / (MATRIX_SHARE * speed.dense)
    attention = 0.0
    for group in shape.kv_groups:
        keys = tokens if group.kind == "full" else min(tokens, 2 * group.window)
        # Scores and values, 2 FLOP each, half of it hidden by causality.
        attention += 2 * tokens * keys * shape.num_heads * shape.head_dim * len(group.layers)
    seconds = prompts * (products + attention / (ATTENTION_SHARE * speed.dense16))
    floor = read_bytes(shape, weight_bytes) / (BANDWIDTH_SHARE * speed.bandwidth)
    return max(floor, seconds) + shape.num_layers * LAYER_SECONDS


def _products(shape: ModelShape) -> int:
    """Parameters a row is multiplied with: everything but the embedding, the head included."""
    embedding = 0 if shape.tie_embeddings else shape.vocab_size * shape.hidden_size
    return shape.num_parameters - embedding
