"""The dense decoder of Llama, Mistral, Qwen2 and Qwen3 (Touvron et al. 2023, arXiv 2302.13971, and its descendants)."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Hashable, Iterator

import torch
import torch.nn.functional as F

from workstation.architecture import ModelShape
from workstation.kernels import ops
from workstation.model.inputs import InputTensors
from workstation.model.layers import Attention, DecoderLayer
from workstation.model.linear import DenseLinear, Linear, packed
from workstation.model.linear_forms import empty_linear
from workstation.model.rope import cos_sin_table
from workstation.quant.forms import FusedLinear, WeightForms, head_linear, layer_linears


class Decoder:
    """Embedding, layers, final norm, head. Built with uninitialised weights; `loader.load_model` fills them.

    Inference only: the caller holds `torch.inference_mode()`.

    Attributes:
        shape: the architecture.  embedding: [V, H].  final_norm: [H].  head: H → V (shares the embedding when tied).
        cos_sin: [max_model_len, D] float32 rotary table.  dtype, device: of weights and activations.
        forms: how each linear layer's weights are kept; None in the constructor means all dense.
    """

    def __init__(self, shape: ModelShape, *, dtype: torch.dtype, device: torch.device, max_model_len: int,
                 forms: WeightForms | None = None) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.forms = forms or WeightForms()
        self.embedding = torch.empty(shape.vocab_size, shape.hidden_size, dtype=dtype, device=device)
        self.cos_sin = cos_sin_table(shape.rope, max_model_len, device)
        self.layers = [self._layer(number) for number in range(shape.num_layers)]
        self.final_norm = torch.empty(shape.hidden_size, dtype=dtype, device=device)
        self.head: Linear = DenseLinear(self.embedding) if shape.tie_embeddings else self._linear(head_linear(shape))
        self._places = _places(shape)
        self._kv: tuple[torch.Tensor, ...] = ()
        self._steps: list[tuple[DecoderLayer, int, torch.Tensor, DecoderLayer | None]] = []

    def forward(self, inputs: InputTensors, kv: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Run a step's tokens through all layers, writing their keys and values into the cache.

        Args:
            inputs: the step; `slots[g]` and `plans[g]` belong to KV group g.
            kv: per KV group its pool [blocks, layer slots, 2, Hkv, block_size, D]; the same tuple at every step.
        Returns:
            [T, H] hidden states after the final norm.
        """
        if kv is not self._kv:
            self._bind(kv)
        positions, slots, plans, eps = inputs.positions, inputs.slots, inputs.plans, self.shape.norm_eps
        residual = F.embedding(inputs.token_ids, self.embedding)
        # One name for what is passed on: a large tensor lives no longer than it is read, as the memory plan has it.
        x = self.layers[0].attention.qkv(ops.rms_norm(residual, self.layers[0].attention_norm, eps))
        for layer, group, kv_layer, following in self._steps:
            x = layer.attention(x, positions, kv_layer, slots[group], plans[group])
            x, residual = layer.feed_forward(x, residual)
            if following is not None:
                x, residual = following.enter(x, residual)
        normed, _ = ops.add_rms_norm(x, residual, self.final_norm, eps)
        assert isinstance(normed, torch.Tensor)
        return normed

    __call__ = forward

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [L, H], rows of `forward`'s result → [L, V], on a GPU in the model's dtype, on a CPU in float32.

        out: [L, V] of that dtype, to write into.
        """
        if hidden.shape[0] == 0:
            return hidden.new_empty((0, self.shape.vocab_size), dtype=hidden.dtype if hidden.is_cuda else torch.float32)
        if out is not None:
            self.head.write(hidden, out)
            return out
        logits = self.head(hidden)
        return logits if logits.is_cuda else logits.float()

    def sample_of_layers(self) -> Decoder:
        """A decoder of these weights with two layers of every kind: it launches all kernels that this one does.

        Layers are of one kind whose weights have the same forms and whose keys and values lie in the same KV group. Two: the
        first of a step plans the attention of the others.
        """
        seen: Counter[Hashable] = Counter()
        chosen = []
        for number, (group, _) in enumerate(self._places):
            linears = layer_linears(self.shape, number)
            kind = group, *((part.form, part.activations, part.groups, part.linear.out_features)
                            for linear in linears for part in self.forms.segments(linear))
            seen[kind] += 1
            if seen[kind] <= 2:
                chosen.append(number)
        sample = copy.copy(self)
        sample.layers = [self.layers[number] for number in chosen]
        sample._places = [self._places[number] for number in chosen]
        sample._kv = ()
        return sample

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights and tables on the device."""
        tensors = [self.embedding, self.cos_sin, *self.norms()]
        return sum(tensor.nbytes for tensor in tensors) + sum(linear.nbytes for linear in self.linears())

    def pack_weights(self) -> None:
        """Put dense weights into the CPU's packed order, one at a time; call once, after loading. No-op on a GPU."""
        for layer in self.layers:
            layer.attention.qkv = packed(layer.attention.qkv)
            layer.attention.o = packed(layer.attention.o)
            layer.gate_up = packed(layer.gate_up)
            layer.down = packed(layer.down)
        self.head = packed(self.head)

    def linears(self) -> Iterator[Linear]:
        """Every linear layer with weights of its own; a tied head has none."""
        for layer in self.layers:
            yield from (layer.attention.qkv, layer.attention.o, layer.gate_up, layer.down)
        if not (self.shape.tie_embeddings and isinstance(self.head, DenseLinear)):
            yield self.head

    def norms(self) -> Iterator[torch.Tensor]:
        """Every norm's weight."""
        for layer in self.layers:
            yield from (layer.attention_norm, layer.mlp_norm)
            yield from (norm for norm in (layer.attention.q_norm, layer.attention.k_norm) if norm is not None)
        yield self.final_norm

    def _linear(self, linear: FusedLinear) -> Linear:
        return empty_linear(linear, self.forms, dtype=self.dtype, device=self.device)

    def _layer(self, number: int) -> DecoderLayer:
        shape = self.shape
        linears = layer_linears(shape, number)

        def norm(size: int) -> torch.Tensor:
            return torch.empty(size, dtype=self.dtype, device=self.device)

        attention = Attention(
            self._linear(linears.qkv), self._linear(linears.o),
            norm(shape.head_dim) if shape.qk_norm else None, norm(shape.head_dim) if shape.qk_norm else None,
            self.cos_sin, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
            eps=shape.norm_eps,
        )
        return DecoderLayer(attention, self._linear(linears.gate_up), self._linear(linears.down),
                            norm(shape.hidden_size), norm(shape.hidden_size), shape.norm_eps)

    def _bind(self, kv: tuple[torch.Tensor, ...]) -> None:
        """Make every layer's view of the pool once, not at every step."""
        following = [*self.layers[1:], None]
        self._steps = [(layer, group, kv[group][:, slot], after) for layer, (group, slot), after
                       in zip(self.layers, self._places, following, strict=True)]
        self._kv = kv


def _places(shape: ModelShape) -> list[tuple[int, int]]:
    """Each layer's (KV group, layer slot in that group's blocks)."""
    by_layer = {layer: (group, slot) for group, item in enumerate(shape.kv_groups)
                for slot, layer in enumerate(item.layers)}
    return [by_layer[layer] for layer in range(shape.num_layers)]
