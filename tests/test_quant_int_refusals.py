"""What is refused of integer checkpoints: tensors that contradict, descriptions that are not served; each by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_models import large, refusal, rewrite
from quantised import Weights
from quantised_int import AWQ, INT_FORMATS, ct, gptq, write_integers
from tiny import edit_config, write_tiny

from workstation.errors import ModelFolderError
from workstation.quant.forms import weight_bytes

Q = "model.layers.0.self_attn.q_proj"

BROKEN: dict[str, tuple[str, Callable[[Weights], object], list[str]]] = {
    "no_scale": ("gptq", lambda w: w.pop(f"{Q}.scales"), [f"{Q}.qweight", f"{Q}.scales is missing"]),
    "no_codes": ("gptq", lambda w: w.pop(f"{Q}.qweight"), [f"{Q}.qweight", "missing"]),
    "no_zeros": ("awq", lambda w: w.pop(f"{Q}.qzeros"), [f"{Q}.qzeros", "missing"]),
    "no_ct_zeros": ("ct_w4a16_asym", lambda w: w.pop(f"{Q}.weight_zero_point"), [f"{Q}.weight_zero_point", "missing"]),
    "nan_scale": ("gptq", lambda w: w[f"{Q}.scales"][1, 3].fill_(torch.nan), [f"{Q}.scales", "not finite"]),
    "infinite_scale": ("ct_w4a16", lambda w: w[f"{Q}.weight_scale"][3].fill_(torch.inf), [f"{Q}.weight_scale", "not finite"]),
    "integer_scale": ("awq", lambda w: w.update({f"{Q}.scales": w[f"{Q}.scales"].int()}), [f"{Q}.scales", "I32"]),
    "other_groups": ("awq", lambda w: w.update({f"{Q}.scales": torch.ones(4, 128).half()}),
                     [f"{Q}.scales", "[4, 128]", "[2, 128]"]),
    "not_symmetric": ("gptq", lambda w: w[f"{Q}.qzeros"][0, 0].fill_(0x77777779), [f"{Q}.qzeros", "other than 8"]),
    "not_symmetric_8": ("gptq_8", lambda w: w[f"{Q}.qzeros"].fill_(5), [f"{Q}.qzeros", "other than 128"]),
    "ct_not_symmetric": ("ct_w4a16", lambda w: w.update({f"{Q}.weight_zero_point": torch.ones(16, 2, dtype=torch.int32)}),
                         [f"{Q}.weight_zero_point", "symmetric"]),
    "floating_codes": ("gptq", lambda w: w.update({f"{Q}.qweight": w[f"{Q}.qweight"].float()}), [f"{Q}.qweight", "F32", "I32"]),
    "awq_as_gptq": ("gptq_asym", lambda w: w.update({f"{Q}.qweight": torch.ones(256, 16, dtype=torch.int32)}),
                    [f"{Q}.qweight", "4-bit awq", "4-bit gptq"]),
    "eight_bits": ("gptq", lambda w: w.update({f"{Q}.qweight": torch.ones(64, 128, dtype=torch.int32)}),
                   [f"{Q}.qweight", "8-bit gptq", "4-bit gptq"]),
    "shape": ("ct_w4a16", lambda w: w.update({f"{Q}.weight_shape": torch.tensor([128, 255])}), ["weight_shape", "[128, 255]"]),
    "two_weights": ("gptq", lambda w: w.update({f"{Q}.weight": torch.ones(128, 256)}),
                    [f"{Q}.qweight", f"{Q}.weight is there"]),
    "two_codes": ("gptq", lambda w: w.update({f"{Q}.weight_packed": torch.ones(128, 32, dtype=torch.int32)}),
                  [Q, "there as well"]),
    "uneven_order": ("gptq_order", lambda w: w[f"{Q}.g_idx"][:5].fill_(1), [f"{Q}.g_idx", "128 columns"]),
    "groups_beyond": ("gptq_order", lambda w: w[f"{Q}.g_idx"][3].fill_(77), [f"{Q}.g_idx", "groups 0 to 1"]),
    "order_shape": ("gptq", lambda w: w.update({f"{Q}.g_idx": torch.zeros(4, dtype=torch.int32)}), [f"{Q}.g_idx", "I32 [256]"]),
    "fp8_weight": ("gptq", lambda w: w.update({f"{Q}.weight": w.pop(f"{Q}.qweight").to(torch.float8_e4m3fn)}),
                   [f"{Q}.weight", "F8_E4M3", "qweight"]),
    "surplus": ("awq", lambda w: w.update({f"{Q}.perm": torch.ones(1)}), [f"{Q}.perm", "no place"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_tensor_that_contradicts_the_description_is_named(case: str, tmp_path: Path) -> None:
    name, change, expected = BROKEN[case]
    folder, _ = write_integers(tmp_path, name, num_hidden_layers=1)
    message = refusal(rewrite(folder, change))
    assert all(word in message for word in expected), message


def test_tensors_of_another_format_than_described_are_refused(tmp_path: Path) -> None:
    folder, _ = write_integers(tmp_path, "awq", num_hidden_layers=1)
    edit_config(folder, quantization_config=gptq(sym=False))
    assert "4-bit awq" in refusal(folder)
    edit_config(folder, quantization_config=ct(4, 128))
    assert "weight_packed" in (message := refusal(folder)) and "qweight" in message


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    (gptq(bits=3), ["bits", "4 or 8"]),
    (gptq(bits=True), ["bits"]),
    (gptq(size=0), ["group_size"]),
    (gptq(size=100), ["group_size 100 does not divide the 4096 columns"]),
    (gptq(checkpoint_format="marlin"), ["checkpoint_format", "marlin", "convert"]),
    (gptq(format="bitblas"), ["format", "bitblas"]),
    (gptq(dynamic=[1]), ["dynamic"]),
    (gptq(dynamic={"+:(a+)+$": {}}), ["pattern"]),
    (gptq(dynamic={".*": {"bits": 2}}), ["dynamic", "bits", "4 or 8"]),
    (gptq(dynamic={".*": {"rotation": 1}}), ["rotation", "not known"]),
    (gptq(modules_in_block_to_quantize=7), ["modules_in_block_to_quantize"]),
    ({**AWQ, "version": "gemv"}, ["version", "gemm"]),
    ({**AWQ, "zero_point": False}, ["zero_point", "true"]),
    ({**AWQ, "bits": 8}, ["bits", "4"]),
    ({**AWQ, "group_size": 0}, ["group_size"]),
    (ct(3, 128), ["num_bits", "4 or 8"]),
    (ct(4, 128, strategy="tensor"), ["strategy", "group or channel"]),
    (ct(4, 128, strategy="channel"), ["group_size"]),
    (ct(4, 0, strategy="group"), ["group_size"]),
    (ct(4, 128, dynamic=True), ["dynamic", "false"]),
    (ct(4, 128, rotation="hadamard"), ["rotation", "not known"]),
    (ct(4, 128, block_structure=[128, 128]), ["block_structure"]),
]


@pytest.mark.parametrize(("description", "expected"), REFUSED, ids=range(len(REFUSED)))
def test_a_description_that_is_not_served_names_field_and_value(description: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(ModelFolderError) as caught:
        large(description)
    assert all(word in caught.value.message for word in expected), caught.value.message


def test_integer_activations_are_refused() -> None:
    description = json.loads(json.dumps(ct(8, 0)))
    description["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "int", "strategy": "token"}
    with pytest.raises(ModelFolderError, match="input_activations must be null in the format pack-quantized"):
        large(description)


JUNK: tuple[Any, ...] = (None, True, 0, -1, 1e300, "", "x", "re:[", [], [[]], [None], {}, {"": {}}, {"a": [{}]}, 1 << 80)


@pytest.mark.parametrize("name", ["ct_w4a16_asym", "gptq", "awq"])
def test_any_value_in_a_description_gives_forms_or_a_named_error(name: str) -> None:
    description = {**INT_FORMATS[name].description, "dynamic": {".*q_proj": {"bits": 8}}}
    for key in [*description, "checkpoint_format", "version", "modules_in_block_to_quantize", "lm_head"]:
        for junk in JUNK:
            try:
                shape, forms = large({**description, key: junk}, num_hidden_layers=1)
                assert weight_bytes(shape, 2, forms) > 0
            except ModelFolderError as error:
                assert len(error.message) > 20


def test_a_plain_folder_described_as_integers_is_refused(tmp_path: Path) -> None:
    folder = edit_config(write_tiny(tmp_path), quantization_config=gptq(size=32))
    assert "remove quantization_config" in refusal(folder)
