"""Reading config.json: what each architecture means, and that nothing wrong or unknown is passed over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import edit_config, write_tiny

from workstation.architecture import KVGroup, ModelShape, partition_layers, read_shape
from workstation.errors import ModelFolderError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
    "hidden_act": "silu", "attention_bias": False, "use_cache": True, "transformers_version": "4.42.3",
    "pretraining_tp": 1, "initializer_range": 0.02, "attention_dropout": 0.0, "mlp_bias": False,
}
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "max_position_embeddings": 32768, "sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28,
    "rope_theta": 1000000.0, "torch_dtype": "bfloat16", "eos_token_id": 151645, "bos_token_id": 151643,
}
MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 32768, "sliding_window": 4096, "torch_dtype": "bfloat16",
}


def changed(base: dict[str, Any], remove: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    return {**{name: value for name, value in base.items() if name not in remove}, **fields}


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ModelFolderError) as caught:
        read_shape(config)
    return caught.value.message


def test_llama_in_the_spelling_of_transformers_4() -> None:
    shape = read_shape(LLAMA)
    assert (shape.architecture, shape.num_layers, shape.num_heads, shape.num_kv_heads) == ("llama", 32, 32, 8)
    assert (shape.head_dim, shape.max_position, shape.dtype, shape.norm_eps) == (128, 131072, "bfloat16", 1e-5)
    assert (shape.rope.kind, shape.rope.theta, shape.rope.options["factor"]) == ("llama3", 500000.0, 8.0)
    assert shape.eos_token_ids == (128001, 128008, 128009)
    assert shape.kv_groups == (KVGroup("full", tuple(range(32))),)
    assert shape.kv_bytes_per_block(16, 2) == 32 * 2 * 8 * 16 * 128 * 2
    assert shape.unread_fields == ()


def test_the_spelling_of_transformers_5_reads_the_same() -> None:
    new = changed(LLAMA, ("rope_scaling", "rope_theta", "torch_dtype"), dtype="bfloat16",
                  rope_parameters={**LLAMA["rope_scaling"], "rope_theta": 500000.0})
    assert read_shape(new) == read_shape(LLAMA)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_folder_written_by_transformers_reads_back(kind: str, tmp_path: Path) -> None:
    shape = read_shape(write_tiny(tmp_path, kind))
    assert (shape.architecture, shape.hidden_size, shape.num_kv_heads, shape.head_dim) == (kind, 64, 2, 16)
    assert (shape.dtype, shape.max_position, shape.tie_embeddings) == ("float32", 512, False)
    assert (shape.qkv_bias, shape.qk_norm) == (kind == "qwen2", kind == "qwen3")
    assert (shape.eos_token_ids, shape.bos_token_id, shape.unread_fields) == ((2,), 1, ())


def test_an_old_llama_without_kv_heads_or_rope_has_transformers_defaults() -> None:
    shape = read_shape(changed(LLAMA, ("num_key_value_heads", "rope_scaling", "rope_theta", "rms_norm_eps",
                                       "eos_token_id", "bos_token_id", "architectures")))
    assert (shape.num_kv_heads, shape.rope.kind, shape.rope.theta, shape.norm_eps) == (32, "default", 10000.0, 1e-6)
    assert (shape.eos_token_ids, shape.bos_token_id) == ((2,), 1)


def test_qwen2_has_qkv_biases_and_no_window_unless_it_asks_for_one() -> None:
    shape = read_shape(QWEN2)
    assert (shape.qkv_bias, shape.o_bias, shape.window, set(shape.layer_kinds)) == (True, False, 0, {"full"})


def test_mistral_slides_in_every_layer() -> None:
    shape = read_shape(MISTRAL)
    assert (shape.window, set(shape.layer_kinds)) == (4096, {"sliding"})
    assert shape.kv_groups == (KVGroup("sliding", tuple(range(32)), 4096),)


def test_mistral_without_the_field_has_the_default_window_and_with_null_none() -> None:
    assert read_shape(changed(MISTRAL, ("sliding_window",))).window == 4096
    assert read_shape(changed(MISTRAL, sliding_window=None)).window == 0


def test_a_window_as_wide_as_the_model_is_full_attention() -> None:
    shape = read_shape(changed(MISTRAL, sliding_window=32768))
    assert (shape.window, set(shape.layer_kinds)) == (0, {"full"})


def test_layers_above_max_window_layers_slide() -> None:
    shape = read_shape(changed(QWEN2, use_sliding_window=True, sliding_window=4096, max_window_layers=21))
    assert shape.layer_kinds == ("full",) * 21 + ("sliding",) * 7
    assert [(group.kind, len(group.layers), group.window) for group in shape.kv_groups] == [
        ("full", 7, 0), ("full", 7, 0), ("full", 7, 0), ("sliding", 7, 4096)]


def test_groups_have_equal_slots_and_hold_every_layer_once() -> None:
    kinds = ("sliding", "sliding", "full", "sliding", "sliding", "full", "sliding")
    groups = partition_layers(kinds, 128)
    assert [group.layers for group in groups] == [(0, 1), (2, 5), (3, 4), (6,)]
    assert [group.window for group in groups] == [128, 0, 128, 128]


@pytest.mark.parametrize(("scaling", "window"), [
    ({"type": "linear", "factor": 4.0}, 16384),
    ({"type": "dynamic", "factor": 2.0}, 8192),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}, 32768),
    ({"rope_type": "yarn", "original_max_position_embeddings": 1024}, 4096),
    ({"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64,
      "original_max_position_embeddings": 1024}, 4096),
], ids=["linear", "dynamic", "yarn", "yarn_without_factor", "longrope"])
def test_the_window_after_rope_scaling(scaling: dict[str, Any], window: int) -> None:
    assert read_shape(changed(LLAMA, max_position_embeddings=4096, rope_scaling=scaling)).max_position == window


def test_longrope_takes_the_original_window_from_beside_its_dict() -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    shape = read_shape(changed(LLAMA, rope_scaling=scaling, original_max_position_embeddings=4096))
    assert shape.rope.options["original_max_position"] == 4096
    assert shape.rope.options["attention_factor"] == pytest.approx((1 + 5 / 12) ** 0.5)  # 1 + ln 32 / ln 4096


def test_quantisation_is_kept_for_the_loader() -> None:
    assert read_shape(changed(LLAMA, quantization_config={"quant_method": "fp8"})).quantization == {
        "quant_method": "fp8"}


def test_quantisation_described_beside_the_config_is_seen(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    assert read_shape(folder).quantization == {"quant_method": "gptq", "bits": 4}


def test_unknown_harmless_fields_are_reported_not_refused() -> None:
    assert read_shape(changed(LLAMA, some_note="hello", another=None)).unread_fields == ("some_note",)


def test_the_dtype_comes_from_the_weights_when_the_config_is_silent(tmp_path: Path) -> None:
    folder = edit_config(write_tiny(tmp_path), ("dtype", "torch_dtype"))
    assert read_shape(folder).dtype == "float32"


@pytest.mark.parametrize(("fields", "words"), [
    ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, ["model_type", "gpt2", "llama, mistral, qwen2"]),
    ({"model_type": 7}, ["model_type", "7"]),
    ({"model_type": None, "architectures": ["Foo"]}, ["architectures", "Foo"]),
    ({"architectures": ["LlamaForSequenceClassification"]}, ["architectures", "LlamaForCausalLM"]),
    ({"architectures": "LlamaForCausalLM"}, ["architectures"]),
    ({"hidden_size": -1}, ["hidden_size", "-1"]),
    ({"hidden_size": 10**18}, ["hidden_size", "1048576"]),
    ({"hidden_size": 4096.0}, ["hidden_size", "4096.0"]),
    ({"hidden_size": True}, ["hidden_size", "True"]),
    ({"hidden_size": None}, ["hidden_size"]),
    ({"num_hidden_layers": 0}, ["num_hidden_layers"]),
    ({"num_hidden_layers": 10**6}, ["num_hidden_layers", "1024"]),
    ({"vocab_size": "many"}, ["vocab_size", "many"]),
    ({"num_key_value_heads": 5}, ["num_key_value_heads", "divisor", "5"]),
    ({"num_key_value_heads": 64}, ["num_key_value_heads", "64"]),
    ({"num_attention_heads": 24, "num_key_value_heads": 8}, ["hidden_size", "multiple", "24"]),
    ({"head_dim": 40}, ["head_dim", "40"]),
    ({"head_dim": 512}, ["head_dim", "512"]),
    ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
    ({"rms_norm_eps": 0}, ["rms_norm_eps"]),
    ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps"]),
    ({"max_position_embeddings": 10**12}, ["max_position_embeddings"]),
    ({"rope_theta": -1.0}, ["rope_theta"]),
    ({"rope_scaling": {"type": "mystery", "factor": 2}}, ["type", "mystery", "yarn"]),
    ({"rope_scaling": {"rope_type": "linear"}}, ["factor"]),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, ["factor", "0.5"]),
    ({"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}}, ["mrope_section"]),
    ({"rope_scaling": [1]}, ["rope_scaling"]),
    ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, ["full_attention"]),
    ({"rope_scaling": {**LLAMA["rope_scaling"], "high_freq_factor": 0.5}}, ["high_freq_factor", "0.5"]),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 64}},
     ["short_factor", "64"]),
    ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    ({"torch_dtype": "int8"}, ["torch_dtype", "int8"]),
    ({"eos_token_id": 10**9}, ["eos_token_id", "128255"]),
    ({"eos_token_id": ["a"]}, ["eos_token_id"]),
    ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "yes"]),
    ({"attention_bias": 1}, ["attention_bias"]),
    ({"quantization_config": "fp8"}, ["quantization_config"]),
    ({"sliding_window": 4096}, ["sliding_window", "llama"]),
    ({"layer_types": ["sliding_attention"] * 32}, ["layer_types"]),
    ({"layer_types": ["full_attention"]}, ["layer_types", "32"]),
    ({"auto_map": {"AutoModel": "x.Y"}}, ["auto_map"]),
    ({"nested": {"deeper": [{"auto_map": {"AutoModel": "x.Y"}}]}}, ["auto_map"]),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_wrong_fields_are_refused_by_name_value_and_limit(fields: dict[str, Any], words: list[str]) -> None:
    message = refusal(changed(LLAMA, **fields))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("name", "value"), [
    ("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0), ("num_local_experts", 8),
    ("attention_sinks", True), ("residual_multiplier", 0.22), ("logits_scaling", 8.0), ("use_qk_norm", True),
    ("no_rope_layers", [1, 0]), ("clip_qkv", 8.0), ("vision_config", {"depth": 3}), ("use_mrope", True),
    ("is_encoder_decoder", True), ("attention_chunk_size", 8192), ("position_embedding_type", "alibi"),
])
def test_a_field_that_would_change_the_mathematics_is_refused(name: str, value: Any) -> None:
    assert name in refusal(changed(LLAMA, **{name: value}))


@pytest.mark.parametrize(("name", "value"), [
    ("final_logit_softcapping", None), ("num_local_experts", 0), ("residual_multiplier", 1.0), ("use_mrope", False),
    ("position_embedding_type", "rotary"),
])
def test_such_a_field_at_its_neutral_value_is_accepted(name: str, value: Any) -> None:
    assert read_shape(changed(LLAMA, **{name: value})) == read_shape(LLAMA)


@pytest.mark.parametrize(("base", "fields", "word"), [
    (MISTRAL, {"attention_bias": True}, "attention_bias"),
    (QWEN2, {"attention_bias": False}, "attention_bias"),
    (QWEN2, {"mlp_bias": True}, "mlp_bias"),
    (QWEN2, {"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
    (QWEN2, {"layer_types": ["sliding_attention"] * 28}, "use_sliding_window"),
    (QWEN2, {"layer_types": ["linear_attention"] * 28}, "layer_types"),
    (changed(QWEN2, ("num_key_value_heads",)), {}, "num_key_value_heads"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_an_architecture_does_not_have_is_refused(base: dict[str, Any], fields: dict[str, Any], word: str) -> None:
    assert word in refusal(changed(base, **fields))


@pytest.mark.parametrize(("content", "words"), [
    (b"", "is empty"), (b"{", "not valid JSON"), (b"[]", "JSON object"), (b"\xff\xfe{}", "not UTF-8"),
    (b'{"a":' + b"[" * 200 + b"]" * 200 + b"}", "too deeply"), (b"[" * 100_000, "too deeply"),
    (b'{"a": "' + b"x" * (1 << 20) + b'"}', "larger than the limit"), (b'{"a": NaN}', "NaN"),
    (b'{"a": 1, "a": 2}', "given twice"), (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
], ids=["empty", "cut", "list", "utf16", "deep", "very_deep", "huge", "nan", "twice", "long_number"])
def test_a_broken_config_file_is_a_named_error(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelFolderError, match=r"config\.json") as caught:
        read_shape(tmp_path)
    assert words in caught.value.message


def test_a_missing_folder_or_config_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="does not exist"):
        read_shape(tmp_path / "nowhere")
    with pytest.raises(ModelFolderError, match=r"config\.json is missing"):
        read_shape(tmp_path)


def test_a_config_that_is_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ModelFolderError, match="not a regular file"):
        read_shape(tmp_path)


def test_a_config_linked_from_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.json").write_text(json.dumps(LLAMA))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").symlink_to("../elsewhere.json")
    with pytest.raises(ModelFolderError, match="leaves the folder"):
        read_shape(folder)


def test_reading_a_config_needs_no_torch() -> None:
    code = "import sys, workstation.architecture; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["yarn", "longrope"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=4)
FIELDS = sorted({*LLAMA, *QWEN2, "head_dim", "layer_types", "quantization_config", "rope_parameters", "dtype"})
ROPE_FIELDS = ["rope_type", "type", "factor", "original_max_position_embeddings", "short_factor", "long_factor",
               "beta_fast", "mscale", "attention_factor", "low_freq_factor", "high_freq_factor", "rope_theta"]


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(base=st.sampled_from([LLAMA, QWEN2, MISTRAL]), fields=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
       rope=st.dictionaries(st.sampled_from(ROPE_FIELDS), JSON, max_size=4))
def test_any_json_value_gives_a_shape_or_a_named_error(
    base: dict[str, Any], fields: dict[str, Any], rope: dict[str, Any],
) -> None:
    config = {**base, **fields}
    if rope:
        config["rope_scaling"] = {**base.get("rope_scaling", {}), **rope}
    try:
        shape = read_shape(config)
    except ModelFolderError as error:
        assert error.message.startswith("config.json")
    else:
        assert isinstance(shape, ModelShape)
        assert sorted(layer for group in shape.kv_groups for layer in group.layers) == list(range(shape.num_layers))
