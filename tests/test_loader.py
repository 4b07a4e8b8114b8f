"""Reading weights: fusion, conversion, sharding, and every way a checkpoint can be broken."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import edit_config, write_tiny

from workstation import safetensors_header
from workstation.architecture import ModelShape, read_shape
from workstation.errors import ConfigError, ModelFolderError, OutOfMemoryError
from workstation.model import staging
from workstation.model.loader import load_model
from workstation.model.tensor_names import destinations
from workstation.model.transformer import Decoder
from workstation.safetensors_header import checkpoint_bytes, checkpoint_dtype, read_checkpoint

CPU = torch.device("cpu")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep weights in their plain order, so that tests can look at them."""
    monkeypatch.setattr(Decoder, "pack_weights", lambda self: None)


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Decoder:
    return load_model(folder, read_shape(folder), dtype=dtype, device=CPU, max_model_len=64, **options)


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ModelFolderError) as caught:
        load(folder, **options)
    return caught.value.message


def rewrite(folder: Path, change: Callable[[Weights], object]) -> Path:
    """Change a single-file checkpoint's tensors in place."""
    weights = load_file(folder / SINGLE)
    change(weights)
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})
    return folder


def assert_holds(decoder: Decoder, stored: Weights) -> None:
    table = destinations(decoder)
    assert table.keys() == stored.keys()
    for name, tensor in table.items():
        assert torch.equal(tensor, stored[name].to(tensor.dtype)), name


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_tensor_arrives_converted(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, kind, **({} if kind == "qwen2" else {"attention_bias": True}))
    assert_holds(load(folder, dtype), load_file(folder / SINGLE))


def test_stored_bfloat16_loads_as_float32(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, dtype=torch.bfloat16)
    assert checkpoint_dtype(folder) == "bfloat16"
    assert_holds(load(folder), load_file(folder / SINGLE))


def test_conversion_in_small_chunks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "CHUNK_BYTES", 256)
    folder = write_tiny(tmp_path)
    assert_holds(load(folder, torch.bfloat16), load_file(folder / SINGLE))
    assert_holds(load(folder), load_file(folder / SINGLE))


def test_shards_load_like_one_file(tmp_path: Path) -> None:
    one = write_tiny(tmp_path / "one", "qwen3")
    many = write_tiny(tmp_path / "many", "qwen3", max_shard_size="60KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    assert_holds(load(many), load_file(one / SINGLE))
    assert checkpoint_bytes(many) == checkpoint_bytes(one)


def test_the_size_is_that_of_all_tensors(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    assert checkpoint_bytes(folder) == sum(tensor.nbytes for tensor in load_file(folder / SINGLE).values())


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    seen: list[tuple[int, int]] = []
    load(folder, progress=lambda done, total: seen.append((done, total)))
    assert [total for _, total in seen] == [checkpoint_bytes(folder)] * len(seen)
    assert seen[-1][0] == checkpoint_bytes(folder)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_tied_head_shares_the_embedding(tmp_path: Path) -> None:
    decoder = load(write_tiny(tmp_path, tie_word_embeddings=True))
    assert decoder.head.weight.data_ptr() == decoder.embedding.data_ptr()
    assert decoder.weight_bytes == checkpoint_bytes(tmp_path) + decoder.cos_sin.nbytes


def test_a_tied_head_that_is_stored_again_is_accepted(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, tie_word_embeddings=True)
    rewrite(folder, lambda weights: weights.update(
        {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    assert torch.equal(load(folder).embedding, load_file(folder / SINGLE)["lm_head.weight"])


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, tie_word_embeddings=True)
    rewrite(folder, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] + 1}))
    assert "lm_head.weight differs" in refusal(folder)


def test_stored_rotary_frequencies_are_passed_over(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    expected = load_file(folder / SINGLE)
    rewrite(folder, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert_holds(load(folder), expected)


@pytest.mark.parametrize(("change", "words"), [
    (lambda w: w.pop("model.layers.1.self_attn.k_proj.weight"), ["model.layers.1.self_attn.k_proj.weight", "missing"]),
    (lambda w: w.update({"model.layers.3.mlp.up_proj.weight": torch.ones(2)}), ["layers.3.mlp.up_proj", "no place"]),
    (lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), ["q_proj.bias", "no place"]),
    (lambda w: w.update({"model.norm.weight": torch.ones(63)}), ["model.norm.weight", "[63]", "[64]"]),
    (lambda w: w.update({"model.norm.weight": torch.ones(64, dtype=torch.float64)}), ["model.norm.weight", "F64"]),
    (lambda w: w.update({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}), ["norm.weight", "F8_E4M3"]),
], ids=["missing", "surplus", "surplus_bias", "misshapen", "float64", "float8"])
def test_a_wrong_tensor_is_named(change: Callable[[Weights], object], words: list[str], tmp_path: Path) -> None:
    message = refusal(rewrite(write_tiny(tmp_path), change))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "mid_length", "mid_header", "last_byte"])
