"""The demo model for training: a Qwen3 decoder over packed documents, with its layers' weights stacked for the optimiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Size:
    """The model's numbers, in config.json's terms."""

    vocab: int = 4096
    hidden: int = 256
    ffn: int = 768
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    positions: int = 8192
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, computed in fp32 (Zhang & Sennrich 2019)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on halves. x: [T, heads, head_dim]; cos, sin: [T, head_dim / 2] fp32."""
    one, two = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1).to(x.dtype)


def before_attention(
    x: Tensor, norm: Tensor, qkv: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, size: Size
) -> tuple[Tensor, Tensor, Tensor]:
    """x: [T, hidden] → q [T, heads, D], k and v [T, kv heads, D]: norm, projection, QK-norm, rotary embedding."""
    projected = F.linear(rms_norm(x, norm, size.norm_eps), qkv)
    wide, narrow = size.heads * size.head_dim, size.kv_heads * size.head_dim
    q, k, v = torch.split(projected, [wide, narrow, narrow], dim=-1)
    q = rms_norm(q.view(-1, size.heads, size.head_dim), q_norm, size.norm_eps)
    k = rms_norm(k.view(-1, size.kv_heads, size.head_dim), k_norm, size.norm_eps)
    return rotated(q, cos, sin), rotated(k, cos, sin), v.reshape(-1, size.kv_heads, size.head_dim)


def after_attention(x: Tensor, attended: Tensor, o: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, eps: float) -> Tensor:
    """Output projection and SwiGLU, each added to the residual. x: [T, hidden]; attended: [T, heads · D]."""
    x = x + F.linear(attended, o)
    gate, up = F.linear(rms_norm(x, norm, eps), gate_up).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, down)


def summed_loss(x: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor, eps: float) -> Tensor:
    """Cross-entropy summed over positions. x: [N, hidden]; targets: [N] int64."""
    return F.cross_entropy(F.linear(rms_norm(x, norm, eps), embedding).float(), targets, reduction="sum")


def packed_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Causal attention inside each document of a pack.

    Args:
        q: [T, heads, D]; k, v: [T, kv heads, D].  starts: [documents + 1] int32.  longest: tokens of the longest document.

    Returns:
        [T, heads · D]. FlashAttention on a GPU; a [T, T] mask on the CPU, meant for tests.
    """
    if q.is_cuda:
        out = torch.ops.aten._flash_attention_forward(q, k, v, starts, starts, longest, longest, 0.0, True, False)[0]
        return out.flatten(1)  # type: ignore[no-any-return]
    tokens = q.shape[0]
    document = torch.searchsorted(starts, torch.arange(tokens, dtype=starts.dtype), right=True)
    mask = (document[:, None] == document[None]).tril()
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1).flatten(1)


class Network(nn.Module):
    """The decoder. Matrices of one kind are one parameter [layers, out, in]."""

    cos: Tensor
    sin: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        wide, narrow = size.heads * size.head_dim, size.kv_heads * size.head_dim
        self.embedding = nn.Parameter(torch.randn(size.vocab, size.hidden) * 0.02)
        self.q = _stack(size.layers, wide, size.hidden)
        self.k = _stack(size.layers, narrow, size.hidden)
        self.v = _stack(size.layers, narrow, size.hidden)
        self.o = _stack(size.layers, size.hidden, wide, scale=0.0)
        self.gate = _stack(size.layers, size.ffn, size.hidden)
        self.up = _stack(size.layers, size.ffn, size.hidden)
        self.down = _stack(size.layers, size.hidden, size.ffn, scale=0.0)
        self.input_norm = nn.Parameter(torch.ones(size.layers, size.hidden))
        self.post_norm = nn.Parameter(torch.ones(size.layers, size.hidden))
        self.q_norm = nn.Parameter(torch.ones(size.layers, size.head_dim))
        self.k_norm = nn.Parameter(torch.ones(size.layers, size.head_dim))
        self.norm = nn.Parameter(torch.ones(size.hidden))
        angles = torch.outer(
            torch.arange(size.positions).float(),
            size.rope_theta ** (-torch.arange(0, size.head_dim, 2).float() / size.head_dim),
        )
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self._before: Callable[..., Any] = before_attention
        self._after: Callable[..., Any] = after_attention
        self._loss: Callable[..., Any] = summed_loss

    def compile_parts(self) -> None:
        """Fuses what lies between the attention calls; every layer shares the compiled code."""
        self._before = torch.compile(before_attention, dynamic=False)
        self._after = torch.compile(after_attention, dynamic=False)
        self._loss = torch.compile(summed_loss, dynamic=True)

    def matrices(self) -> list[nn.Parameter]:
        """The stacked weight matrices: what Muon trains. Everything else is AdamW's."""
        return [self.q, self.k, self.v, self.o, self.gate, self.up, self.down]

    def others(self) -> list[nn.Parameter]:
        chosen = {id(parameter) for parameter in self.matrices()}
        return [parameter for parameter in self.parameters() if id(parameter) not in chosen]

    def hidden(self, tokens: Tensor, positions: Tensor, starts: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
        """tokens, positions: [T] int64; starts: [documents + 1] int32 → [T, hidden] before the last norm."""
        size = self.size
        x = F.embedding(tokens, self.embedding).to(dtype)
        cos, sin = self.cos[positions], self.sin[positions]
        qkv = torch.cat((self.q, self.k, self.v), dim=1).to(dtype).unbind(0)
        gate_up = torch.cat((self.gate, self.up), dim=1).to(dtype).unbind(0)
        o, down = self.o.to(dtype).unbind(0), self.down.to(dtype).unbind(0)
        norms = [weight.unbind(0) for weight in (self.input_norm, self.q_norm, self.k_norm, self.post_norm)]
        for layer in range(size.layers):
            first, q_norm, k_norm, second = (weight[layer] for weight in norms)
            q, k, v = self._before(x, first, qkv[layer], q_norm, k_norm, cos, sin, size)
            attended = packed_attention(q, k, v, starts, longest)
            x = self._after(x, attended, o[layer], second, gate_up[layer], down[layer], size.norm_eps)
        return x

    def loss(self, x: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """The summed cross-entropy of `targets` [N] after the hidden states at `inputs` [N]."""
        return self._loss(x[inputs], self.norm, self.embedding.to(x.dtype), targets, self.size.norm_eps)  # type: ignore[no-any-return]


def _stack(layers: int, out: int, inside: int, scale: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(layers, out, inside) * (scale * 0.5 * inside**-0.5))
