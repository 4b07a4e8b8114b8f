"""16-bit folders that become integers or codes while they are loaded: the search for scales, the memory, the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import make_engine, run
from quant_models import CPU, PROMPT, load, logits, refusal, rewrite
from quantised import SINGLE, linears
from quantised_int import SIZES, write_integers
from safetensors.torch import load_file
from tiny import write_tiny

from workstation.architecture import read_shape
from workstation.catalog import demo_folder
from workstation.engine.request import SamplingParams
from workstation.kernels import reference_codes
from workstation.kernels.int_weights import IntWeight, unpack
from workstation.kernels.reference_int import widen
from workstation.model.linear_codes import CodeLinear
from workstation.model.linear_int import IntLinear
from workstation.model.loader import checked_entries, read_forms
from workstation.model.targets import Scratch
from workstation.model.tensor_names import targets
from workstation.model.transformer import Decoder
from workstation.quant.forms import weight_bytes
from workstation.quant.quantise import quantise_groups
from workstation.safetensors_header import checkpoint_bytes

Q = "model.layers.0.self_attn.q_proj"
BF16 = torch.bfloat16


def quantised(weight: torch.Tensor, bits: int, size: int, dtype: torch.dtype = BF16) -> IntWeight:
    rows, columns = weight.shape
    per = 128 if bits == 4 else 64
    words = torch.empty(rows, -(-columns // per) * 32, dtype=torch.int16)
    scale = torch.empty(columns // size, rows, dtype=dtype)
    quantise_groups(weight, words, scale, bits)
    return IntWeight(words, scale, None, bits, size, columns)


def nearest(weight: torch.Tensor, size: int) -> torch.Tensor:
    """Plain rounding to the nearest of 15 even steps from −max to max."""
    groups = weight.view(len(weight), -1, size)
    scale = (groups.abs().amax(2, keepdim=True) / 7).to(BF16).float()
    return ((groups / scale).round().clamp(-8, 7) * scale).view(weight.shape)


def error(found: torch.Tensor, weight: torch.Tensor) -> float:
    return float((found - weight).square().mean() / weight.square().mean())


@pytest.mark.parametrize("size", [32, 64, 128])
def test_the_search_takes_a_quarter_of_the_squared_error_away(size: int) -> None:
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    searched = error(widen(quantised(weight, 4, size), torch.float32), weight)
    assert searched < 0.75 * error(nearest(weight, size), weight)


def test_no_group_is_worse_than_rounding_to_its_largest_value() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)) ** 3
    searched = (widen(quantised(weight, 4, 64), torch.float32) - weight).view(64, 8, 64).square().sum(2)
    largest = weight.view(64, 8, 64).gather(2, weight.view(64, 8, 64).abs().argmax(2, keepdim=True))
    scale = (largest / -8).to(BF16).float()
    plain = (weight.view(64, 8, 64) / scale).round().clamp(-8, 7) * scale - weight.view(64, 8, 64)
    assert (searched <= plain.square().sum(2) * (1 + 1e-5)).all()


def test_eight_bits_are_rounded_to_nearest_with_a_scale_a_row() -> None:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(2))
    found = quantised(weight, 8, 96, torch.float32)
    scale = weight.abs().amax(1) / 127
    assert torch.equal(found.scale[0], scale)
    assert torch.equal(unpack(found.words, 8, 96).int() - 128, (weight / scale[:, None]).round().int())


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_without_size_stay_zero(bits: int) -> None:
    weight = torch.zeros(2, 128)
    weight[1] = 1e-44  # below what a scale can hold
    assert torch.equal(widen(quantised(weight, bits, 64), torch.float32), torch.zeros(2, 128))


def test_groups_are_quantised_alike_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 128, generator=torch.Generator().manual_seed(0))
    results = []
    for chunk in (1, 1000, 1 << 22):
        monkeypatch.setattr("workstation.quant.quantise.CHUNK_ELEMENTS", chunk)
        results.append(quantised(weight, 4, 32))
    assert all(torch.equal(other.words, results[0].words) and torch.equal(other.scale, results[0].scale) for other in results)


@pytest.mark.parametrize("stored", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize(("quantization", "size"), [("int4", 128), ("int8", 256)])
def test_plain_weights_become_integers_and_the_rest_stays(
    quantization: str, size: int, stored: torch.dtype, tmp_path: Path,
) -> None:
    folder = write_tiny(tmp_path, "qwen2", dtype=stored, **SIZES)
    weights = load_file(folder / SINGLE)
    decoder = load(folder, quantization=quantization)
    qkv = decoder.layers[1].attention.qkv
    assert isinstance(qkv, IntLinear) and qkv.weight.size == size
    plain = torch.cat([weights[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]).float()
    expected = quantised(plain, qkv.weight.bits, size, qkv.weight.scale.dtype)
    assert torch.equal(qkv.weight.words, expected.words) and torch.equal(qkv.weight.scale, expected.scale)
    assert torch.equal(decoder.embedding, weights["model.embed_tokens.weight"].float())
    assert not isinstance(decoder.head, IntLinear)
    assert decoder.weight_bytes - decoder.cos_sin.nbytes == weight_bytes(decoder.shape, 4, decoder.forms)


def test_groups_are_as_wide_as_divides_the_columns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_tiny(tmp_path, hidden_size=192, intermediate_size=328, head_dim=16, num_attention_heads=6)
    decoder = load(folder, quantization="int4")
    layer = decoder.layers[0]
    assert isinstance(layer.gate_up, IntLinear) and layer.gate_up.weight.size == 64
    assert isinstance(layer.attention.o, IntLinear) and layer.attention.o.weight.size == 32
    assert not isinstance(layer.down, IntLinear) and "328 columns stay as they are" in caplog.text
    layer = load(folder, quantization="nf4").layers[0]
    assert isinstance(layer.attention.o, CodeLinear) and layer.attention.o.weight.size == 32
    assert not isinstance(layer.down, CodeLinear)


def test_nf4_takes_the_nearest_value_of_each_block_of_64(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "qwen2", **SIZES)
    weights, decoder = load_file(folder / SINGLE), load(folder, quantization="nf4")
    down = decoder.layers[1].down
    assert isinstance(down, CodeLinear) and down.weight.size == 64
    plain = weights["model.layers.1.mlp.down_proj.weight"].float().view(-1, 64)
    absmax = plain.abs().amax(1)
    table = torch.tensor(down.weight.values)
    nearest = table[((plain / absmax[:, None])[..., None] - table).abs().argmin(-1)]
    found = reference_codes.widen(down.weight, torch.float32)
    assert torch.equal(found, (nearest * absmax[:, None]).view(found.shape))
    assert decoder.weight_bytes - decoder.cos_sin.nbytes == weight_bytes(decoder.shape, 4, decoder.forms)
    assert torch.equal(decoder.embedding, weights["model.embed_tokens.weight"].float())


@pytest.mark.parametrize("quantization", ["int4", "int8"])
def test_the_buffer_for_quantising_is_one_tensor(quantization: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, **SIZES)
    shape = read_shape(folder)
    forms = read_forms(folder, shape, quantization=quantization)
    entries = checked_entries(folder, shape, forms)
    decoder = Decoder(shape, dtype=torch.float32, device=CPU, max_model_len=8, forms=forms)
    assert Scratch(targets(decoder), entries, CPU).take(1 << 30).nbytes == 256 * 384 * 4
    assert decoder.weight_bytes < checkpoint_bytes(folder)


@pytest.mark.parametrize("quantization", ["int4", "int8", "nf4"])
def test_a_weight_that_is_not_finite_cannot_be_quantised(quantization: str, tmp_path: Path) -> None:
    for value in (torch.inf, torch.nan):
        folder = write_tiny(tmp_path, **SIZES)
        rewrite(folder, lambda w, value=value: w[f"{Q}.weight"][3, 5].fill_(value))
        assert f"{Q}.weight" in refusal(folder, quantization=quantization)


def test_an_integer_checkpoint_stays_as_it_is_whatever_is_asked_for(tmp_path: Path) -> None:
    folder, _ = write_integers(tmp_path, "gptq", num_hidden_layers=1)
    shape = read_shape(folder)
    assert read_forms(folder, shape, quantization="fp8") == read_forms(folder, shape)


def test_logits_move_little_with_eight_bits_and_more_with_four(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, **SIZES)
    exact = logits(load(folder))
    names = ("int8", "int4", "nf4")
    eight, four, nf4 = (float((logits(load(folder, quantization=name)) - exact).abs().mean()) for name in names)
    assert 0 < eight < 0.1 * min(four, nf4) and max(four, nf4) < 1


def test_the_demo_models_weights_lose_less_than_by_plain_rounding() -> None:
    weights = load_file(demo_folder() / SINGLE)
    gains = []
    for module in linears(weights):
        weight = weights[f"{module}.weight"].float()
        size = next(size for size in (128, 64, 32) if weight.shape[1] % size == 0)
        gains.append(error(widen(quantised(weight, 4, size), torch.float32), weight) / error(nearest(weight, size), weight))
    assert max(gains) < 0.8


@pytest.mark.parametrize("quantization", ["int4", "int8", "nf4"])
def test_the_engine_plans_for_integers_and_quantises_while_loading(quantization: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, **SIZES)
    whole, small = make_engine(folder), make_engine(folder, quantization=quantization)
    assert small.info.weight_bytes < whole.info.weight_bytes
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    together = run(folder, [PROMPT[:33], PROMPT[3:20]], greedy, quantization=quantization)
    assert together == [run(folder, [prompt], greedy, quantization=quantization)[0] for prompt in (PROMPT[:33], PROMPT[3:20])]