def test_a_truncated_file_is_refused(keep: int, tmp_path: Path) -> None:
    file = write_tiny(tmp_path) / SINGLE
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    assert "model.safetensors is truncated" in refusal(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    real = (folder / SINGLE).stat().st_size

    def shrink(done: int, total: int) -> None:
        os.truncate(folder / SINGLE, real // 2)

    assert "changed while being read" in refusal(folder, progress=shrink)


def write_header(folder: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(("header", "words"), [
    (b"not json", "not valid JSON"), (b"[1]", "JSON object"), (b"\xff" * 9, "not UTF-8"),
    ({"a": {"dtype": "F32"}}, "dtype, shape and data_offsets"), ({"a": entry(dtype="F33")}, "unknown dtype"),
    ({"a": entry(shape=[-1])}, "malformed shape"), ({"a": entry(shape=[1.0])}, "malformed shape"),
    ({"a": entry(shape=[1] * 20)}, "malformed shape"), ({"a": entry(offsets=[0])}, "data_offsets"),
    ({"a": entry(offsets=[0, 2**63])}, "data_offsets"), ({"a": entry(shape=[2])}, "not the 4 bytes"),
    ({"a": entry(shape=[2**40, 2**40], offsets=[0, 4])}, "not the 4 bytes"),
    ({"a": entry(), "b": entry()}, "overlap at tensor 'b'"), ({"a": entry(offsets=[4, 8])}, "gap before tensor 'a'"),
    ({}, "bytes after the last tensor"),
])
def test_a_malformed_header_is_a_named_error(header: Any, words: str, tmp_path: Path) -> None:
    write_header(tmp_path, header, b"\0" * 8)
    with pytest.raises(ModelFolderError, match=r"model\.safetensors") as caught:
        read_checkpoint(tmp_path)
    assert words in caught.value.message


def test_header_bytes_and_tensor_count_are_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_header(tmp_path, {"a": entry(), "b": entry(offsets=(4, 8))}, b"\0" * 8)
    monkeypatch.setattr(safetensors_header, "MAX_TENSORS", 1)
    with pytest.raises(ModelFolderError, match="2 tensors exceed the limit of 1"):
        read_checkpoint(tmp_path)
    monkeypatch.setattr(safetensors_header, "MAX_HEADER_BYTES", 10)
    with pytest.raises(ModelFolderError, match="exceed the limit of 10"):
        read_checkpoint(tmp_path)


def sharded(folder: Path) -> Path:
    return write_tiny(folder, max_shard_size="60KB")


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(("name", "words"), [
    ("../model-00001.safetensors", "plain name"), ("/etc/x.safetensors", "plain name"),
    ("sub/x.safetensors", "plain name"), ("a\0.safetensors", "plain name"), ("x" * 4096 + ".safetensors", "plain name"),
    ("absent.safetensors", "absent.safetensors is missing"), ("weights.bin", "weights.bin"), ("..", "'..'"),
    (7, "in 7, which is not a .safetensors file name"),
], ids=["parent", "absolute", "folder", "nul", "long", "absent", "pickle", "dots", "number"])
def test_a_shard_name_that_is_no_plain_present_file_is_refused(name: Any, words: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    edit_index(folder, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    assert words in refusal(folder)


def test_an_index_that_names_an_absent_tensor_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    edit_index(folder, lambda weight_map: weight_map.update({"ghost": next(iter(weight_map.values()))}))
    assert "ghost" in refusal(folder)


def test_an_index_that_places_a_tensor_wrongly_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    edit_index(folder, lambda weight_map: weight_map.update(
        {"model.norm.weight": next(file for file in weight_map.values() if file != weight_map["model.norm.weight"])}))
    assert "model.norm.weight" in refusal(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    shards = sorted(folder.glob("*.safetensors"))
    twice = next(iter(load_file(shards[0])))
    save_file({**load_file(shards[1]), twice: torch.ones(1)}, shards[1])
    assert twice in refusal(folder)


def test_a_link_into_the_hugging_face_cache_is_followed(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "models--x" / "snapshots" / "abc")
    stored = load_file(folder / SINGLE)
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    for name in (SINGLE, "config.json"):
        (folder / name).rename(blobs / f"hash-{name}")
        (folder / name).symlink_to(f"../../blobs/hash-{name}")
    assert_holds(load(folder), stored)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    (folder / SINGLE).rename(tmp_path / "outside.safetensors")
    (folder / SINGLE).symlink_to("../outside.safetensors")
    assert "leaves the folder" in refusal(folder)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_weights_that_are_no_regular_file_are_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    (folder / SINGLE).unlink()
    make(folder / SINGLE)
    assert "not a regular file" in refusal(folder)


def test_a_folder_with_pickles_only_is_refused_by_name_and_not_opened(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    (folder / SINGLE).unlink()
    canary = tmp_path / "canary"
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    message = refusal(folder)
    assert "pytorch_model.bin" in message and "safetensors only" in message
    assert not canary.exists()


def test_a_folder_without_weights_says_what_is_missing(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    (folder / SINGLE).rename(folder / "consolidated.safetensors")
    assert "consolidated.safetensors" in refusal(folder)
    (folder / "consolidated.safetensors").unlink()
    assert "model.safetensors.index.json is missing" in refusal(folder)


def test_a_quantised_checkpoint_is_refused_by_method(tmp_path: Path) -> None:
    folder = edit_config(write_tiny(tmp_path), quantization_config={"quant_method": "awq"})
    assert "awq" in refusal(folder)


@pytest.mark.parametrize(("options", "name"), [
    ({"load_format": "pt"}, "load_format"), ({"dtype": torch.float64}, "dtype"), ({"max_model_len": 513}, "512"),
    ({"max_model_len": 0}, "max_model_len"),
])
def test_a_wrong_option_is_refused(options: dict[str, Any], name: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    asked: dict[str, Any] = {"dtype": torch.float32, "device": CPU, "max_model_len": 64, **options}
    with pytest.raises(ConfigError, match=name):
        load_model(folder, read_shape(folder), **asked)


def dummy(shape: ModelShape, seed: int) -> Weights:
    return destinations(load_model("/nowhere", shape, dtype=torch.bfloat16, device=CPU, max_model_len=64,
                                   load_format="dummy", seed=seed))


def test_dummy_weights_need_no_files_and_follow_the_seed(tmp_path: Path) -> None:
    shape = read_shape(write_tiny(tmp_path, "qwen2"))
    first, again, other = dummy(shape, 1), dummy(shape, 1), dummy(shape, 2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert all(tensor.isfinite().all() and tensor.any() for tensor in first.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_reach_the_gpu_in_chunks(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "CHUNK_BYTES", 1 << 12)
    folder = write_tiny(tmp_path, "qwen2")
    decoder = load_model(folder, read_shape(folder), dtype=dtype, device=torch.device("cuda"), max_model_len=64)
    stored = load_file(folder / SINGLE)
    for name, tensor in destinations(decoder).items():
        assert torch.equal(tensor.cpu(), stored[name].to(dtype)), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_weights_that_do_not_fit_the_gpu_are_a_named_error(tmp_path: Path) -> None:
    folder = edit_config(write_tiny(tmp_path), num_hidden_layers=1000, intermediate_size=1 << 20, hidden_size=1 << 14)
    shape = read_shape(folder)
    with pytest.raises(OutOfMemoryError, match="do not fit"):
        load_model(folder, shape, dtype=torch.bfloat16, device=torch.device("cuda"), max_model_len=64,
                   load_format="dummy")


def test_reading_headers_needs_no_torch(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    code = ("import sys; from workstation.safetensors_header import checkpoint_bytes; "
            f"assert checkpoint_bytes({str(folder)!r}) > 0; sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
