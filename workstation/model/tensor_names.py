"""Which tensor of a checkpoint goes where in a Decoder. Names are those of transformers' `…ForCausalLM`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from workstation.architecture import ModelShape
from workstation.model.layers import DecoderLayer
from workstation.model.linear import DenseLinear, Linear
from workstation.model.transformer import Decoder

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def destinations(decoder: Decoder) -> dict[str, torch.Tensor]:
    """Every tensor a checkpoint must hold, by name: the (part of a fused) weight it fills, as a contiguous view."""
    shape = decoder.shape
    table = {EMBEDDING: decoder.embedding, "model.norm.weight": decoder.final_norm}
    for number, layer in enumerate(decoder.layers):
        prefix = f"model.layers.{number}."
        table.update((prefix + name, tensor) for name, tensor in _layer_tensors(layer, shape))
    if not shape.tie_embeddings:
        table[HEAD] = _dense(decoder.head).weight
    return table


def is_surplus(name: str, shape: ModelShape) -> bool:
    """Tensors that old or careless exporters add and that hold nothing of their own."""
    return name.endswith("rotary_emb.inv_freq") or (shape.tie_embeddings and name == HEAD)


def _layer_tensors(layer: DecoderLayer, shape: ModelShape) -> Iterator[tuple[str, torch.Tensor]]:
    attention = layer.attention
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    yield "input_layernorm.weight", layer.attention_norm
    yield "post_attention_layernorm.weight", layer.mlp_norm
    yield from _parts(attention.qkv, {"self_attn.q_proj": q_size, "self_attn.k_proj": kv_size,
                                      "self_attn.v_proj": kv_size})
    yield from _parts(attention.o, {"self_attn.o_proj": shape.hidden_size})
    yield from _parts(layer.gate_up, {"mlp.gate_proj": shape.intermediate_size, "mlp.up_proj": shape.intermediate_size})
    yield from _parts(layer.down, {"mlp.down_proj": shape.hidden_size})
    if attention.q_norm is not None and attention.k_norm is not None:
        yield "self_attn.q_norm.weight", attention.q_norm
        yield "self_attn.k_norm.weight", attention.k_norm


def _parts(linear: Linear, rows: dict[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
    """The named row ranges of a (fused) layer's weight, and of its bias when it has one."""
    dense = _dense(linear)
    start = 0
    for name, count in rows.items():
        yield f"{name}.weight", dense.weight[start:start + count]
        if dense.bias is not None:
            yield f"{name}.bias", dense.bias[start:start + count]
        start += count


def _dense(linear: Linear) -> DenseLinear:
    if not isinstance(linear, DenseLinear):
        raise TypeError(f"weights are loaded before they are packed, not into {type(linear).__name__}")
    return linear
