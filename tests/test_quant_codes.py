"""Checkpoints of 4-bit codes: bitsandbytes, MXFP4 and NVFP4 mean what their bytes say, and what their libraries read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import code_vectors
import pytest
import torch
from quant_models import large, load, logits, rewrite, transformers_logits
from quantised import SINGLE, describe, linears
from quantised_codes import CODE_FORMATS, bnb, four_bit_floats, modelopt, write_codes
from safetensors.torch import load_file, save_file
from tiny import edit_config

from workstation.architecture import read_shape
from workstation.kernels.code_tables import E2M1, FP4, NF4
from workstation.kernels.code_weights import CodeWeight
from workstation.kernels.reference_codes import widen
from workstation.model.linear import DenseLinear, Linear, PackedLinear, SplitLinear
from workstation.model.linear_codes import CodeLinear, empty_codes
from workstation.model.linear_forms import pieces
from workstation.model.loader import load_model, read_forms
from workstation.model.staging import Reader
from workstation.model.targets import Scratch
from workstation.model.tensor_names import code_targets
from workstation.quant.code_layers import CodeLayers
from workstation.quant.codes import CodePacking, Codes, CodeScheme
from workstation.quant.detect import weight_forms
from workstation.quant.forms import Form, FusedLinear, Segment, scratch_bytes, weight_bytes
from workstation.quant.quantise_codes import quantise_codes
from workstation.safetensors_header import read_checkpoint

EVERY = pytest.mark.parametrize("name", CODE_FORMATS)
CPU = torch.device("cpu")
Q = "model.layers.0.self_attn.q_proj"
VECTORS = load_file(Path(__file__).parent / "code_vectors.safetensors")
SCHEMES = {"nf4": CodeScheme(CodePacking.BNB, NF4, 64), "fp4": CodeScheme(CodePacking.BNB, FP4, 64),
           "mxfp4": CodeScheme(CodePacking.MXFP4), "nvfp4": CodeScheme(CodePacking.NVFP4)}

Written = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A format's folder and its plain twin, for tests that only read them."""
    made: dict[str, tuple[Path, Path]] = {}

    def folders(name: str) -> tuple[Path, Path]:
        if name not in made:
            made[name] = write_codes(tmp_path_factory.mktemp(name), name, "qwen2")
        return made[name]

    return folders


def wide(linear: Linear) -> torch.Tensor:
    """A layer's weights in float32."""
    found = []
    for piece in pieces(linear):
        assert isinstance(piece, CodeLinear)
        found.append(widen(piece.weight, torch.float32))
    return torch.cat(found)


def loaded(folder: Path, tensors: dict[str, torch.Tensor], scheme: CodeScheme, rows: int, columns: int) -> CodeWeight:
    """One matrix `m`, read from its stored tensors as the loader reads it."""
    save_file({f"m.{name}": value for name, value in tensors.items()}, folder / SINGLE)
    entries = read_checkpoint(folder)
    part = CodeLayers(entries).part("m", scheme, rows, columns)
    assert isinstance(part.groups, Codes)
    segment = Segment(FusedLinear((("m", rows),), columns), part.form, part.activations, part.groups)
    linear = empty_codes(segment, part.groups, dtype=torch.float32, device=CPU)
    places = dict(code_targets("m", slice(0, rows), linear, part))
    scratch = Scratch(places, [entries[name] for name in places], CPU)
    with Reader() as reader:
        for name, target in places.items():
            target.read(reader, entries[name], scratch)
    assert not any(bool(target.is_broken()) for target in places.values() if target.is_broken() is not None)
    return linear.weight


# ── what the bytes mean ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", sorted({key.split("/")[0] for key in VECTORS}))
def test_weights_are_bit_for_bit_what_the_library_reads_that_wrote_them(name: str, tmp_path: Path) -> None:
    """bitsandbytes 0.50.2 and compressed-tensors 0.20.0; `code_vectors.py` has written the file."""
    tensors = {key.removeprefix(f"{name}/"): value for key, value in VECTORS.items() if key.startswith(f"{name}/")}
    meaning, (rows, columns) = tensors.pop("meaning"), tensors.pop("shape").tolist()
    scheme = SCHEMES[name.split("_")[0]]
    assert torch.equal(widen(loaded(tmp_path, tensors, scheme, rows, columns), meaning.dtype), meaning)


