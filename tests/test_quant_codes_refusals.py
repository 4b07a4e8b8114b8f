"""What is refused of checkpoints of 4-bit codes: tensors that contradict, descriptions not served; each by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_models import large, refusal, rewrite
from quantised import Weights, describe
from quantised_codes import CODE_FORMATS, bnb, four_bit_floats, modelopt, write_codes
from tiny import edit_config, write_tiny

from workstation.errors import ModelFolderError
from workstation.quant.forms import weight_bytes

Q = "model.layers.0.self_attn.q_proj"
STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"


def state(**changes: Any) -> Callable[[Weights], object]:
    """Changes what the JSON of q's quant_state says."""
    def change(weights: Weights) -> None:
        text = json.dumps({**json.loads(bytes(weights[STATE].tolist())), **changes})
        weights[STATE] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return change


def renamed(weights: Weights) -> None:
    weights[f"{STATE[:-3]}fp4"] = weights.pop(STATE)


BROKEN: dict[str, tuple[str, Callable[[Weights], object], list[str]]] = {
    "no_absmax": ("nf4", lambda w: w.pop(f"{Q}.weight.absmax"), [f"{Q}.weight", f"{Q}.weight.absmax is missing"]),
    "no_codes": ("nf4", lambda w: w.pop(f"{Q}.weight"), [f"{Q}.weight is missing"]),
    "no_table": ("nf4", lambda w: w.pop(f"{Q}.weight.quant_map"), [f"{Q}.weight.quant_map is missing"]),
    "no_state": ("nf4", lambda w: w.pop(STATE), [STATE, "neither"]),
    "no_nested_absmax": ("nf4_nested", lambda w: w.pop(f"{Q}.weight.nested_absmax"), [f"{Q}.weight.nested_absmax is missing"]),
    "nested_without_bytes": ("nf4", state(nested_blocksize=256), [STATE, "nested_blocksize"]),
    "bytes_without_nested": ("nf4_nested", state(nested_blocksize=None), [STATE, "nested_blocksize"]),
    "other_type": ("nf4", renamed, ["fp4", "bnb_4bit_quant_type"]),
    "other_type_inside": ("nf4", state(quant_type="fp4"), [STATE, "quant_type", "nf4"]),
    "other_shape": ("nf4", state(shape=[256, 128]), [STATE, "shape", "[256, 128]", "[128, 256]"]),
    "odd_blocks": ("nf4", state(blocksize=48), [STATE, "blocksize", "power of two", "48"]),
    "unknown_state": ("nf4", state(rotation="hadamard"), [STATE, "rotation", "not known"]),
    "infinite_offset": ("nf4_nested", state(nested_offset="much"), [STATE, "nested_offset", "number"]),
    "not_json": ("nf4", lambda w: w[STATE][3].fill_(0), [STATE, "not valid JSON"]),
    "other_blocks": ("nf4", state(blocksize=128), [f"{Q}.weight.absmax", "[512]", "[256]"]),
    "fewer_codes": ("nf4", lambda w: w.update({f"{Q}.weight": w[f"{Q}.weight"][:-1].clone()}),
                    [f"{Q}.weight", "16383", "16384"]),
    "nan_absmax": ("nf4", lambda w: w[f"{Q}.weight.absmax"][7].fill_(torch.nan), [f"{Q}.weight.absmax", "not finite"]),
    "nan_nested": ("nf4_nested", lambda w: w[f"{Q}.weight.nested_absmax"].fill_(torch.nan), [Q, "not finite"]),
    "nan_table": ("nf4", lambda w: w[f"{Q}.weight.quant_map"][3].fill_(torch.nan), [f"{Q}.weight.quant_map", "nan"]),
    "short_table": ("nf4", lambda w: w.update({f"{Q}.weight.quant_map": torch.ones(8)}), [f"{Q}.weight.quant_map", "F32 [16]"]),
    "no_mx_scale": ("mxfp4", lambda w: w.pop(f"{Q}.weight_scale"), [f"{Q}.weight_packed", f"{Q}.weight_scale is missing"]),
    "nan_mx_scale": ("mxfp4", lambda w: w[f"{Q}.weight_scale"][3, 2].fill_(255), [f"{Q}.weight_scale", "NaN"]),
    "huge_mx_scale": ("mxfp4", lambda w: w[f"{Q}.weight_scale"][3, 2].fill_(140), [f"{Q}.weight_scale", "above 2^9"]),
    "mx_groups": ("mxfp4", lambda w: w.update({f"{Q}.weight_scale": torch.ones(128, 16, dtype=torch.uint8)}),
                  [f"{Q}.weight_scale", "[128, 16]", "[128, 8]"]),
    "mx_float_scale": ("mxfp4", lambda w: w.update({f"{Q}.weight_scale": torch.ones(128, 8)}), [f"{Q}.weight_scale", "F32"]),
    "nan_nv_scale": ("nvfp4", lambda w: w[f"{Q}.weight_scale"].view(torch.uint8)[3, 2].fill_(0x7F),
                     [f"{Q}.weight_scale", "NaN"]),
    "negative_nv_scale": ("modelopt", lambda w: w[f"{Q}.weight_scale"].view(torch.uint8)[3, 2].fill_(0xB8),
                          [f"{Q}.weight_scale", "negative"]),
    "no_divisor": ("nvfp4", lambda w: w.pop(f"{Q}.weight_global_scale"), [f"{Q}.weight_global_scale is missing"]),
    "no_multiplier": ("modelopt", lambda w: w.pop(f"{Q}.weight_scale_2"), [f"{Q}.weight_scale_2 is missing"]),
    "divisor_as_multiplier": ("modelopt", lambda w: w[f"{Q}.weight_scale_2"].reciprocal_(),
                              [f"{Q}.weight_scale_2", "multiplier", "divisor"]),
    "multiplier_as_divisor": ("nvfp4", lambda w: w[f"{Q}.weight_global_scale"].reciprocal_(),
                              [f"{Q}.weight_global_scale", "divisor", "multiplier"]),
    "zero_divisor": ("nvfp4", lambda w: w[f"{Q}.weight_global_scale"].zero_(), [f"{Q}.weight_global_scale", "positive"]),
    "nan_multiplier": ("modelopt", lambda w: w[f"{Q}.weight_scale_2"].fill_(torch.nan), [f"{Q}.weight_scale_2", "positive"]),
    "many_multipliers": ("modelopt", lambda w: w.update({f"{Q}.weight_scale_2": torch.ones(128)}),
                         [f"{Q}.weight_scale_2", "[128]", "[] or [1]"]),
    "two_weights": ("mxfp4", lambda w: w.update({f"{Q}.weight": torch.ones(128, 256)}), [f"{Q}.weight is there as well"]),
    "codes_of_integers": ("mxfp4", lambda w: w.update({f"{Q}.weight_packed": torch.ones(128, 32, dtype=torch.int32)}),
                          [f"{Q}.weight_packed", "I32", "mxfp4-pack-quantized"]),
    "surplus": ("mxfp4", lambda w: w.update({f"{Q}.weight_global_scale": torch.ones(1)}),
                [f"{Q}.weight_packed", "nvfp4-pack-quantized", "mxfp4-pack-quantized"]),
    "scale_without_codes": ("nvfp4", lambda w: w.pop(f"{Q}.weight_packed"), [f"{Q}.weight_packed", "missing"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A format's folder of one layer, made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name], _ = write_codes(tmp_path_factory.mktemp(name), name, num_hidden_layers=1)
        return made[name]

    return folder


@pytest.mark.parametrize("case", BROKEN)
def test_a_tensor_that_contradicts_the_description_is_named(
    case: str, written: Callable[[str], Path], tmp_path: Path,
) -> None:
    name, change, expected = BROKEN[case]
    folder = shutil.copytree(written(name), tmp_path / "broken")
    message = refusal(rewrite(folder, change))
    assert all(word in message for word in expected), message


@pytest.mark.parametrize(("name", "described", "words"), [
    ("mxfp4", modelopt(), ["mxfp4-pack-quantized", "modelopt NVFP4"]),
    ("modelopt", bnb(), ["absmax is missing"]),
    ("nvfp4", four_bit_floats("group", 32, False), ["nvfp4-pack-quantized", "describes mxfp4-pack-quantized"]),
    ("nf4", modelopt(), ["bitsandbytes", "modelopt NVFP4"]),
    ("nf4", {"quant_method": "fp8"}, ["bitsandbytes", "F8_E4M3"]),
    ("nf4", bnb("fp4"), [STATE, "bnb_4bit_quant_type"]),
])  # fmt: skip
def test_tensors_of_another_format_than_described_are_refused(
    name: str, described: dict[str, Any], words: list[str], written: Callable[[str], Path], tmp_path: Path,
) -> None:
    folder = shutil.copytree(written(name), tmp_path / "described")
    edit_config(folder, quantization_config=described)
    message = refusal(folder)
    assert all(word in message for word in words), message


def floats(**more: Any) -> dict[str, Any]:
    """NVFP4's description with other words in its `weights`."""
    made = json.loads(json.dumps(four_bit_floats("tensor_group", 16, True)))
    made["config_groups"]["group_0"]["weights"].update(more)
    return made  # type: ignore[no-any-return]


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    (bnb("int4"), ["bnb_4bit_quant_type", "nf4, fp4", "int4"]),
    (bnb(storage="complex64"), ["bnb_4bit_quant_storage", "complex64"]),
    ({**bnb(), "load_in_8bit": True}, ["load_in_8bit", "false"]),
    ({**bnb(), "load_in_4bit": False}, ["load_in_4bit", "true"]),
    ({**bnb(), "llm_int8_skip_modules": "lm_head"}, ["llm_int8_skip_modules", "list"]),
    (floats(group_size=32), ["group_size", "16", "tensor_group"]),
    (floats(strategy="channel"), ["strategy", "tensor_group"]),
    (floats(strategy="group"), ["group_size", "32", "group"]),
    (floats(symmetric=False), ["symmetric", "true"]),
    (floats(dynamic=True), ["dynamic", "false"]),
    (floats(scale_dtype="torch.uint8"), ["scale_dtype", "float8_e4m3fn"]),
    (floats(num_bits=6), ["num_bits", "8, or 4"]),
    (floats(rotation="hadamard"), ["rotation", "not known"]),
    ({**floats(), "format": "mxfp8-quantized"}, ["format", "mxfp8-quantized"]),
    (modelopt("NVFP4_AWQ"), ["quant_algo", "NVFP4_AWQ"]),
    (modelopt(group_size=32), ["group_size", "16", "32"]),
    ({"quant_method": "mxfp4"}, ["mxfp4", "gpt-oss", "architecture"]),
]


@pytest.mark.parametrize(("description", "expected"), REFUSED, ids=range(len(REFUSED)))
def test_a_description_that_is_not_served_names_field_and_value(description: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(ModelFolderError) as caught:
        large(description)
    assert all(word in caught.value.message for word in expected), caught.value.message


def test_integer_activations_beside_four_bit_floats_are_refused() -> None:
    description = json.loads(json.dumps(floats()))
    description["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "int"}
    with pytest.raises(ModelFolderError, match="input_activations must be null, or floats of 4 or 8 bits"):
        large(description)


@pytest.mark.parametrize(("description", "columns", "words"), [
    (bnb(), 4100, ["4100 columns", "blocks of 64", "only 4"]),
    (four_bit_floats("group", 32, False), 4112, ["groups of 32", "4112"]),
    (modelopt(), 4104, ["groups of 16", "4104"]),
])
def test_rows_that_groups_do_not_divide_are_refused(description: dict[str, Any], columns: int, words: list[str]) -> None:
    with pytest.raises(ModelFolderError) as caught:
        large(description, hidden_size=columns, num_hidden_layers=1)
    assert all(word in caught.value.message for word in words), caught.value.message


JUNK: tuple[Any, ...] = (None, True, 0, -1, 1e300, "", "x", "re:[", [], [[]], [None], {}, {"": {}}, {"a": [{}]}, 1 << 80)


@pytest.mark.parametrize("name", ["nf4_nested", "nvfp4", "modelopt"])
def test_any_value_in_a_description_gives_forms_or_a_named_error(name: str) -> None:
    description = CODE_FORMATS[name].description
    weights = json.loads(json.dumps(description)).get("config_groups", {}).get("group_0", {}).get("weights", {})
    for junk in JUNK:
        changed = [{**description, key: junk} for key in description] + [floats(**{key: junk}) for key in weights]
        for made in changed:
            try:
                shape, forms = large(made, num_hidden_layers=1)
                assert weight_bytes(shape, 2, forms) > 0
            except ModelFolderError as error:
                assert len(error.message) > 20


def test_a_plain_folder_described_as_codes_is_refused(tmp_path: Path) -> None:
    folder = edit_config(write_tiny(tmp_path), quantization_config=bnb())
    assert "remove quantization_config" in refusal(folder)
    assert describe(folder)["load_in_4bit"]
