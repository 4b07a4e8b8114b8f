"""`kv_cache_dtype`: what it becomes, scales in each of their namings, and what is refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import make_engine
from quant_models import rewrite
from quantised import FORMATS, SIZES, describe, write_quantised
from safetensors.torch import save_file
from tiny import edit_config, write_tiny

from workstation.architecture import read_shape
from workstation.cli.main import main
from workstation.config import EngineConfig
from workstation.engine.start import read_cache
from workstation.errors import ConfigError, ModelFolderError
from workstation.estimate_model import find_model
from workstation.llm import LLM
from workstation.quant.kv_cache import KVCacheForm, kv_cache_form
from workstation.safetensors_header import read_checkpoint

ATTENTION = "model.layers.{}.self_attn."
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
NAMINGS = {
    "compressed_tensors": ("k_scale", "v_scale"), "attn_module": ("attn.k_scale", "attn.v_scale"),
    "modelopt": ("k_proj.k_scale", "v_proj.v_scale"), "old": ("k_proj.output_scale", "v_proj.output_scale"),
}  # fmt: skip
LAYERS = range(SIZES["num_hidden_layers"])
SCALES = tuple((0.5 + layer, 0.25 + layer) for layer in LAYERS)


def quantised_folder(root: Path, name: str = "ct_channel", **description: Any) -> Path:
    folder, _ = write_quantised(root, name)
    return edit_config(folder, quantization_config={**describe(folder), **description})


def with_scales(folder: Path, key: str, value: str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = ()) -> Path:
    def add(weights: dict[str, torch.Tensor]) -> None:
        for layer, pair in zip(LAYERS, SCALES, strict=True):
            for name, scale in zip((key, value), pair, strict=True):
                weights[ATTENTION.format(layer) + name] = torch.full(shape, scale, dtype=dtype)

    return rewrite(folder, add)


def form(folder: Path, asked: str = "fp8", dtype: torch.dtype = torch.float32) -> KVCacheForm:
    config: Any = EngineConfig(str(folder), kv_cache_dtype=asked)  # type: ignore[arg-type]
    return read_cache(config, read_shape(folder), dtype)


# ── what the setting becomes ────────────────────────────────────────────────────────────────────────────────────────


def test_a_plain_checkpoint_keeps_the_models_dtype_unless_fp8_is_asked_for(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    assert form(folder, "auto") == form(folder, "float32") == KVCacheForm(False)
    assert form(folder, "fp8") == form(folder, "fp8_e4m3") == KVCacheForm(True)


@pytest.mark.parametrize("asked", ["int8", "fp8_e5m2", "FP8", "bfloat16", "", None, 8])
def test_another_value_is_refused_with_field_value_and_what_is_accepted(asked: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        form(write_tiny(tmp_path), asked)
    assert caught.value.message == ("kv_cache_dtype must be auto, fp8, fp8_e4m3 or the model's dtype (float32), "
                                    f"got {asked!r}")
    assert caught.value.param == "kv_cache_dtype"


def test_llm_refuses_it_as_well_and_the_command_line_names_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype must be auto"):
        LLM(str(write_tiny(tmp_path)), kv_cache_dtype="int8", skip_tokenizer_init=True, device="cpu")
    with pytest.raises(SystemExit):
        main(["serve", "demo", "--kv-cache-dtype", "int8"])
    assert "--kv-cache-dtype must be one of auto, fp8, fp8_e4m3" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "description"), [
    ("ct_channel", {"kv_cache_scheme": SCHEME}), ("ct_channel", {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}),
    ("hf_tensor", {"kv_cache_scheme": "static"}), ("modelopt", {"kv_cache_quant_algo": "FP8"}),
    ("modelopt", {"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}),
], ids=["scheme", "short_scheme", "word", "modelopt", "modelopt_scheme"])  # fmt: skip
def test_a_checkpoint_that_describes_an_fp8_cache_gets_one_with_its_scales(
    name: str, description: dict[str, Any], tmp_path: Path,
) -> None:
    folder = with_scales(quantised_folder(tmp_path, name, **description), *NAMINGS["compressed_tensors"])
    assert form(folder, "auto") == KVCacheForm(True, SCALES)
    assert form(folder, "float32") == KVCacheForm(False)
    assert find_model(str(folder), {}).kv_cache_dtype("auto") == "fp8"
    assert find_model(str(folder), {}).kv_cache_dtype("float16") == "auto"


def test_without_scales_a_described_cache_is_fp8_with_ones_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    assert form(quantised_folder(tmp_path, kv_cache_scheme=SCHEME), "auto") == KVCacheForm(True)
    assert "they count as 1" in caplog.text


@pytest.mark.parametrize("scheme", [
    {**SCHEME, "type": "int"}, {**SCHEME, "num_bits": 4}, {**SCHEME, "dynamic": True}, {**SCHEME, "strategy": "attn_head"},
    "int8", 7,
], ids=str)  # fmt: skip
def test_another_scheme_is_logged_and_the_cache_keeps_the_models_dtype(
    scheme: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    assert form(quantised_folder(tmp_path, kv_cache_scheme=scheme), "auto") == KVCacheForm(False)
    assert "a KV cache that is not served" in caplog.text and "float32" in caplog.text


@pytest.mark.parametrize("description", [
    {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "kv_cache_scheme": SCHEME, "ignore": []},
    {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"},
], ids=["compressed-tensors", "modelopt"])
def test_a_description_of_the_cache_alone_leaves_the_weights_as_they_are(description: dict[str, Any], tmp_path: Path) -> None:
    folder = with_scales(write_tiny(tmp_path, **SIZES), *NAMINGS["compressed_tensors"])
    plain = make_engine(write_tiny(tmp_path / "plain", **SIZES)).info
    edit_config(folder, quantization_config=description)
    info = make_engine(folder).info
    assert (info.kv_cache_dtype, info.weight_bytes) == ("fp8", plain.weight_bytes)
    found = find_model(str(folder), {})
    assert (found.own.name, found.kv_cache) == ("16-bit", "fp8")


def test_dummy_weights_follow_the_description_without_scales() -> None:
    shape = read_shape({**json.loads(json.dumps(FP8_LLAMA))})
    assert kv_cache_form("auto", "bfloat16", shape, None) == KVCacheForm(True)


FP8_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
    "max_position_embeddings": 512, "quantization_config": {**FORMATS["ct_channel"][0], "kv_cache_scheme": SCHEME},
}  # fmt: skip


# ── scales ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize(("dtype", "shape"), [(torch.float32, ()), (torch.bfloat16, (1,)), (torch.float16, (1, 1))],
                         ids=["float32", "bfloat16", "float16"])
def test_scales_are_found_under_each_of_their_names(
    naming: str, dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path,
) -> None:
    folder = with_scales(quantised_folder(tmp_path), *NAMINGS[naming], dtype, shape)
    assert form(folder) == KVCacheForm(True, SCALES)


def test_one_old_scale_counts_for_keys_and_values(tmp_path: Path) -> None:
    folder = rewrite(quantised_folder(tmp_path), lambda w: w.update(
        {ATTENTION.format(layer) + "kv_scale": torch.tensor(0.5 + layer) for layer in LAYERS}))
    assert form(folder) == KVCacheForm(True, tuple((0.5 + layer, 0.5 + layer) for layer in LAYERS))


def test_scales_reach_their_layers(tmp_path: Path) -> None:
    folder = with_scales(quantised_folder(tmp_path, kv_cache_scheme=SCHEME), *NAMINGS["modelopt"])
    engine = make_engine(folder)
    assert tuple(tuple(layer.attention.kv_scales) for layer in engine._runner.model.layers) == SCALES
    plain = make_engine(folder, kv_cache_dtype="float32")
    assert {tuple(layer.attention.kv_scales) for layer in plain._runner.model.layers} == {(1.0, 1.0)}


KEY, VALUE = (ATTENTION.format(1) + name for name in NAMINGS["compressed_tensors"])


@pytest.mark.parametrize(("change", "words"), [
    (lambda w: w.update({KEY: torch.tensor(torch.nan)}), [KEY, "is nan", "above 0"]),
    (lambda w: w.update({VALUE: torch.tensor(torch.inf)}), [VALUE, "is inf"]),
    (lambda w: w.update({KEY: torch.tensor(0.0)}), [KEY, "is 0", "above 0"]),
    (lambda w: w.update({VALUE: torch.tensor(-1.0)}), [VALUE, "is -1"]),
    (lambda w: w.update({VALUE: torch.ones(2)}), [VALUE, "the shape [2]"]),
    (lambda w: w.update({VALUE: torch.ones(1, dtype=torch.int32)}), [VALUE, "is I32"]),
    (lambda w: w.pop(VALUE), [VALUE, "missing", f"{KEY} is there"]),
    (lambda w: w.pop(KEY), [KEY, "missing", f"{VALUE} is there"]),
    (lambda w: [w.pop(name) for name in (KEY, VALUE)], [KEY, "missing", "other layers"]),
], ids=["nan", "infinite", "zero", "negative", "two_numbers", "integer", "no_value", "no_key", "no_layer"])  # fmt: skip
def test_scales_that_cannot_be_are_refused_by_name_and_a_wider_cache_does_without(
    change: Any, words: list[str], tmp_path: Path,
) -> None:
    folder = rewrite(with_scales(quantised_folder(tmp_path), *NAMINGS["compressed_tensors"]), change)
    with pytest.raises(ModelFolderError) as caught:
        make_engine(folder, kv_cache_dtype="fp8")
    assert all(word in caught.value.message for word in [*words, "model's own dtype"]), caught.value.message
    assert make_engine(folder).info.kv_cache_dtype == "float32"


def test_a_file_that_ends_inside_a_scale_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    stored = {ATTENTION.format(0) + name: torch.ones(()) for name in NAMINGS["compressed_tensors"]}
    save_file(stored, path)
    path.rename(tmp_path / "model.safetensors")
    entries = read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-6])
    shape = read_shape({**FP8_LLAMA, "num_hidden_layers": 1, "quantization_config": None})
    with pytest.raises(ModelFolderError, match="is cut off"):
        kv_cache_form("fp8", "float32", shape, entries)


# ── sizes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pool_of_as_many_bytes_holds_four_times_the_blocks_of_float32(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    plain, small = (make_engine(folder, num_blocks=None, kv_cache_memory_bytes=3 << 20, kv_cache_dtype=kv)
                    for kv in ("auto", "fp8"))
    assert small.info.num_blocks + 1 == 4 * (plain.info.num_blocks + 1)
    assert small.info.kv_bytes == plain.info.kv_bytes == small._runner.pool.nbytes
    assert small._runner.pool.dtype == torch.float8_e4m3fn
    assert (plain.info.kv_cache_dtype, small.info.kv_cache_dtype, small.info.dtype) == ("float32", "fp8", "float32")


def test_a_block_of_fp8_has_a_byte_an_element(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    info = make_engine(folder, kv_cache_dtype="fp8_e4m3").info
    assert info.kv_bytes == (info.num_blocks + 1) * read_shape(folder).kv_bytes_per_block(16, 1)
