"""config.json → ModelShape: the only reader of Hugging Face field names. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

LayerKind = Literal["full", "sliding"]


@dataclass(frozen=True, slots=True)
class RopeShape:
    """Rotary embedding. `kind` is default, linear, dynamic, llama3, yarn or longrope; `options` holds its numbers."""

    kind: str = "default"
    theta: float = 10000.0
    rotary_dim: int = 0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share one paging rule and one block table a sequence. All groups hold the same number of layer slots.

    Attributes:
        kind: "full" or "sliding".  layers: model layer numbers, in order; slot i of a block belongs to layers[i].
        window: keys a query sees in a sliding group; 0 for full.
    """

    kind: LayerKind
    layers: tuple[int, ...]
    window: int = 0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder, in our words.

    Attributes:
        architecture: "llama", "mistral", "qwen2" or "qwen3".
        vocab_size: rows of the embedding = width of the logits.
        window: sliding window in tokens, 0 when no layer slides.  layer_kinds: one entry a layer.
        kv_groups: how layers share block tables (see KVGroup).
        max_position: the window the model was made for (after RoPE scaling).
        dtype: the checkpoint's dtype name.  eos_token_ids, bos_token_id: from config.json (generation_config.json overrides).
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope: RopeShape
    max_position: int
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    window: int
    layer_kinds: tuple[LayerKind, ...]
    kv_groups: tuple[KVGroup, ...]
    dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    quantization: dict[str, Any] | None = None

    @property
    def layers_per_block(self) -> int:
        """Layer slots in a block: the same in every group, so that one pool serves all."""
        return max(len(group.layers) for group in self.kv_groups)

    def kv_bytes_per_block(self, block_size: int, element_bytes: int) -> int:
        return self.layers_per_block * 2 * self.num_kv_heads * block_size * self.head_dim * element_bytes
