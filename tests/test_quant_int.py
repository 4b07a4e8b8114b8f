"""Integer checkpoints: every packing means what its words say, and every contradiction is an error that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quant_models import large, load, logits, refusal, rewrite, transformers_logits
from quantised import SINGLE, describe, linears
from quantised_int import AWQ, INT_FORMATS, ct, gptq, tensor, write_integers
from safetensors.torch import load_file
from tiny import edit_config

from workstation.architecture import read_shape
from workstation.kernels import launch_int
from workstation.kernels.int_weights import IntWeight, pack, pack_zeros, unpack, unpack_zeros
from workstation.kernels.reference_int import widen
from workstation.model.linear import DenseLinear, Linear, PackedLinear, SplitLinear
from workstation.model.linear_forms import pieces
from workstation.model.linear_int import IntLinear
from workstation.model.loader import load_model, read_forms
from workstation.quant import unpack as stored_unpack
from workstation.quant.forms import SCRATCH_BYTES, Form, scratch_bytes, weight_bytes
from workstation.quant.integers import Packing
from workstation.safetensors_header import read_checkpoint

EVERY = pytest.mark.parametrize("name", INT_FORMATS)
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A format's folder and its plain twin, for tests that only read them."""
    made: dict[str, tuple[Path, Path]] = {}

    def folders(name: str) -> tuple[Path, Path]:
        if name not in made:
            made[name] = write_integers(tmp_path_factory.mktemp(name), name, "qwen2")
        return made[name]

    return folders


def wide(linear: Linear) -> torch.Tensor:
    """A layer's weights in float32, columns as x has them."""
    found = []
    for piece in pieces(linear):
        assert isinstance(piece, IntLinear)
        weight = widen(piece.weight, torch.float32)
        found.append(weight if piece.order is None else weight[:, piece.order.argsort()])
    return torch.cat(found)


# ── what the words mean ─────────────────────────────────────────────────────────────────────────────────────────────


@EVERY
def test_weights_are_bit_for_bit_those_of_a_naive_decoder(name: str, written: Callable[[str], tuple[Path, Path]]) -> None:
    folder, plain = written(name)
    decoder, meaning = load(folder), load_file(plain / SINGLE)
    for number, layer in enumerate(decoder.layers):
        prefix = f"model.layers.{number}"
        for linear, block, parts in ((layer.attention.qkv, "self_attn", "qkv"), (layer.attention.o, "self_attn", "o"),
                                     (layer.gate_up, "mlp", ("gate", "up")), (layer.down, "mlp", ("down",))):
            expected = torch.cat([meaning[f"{prefix}.{block}.{part}_proj.weight"] for part in parts])
            assert torch.equal(wide(linear), expected), (number, block)


@EVERY
def test_logits_are_those_of_the_dequantised_twin_in_transformers(
    name: str, written: Callable[[str], tuple[Path, Path]],
) -> None:
    folder, plain = written(name)
    assert (logits(load(folder)) - transformers_logits(plain)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["ct_w4a16", "gptq_order", "awq", "ct_w8a16"])
def test_in_bfloat16_the_error_is_that_of_the_dequantised_twin_in_transformers(
    name: str, written: Callable[[str], tuple[Path, Path]],
) -> None:
    folder, plain = written(name)
    exact, theirs = transformers_logits(plain), transformers_logits(plain, torch.bfloat16)
    ours = logits(load(folder, torch.bfloat16), torch.bfloat16)
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()


def words(*values: int) -> torch.Tensor:
    return tensor(np.array([values], dtype=np.uint32).view(np.int32))


def test_gptq_counts_along_the_columns_from_the_lowest_bits() -> None:
    codes = stored_unpack.codes(words(0x76543210).t(), Packing.GPTQ, 4, slice(0, 1), 8)
    assert codes.tolist() == [list(range(8))]


def test_awq_holds_the_columns_of_a_word_in_an_order_of_its_own() -> None:
    codes = stored_unpack.codes(words(0x75316420), Packing.AWQ, 4, slice(0, 8), 1)
    assert codes.flatten().tolist() == list(range(8))
    assert stored_unpack.zeros(words(0x75316420), Packing.AWQ, 4, 8).tolist() == [list(range(8))]


