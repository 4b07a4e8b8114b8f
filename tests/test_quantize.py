"""`ws quantize`: folders written in compressed-tensors format, read back; runs that stop and go on; what is refused."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from quant_models import CPU, load, rewrite
from quantised import SINGLE, dequantised
from quantised_int import SIZES, IntFormat, decode
from safetensors.torch import load_file
from test_cli import run
from tiny import write_tiny

from workstation.architecture import read_shape
from workstation.errors import ConfigError, ModelFolderError, StartupError
from workstation.kernels.reference_int import widen
from workstation.model import quantised_folder
from workstation.model.linear import DenseLinear
from workstation.model.linear_codes import CodeLinear
from workstation.model.linear_fp8 import Fp8Linear
from workstation.model.linear_int import IntLinear
from workstation.model.loader import read_forms
from workstation.model.quantised_folder import quantise_folder
from workstation.model.transformer import Decoder
from workstation.quant.destination import RECORD
from workstation.quant.forms import Form

BF16 = torch.bfloat16
EVERY_FORM = pytest.mark.parametrize("to", ["fp8", "int8", "int4"])
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "plain", "qwen2", dtype=BF16, **SIZES)


def stored_tensors(decoder: Decoder) -> list[torch.Tensor]:
    found: list[torch.Tensor] = [decoder.embedding, *decoder.norms()]
    for linear in decoder.linears():
        if isinstance(linear, IntLinear):
            found += [linear.weight.words, linear.weight.scale]
        elif isinstance(linear, CodeLinear):
            found += [linear.weight.words, linear.weight.scale, linear.weight.table]
        elif isinstance(linear, Fp8Linear):
            found += [linear.weight.view(torch.uint8), linear.scale]
        else:
            assert isinstance(linear, DenseLinear)
            found.append(linear.weight)
        if getattr(linear, "bias", None) is not None:
            found.append(linear.bias)
    return found


def same(first: Decoder, second: Decoder) -> bool:
    pairs = zip(stored_tensors(first), stored_tensors(second), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def unpacked(folder: Path, **options: str) -> Decoder:
    """Loaded without the CPU's order of dense weights, so that all tensors can be compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "pack_weights", lambda self: None)
        return load(folder, **options)  # type: ignore[arg-type]


def write(plain: Path, to: str, name: str = "small", **options: bool) -> Path:
    quantise_folder(plain, plain.parent / name, to, device=CPU, **options)
    return plain.parent / name


# ── what is written ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("to", "stored"), [
    ("fp8", torch.float32), ("int8", torch.float16), ("int4", BF16), ("int4-g32", BF16),
    ("nf4", BF16)], ids=str)
def test_a_written_folder_is_what_quantising_while_loading_gives(to: str, stored: torch.dtype, tmp_path: Path) -> None:
    plain = write_tiny(tmp_path / "plain", "qwen2", dtype=stored, **SIZES)
    written, at_load = unpacked(write(plain, to)), unpacked(plain, quantization=to)
    assert same(written, at_load)
    assert written.weight_bytes == at_load.weight_bytes < unpacked(plain).weight_bytes


@EVERY_FORM
def test_stored_tensors_mean_the_weights_that_are_used(to: str, plain: Path) -> None:
    folder = write(plain, to)
    stored, down = load_file(folder / SINGLE), load(folder).layers[1].down
    if to == "fp8":
        assert isinstance(down, Fp8Linear)
        found = dequantised(stored[f"{DOWN}.weight"], stored[f"{DOWN}.weight_scale"])
        assert torch.equal(found, down.weight.float() * down.scale[:, None])
        return
    assert isinstance(down, IntLinear)
    bits = int(to.removeprefix("int"))
    form = IntFormat("ct", {}, bits=bits, size=128 if bits == 4 else 0, scale=BF16)
    tensors = {name.removeprefix(f"{DOWN}."): value for name, value in stored.items() if name.startswith(f"{DOWN}.")}
    assert torch.equal(decode(tensors, form, *down.weight.shape), widen(down.weight, torch.float32))