@EVERY
def test_weights_are_bit_for_bit_those_of_a_naive_decoder(name: str, written: Written) -> None:
    folder, plain = written(name)
    decoder, meaning = load(folder), load_file(plain / SINGLE)
    for number, layer in enumerate(decoder.layers):
        prefix = f"model.layers.{number}"
        for linear, block, parts in ((layer.attention.qkv, "self_attn", "qkv"), (layer.attention.o, "self_attn", "o"),
                                     (layer.gate_up, "mlp", ("gate", "up")), (layer.down, "mlp", ("down",))):
            expected = torch.cat([meaning[f"{prefix}.{block}.{part}_proj.weight"] for part in parts])
            assert torch.equal(wide(linear), expected), (number, block)


@pytest.mark.parametrize("name", ["nf4_nested", "fp4", "mxfp4", "nvfp4", "modelopt"])
def test_logits_are_those_of_the_dequantised_twin_in_transformers(name: str, written: Written) -> None:
    folder, plain = written(name)
    assert (logits(load(folder)) - transformers_logits(plain)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["nf4_nested", "nvfp4"])
def test_in_bfloat16_the_error_is_that_of_the_dequantised_twin_in_transformers(name: str, written: Written) -> None:
    folder, plain = written(name)
    exact, theirs = transformers_logits(plain), transformers_logits(plain, torch.bfloat16)
    ours = logits(load(folder, torch.bfloat16), torch.bfloat16)
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()


def one_row(codes: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """64 codes of NF4 in one block, the first eight from the bytes of a number, highest first."""
    stored = torch.zeros(32, 1, dtype=torch.uint8)
    stored[:4, 0] = torch.tensor(list(codes.to_bytes(4, "big")), dtype=torch.uint8)
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [1, 64]}).encode()
    return {"weight": stored, "weight.absmax": torch.ones(1), "weight.quant_map": torch.tensor(NF4),
            "weight.quant_state.bitsandbytes__nf4": torch.frombuffer(bytearray(state), dtype=torch.uint8), **more}


@pytest.mark.parametrize("name", ["nf4", "nf4_float32"])
def test_quantising_gives_the_codes_and_scales_that_bitsandbytes_gives(name: str, tmp_path: Path) -> None:
    tensors = {key.removeprefix(f"{name}/"): value for key, value in VECTORS.items() if key.startswith(f"{name}/")}
    _, (rows, columns) = tensors.pop("meaning"), tensors.pop("shape").tolist()
    theirs = loaded(tmp_path, tensors, SCHEMES["nf4"], rows, columns)
    ours = theirs._replace(words=torch.zeros_like(theirs.words), scale=torch.zeros_like(theirs.scale))
    quantise_codes(code_vectors.weight(rows, columns), ours)
    assert torch.equal(ours.words, theirs.words) and torch.equal(ours.scale, theirs.scale)


def test_bitsandbytes_keeps_the_first_code_of_a_byte_in_its_upper_half(tmp_path: Path) -> None:
    weight = loaded(tmp_path, one_row(0x01234567), SCHEMES["nf4"], 1, 64)
    assert widen(weight, torch.float32)[0, :8].tolist() == list(NF4[:8])


def test_the_table_is_the_files_own(tmp_path: Path) -> None:
    table = torch.linspace(-1, 1, 16)
    weight = loaded(tmp_path, one_row(0x89ABCDEF, **{"weight.quant_map": table}), SCHEMES["nf4"], 1, 64)
    assert torch.equal(widen(weight, torch.float32)[0, :8], table[8:])


def test_floats_keep_the_first_code_of_a_byte_in_its_lower_half(tmp_path: Path) -> None:
    packed = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE, *[0] * 8]], dtype=torch.uint8)
    tensors = {"weight_packed": packed, "weight_scale": torch.tensor([[130]], dtype=torch.uint8)}
    weight = loaded(tmp_path, tensors, SCHEMES["mxfp4"], 1, 32)
    assert widen(weight, torch.float32)[0, :16].tolist() == [8 * value for value in E2M1]