def test_compressed_tensors_stores_signed_codes_with_an_offset() -> None:
    codes = stored_unpack.codes(words(0x76543210, 0xFEDCBA98), Packing.PACKED, 4, slice(0, 1), 16)
    assert (codes.int() - 8).tolist() == [list(range(-8, 8))]
    eight = stored_unpack.codes(words(0xFF807F00), Packing.PACKED, 8, slice(0, 1), 4)
    assert (eight.int() - 128).tolist() == [[-128, -1, 0, 127]]
    zeros = stored_unpack.zeros(words(0x76543210, 0xFEDCBA98).t(), Packing.PACKED, 4, 16)
    assert (zeros.int() - 8).tolist() == [list(range(-8, 8))]


def test_gptqs_first_version_stores_zero_points_less_one_and_wraps_around() -> None:
    assert stored_unpack.zeros(words(0xF7777770), Packing.GPTQ, 4, 8).tolist() == [[1, 8, 8, 8, 8, 8, 8, 0]]
    assert stored_unpack.zeros(words(0x88888880), Packing.GPTQ_V2, 4, 8).tolist() == [[0, *[8] * 7]]
    assert stored_unpack.zeros(words(0xFF7F7F00), Packing.GPTQ, 8, 4).tolist() == [[1, 128, 128, 0]]