def test_nf4_is_stored_as_bitsandbytes_defines_it(plain: Path) -> None:
    folder = write(plain, "nf4")
    stored, weight = load_file(folder / SINGLE), load_file(plain / SINGLE)[f"{DOWN}.weight"].float()
    state = json.loads(bytes(stored[f"{DOWN}.weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert state == {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    absmax, table = stored[f"{DOWN}.weight.absmax"], stored[f"{DOWN}.weight.quant_map"]
    assert torch.equal(absmax, weight.view(-1, 64).abs().amax(1))
    found = stored[f"{DOWN}.weight"][:, 0].int()
    codes = torch.stack((found >> 4, found & 15), 1).view(-1, 64)
    error = (table[codes] * absmax[:, None] - weight.view(-1, 64)).abs()
    assert (error <= absmax[:, None] * float(table.diff().max()) / 2 + 1e-6).all()
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["load_in_4bit"] and config["llm_int8_skip_modules"] == ["lm_head"]


def test_head_embedding_norms_and_biases_keep_their_bytes(plain: Path) -> None:
    before, after = load_file(plain / SINGLE), load_file(write(plain, "int8") / SINGLE)
    kept = [name for name in before if "_proj.weight" not in name]
    assert {"lm_head.weight", "model.embed_tokens.weight", f"{Q}.bias"} <= set(kept)
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in kept)


def test_layers_of_other_widths_have_groups_of_their_own_and_the_rest_is_ignored(tmp_path: Path) -> None:
    plain = write_tiny(tmp_path / "plain", hidden_size=96, intermediate_size=72, num_hidden_layers=1, head_dim=32)
    folder = write(plain, "int4")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = {group["weights"]["group_size"]: group["targets"] for group in config["config_groups"].values()}
    assert set(groups) == {32, 128} and groups[128] == ["re:.*\\.self_attn\\.o_proj$"]
    assert config["ignore"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    forms = read_forms(folder, read_shape(folder))
    assert forms.part("model.layers.0.mlp.down_proj").form is Form.DENSE
    assert same(unpacked(folder), unpacked(plain, quantization="int4"))


def test_tokenizer_template_and_licence_come_along_and_nothing_else(plain: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        (plain / name).write_text(name)
    for name in ("README.md", "pytorch_model.bin", "modeling_own.py"):
        (plain / name).write_text(name)
    folder = write(plain, "fp8")
    names = {path.name for path in folder.iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "config.json",
                     "generation_config.json", SINGLE, RECORD}
    assert (folder / "LICENSE").read_text() == "LICENSE"
    before, after = (json.loads((place / "config.json").read_text()) for place in (plain, folder))
    assert after.pop("quantization_config")["format"] == "float-quantized" and after == before


# ── stopping and going on ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised_folder, "SHARD_BYTES", 300_000)


@pytest.mark.usefixtures("small_shards")
def test_a_run_that_was_stopped_goes_on_with_what_is_there(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(plain, "int8", "whole")

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    target = plain.parent / "small"
    with pytest.raises(KeyboardInterrupt):
        quantise_folder(plain, target, "int8", device=CPU, progress=stop)
    kept = {path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    assert kept and not (target / "config.json").exists() and not list(target.glob("*.part"))
    report = quantise_folder(plain, target, "int8", device=CPU)
    assert report.found == len(kept) < report.shards
    assert all((target / name).stat().st_mtime_ns == changed for name, changed in kept.items())
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in target.iterdir()) and "model.safetensors.index.json" in names
    assert all((target / name).read_bytes() == (whole / name).read_bytes() for name in names)
    assert same(unpacked(target), unpacked(plain, quantization="int8"))


@pytest.mark.parametrize("name", ["small", "link"])
def test_a_folder_may_be_named_from_here_or_through_a_link(
    name: str, plain: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(plain.parent)
    Path("link").symlink_to("small")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            quantise_folder(Path("plain"), Path(name), "int8", device=CPU, progress=interrupt)
    quantise_folder(Path("plain"), Path(name), "int8", device=CPU)
    with pytest.raises(ConfigError, match="is finished"):
        quantise_folder(Path("plain"), Path(name), "int8", device=CPU)
    assert same(unpacked(plain.parent / "small"), unpacked(plain, quantization="int8"))


@pytest.mark.usefixtures("small_shards")
def test_what_other_weights_left_is_not_gone_on_with(plain: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantise_folder(plain, plain.parent / "small", "int8", device=CPU, progress=interrupt)
    rewrite(plain, lambda weights: weights[f"{Q}.weight"].mul_(2))
    with pytest.raises(ConfigError, match=r"beginning of something else.*--force"):
        write(plain, "int8")
    assert same(unpacked(write(plain, "int8", force=True)), unpacked(plain, quantization="int8"))


def interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("small_shards")
def test_a_finished_folder_is_written_anew_only_when_told(plain: Path) -> None:
    folder = write(plain, "int8")
    with pytest.raises(ConfigError, match=r"is finished \('int8'\); --force"):
        write(plain, "int8")
    (folder / "notes.txt").write_text("mine")
    write(plain, "fp8", force=True)
    assert same(unpacked(folder), unpacked(plain, quantization="fp8"))
    assert (folder / "notes.txt").read_text() == "mine"


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_somebody_else_is_never_written_to(force: bool, plain: Path) -> None:
    (plain.parent / "small").mkdir()
    (plain.parent / "small" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        write(plain, "fp8", force=force)
    assert [path.name for path in (plain.parent / "small").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("inside", [".", "small", "a/b"])
def test_the_source_is_not_written_into(inside: str, plain: Path) -> None:
    before = sorted(plain.rglob("*"))
    with pytest.raises(ConfigError, match="inside the folder that is read"):
        quantise_folder(plain, plain / inside, "fp8", device=CPU)
    assert sorted(plain.rglob("*")) == before


def test_a_link_into_the_source_is_followed_before_it_is_judged(plain: Path) -> None:
    (plain.parent / "link").symlink_to(plain)
    with pytest.raises(ConfigError, match="inside the folder that is read"):
        write(plain, "int4", "link/small")


def test_two_processes_do_not_write_one_folder(plain: Path) -> None:
    folder = write(plain, "fp8")
    with (folder / RECORD).open("rb") as held, pytest.raises(StartupError, match="another process"):
        fcntl.flock(held, fcntl.LOCK_EX)
        write(plain, "fp8", force=True)


def test_a_disk_without_room_is_told_before_anything_is_written(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2 << 30, 1 << 30, 1 << 30))
    with pytest.raises(StartupError, match=r"1\.00 GiB to spare.*1\.00 GiB free"):
        write(plain, "fp8")
    assert not list((plain.parent / "small").glob("*.safetensors"))


@pytest.mark.parametrize("to", ["fp8", "int4", "nf4"])
def test_a_weight_that_is_not_finite_is_named(to: str, plain: Path) -> None:
    rewrite(plain, lambda weights: weights[f"{Q}.weight"][3, 5].fill_(torch.nan))
    with pytest.raises(ModelFolderError, match=f"{Q}.weight"):
        write(plain, to)
    assert not (plain.parent / "small" / "config.json").exists()


def test_a_quantised_model_is_not_quantised_again(plain: Path) -> None:
    with pytest.raises(ConfigError, match="quantised already"):
        write(write(plain, "int8"), "int4", "smaller")


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_prints_the_folder_it_wrote(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = plain.parent / "small"
    assert run("quantize", str(plain), str(target), "--to", "int8", "--device", "cpu") == 0
    said = capsys.readouterr()
    assert said.out == f"{target}\n" and f"ws serve {target}" in said.err
    assert (target / "config.json").is_file()


def test_an_unknown_form_is_refused_with_those_there_are(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", str(plain), str(plain.parent / "small"), "--to", "int3", "--device", "cpu") == 2
    assert "--to must be fp8, int8, int4" in capsys.readouterr().err
    assert not (plain.parent / "small").exists()


def test_a_stopped_command_says_how_to_go_on(
    plain: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("workstation.cli.progress.LoadingBar.update", lambda *_: interrupt(0, 0))
    assert run("quantize", str(plain), str(plain.parent / "small"), "--to", "int8", "--device", "cpu") == 130
    assert "the same command goes on" in capsys.readouterr().err
