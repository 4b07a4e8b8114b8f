"""One decoder layer: norm, attention over the paged cache, norm, SwiGLU. T tokens, H hidden, D head dim, F FFN width."""

from __future__ import annotations

import torch

from workstation.kernels import ops
from workstation.kernels.paging import UNSCALED, AttentionPlan
from workstation.kernels.quantized import Halves, Operand, Quantized
from workstation.memory import MLP_TOKENS
from workstation.model.linear import Linear


class Attention:
    """Grouped-query attention with rotary embedding and, for Qwen3, an RMSNorm of each query and key head."""

    __slots__ = ("cos_sin", "eps", "k_norm", "kv_scales", "num_heads", "num_kv_heads", "o", "q_norm", "qkv", "scale")

    def __init__(
        self, qkv: Linear, o: Linear, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, cos_sin: torch.Tensor,
        *, num_heads: int, num_kv_heads: int, head_dim: int, eps: float,
    ) -> None:
        self.qkv = qkv  # H → (Hq + 2 Hkv) · D: query, key and value heads in this order
        self.o = o  # Hq · D → H
        self.q_norm, self.k_norm, self.cos_sin, self.eps = q_norm, k_norm, cos_sin, eps
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.scale = head_dim**-0.5
        self.kv_scales = UNSCALED  # of an FP8 cache; the loader sets what the checkpoint has

    def __call__(
        self, qkv: torch.Tensor, positions: torch.Tensor, kv_layer: torch.Tensor, slots: torch.Tensor, plan: AttentionPlan,
    ) -> torch.Tensor:
        """qkv [T, (Hq + 2 Hkv) · D] → [T, H]; the tokens' keys and values are written to `slots` of kv_layer first."""
        q = ops.rope_and_cache(qkv, positions, self.cos_sin, self.q_norm, self.k_norm, self.eps, kv_layer, slots,
                               self.num_heads, self.num_kv_heads, self.kv_scales)
        return self.o(ops.attention(q, kv_layer, plan, self.scale, self.kv_scales).flatten(1))


class DecoderLayer:
    """Pre-norm residual layer. The residual stream is carried beside the branch's output, so add and norm are one kernel."""

    __slots__ = ("attention", "attention_norm", "down", "eps", "gate_up", "mlp_norm")

    def __init__(
        self, attention: Attention, gate_up: Linear, down: Linear, attention_norm: torch.Tensor,
        mlp_norm: torch.Tensor, eps: float,
    ) -> None:
        self.attention = attention
        self.gate_up = gate_up  # H → 2 F: gate, then up
        self.down = down  # F → H
        self.attention_norm, self.mlp_norm, self.eps = attention_norm, mlp_norm, eps

    def __call__(
        self, qkv: torch.Tensor, residual: torch.Tensor, positions: torch.Tensor, kv_layer: torch.Tensor,
        slots: torch.Tensor, plan: AttentionPlan,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(qkv [T, …], residual [T, H]) → (MLP output, not yet added, [T, H]; residual). Changes `residual`.

        The query, key and value product belongs to the norm in front of it, which also ends the layer before: see `enter`.
        """
        return self.feed_forward(self.attention(qkv, positions, kv_layer, slots, plan), residual)

    def feed_forward(self, attended: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(attention's output [T, H], residual) → (MLP output, not yet added; residual). Changes both."""
        normed, residual = _norm_before(self.gate_up, attended, residual, self.mlp_norm, self.eps)
        tokens = attended.shape[0]
        if tokens <= MLP_TOKENS:
            return self.down(self.gate_up.silu_mul(normed, self.down)), residual
        for first in range(0, tokens, MLP_TOKENS):  # in pieces, so that the widest activations stay small
            count = min(MLP_TOKENS, tokens - first)
            piece = self.gate_up.silu_mul(_tokens(normed, first, count), self.down)
            self.down.write(piece, attended[first:first + count])
        return attended, residual

    def enter(self, out: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(the layer before's output [T, H], residual) → (this layer's qkv, residual). Changes `residual`."""
        normed, residual = _norm_before(self.attention.qkv, out, residual, self.attention_norm, self.eps)
        return self.attention.qkv(normed), residual


def _norm_before(
    linear: Linear, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
) -> tuple[Operand, torch.Tensor]:
    """`ops.add_rms_norm`, its result as `linear` wants it."""
    return ops.add_rms_norm(x, residual, weight, eps, linear.after_norm(x.shape[0], x.dtype))


def _tokens(x: Operand, first: int, count: int) -> Operand:
    assert not isinstance(x, Halves)  # few tokens
    return x.tokens(first, count) if isinstance(x, Quantized) else x[first:first + count]