@pytest.mark.parametrize(("bits", "columns"), [(4, 128), (4, 384), (4, 100), (8, 64), (8, 200)])
def test_codes_lie_in_words_of_columns_thirty_two_apart(bits: int, columns: int) -> None:
    codes = torch.randint(0, 1 << bits, (6, columns), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, columns), codes)
    first = packed[:, 0].int() & 0xFFFF
    expected = sum(codes[:, 32 * i].int() << bits * i for i in range(16 // bits))
    assert torch.equal(first, expected) and packed.shape[1] % 32 == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_are_as_wide_as_the_codes(bits: int) -> None:
    zeros = torch.randint(0, 1 << bits, (3, 10), dtype=torch.uint8)
    kept = pack_zeros(zeros, bits)
    assert kept.numel() == 30 * bits // 8 and torch.equal(unpack_zeros(kept, bits), zeros)


@pytest.mark.parametrize("name", ["gptq_asym", "awq_64", "ct_w4a16_asym", "ct_w8a16"])
def test_rows_that_do_not_fill_a_chunk_are_served(name: str, tmp_path: Path) -> None:
    folder, plain = write_integers(tmp_path, name, hidden_size=192, intermediate_size=320)
    assert (logits(load(folder)) - transformers_logits(plain)).abs().max() < 1e-4


def test_bits_behind_the_end_of_a_row_are_not_weights(tmp_path: Path) -> None:
    folder, plain = write_integers(tmp_path, "ct_w4a16_channel", hidden_size=100, intermediate_size=132)
    assert load_file(folder / SINGLE)[f"{Q}.weight_packed"].shape[1] == 13
    assert (logits(load(folder)) - transformers_logits(plain)).abs().max() < 1e-4


@pytest.mark.parametrize(("name", "kind", "more"), [
    ("gptq_order", "qwen2", {}), ("awq", "qwen3", {"attention_bias": True}),
    ("ct_w4a16", "qwen3", {"tie_word_embeddings": True}),
    ("ct_w8a16", "llama", {"attention_bias": True, "mlp_bias": True}), ("awq_64", "mistral", {}),
])  # fmt: skip
def test_biases_norms_and_tied_heads_stay_beside_integer_layers(
    name: str, kind: str, more: dict[str, Any], tmp_path: Path,
) -> None:
    folder, plain = write_integers(tmp_path, name, kind, **more)
    assert (logits(load(folder)) - transformers_logits(plain)).abs().max() < 1e-4


# ── the order of groups ─────────────────────────────────────────────────────────────────────────────────────────────


def test_parts_of_a_fused_layer_share_one_order_only_if_it_is_theirs(tmp_path: Path) -> None:
    folder, plain = write_integers(tmp_path, "gptq_order", alone=lambda module: module.endswith("k_proj"))
    decoder = load(folder)
    qkv, gate_up = decoder.layers[0].attention.qkv, decoder.layers[0].gate_up
    assert isinstance(qkv, SplitLinear) and len(qkv.pieces) == 3
    assert isinstance(gate_up, IntLinear) and gate_up.order is not None
    assert (logits(decoder) - transformers_logits(plain)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["gptq", "gptq_asym"])
def test_an_order_of_neighbours_needs_no_gathering(name: str, written: Callable[[str], tuple[Path, Path]]) -> None:
    folder, _ = written(name)
    assert all(isinstance(piece, IntLinear) and piece.order is None
               for layer in load(folder).layers for piece in pieces(layer.down))


@pytest.mark.parametrize("damage", [lambda w, name: w[name].zero_(), lambda w, name: w.pop(name)], ids=["zeros", "absent"])
def test_an_order_that_was_never_written_means_neighbours(damage: Callable[..., object], tmp_path: Path) -> None:
    folder, plain = write_integers(tmp_path, "gptq_asym")
    rewrite(folder, lambda w: [damage(w, name) for name in list(w) if name.endswith("g_idx")])
    assert (logits(load(folder)) - transformers_logits(plain)).abs().max() < 1e-4


# ── what stays in 16 bits ───────────────────────────────────────────────────────────────────────────────────────────

KEPT: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "ct_w4a16": ({"ignore": ["lm_head", "re:.*self_attn.*"]}, lambda m: "self_attn" in m),
    "gptq": ({"dynamic": {"-:.*k_proj": {}}}, lambda m: m.endswith("k_proj")),
    "gptq_asym": ({"modules_in_block_to_quantize": [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]},
                  lambda m: "self_attn" in m),
    "awq": ({"modules_to_not_convert": ["self_attn.v", "layers.1.mlp"]}, lambda m: "v_proj" in m or "layers.1.mlp" in m),
}


@pytest.mark.parametrize("name", KEPT)
def test_layers_on_the_skip_list_are_dense_with_and_without_tensors_to_look_at(name: str, tmp_path: Path) -> None:
    changes, kept = KEPT[name]
    folder, plain = write_integers(tmp_path, name, skip=kept)
    edit_config(folder, quantization_config={**describe(folder), **changes})
    shape, modules = read_shape(folder), linears(load_file(plain / SINGLE))
    for load_format in ("auto", "dummy"):
        forms = read_forms(folder, shape, load_format=load_format)
        assert {m for m in modules if forms.part(m).form is Form.DENSE} == set(filter(kept, modules))
    assert (logits(load(folder)) - transformers_logits(plain)).abs().max() < 1e-4


def test_the_tensors_decide_where_a_layer_is_dense(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, plain = write_integers(tmp_path, "gptq", skip=lambda module: module.endswith("k_proj"))
    decoder = load(folder)
    qkv = decoder.layers[1].attention.qkv
    assert isinstance(qkv, SplitLinear) and "2 layers differ" in caplog.text
    assert [isinstance(piece, (DenseLinear, PackedLinear)) for piece in qkv.pieces] == [False, True, False]
    assert (logits(decoder) - transformers_logits(plain)).abs().max() < 1e-4


def test_layers_may_have_numbers_of_their_own(tmp_path: Path) -> None:
    folder, plain = write_integers(tmp_path, "gptq", skip=lambda module: module.endswith("down_proj"))
    other, theirs = write_integers(tmp_path / "other", "gptq_8_asym")
    down, meaning = ({name: value for name, value in load_file(path / SINGLE).items() if "down_proj" in name}
                     for path in (other, theirs))
    rewrite(folder, lambda w: [w.pop(f"{name.rsplit('.', 1)[0]}.weight", None) for name in down] and w.update(down))
    rewrite(plain, lambda w: w.update(meaning))
    edit_config(folder, quantization_config={**describe(folder), "dynamic": {r"+:.*\.down_proj": {"bits": 8, "sym": False}}})
    assert read_forms(folder, read_shape(folder)).part(DOWN).form is Form.INT8
    assert (logits(load(folder)) - transformers_logits(plain)).abs().max() < 1e-4


def test_a_quantised_head_is_served(tmp_path: Path) -> None:
    folder, _ = write_integers(tmp_path, "gptq")
    edit_config(folder, quantization_config={**describe(folder), "lm_head": True})
    layer = {name.rsplit(".", 1)[1]: value for name, value in load_file(folder / SINGLE).items() if name.startswith(f"{Q}.")}
    rewrite(folder, lambda w: w.pop("lm_head.weight") is None or w.update({f"lm_head.{name}": v for name, v in layer.items()}))
    decoder = load(folder)
    assert isinstance(decoder.head, IntLinear) and torch.equal(wide(decoder.head), wide(decoder.layers[0].attention.qkv)[:128])


# ── tensors that hold nothing, or contradict themselves ─────────────────────────────────────────────────────────────


def test_symmetric_zero_points_of_the_other_version_are_read_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    folder, plain = write_integers(tmp_path, "gptq")
    edit_config(folder, quantization_config={**describe(folder), "checkpoint_format": "gptq_v2"})
    assert (logits(load(folder)) - transformers_logits(plain)).abs().max() < 1e-4
    assert caplog.text.count("wrong checkpoint_format") == 1


def test_biases_of_zero_are_passed_over_where_the_model_has_none(tmp_path: Path) -> None:
    folder, plain = write_integers(tmp_path, "gptq")
    rewrite(folder, lambda w: w.update({f"{Q}.bias": torch.zeros(128), f"{DOWN}.bias": torch.zeros(256)}))
    assert (logits(load(folder)) - transformers_logits(plain)).abs().max() < 1e-4
    rewrite(folder, lambda w: w.update({f"{Q}.bias": torch.full((128,), 0.5)}))
    assert f"{Q}.bias" in (message := refusal(folder)) and "no bias" in message


# ── sizes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@EVERY
def test_the_planned_bytes_are_those_of_the_loaded_weights_and_of_the_file(
    name: str, written: Callable[[str], tuple[Path, Path]],
) -> None:
    folder, _ = written(name)
    decoder = load(folder)
    held = decoder.weight_bytes - decoder.cos_sin.nbytes
    assert held == weight_bytes(decoder.shape, 4, decoder.forms)
    stored = {name: entry.nbytes for name, entry in read_checkpoint(folder).items()}
    # Of symmetric layers GPTQ stores zero points, and an order where groups are neighbours: neither is kept.
    small = sum(size for name, size in stored.items() if name.endswith(("qzeros", "g_idx", "weight_shape")))
    assert sum(stored.values()) - small <= held <= 1.01 * sum(stored.values())


@pytest.mark.parametrize(("description", "bits"), [
    (ct(4, 128), 4 + 16 / 128), (AWQ, 4 + 20 / 128), (gptq(size=32, sym=False), 4 + 20 / 32), (ct(8, 0), 8)],
    ids=["w4a16", "awq", "gptq_32", "w8a16"])  # fmt: skip
def test_the_plan_of_a_large_model_is_within_one_percent_of_its_file(description: dict[str, Any], bits: float) -> None:
    shape, forms = large(description)
    linear = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    stored = linear * bits / 8 + 2 * (2 * 128256 * 4096 + 65 * 4096)
    assert stored <= weight_bytes(shape, 2, forms) < 1.01 * stored


def test_the_plan_has_room_for_widened_weights() -> None:
    shape, forms = large(ct(4, 128))
    assert scratch_bytes(shape, 2, forms) == SCRATCH_BYTES == launch_int.SCRATCH_BYTES
    tiny, small = large(AWQ, hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    assert scratch_bytes(tiny, 2, small) == 2 * 512 * 256 * 2


@pytest.mark.parametrize("name", ["ct_w4a16", "awq", "ct_w8a16"])
def test_dummy_weights_are_finite_and_keep_activations_in_range(
    name: str, written: Callable[[str], tuple[Path, Path]],
) -> None:
    folder, _ = written(name)
    decoder = load(folder, torch.bfloat16, load_format="dummy")
    weights = wide(decoder.layers[0].down)
    assert weights.isfinite().all() and abs(weights.square().mean().sqrt() * 384**0.5 - 1) < 0.05
    assert logits(decoder, torch.bfloat16).isfinite().all()


def test_a_part_of_the_rows_is_a_weight_of_its_own() -> None:
    for bits in (4, 8):
        codes, zeros = (torch.randint(0, 1 << bits, size, dtype=torch.uint8) for size in ((8, 128), (2, 8)))
        weight = IntWeight(pack(codes, bits), torch.rand(2, 8), pack_zeros(zeros, bits), bits, 64, 128)
        assert torch.equal(widen(weight.part(2, 6), torch.float32), widen(weight, torch.float32)[2:6])


@pytest.mark.gpu
@EVERY
def test_weights_on_the_gpu_are_those_on_the_cpu(name: str, written: Callable[[str], tuple[Path, Path]]) -> None:
    folder, _ = written(name)
    shape = read_shape(folder)
    made = [load_model(folder, shape, dtype=torch.bfloat16, device=torch.device(device), max_model_len=64)
            for device in ("cpu", "cuda")]
    layers = [[piece for linear in decoder.linears() for piece in pieces(linear)] for decoder in made]
    for cpu, cuda in zip(*layers, strict=True):
        if isinstance(cpu, IntLinear) and isinstance(cuda, IntLinear):
            assert torch.equal(cuda.weight.words.cpu(), cpu.weight.words)
            assert torch.equal(widen(cuda.weight, torch.float32).cpu(), widen(cpu.weight, torch.float32))
