"""FP8 checkpoints: every format means what its numbers say, and every contradiction is an error that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_models import EVERY_FORMAT, large, load, logits, refusal, rewrite, transformers_logits
from quantised import FORMATS, SINGLE, Weights, describe, linears, write_quantised
from safetensors.torch import load_file
from tiny import edit_config

from workstation.architecture import read_shape
from workstation.errors import ModelFolderError
from workstation.model.linear import SplitLinear
from workstation.model.linear_forms import pieces
from workstation.model.linear_fp8 import Fp8BlockLinear, Fp8ChannelLinear, Fp8Linear
from workstation.model.loader import read_forms
from workstation.quant.forms import Form, weight_bytes

# ── what the numbers mean ───────────────────────────────────────────────────────────────────────────────────────────


@EVERY_FORMAT
def test_logits_are_those_of_the_dequantised_twin_in_transformers(name: str, tmp_path: Path) -> None:
    fp8, plain = write_quantised(tmp_path, name)
    decoder = load(fp8)
    assert all(isinstance(piece, Fp8Linear) for layer in decoder.layers for piece in pieces(layer.gate_up))
    assert all(isinstance(layer.down, Fp8Linear) for layer in decoder.layers)
    assert (logits(decoder) - transformers_logits(plain)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["ct_tensor_static", "ct_channel", "hf_block"])
def test_in_bfloat16_the_error_is_that_of_the_dequantised_twin_in_transformers(name: str, tmp_path: Path) -> None:
    fp8, plain = write_quantised(tmp_path, name)
    exact, theirs = transformers_logits(plain), transformers_logits(plain, torch.bfloat16)
    ours = logits(load(fp8, torch.bfloat16), torch.bfloat16)
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()


@pytest.mark.parametrize(("name", "kind", "more"), [
    ("ct_channel", "qwen2", {}), ("hf_tensor", "qwen3", {"attention_bias": True}),
    ("hf_block", "llama", {"attention_bias": True, "mlp_bias": True}), ("modelopt", "mistral", {}),
    ("ct_block", "qwen3", {"tie_word_embeddings": True}),
])  # fmt: skip
def test_biases_norms_and_tied_heads_stay_beside_quantised_layers(
    name: str, kind: str, more: dict[str, Any], tmp_path: Path,
) -> None:
    fp8, plain = write_quantised(tmp_path, name, kind, **more)
    assert (logits(load(fp8)) - transformers_logits(plain)).abs().max() < 1e-4


def test_parts_of_a_fused_layer_keep_their_own_scales(tmp_path: Path) -> None:
    fp8, _ = write_quantised(tmp_path, "hf_tensor")
    rewrite(fp8, lambda w: w.update({"model.layers.0.self_attn.k_proj.weight_scale": torch.tensor(0.5)}))
    stored = load_file(fp8 / SINGLE)
    qkv = load(fp8).layers[0].attention.qkv
    assert isinstance(qkv, Fp8ChannelLinear)
    expected = torch.cat([stored[f"model.layers.0.self_attn.{name}.weight_scale"].expand(rows)
                          for name, rows in (("q_proj", 128), ("k_proj", 64), ("v_proj", 64))])
    assert torch.equal(qkv.scale, expected) and qkv.scale[130] == 0.5


def test_block_scales_of_parts_that_end_inside_a_block_split_the_fused_layer(tmp_path: Path) -> None:
    fp8, _ = write_quantised(tmp_path, "hf_block")
    decoder = load(fp8)
    qkv, gate_up = decoder.layers[0].attention.qkv, decoder.layers[0].gate_up
    assert isinstance(qkv, SplitLinear) and [piece.out_features for piece in qkv.pieces] == [192, 64]
    assert isinstance(gate_up, SplitLinear) and [piece.out_features for piece in gate_up.pieces] == [320, 320]


def test_block_scales_of_whole_blocks_are_stacked(tmp_path: Path) -> None:
    fp8, plain = write_quantised(tmp_path, "ct_block", hidden_size=128, intermediate_size=256, head_dim=64)
    decoder = load(fp8)
    qkv, gate_up = decoder.layers[0].attention.qkv, decoder.layers[0].gate_up
    assert isinstance(qkv, Fp8BlockLinear) and qkv.scale.shape == (4, 1)
    assert isinstance(gate_up, Fp8BlockLinear) and gate_up.scale.shape == (4, 1)
    assert (logits(decoder) - transformers_logits(plain)).abs().max() < 1e-4


# ── what stays in 16 bits ───────────────────────────────────────────────────────────────────────────────────────────

KEPT: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "ct_channel": ({"ignore": ["lm_head", "re:.*self_attn.*", "model.layers.1.mlp.down_proj"]},
                   lambda m: "self_attn" in m or m == "model.layers.1.mlp.down_proj"),
    "hf_block": ({"modules_to_not_convert": ["model.layers.0", "down_proj"]},
                 lambda m: m.startswith("model.layers.0.") or m.endswith("down_proj")),
    "fbgemm": ({"modules_to_not_convert": ["model.layers.1.self_attn"]}, lambda m: m.startswith("model.layers.1.self_attn")),
    "modelopt": ({"exclude_modules": ["model.layers.0*", "*.o_proj"]},
                 lambda m: m.startswith("model.layers.0") or m.endswith("o_proj")),
}


@pytest.mark.parametrize("name", KEPT)
def test_layers_on_the_skip_list_are_dense_with_and_without_tensors_to_look_at(name: str, tmp_path: Path) -> None:
    changes, kept = KEPT[name]
    fp8, plain = write_quantised(tmp_path, name, skip=kept)
    edit_config(fp8, quantization_config={**describe(fp8), **changes})
    shape = read_shape(fp8)
    modules = linears(load_file(plain / SINGLE))
    for load_format in ("auto", "dummy"):
        forms = read_forms(fp8, shape, load_format=load_format)
        assert {m for m in modules if forms.part(m).form is Form.DENSE} == set(filter(kept, modules))
    assert (logits(load(fp8)) - transformers_logits(plain)).abs().max() < 1e-4


def test_one_part_of_a_fused_layer_may_be_dense(tmp_path: Path) -> None:
    fp8, plain = write_quantised(tmp_path, "ct_channel", "qwen2", skip=lambda module: module.endswith("k_proj"))
    edit_config(fp8, quantization_config={**describe(fp8), "ignore": ["lm_head", "re:.*k_proj"]})
    decoder = load(fp8)
    qkv = decoder.layers[1].attention.qkv
    assert isinstance(qkv, SplitLinear)
    assert [isinstance(piece, Fp8Linear) for piece in qkv.pieces] == [True, False, True]
    assert (logits(decoder) - transformers_logits(plain)).abs().max() < 1e-4


def test_the_tensors_decide_when_a_skip_list_uses_another_rule(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fp8, plain = write_quantised(tmp_path, "hf_block", skip=lambda module: module.endswith("down_proj"))
    decoder = load(fp8)
    assert not isinstance(decoder.layers[0].down, Fp8Linear) and decoder.layers[0].down.nbytes == 192 * 320 * 4
    assert "2 layers differ" in caplog.text and "model.layers.0.mlp.down_proj" in caplog.text
    assert (logits(decoder) - transformers_logits(plain)).abs().max() < 1e-4


def test_groups_may_differ_in_their_scales(tmp_path: Path) -> None:
    """compressed-tensors: a target by name goes before the class; here attention has one scale a matrix, the MLP one a row."""
    fp8, _ = write_quantised(tmp_path, "ct_channel", skip=lambda module: "self_attn" in module)
    other, _ = write_quantised(tmp_path / "other", "ct_tensor_static")
    attention = {name: tensor for name, tensor in load_file(other / SINGLE).items() if "_proj" in name and "self_attn" in name}
    rewrite(fp8, lambda weights: weights.update(attention))
    groups = describe(fp8)["config_groups"]
    groups["group_1"] = {**describe(other)["config_groups"]["group_0"], "targets": ["re:.*self_attn.*"]}
    edit_config(fp8, quantization_config={**describe(fp8), "config_groups": groups})
    forms = read_forms(fp8, read_shape(fp8))
    assert forms.part("model.layers.0.self_attn.q_proj").granularity == "tensor"
    assert forms.part("model.layers.0.mlp.up_proj").granularity == "channel"
    assert logits(load(fp8)).isfinite().all()


def test_a_quantised_head_is_served(tmp_path: Path) -> None:
    fp8, _ = write_quantised(tmp_path, "ct_channel")
    edit_config(fp8, quantization_config={**describe(fp8), "ignore": []})
    head = load_file(fp8 / SINGLE)["lm_head.weight"]
    scale = head.abs().amax(1, keepdim=True) / 448
    rewrite(fp8, lambda w: w.update({"lm_head.weight": (head / scale).to(torch.float8_e4m3fn), "lm_head.weight_scale": scale}))
    decoder = load(fp8)
    assert isinstance(decoder.head, Fp8ChannelLinear)
    assert decoder.weight_bytes == weight_bytes(decoder.shape, 4, decoder.forms) + decoder.cos_sin.nbytes


def test_modelopts_own_file_describes_as_well(tmp_path: Path) -> None:
    fp8, plain = write_quantised(tmp_path, "modelopt")
    edit_config(fp8, remove=("quantization_config",))
    (fp8 / "hf_quant_config.json").write_text(json.dumps({
        "producer": {"name": "modelopt", "version": "0.35"},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}))
    assert (logits(load(fp8)) - transformers_logits(plain)).abs().max() < 1e-4


def test_what_meets_the_weights_follows_the_description(tmp_path: Path) -> None:
    found = {}
    for name in ("ct_channel", "ct_weight_only", "fbgemm", "hf_block"):
        fp8, _ = write_quantised(tmp_path / name, name)
        part = read_forms(fp8, read_shape(fp8)).part("model.layers.0.mlp.up_proj")
        found[name] = (part.activations.quantised, part.activations.bound)
    assert found == {"ct_channel": (True, None), "ct_weight_only": (False, None), "fbgemm": (True, 1200.0),
                     "hf_block": (False, None)}


def test_tensors_that_are_not_needed_are_passed_over(tmp_path: Path) -> None:
    fp8, plain = write_quantised(tmp_path, "ct_tensor_static")
    layer = "model.layers.0.self_attn"
    rewrite(fp8, lambda w: w.update({
        f"{layer}.k_scale": torch.ones(1), f"{layer}.v_scale": torch.ones(1), f"{layer}.v_proj.output_scale": torch.ones(1),
        f"{layer}.q_proj.weight_zero_point": torch.zeros(1).to(torch.float8_e4m3fn)}))
    assert (logits(load(fp8)) - transformers_logits(plain)).abs().max() < 1e-4


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("name", "change", "words"), [
    ("ct_channel", lambda w: w.pop(f"{Q}.weight_scale"), [f"{Q}.weight", "no scale", f"{Q}.weight_scale"]),
    ("ct_channel", lambda w: w.pop(f"{Q}.weight"), [f"{Q}.weight", "missing"]),
    ("ct_channel", lambda w: w.update({f"{Q}.weight": torch.ones(128, 192)}), [f"{Q}.weight", "F32", "weight_scale"]),
    ("ct_channel", lambda w: w.update({f"{Q}.weight": torch.ones(128, 192, dtype=torch.int8)}), [f"{Q}.weight", "I8"]),
    ("ct_channel", lambda w: w.update({f"{Q}.weight": torch.ones(128, 192).to(torch.float8_e5m2)}), [f"{Q}", "F8_E5M2"]),
    ("ct_channel", lambda w: w.update({f"{Q}.weight_scale": torch.ones(())}), ["weight_scale", "[]", "[128, 1] or [128]"]),
    ("ct_channel", lambda w: w.update({f"{Q}.weight_scale": torch.ones(128, 1, dtype=torch.int32)}), ["weight_scale", "I32"]),
    ("ct_channel", lambda w: w.update({f"{Q}.weight_scale": torch.ones(128, 1, dtype=torch.uint8)}), ["weight_scale", "U8"]),
    ("ct_channel", lambda w: w.update({f"{Q}.weight_scale_inv": torch.ones(())}), [f"{Q}.weight", "two scales"]),
    ("ct_channel", lambda w: w.update({f"{Q}.weight_scale": torch.full((128, 1), torch.nan)}), ["weight_scale", "not finite"]),
    ("ct_channel", lambda w: w[f"{Q}.weight"].view(torch.uint8)[5, 7:8].fill_(0xFF), [f"{Q}.weight", "not finite"]),
    ("ct_channel", lambda w: w.update({f"{Q}.weight_zero_point": torch.ones(1)}), [f"{Q}.weight_zero_point", "symmetric"]),
    ("ct_channel", lambda w: w.update({f"{Q}.g_idx": torch.ones(1)}), [f"{Q}.g_idx", "no place"]),
    ("hf_block", lambda w: w.update({f"{Q}.weight_scale_inv": torch.ones(2, 2)}), ["weight_scale_inv", "[2, 2]", "[1, 2]"]),
    ("hf_block", lambda w: w.update({f"{Q}.weight_scale": w.pop(f"{Q}.weight_scale_inv")}), [Q, "weight_scale_inv"]),
    ("hf_tensor", lambda w: w.update({f"{Q}.weight_scale": torch.ones(1, 2)}), ["weight_scale", "[1, 2]", "[] or [1]"]),
    ("modelopt_block", lambda w: w.update({f"{Q}.weight_scale": torch.ones(128)}), ["weight_scale", "[1, 1, 2, 1]"]),
    ("fbgemm", lambda w: w.update({"model.norm.weight": torch.ones(192).to(torch.float8_e4m3fn)}), ["norm", "F8_E4M3"]),
], ids=["no_scale", "no_weight", "plain_with_scale", "int8", "e5m2", "one_scale_for_rows", "integer_scale", "exponent_scale",
        "two_scales", "nan_scale", "nan_weight", "zero_point", "surplus", "grid", "scale_name", "vector_for_tensor",
        "rows_for_blocks", "fp8_norm"])  # fmt: skip
def test_a_tensor_that_contradicts_the_description_is_named(
    name: str, change: Callable[[Weights], object], words: list[str], tmp_path: Path,
) -> None:
    fp8, _ = write_quantised(tmp_path, name)
    message = refusal(rewrite(fp8, change))
    assert all(word in message for word in words), message


def changed(description: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with the field at a dotted path replaced."""
    made: dict[str, Any] = json.loads(json.dumps(description))
    *parents, last = path.split(".")
    inner = made
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return made


