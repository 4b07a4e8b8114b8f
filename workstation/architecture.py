"""config.json → ModelShape: with rope_config.py the only reader of Hugging Face field names. Imports no torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from workstation.config_fields import Fields
from workstation.errors import ModelFolderError
from workstation.model_folder import check_depth, has_file, model_folder, read_json_object, shown
from workstation.rope_config import MAX_POSITIONS, read_rope
from workstation.safetensors_header import checkpoint_dtype

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
        dtype: the checkpoint's dtype name.  quantization: the checkpoint's own description, None for plain weights.
        unread_fields: names in config.json that we neither know nor use.
        eos_token_ids, bos_token_id: from config.json (generation_config.json overrides).
        headless: the model was saved without a head and makes embeddings only; the embedding stands in for one.
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
    unread_fields: tuple[str, ...] = ()
    headless: bool = False

    @property
    def layers_per_block(self) -> int:
        """Layer slots in a block: the same in every group, so that one pool serves all."""
        return max(len(group.layers) for group in self.kv_groups)

    @property
    def num_parameters(self) -> int:
        """Weights, biases and norms; a tied head counts once."""
        heads, hidden, ffn = self.num_heads + 2 * self.num_kv_heads, self.hidden_size, self.intermediate_size
        attention = hidden * (heads + self.num_heads) * self.head_dim + 2 * self.head_dim * self.qk_norm
        biases = self.qkv_bias * heads * self.head_dim + self.o_bias * hidden + self.mlp_bias * (2 * ffn + hidden)
        layer = attention + 3 * hidden * ffn + 2 * hidden + biases
        return self.num_layers * layer + hidden + self.vocab_size * hidden * (1 if self.tie_embeddings else 2)

    def kv_bytes_per_block(self, block_size: int, element_bytes: int) -> int:
        return self.layers_per_block * 2 * self.num_kv_heads * block_size * self.head_dim * element_bytes


SUPPORTED = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
DTYPES = ("bfloat16", "float16", "float32")
MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20
MAX_HEADS = 1024
MAX_VOCAB = 1 << 22
HEAD_DIM_STEP, MAX_HEAD_DIM = 16, 256

# Fields of transformers' base class and of training: they do not touch a token's logits.
_HARMLESS = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout", "auto_map", "bad_words_ids",
    "begin_suppress_tokens", "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "embd_pdrop", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "is_matryoshka",
    "matryoshka_dimensions",
    "hidden_dropout", "id2label", "initializer_range", "is_decoder", "label2id", "length_penalty", "max_length",
    "min_length", "mlp_dropout", "model_max_length", "model_type", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id",
    "prefix", "pretraining_tp", "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty",
    "resid_pdrop", "return_dict", "return_dict_in_generate", "rope_scaling", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "torchscript", "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
})

# Present and not neutral, these mean other mathematics than this decoder runs. `False`, `[]`, `{}` are always neutral.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (), "add_cross_attention": (), "tie_encoder_decoder": (), "use_rope": (True,),
    "rope_interleaved": (), "is_neox_style": (True,), "position_embedding_type": ("rope", "rotary"),
    "hidden_activation": ("silu", "swish"), "activation_function": ("silu", "swish"),
    "text_config": (), "vision_config": (), "audio_config": (), "attention_chunk_size": (), "use_bias": (), "bias": (),
    "rotary_dim": (), "rotary_pct": (1.0,), "norm_type": ("rms_norm", "rmsnorm"), "layer_norm_eps": (),
}
_SUSPICIOUS = re.compile(
    r"softcap|soft_cap|multiplier|sink|expert|moe|mrope|alibi|scal|clip|qk_norm|qk_layernorm|no_rope|nope_|parallel_(?:attn|block|residual)"
    r"|query_pre_attn|post_norm|unit_offset|cross_attention|kv_shared|share_kv|lora|chunk|conv_|_conv|ssm|mamba|linear_attn"
    r"|window|gate|norm_position|hyper|altup|laurel|nextn")


def read_shape(source: str | os.PathLike[str] | dict[str, Any]) -> ModelShape:
    """Read a model folder's config.json (or the parsed object) into a ModelShape.

    Covers dense Llama, Mistral, Qwen2 and Qwen3 in the spellings of transformers 4 and 5; a field that is absent has
    transformers' default. Raises ModelFolderError naming the field, the value and what is supported.
    """
    if isinstance(source, dict):
        values, folder = source, None
        check_depth(values, "config.json")
    else:
        folder = model_folder(source)
        values = read_json_object(folder, "config.json")
    _refuse_remote_code(values)
    config = Fields(values)
    architecture = _architecture(config)
    headless, sizes = _is_headless(config, architecture), _sizes(config, architecture)
    rope = read_rope(config, sizes["head_dim"])
    kinds, window = _layer_kinds(config, architecture, sizes["num_layers"], rope.max_position)
    shape = ModelShape(
        architecture=architecture, **sizes, **_biases(config, architecture),
        norm_eps=config.number("rms_norm_eps", 1e-12, 1.0, 1e-6),
        rope=RopeShape(rope.kind, rope.theta, sizes["head_dim"], rope.options), max_position=rope.max_position,
        headless=headless, tie_embeddings=config.boolean("tie_word_embeddings", False) or headless,
        qk_norm=architecture == "qwen3", window=window, layer_kinds=kinds,
        kv_groups=partition_layers(kinds, window), dtype=_dtype(config, folder),
        **_special_tokens(config, architecture, sizes["vocab_size"]), quantization=_quantization(config, folder),
    )
    return replace(shape, unread_fields=_unread_fields(config))


def partition_layers(kinds: tuple[LayerKind, ...], window: int) -> tuple[KVGroup, ...]:
    """Cut layers into KV groups of equal size, so that every group's block has equally many bytes.

    The size is the smaller of the two kinds' counts: 5 sliding layers for 1 full one give 6 groups of 1 layer each.
    A kind's last group may have spare slots. Groups come in the order of their first layer.
    """
    by_kind: dict[LayerKind, list[int]] = {}
    for layer, kind in enumerate(kinds):
        by_kind.setdefault(kind, []).append(layer)
    size = min(len(layers) for layers in by_kind.values())
    groups = [
        KVGroup(kind, tuple(layers[start:start + size]), window if kind == "sliding" else 0)
        for kind, layers in by_kind.items() for start in range(0, len(layers), size)
    ]
    return tuple(sorted(groups, key=lambda group: group.layers[0]))


def _refuse_remote_code(values: dict[str, Any]) -> None:
    """`auto_map` at any depth asks for Python from the folder to be run, which this server never does."""
    level: list[Any] = [values]
    while level:
        item = level.pop()
        if isinstance(item, dict):
            if item.get("auto_map"):
                raise ModelFolderError(f"config.json: auto_map = {shown(item['auto_map'])} asks to run code from the "
                                       "model folder; remote code is never run", param="auto_map")
            level.extend(item.values())
        elif isinstance(item, list):
            level.extend(item)


def _architecture(config: Fields) -> str:
    listed = config.raw("architectures", [])
    if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
        raise config.refuse("architectures", "a list of class names")
    by_class = {name: kind for kind, name in SUPPORTED.items()}
    kind = config.text("model_type", next((by_class[item] for item in listed if item in by_class), ""))
    supported = f"one of {', '.join(SUPPORTED)}"
    if kind not in SUPPORTED:
        raise config.refuse("model_type" if kind else "architectures", f"{supported} (the supported architectures)")
    if listed and SUPPORTED[kind] not in listed and not _is_headless(config, kind):
        raise config.refuse("architectures", f"{SUPPORTED[kind]} for model_type {kind!r}")
    return kind


def _is_headless(config: Fields, kind: str) -> bool:
    """An embedding model without a head of its own, such as MistralModel."""
    return SUPPORTED[kind].replace("ForCausalLM", "Model") in (config.raw("architectures") or [])


def _sizes(config: Fields, architecture: str) -> dict[str, Any]:
    hidden = config.integer("hidden_size", 1, MAX_WIDTH)
    heads = config.integer("num_attention_heads", 1, MAX_HEADS)
    # Only Llama's first configs came without num_key_value_heads; null means "as many as heads" everywhere.
    absent = "num_key_value_heads" not in config.values and architecture != "llama"
    kv_heads = config.integer("num_key_value_heads", 1, heads, *(() if absent else (heads,)))
    if heads % kv_heads:
        raise config.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    head_dim = config.integer("head_dim", 1, MAX_HEAD_DIM, 128 if architecture == "qwen3" else 0)
    if not head_dim:
        if hidden % heads:
            raise config.refuse("hidden_size", f"a multiple of num_attention_heads ({heads}) when head_dim is absent")
        head_dim = hidden // heads
    if head_dim % HEAD_DIM_STEP or head_dim > MAX_HEAD_DIM:
        raise ModelFolderError(f"config.json: head_dim must be a multiple of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM}, "
                               f"got {head_dim}", param="head_dim")
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        if config.text(name, "silu") not in ("silu", "swish"):
            raise config.refuse(name, "silu")
    return {
        "num_layers": config.integer("num_hidden_layers", 1, MAX_LAYERS), "hidden_size": hidden,
        "intermediate_size": config.integer("intermediate_size", 1, MAX_WIDTH), "num_heads": heads,
        "num_kv_heads": kv_heads, "head_dim": head_dim, "vocab_size": config.integer("vocab_size", 1, MAX_VOCAB),
    }


def _biases(config: Fields, architecture: str) -> dict[str, Any]:
    always = architecture == "qwen2"  # its QKV biases are not a choice, and its output projection never has one
    attention = config.boolean("attention_bias", always)
    mlp = config.boolean("mlp_bias", False)
    if (architecture == "mistral" and attention) or (always and not attention):
        raise config.refuse("attention_bias", f"{str(always).lower()} for {architecture}")
    if mlp and architecture != "llama":
        raise config.refuse("mlp_bias", f"false for {architecture}")
    return {"qkv_bias": attention, "o_bias": attention and not always, "mlp_bias": mlp}


def _layer_kinds(
    config: Fields, architecture: str, layers: int, max_position: int,
) -> tuple[tuple[LayerKind, ...], int]:
    """Each layer's kind, and the window in tokens (0 when no layer slides).

    A window as wide as the model's own never hides a key, so such layers count as full ones.
    """
    window, first_sliding = _window(config, architecture, layers)
    derived = ["sliding_attention" if window and layer >= first_sliding else "full_attention"
               for layer in range(layers)]
    named = config.raw("layer_types", derived)
    if not isinstance(named, list) or len(named) != layers:
        raise config.refuse("layer_types", f"a list of {layers} names (num_hidden_layers)")
    for name in named:
        if name not in ("full_attention", "sliding_attention"):
            raise config.refuse("layer_types", "made of full_attention and sliding_attention")
    if architecture in ("llama", "mistral") and named != derived:
        raise config.refuse("layer_types", f"all {derived[0]} for {architecture}")
    if "sliding_attention" in named and not window:
        raise config.refuse("layer_types", "all full_attention when use_sliding_window is false or sliding_window null")
    slides = window < max_position
    kinds: tuple[LayerKind, ...] = tuple(
        "sliding" if name == "sliding_attention" and slides else "full" for name in named)
    return kinds, window if "sliding" in kinds else 0


def _window(config: Fields, architecture: str, layers: int) -> tuple[int, int]:
    """(sliding window or 0, first layer that slides unless layer_types says otherwise)."""
    absent_or_null = config.raw("sliding_window") is None
    if architecture == "llama":
        if not absent_or_null and config.values["sliding_window"] is not False:
            raise config.refuse("sliding_window", "null for llama, whose layers all see the whole context")
        return 0, layers
    if architecture != "mistral" and not config.boolean("use_sliding_window", False):
        config.asked.add("max_window_layers")
        return 0, layers
    default = 4096 if "sliding_window" not in config.values else 0  # null switches the window off; absent does not
    window: int = config.integer("sliding_window", 1, MAX_POSITIONS, default)
    first: int = 0 if architecture == "mistral" else config.integer("max_window_layers", 0, MAX_POSITIONS, 28)
    return window, first


def _dtype(config: Fields, folder: Path | None) -> str:
    """The checkpoint's dtype: config.json's word, else that of the weights, else bfloat16."""
    for field_name in ("dtype", "torch_dtype"):
        name = config.text(field_name, "").removeprefix("torch.")
        if name in DTYPES:
            return name
        if name:
            raise config.refuse(field_name, f"one of {', '.join(DTYPES)}")
    return (checkpoint_dtype(folder) if folder else None) or "bfloat16"


def _special_tokens(config: Fields, architecture: str, vocab_size: int) -> dict[str, Any]:
    old = architecture in ("llama", "mistral")  # transformers gives these two ids when the fields are absent
    eos = 2 if old and "eos_token_id" not in config.values else None
    bos = 1 if old and "bos_token_id" not in config.values else None
    return {"eos_token_ids": config.token_ids("eos_token_id", vocab_size, eos),
            "bos_token_id": next(iter(config.token_ids("bos_token_id", vocab_size, bos)), None)}


def _quantization(config: Fields, folder: Path | None) -> dict[str, Any] | None:
    """The quantisation description, from config.json or from the file older tools put beside it."""
    for name in ("quantization_config", "compression_config"):
        value = config.raw(name)
        if value is not None:
            if not isinstance(value, dict):
                raise config.refuse(name, "an object or null")
            return value
    beside = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
    for name, method in beside.items():
        if folder is not None and has_file(folder, name):
            found = read_json_object(folder, name)
            # Old AWQ used GPTQ's file name, and names of its own inside.
            return {"quant_method": "awq" if "w_bit" in found else method, **found}
    return None


def _unread_fields(config: Fields) -> tuple[str, ...]:
    """Refuse unread fields that change the mathematics; return the other ones that are unknown."""
    unread = []
    for name in config.unasked():
        value = config.values[name]
        if name in _HARMLESS or _is_neutral(name, value):
            continue
        if name in _NEUTRAL or _SUSPICIOUS.search(name):
            raise ModelFolderError(f"config.json: {name} = {shown(value)} is not supported for this architecture "
                                   "and would change its results", param=name)
        unread.append(name)
    return tuple(unread)


def _is_neutral(name: str, value: Any) -> bool:
    """Whether a value says "nothing special": off, empty, a factor of one, a count of zero."""
    if value is False or value in ([], {}, *_NEUTRAL.get(name, ())):
        return True
    neutral_number = 1 if re.search("multiplier|scal", name) else 0
    return value == neutral_number and not isinstance(value, bool)
