"""Signed 8-bit weights, row by row: compressed-tensors' W8A8 and bitsandbytes' INT8; their product with rounded activations."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_models import CPU, large, load, logits, refusal, rewrite, transformers_logits
from quantised import SINGLE, Weights, compressed, ct_args, describe, linears
from quantised_int import SIZES
from safetensors.torch import load_file, save_file
from tiny import edit_config, write_tiny

from workstation.architecture import read_shape
from workstation.errors import ModelFolderError
from workstation.kernels import int8_activations, ops
from workstation.kernels.int8_activations import linear_int8, round_tokens
from workstation.kernels.int_weights import IntWeight, pack
from workstation.kernels.reference_int import widen
from workstation.model.linear import SplitLinear
from workstation.model.linear_int import IntLinear
from workstation.model.loader import read_forms
from workstation.quant.forms import Form

Q = "model.layers.0.self_attn.q_proj"
BF16 = torch.bfloat16


def ints(strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": False, **more}


def w8a8(weights: dict[str, Any] | None = None, inputs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return compressed(weights or ints("channel"), inputs or ints("token", dynamic=True), **{"format": "int-quantized", **more})


def bnb8(**more: Any) -> dict[str, Any]:
    return {"quant_method": "bitsandbytes", "load_in_8bit": True, "_load_in_8bit": True, "load_in_4bit": False,
            "_load_in_4bit": False, "llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None,
            "llm_int8_enable_fp32_cpu_offload": False, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_compute_dtype": "float32", "bnb_4bit_use_double_quant": False, **more}


STATIC = w8a8(inputs=ints("tensor", symmetric=False))
FORMATS: dict[str, dict[str, Any]] = {
    "w8a8": w8a8(), "w8a8_static": STATIC, "w8_rows": compressed(ints("channel"), None, format="naive-quantized"),
    "w8_groups": w8a8(ints("group", group_size=128)), "bnb8": bnb8()}


def write(folder: Path, name: str, kind: str = "llama", skip: Callable[[str], bool] = lambda module: False,
          **more: Any) -> tuple[Path, Path]:
    """Writes `folder/int` in the format `name` and `folder/plain`, its dequantised twin; returns both."""
    ours, plain = folder / "int", write_tiny(folder / "plain", kind, **{**SIZES, **more})
    stored, meaning = load_file(plain / SINGLE), load_file(plain / SINGLE)
    for module in linears(stored):
        if skip(module):
            continue
        weight = stored[f"{module}.weight"]
        groups = weight.shape[1] // 128 if name == "w8_groups" else 1
        parts = weight.view(len(weight), groups, -1)
        largest = parts.abs().amax(2, keepdim=True)
        scale = largest / 127 if name == "bnb8" else (largest / 127).bfloat16().float()
        codes = (parts / scale).round().clamp(-128, 127)
        meaning[f"{module}.weight"] = (codes * scale).view_as(weight)
        stored[f"{module}.weight"] = codes.to(torch.int8).view_as(weight)
        if name == "bnb8":
            stored |= {f"{module}.SCB": largest.flatten(), f"{module}.weight_format": torch.zeros((), dtype=torch.uint8)}
        else:
            stored[f"{module}.weight_scale"] = scale[..., 0].bfloat16()
        if name == "w8a8_static":
            stored |= {f"{module}.input_scale": torch.tensor([0.02]), f"{module}.input_zero_point": torch.tensor([-7])}
    shutil.copytree(plain, ours)
    save_file(stored, ours / SINGLE, metadata={"format": "pt"})
    save_file(meaning, plain / SINGLE, metadata={"format": "pt"})
    edit_config(ours, quantization_config=FORMATS[name])
    return ours, plain


# ── loading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_what_was_stored_and_logits_those_of_the_twin(name: str, tmp_path: Path) -> None:
    folder, plain = write(tmp_path, name, "qwen2")
    decoder, stored = load(folder), load_file(folder / SINGLE)
    qkv = decoder.layers[1].attention.qkv
    assert isinstance(qkv, IntLinear) and qkv.rounds == name.startswith("w8a8")
    modules = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
    codes = torch.cat([stored[f"{module}.weight"] for module in modules]).float()
    if name == "bnb8":
        expected = codes * (torch.cat([stored[f"{module}.SCB"] for module in modules]) / 127)[:, None]
    else:
        scale = torch.cat([stored[f"{module}.weight_scale"] for module in modules]).float()
        expected = codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)
    assert torch.equal(widen(qkv.weight, torch.float32), expected)
    assert (logits(decoder) - transformers_logits(plain)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["w8a8", "bnb8"])
def test_layers_on_the_skip_list_are_dense(name: str, tmp_path: Path) -> None:
    folder, plain = write(tmp_path, name, skip=lambda module: module.endswith("k_proj"))
    skip = {"ignore": ["lm_head", "re:.*k_proj"]} if name == "w8a8" else {"llm_int8_skip_modules": ["lm_head", "k_proj"]}
    edit_config(folder, quantization_config={**describe(folder), **skip})
    shape = read_shape(folder)
    for load_format in ("auto", "dummy"):
        forms = read_forms(folder, shape, load_format=load_format)
        found = [forms.part(f"model.layers.1.self_attn.{part}_proj").form for part in "qkv"]
        assert found == [Form.INT8, Form.DENSE, Form.INT8]
    decoder = load(folder)
    assert isinstance(decoder.layers[0].attention.qkv, SplitLinear)
    assert (logits(decoder) - transformers_logits(plain)).abs().max() < 1e-4


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────

BROKEN: dict[str, tuple[str, Callable[[Weights], object], list[str]]] = {
    "no_scb": ("bnb8", lambda w: w.pop(f"{Q}.SCB"), [f"{Q}.weight", f"{Q}.SCB is missing"]),
    "nan_scb": ("bnb8", lambda w: w[f"{Q}.SCB"][3].fill_(torch.nan), [f"{Q}.SCB", "not finite"]),
    "tiles": ("bnb8", lambda w: w[f"{Q}.weight_format"].fill_(2), [f"{Q}.weight_format", "is not 0"]),
    "no_scale": ("w8a8", lambda w: w.pop(f"{Q}.weight_scale"), [f"{Q}.weight_scale is missing"]),
    "inf_scale": ("w8a8", lambda w: w[f"{Q}.weight_scale"][3].fill_(torch.inf), [f"{Q}.weight_scale", "not finite"]),
    "scale_shape": ("w8a8", lambda w: w.update({f"{Q}.weight_scale": torch.ones(1, 1)}), ["[1, 1]", "[128, 1]"]),
    "zero_point": ("w8a8", lambda w: w.update({f"{Q}.weight_zero_point": torch.ones(128, 1, dtype=torch.int8)}),
                   [f"{Q}.weight_zero_point", "symmetric"]),
    "packed": ("w8a8", lambda w: w.update({f"{Q}.weight_packed": torch.ones(128, 64, dtype=torch.int32)}),
               [f"{Q}.weight_packed", "there as well"]),
    "bytes": ("w8a8", lambda w: w.update({f"{Q}.weight": w[f"{Q}.weight"].view(torch.uint8)}), [f"{Q}.weight", "U8"]),
    "shape": ("bnb8", lambda w: w.update({f"{Q}.weight": w[f"{Q}.weight"][:, :255].contiguous()}),
              ["[128, 255]", "[128, 256]"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_tensor_that_contradicts_the_description_is_named(case: str, tmp_path: Path) -> None:
    name, change, expected = BROKEN[case]
    folder, _ = write(tmp_path, name, num_hidden_layers=1)
    message = refusal(rewrite(folder, change))
    assert all(word in message for word in expected), message


def test_zero_points_that_are_zero_say_nothing(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, "w8a8", num_hidden_layers=1)
    before = logits(load(folder))
    rewrite(folder, lambda w: w.update({f"{Q}.weight_zero_point": torch.zeros(128, 1, dtype=torch.int8)}))
    assert torch.equal(logits(load(folder)), before)


def test_signed_rows_are_refused_where_another_format_is_described(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, "w8a8", num_hidden_layers=1)
    edit_config(folder, quantization_config=compressed(ints("channel"), None, format="pack-quantized"))
    assert "I8" in (message := refusal(folder)) and "weight_packed" in message


@pytest.mark.parametrize(("description", "expected"), [
    (w8a8(ints("channel", symmetric=False)), ["symmetric", "true"]),
    (w8a8(ints("channel", num_bits=4)), ["num_bits", "8 in the format int-quantized"]),
    (w8a8(ints("tensor")), ["strategy", "group or channel"]),
    (w8a8(inputs=ct_args("token", dynamic=True)), ["type", "int beside integer weights"]),
    (w8a8(inputs=ints("token", num_bits=4)), ["num_bits", "8"]),
    (w8a8(inputs=ints("group", group_size=128)), ["strategy", "tensor or token"]),
    (w8a8(inputs=ints("token", outliers=2)), ["outliers", "not known"]),
    (w8a8(format="pack-quantized"), ["input_activations", "pack-quantized"]),
    (bnb8(load_in_4bit=True), ["load_in_8bit", "false beside load_in_4bit"]),
    (bnb8(load_in_8bit=False, _load_in_8bit=False), ["load_in_4bit", "true, or load_in_8bit"]),
    (bnb8(llm_int8_skip_modules="lm_head"), ["llm_int8_skip_modules", "list"]),
])
def test_a_description_that_is_not_served_names_field_and_value(description: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(ModelFolderError) as caught:
        large(description)
    assert all(word in caught.value.message for word in expected), caught.value.message


# ── rounded activations ─────────────────────────────────────────────────────────────────────────────────────────────


def example(
    tokens: int, rows: int, columns: int, dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, IntWeight, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens + rows + columns)
    codes = torch.randint(-128, 128, (rows, columns), generator=generator)
    scale = torch.rand(1, rows, generator=generator) / 100 + 1e-3
    weight = IntWeight(pack((codes + 128).to(torch.uint8), 8), scale.bfloat16(), None, 8, columns, columns)
    return torch.randn(tokens, columns, generator=generator).to(dtype), weight, codes


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 8, 64), (3, 24, 72), (33, 40, 200), (18, 16, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_the_product_is_that_of_the_rounded_numbers(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    x, weight, codes = example(tokens, rows, columns, dtype)
    bias = torch.arange(rows, dtype=dtype)
    scale = x.float().abs().amax(1) / 127
    rounded = (x.float() / scale[:, None]).round().double()
    sums = (rounded @ codes.t().double()).float()
    expected = (sums * scale[:, None] * weight.scale[0].float() + bias).to(dtype)
    assert torch.equal(linear_int8(x, weight, bias), expected)


def test_the_product_is_close_to_that_with_16_bit_activations() -> None:
    x, weight, _ = example(64, 48, 512)
    exact = ops.linear_int(x, weight)
    error = (linear_int8(x, weight) - exact).square().mean() / exact.square().mean()
    assert 0 < error.sqrt() < 0.02


def test_parts_of_rows_and_of_tokens_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = example(21, 40, 200)
    whole = linear_int8(x, weight)
    monkeypatch.setattr(int8_activations, "SCRATCH_BYTES", 256 * 8)
    monkeypatch.setattr(int8_activations, "ROUNDED_ELEMENTS", 500)
    out = torch.empty_like(whole)
    assert linear_int8(x, weight, out=out) is out and torch.equal(out, whole)


def test_a_broken_token_stays_broken_and_alone() -> None:
    x, weight, _ = example(5, 16, 64)
    sound = linear_int8(x, weight)
    x[1, 3], x[2, 0], x[3] = torch.nan, torch.inf, 0
    found = linear_int8(x, weight)
    assert found[1:3].isnan().all() and torch.equal(found[3], torch.zeros(16))
    assert torch.equal(found[[0, 4]], sound[[0, 4]])
    assert round_tokens(x)[1][3] == 1


def test_layers_round_many_rows_where_the_checkpoint_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = example(40, 32, 64)
    following = IntLinear(example(40, 8, 64)[1])
    monkeypatch.setattr(ops, "multiplies_int8", lambda x, weight: x.shape[0] > 20)
    rounds, exact = IntLinear(weight, rounds=True), IntLinear(weight)
    assert torch.equal(rounds(x), linear_int8(x, weight)) and torch.equal(exact(x), ops.linear_int(x, weight))
    assert torch.equal(rounds(x[:20]), ops.linear_int(x[:20], weight))
    out = torch.empty(40, 32)
    rounds.write(x, out)
    assert torch.equal(out, linear_int8(x, weight))
    assert torch.equal(rounds.silu_mul(x, following), ops.silu_mul(linear_int8(x, weight)))  # type: ignore[arg-type]


def test_weights_with_groups_or_zero_points_are_not_multiplied_so() -> None:
    _, weight, _ = example(1, 32, 64)
    assert int8_activations.multiplies_int8(weight)
    zero = torch.zeros(1, 32, dtype=torch.uint8)
    for other in (weight._replace(zero=zero), weight._replace(size=32), weight._replace(bits=4), weight.part(0, 4)):
        assert not int8_activations.multiplies_int8(other)
    with pytest.raises(ValueError, match="8 bits"):
        ops.linear_int8(torch.ones(1, 64), weight._replace(zero=zero))


def test_a_cpu_widens_the_weights() -> None:
    x, weight, _ = example(400, 32, 64, BF16)
    assert not ops.multiplies_int8(x, weight)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(300, 4096, 4096), (2048, 1024, 14336), (257, 40, 200)])
def test_a_gpu_gives_what_a_cpu_gives(shape: tuple[int, int, int]) -> None:
    x, weight, _ = example(*shape, dtype=BF16)
    there = weight._replace(words=weight.words.cuda(), scale=weight.scale.cuda())
    assert ops.multiplies_int8(x.cuda(), there)
    assert torch.equal(ops.linear_int8(x.cuda(), there).cpu(), linear_int8(x.to(CPU), weight))