GROUP = "config_groups.group_0"


@pytest.mark.parametrize(("name", "path", "value", "words"), [
    ("ct_channel", "quant_method", "hqq", ["hqq", "compressed-tensors", "gptq"]),
    ("ct_channel", "quant_method", "gptq", ["format", "gptq_v2"]),
    ("ct_channel", "quant_method", None, ["unnamed method"]),
    ("ct_channel", "format", "marlin-24", ["format", "marlin-24", "not served yet"]),
    ("ct_channel", "config_groups", {}, ["config_groups", "1 to"]),
    ("ct_channel", "config_groups", [1], ["config_groups"]),
    ("ct_channel", GROUP, "x", ["group_0", "object"]),
    ("ct_channel", f"{GROUP}.weights", None, ["group_0: weights"]),
    ("ct_channel", f"{GROUP}.weights.type", "int", ["group_0.input_activations: type", "integer weights"]),
    ("ct_channel", f"{GROUP}.weights.type", "complex", ["group_0.weights: type", "'complex'"]),
    ("ct_channel", f"{GROUP}.weights.num_bits", 6, ["num_bits", "8", "6"]),
    ("ct_channel", f"{GROUP}.weights.symmetric", False, ["symmetric"]),
    ("ct_channel", f"{GROUP}.weights.dynamic", True, ["weights: dynamic"]),
    ("ct_channel", f"{GROUP}.weights.strategy", "group", ["strategy", "tensor, channel or block"]),
    ("ct_channel", f"{GROUP}.weights.group_size", 64, ["group_size", "64"]),
    ("ct_channel", f"{GROUP}.weights.rotation", "hadamard", ["rotation", "not known"]),
    ("ct_channel", f"{GROUP}.output_activations", {"num_bits": 8}, ["output_activations", "null"]),
    ("ct_channel", f"{GROUP}.input_activations.num_bits", 4, ["input_activations: num_bits"]),
    ("ct_channel", f"{GROUP}.targets", "Linear", ["targets", "list"]),
    ("ct_channel", "ignore", [1], ["ignore"]),
    ("ct_channel", "ignore", ["re:("], ["regular expression"]),
    ("ct_channel", "ignore", ["re:(a+)+$"], ["pattern", "repeated group"]),
    ("ct_channel", "ignore", ["re:" + ".*a" * 9], ["pattern", "repeats"]),
    ("ct_channel", "sparsity_config", {"format": "sparse-24-bitmask"}, ["sparsity_config"]),
    ("ct_channel", "transform_config", {"config_groups": {"u": {}}}, ["transform_config"]),
    ("ct_block", f"{GROUP}.weights.block_structure", [64, 64], ["block_structure", "[64, 64]"]),
    ("ct_block", f"{GROUP}.weights.block_structure", None, ["block_structure", "block"]),
    ("hf_block", "weight_block_size", [64, 128], ["weight_block_size", "[128, 128]"]),
    ("hf_block", "activation_scheme", "static", ["activation_scheme", "dynamic"]),
    ("hf_block", "fmt", "e5m2", ["fmt", "e4m3"]),
    ("hf_block", "scale_fmt", "log", ["scale_fmt"]),
    ("hf_tensor", "activation_scheme", "group", ["activation_scheme", "static"]),
    ("fbgemm", "activation_scale_ub", -1.0, ["activation_scale_ub"]),
    ("modelopt", "quant_algo", "NVFP4_AWQ", ["quant_algo", "NVFP4_AWQ", "FP8_PB_WO"]),
    ("modelopt", "ignore", ["*a" * 9], ["ignore", "wildcards"]),
    ("modelopt", "ignore", {"a": 1}, ["ignore", "list"]),
], ids=lambda value: value if isinstance(value, str) and "." not in value else None)  # fmt: skip
def test_a_description_that_is_not_served_names_field_and_value(
    name: str, path: str, value: Any, words: list[str], quantised_folders: Callable[[str], Path],
) -> None:
    folder = quantised_folders(name)
    description = describe(folder)
    shape = read_shape({**json.loads((folder / "config.json").read_text()),
                        "quantization_config": changed(description, path, value)})
    with pytest.raises(ModelFolderError) as caught:
        read_forms(folder, shape)
    assert all(word in caught.value.message for word in words), caught.value.message