def test_one_global_scale_multiplies_and_the_other_divides(tmp_path: Path) -> None:
    packed = torch.full((1, 8), 0x77, dtype=torch.uint8)
    scale = torch.full((1, 1), 448.0).to(torch.float8_e4m3fn)
    for name, codes, factor, packing in (("weight_global_scale", "weight_packed", 4096.0, CodePacking.NVFP4),
                                         ("weight_scale_2", "weight", 1 / 4096, CodePacking.MODELOPT)):
        tensors = {codes: packed, "weight_scale": scale, name: torch.tensor([factor])}
        weight = loaded(tmp_path, tensors, CodeScheme(packing), 1, 16)
        assert torch.equal(widen(weight, torch.float32), torch.full((1, 16), 6 * 448 / 4096))


@pytest.mark.parametrize(("name", "sizes"), [
    ("nf4", {"hidden_size": 104, "intermediate_size": 136}), ("nf4_nested", {"hidden_size": 192, "intermediate_size": 328}),
    ("mxfp4", {"hidden_size": 96, "intermediate_size": 160}), ("modelopt", {"hidden_size": 80, "intermediate_size": 144})])
def test_rows_that_do_not_fill_a_chunk_or_a_block_are_served(name: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    folder, plain = write_codes(tmp_path, name, **sizes)
    assert (logits(load(folder)) - transformers_logits(plain)).abs().max() < 1e-4


@pytest.mark.parametrize(("name", "kind", "more"), [
    ("nf4", "qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("mxfp4", "llama", {"attention_bias": True, "mlp_bias": True}), ("modelopt", "mistral", {})])
def test_biases_norms_and_tied_heads_stay_beside_codes(name: str, kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    folder, plain = write_codes(tmp_path, name, kind, **more)
    assert (logits(load(folder)) - transformers_logits(plain)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["nvfp4", "modelopt"])
def test_parts_of_a_fused_layer_keep_their_own_global_scales(name: str, tmp_path: Path) -> None:
    folder, plain = write_codes(tmp_path, name)
    names = [f"{Q[:-6]}{part}_proj.{'weight_global_scale' if name == 'nvfp4' else 'weight_scale_2'}" for part in "qkv"]
    stored = load_file(folder / SINGLE)
    qkv = load(folder).layers[0].attention.qkv
    assert isinstance(qkv, CodeLinear) and qkv.weight.factor is not None
    assert len({float(stored[name]) for name in names}) == 3
    expected = torch.cat([stored[name].reshape(1).expand(rows) for name, rows in zip(names, (128, 64, 64), strict=True)])
    assert torch.equal(qkv.weight.factor, expected)
    assert (logits(load(folder)) - transformers_logits(plain)).abs().max() < 1e-4


def test_modelopts_own_file_describes_codes_as_well(tmp_path: Path) -> None:
    folder, plain = write_codes(tmp_path, "modelopt")
    edit_config(folder, remove=("quantization_config",))
    (folder / "hf_quant_config.json").write_text(json.dumps({
        "producer": {"name": "modelopt", "version": "0.35"},
        "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}}))
    assert (logits(load(folder)) - transformers_logits(plain)).abs().max() < 1e-4


# ── what stays in 16 bits ───────────────────────────────────────────────────────────────────────────────────────────

KEPT: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "nf4": ({"llm_int8_skip_modules": ["lm_head", "k_proj", "model.layers.1.mlp"]},
            lambda m: m.endswith("k_proj") or m.startswith("model.layers.1.mlp")),
    "mxfp4": ({"ignore": ["lm_head", "re:.*self_attn.*"]}, lambda m: "self_attn" in m),
    "modelopt": ({"ignore": ["lm_head", "model.layers.0*"]}, lambda m: m.startswith("model.layers.0.")),
}


@pytest.mark.parametrize("name", KEPT)
def test_layers_on_the_skip_list_are_dense_with_and_without_tensors_to_look_at(name: str, tmp_path: Path) -> None:
    changes, kept = KEPT[name]
    folder, plain = write_codes(tmp_path, name, skip=kept)
    edit_config(folder, quantization_config={**describe(folder), **changes})
    shape, modules = read_shape(folder), linears(load_file(plain / SINGLE))
    for load_format in ("auto", "dummy"):
        forms = read_forms(folder, shape, load_format=load_format)
        assert {m for m in modules if forms.part(m).form is Form.DENSE} == set(filter(kept, modules))
    assert (logits(load(folder)) - transformers_logits(plain)).abs().max() < 1e-4


def test_the_tensors_decide_where_a_layer_is_dense(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, plain = write_codes(tmp_path, "nf4_nested", skip=lambda module: module.endswith("k_proj"))
    decoder = load(folder)
    qkv = decoder.layers[1].attention.qkv
    assert isinstance(qkv, SplitLinear) and "2 layers differ" in caplog.text
    assert [isinstance(piece, (DenseLinear, PackedLinear)) for piece in qkv.pieces] == [False, True, False]
    assert (logits(decoder) - transformers_logits(plain)).abs().max() < 1e-4


def test_parts_with_tables_of_their_own_are_computed_one_by_one(tmp_path: Path) -> None:
    folder, plain = write_codes(tmp_path, "nf4")
    name = Q.replace("q_proj", "k_proj")
    rewrite(folder, lambda w: w[f"{name}.weight.quant_map"].mul_(0.5))
    rewrite(plain, lambda w: w[f"{name}.weight"].mul_(0.5))
    decoder = load(folder)
    assert isinstance(decoder.layers[0].attention.qkv, SplitLinear)
    assert isinstance(decoder.layers[1].attention.qkv, CodeLinear)
    assert (logits(decoder) - transformers_logits(plain)).abs().max() < 1e-4


# ── sizes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@EVERY
def test_the_planned_bytes_are_those_of_the_loaded_weights(name: str, written: Written) -> None:
    folder, _ = written(name)
    decoder = load(folder)
    assert decoder.weight_bytes - decoder.cos_sin.nbytes == weight_bytes(decoder.shape, 4, decoder.forms)
    assert weight_bytes(decoder.shape, 4, decoder.forms) < weight_bytes(decoder.shape, 4)


@pytest.mark.parametrize("name", ["nf4", "fp4_nested_128"])
def test_headers_alone_give_the_same_bytes(name: str, written: Written) -> None:
    """As on the hub, where no data is at hand: tables and block sizes follow from names and shapes."""
    folder, _ = written(name)
    shape, stored = read_shape(folder), read_checkpoint(folder)
    remote = {key: replace(entry, path=Path("/nowhere")) for key, entry in stored.items()}
    assert weight_bytes(shape, 2, weight_forms(shape, remote)) == weight_bytes(shape, 2, weight_forms(shape, stored))


@pytest.mark.parametrize(("description", "bits"), [
    (bnb(), 4.5), (four_bit_floats("group", 32, False), 4.25), (four_bit_floats("tensor_group", 16, True), 4.5),
    (modelopt(), 4.5)], ids=["nf4", "mxfp4", "nvfp4", "modelopt"])
def test_the_plan_of_a_large_model_is_within_one_percent_of_its_file(description: dict[str, Any], bits: float) -> None:
    shape, forms = large(description)
    linear = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    stored = linear * bits / 8 + 2 * (2 * 128256 * 4096 + 65 * 4096)
    assert stored <= weight_bytes(shape, 2, forms) < 1.01 * stored
    assert scratch_bytes(shape, 2, forms) == 64 << 20


@pytest.mark.parametrize("name", ["nf4", "fp4", "mxfp4", "nvfp4", "modelopt"])
def test_dummy_weights_are_finite_and_keep_activations_in_range(name: str, written: Written) -> None:
    folder, _ = written(name)
    decoder = load(folder, torch.bfloat16, load_format="dummy")
    weights = wide(decoder.layers[0].down)
    # A power of two is at most √2 off.
    assert weights.isfinite().all() and abs(weights.square().mean().sqrt() * 320**0.5 - 1) < (0.45 if name == "mxfp4" else 0.05)
    assert logits(decoder, torch.bfloat16).isfinite().all()


@pytest.mark.gpu
@EVERY
def test_weights_on_the_gpu_are_those_on_the_cpu(name: str, written: Written) -> None:
    folder, _ = written(name)
    shape = read_shape(folder)
    made = [load_model(folder, shape, dtype=torch.bfloat16, device=torch.device(device), max_model_len=64)
            for device in ("cpu", "cuda")]
    layers = [[piece for linear in decoder.linears() for piece in pieces(linear)] for decoder in made]
    for cpu, cuda in zip(*layers, strict=True):
        if isinstance(cpu, CodeLinear) and isinstance(cuda, CodeLinear):
            assert torch.equal(widen(cuda.weight, torch.float32).cpu(), widen(cpu.weight, torch.float32))