JUNK: tuple[Any, ...] = (None, True, 0, -1, 1e300, "", "x", "re:[", [], [[]], [None], {}, {"": {}}, {"a": [{}]}, 1 << 80)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every field in a description."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, item in inner for path in [(*at, key), *paths(item, (*at, key))]]


@EVERY_FORMAT
def test_any_value_in_a_description_gives_forms_or_a_named_error(name: str) -> None:
    description = FORMATS[name][0]
    for path in paths(description):
        for junk in JUNK:
            made = json.loads(json.dumps(description))
            inner = made
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = junk
            try:
                shape, forms = large(made, num_hidden_layers=1)
                assert weight_bytes(shape, 2, forms) > 0
            except ModelFolderError as error:
                assert len(error.message) > 20


@pytest.fixture(scope="module")
def quantised_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name], _ = write_quantised(tmp_path_factory.mktemp(name), name)
        return made[name]

    return folder


def test_fp8_tensors_without_a_description_are_refused(tmp_path: Path) -> None:
    fp8, _ = write_quantised(tmp_path, "ct_channel")
    message = refusal(edit_config(fp8, remove=("quantization_config",)))
    assert "F8_E4M3" in message or "weight_scale" in message


def test_a_description_without_fp8_tensors_is_refused(tmp_path: Path) -> None:
    fp8, plain = write_quantised(tmp_path, "ct_channel")
    (fp8 / SINGLE).write_bytes((plain / SINGLE).read_bytes())
    assert "remove quantization_config" in refusal(fp8)
