"""The catalogue's schema, and how a MODEL on the command line becomes a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from workstation import hub
from workstation.architecture import read_shape
from workstation.catalog import ModelEntry, catalogue_files, find, load_catalogue, read_catalogue
from workstation.errors import ConfigError, ModelFolderError, ModelNotFoundError, StartupError
from workstation.hub import resolve_model, wanted_files
from workstation.memory import GIB


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def model_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_the_shipped_catalogue_is_well_formed_and_has_the_demo() -> None:
    entries = load_catalogue(catalogue_files({"XDG_CONFIG_HOME": "/nowhere"}))
    assert entries["demo"].is_bundled
    assert entries["llama-8b"].model == "meta-llama/Llama-3.1-8B-Instruct"
    assert all(entry.context for entry in entries.values())
    assert entries["llama-70b-fp8"].quantization == "fp8"


SHIPPED = load_catalogue(catalogue_files({"XDG_CONFIG_HOME": "/nowhere"}))
# Well-known totals of parameters, in billions, as the models' own pages round them.
TOTALS = {
    "llama-1b": 1.24, "llama-3b": 3.21, "llama-8b": 8.03, "llama-70b": 70.55, "qwen3-0.6b": 0.596, "qwen3-1.7b": 1.72,
    "qwen3-4b": 4.02, "qwen3-8b": 8.19, "qwen3-14b": 14.77, "qwen3-32b": 32.76, "qwen2.5-1.5b": 1.54, "qwen2.5-7b": 7.62,
    "qwen2.5-14b": 14.77, "qwen2.5-32b": 32.76, "qwen2.5-72b": 72.71, "mistral-7b": 7.25, "mistral-small-24b": 23.57,
    "llama-2-13b": 13.02,
}  # fmt: skip


def test_the_shipped_catalogue_has_30_entries_and_20_that_can_be_served() -> None:
    assert len(SHIPPED) >= 30
    assert sum(not entry.needs for entry in SHIPPED.values()) >= 20
    assert all(entry.licence for entry in SHIPPED.values())


@pytest.mark.parametrize("name", [name for name, entry in SHIPPED.items() if not entry.needs and not entry.is_bundled])
def test_an_entry_that_can_be_served_has_the_shape_of_its_model(name: str) -> None:
    shape = read_shape(SHIPPED[name].shape)
    assert shape.max_position == SHIPPED[name].context
    assert shape.unread_fields == () and shape.window == 0


@pytest.mark.parametrize("name", TOTALS)
def test_a_shape_adds_up_to_the_well_known_number_of_parameters(name: str) -> None:
    assert read_shape(SHIPPED[name].shape).num_parameters / 1e9 == pytest.approx(TOTALS[name], rel=0.005)


def test_a_persons_own_file_adds_and_replaces_entries(tmp_path: Path) -> None:
    shipped = write(tmp_path / "shipped.toml", '[a]\nmodel = "o/a"\n[b]\nmodel = "o/b"\n')
    own = write(tmp_path / "own.toml", '[b]\nmodel = "mine/b"\n[c]\nmodel = "./c"\n')
    entries = load_catalogue([shipped, own])
    assert [entries[name].model for name in "abc"] == ["o/a", "mine/b", str(tmp_path / "c")]
    assert entries["b"].source == str(own)


def test_the_own_file_is_found_in_the_config_home(tmp_path: Path) -> None:
    (tmp_path / "ws").mkdir()
    own = write(tmp_path / "ws" / "models.toml", "")
    assert catalogue_files({"XDG_CONFIG_HOME": str(tmp_path)})[-1] == own


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[a]\nmodle = "o/a"', "did you mean 'model'"),
        ("[a]\n", "model must be a non-empty string"),
        ('[a]\nmodel = "o/a"\ncontext = -5', "context must be a whole number"),
        ('[a]\nmodel = "o/a"\nsampling = { temprature = 1 }', "did you mean 'temperature'"),
        ('[a]\nmodel = "o/a"\nsampling = { top_p = 1.5 }', "top_p must be a number between 0 and 1"),
        ('[a]\nmodel = "o/a"\nsampling = { top_k = 1.5 }', "top_k must be a whole number"),
        ('[a]\nmodel = "o/a"\nsampling = { temperature = nan }', "temperature must be"),
        ('[a]\nmodel = "o/a"\nserve = 3', "serve must be a table"),
        ('[a]\nmodel = "o/a"\nshape = { hiden_size = 8 }', "did you mean 'hidden_size'"),
        ('[a]\nmodel = "o/a"\nshape = "large"', "shape must be a table"),
        ('[a]\nmodel = "o/a"\nquantization = "fp9"', "quantization must be one of fp8, int4, mxfp4, nf4, nvfp4"),
        ('model = "o/a"', "must be a table"),
        ('[qwen3-0.6b]\nmodel = "o/a"', "written in quotes"),
        ('["a b"]\nmodel = "o/a"', "a name is 1 to 64"),
        ("[a\n", "models.toml"),
    ],
)
def test_a_malformed_entry_names_the_file_and_the_key(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path / "models.toml", text)
    with pytest.raises(ConfigError) as caught:
        read_catalogue(path)
    assert said in caught.value.message and str(path) in caught.value.message


def test_an_unknown_name_is_told_the_nearest(tmp_path: Path) -> None:
    entries = {"llama-8b": ModelEntry("llama-8b", "o/x")}
    with pytest.raises(ModelNotFoundError, match="did you mean 'llama-8b'"):
        find("lama-8b", entries)
    with pytest.raises(ModelNotFoundError, match="did you mean 'llama-8b'"):
        resolve_model("lama-8b", entries)


def test_a_local_folder_is_served_under_its_own_name(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "my-model")
    found = resolve_model(str(folder), {})
    assert (found.name, found.folder, found.entry, found.is_demo) == ("my-model", folder, None, False)


def test_a_catalogue_name_wins_over_a_folder_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "mine")
    elsewhere = model_folder(tmp_path / "other" / "place")
    entries = {"mine": ModelEntry("mine", str(elsewhere))}
    assert resolve_model("mine", entries).folder == elsewhere
    assert resolve_model("./mine", entries).folder == tmp_path / "mine"


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nowhere", "a/b/c", "a/.."])
def test_a_folder_that_is_not_there_is_named(model: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model(model, {})
    assert repr(model) in caught.value.message


def test_a_folder_without_config_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"no config\.json"):
        resolve_model(str(tmp_path), {})


def test_an_entry_whose_format_has_not_landed_is_refused_with_a_sentence(tmp_path: Path) -> None:
    own = write(tmp_path / "own.toml", '[later]\nmodel = "o/later"\nneeds = "a format that has not landed"\n')
    with pytest.raises(ConfigError, match="it needs a format that has not landed"):
        resolve_model("later", load_catalogue([own]))


def test_only_what_a_server_reads_is_downloaded() -> None:
    names = ["README.md", "config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "pytorch_model.bin",
             "model-00002-of-00002.safetensors", "model.safetensors.index.json", "original/consolidated.00.pth",
             "consolidated.safetensors", "modeling_evil.py", "onnx/model.safetensors"]  # fmt: skip
    assert wanted_files(names) == [
        "config.json", "tokenizer.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]  # fmt: skip
    assert wanted_files(names, weights=False) == ["config.json", "tokenizer.json", "model.safetensors.index.json"]


def test_pickled_weights_are_not_downloaded() -> None:
    with pytest.raises(ModelFolderError, match=r"no safetensors weights \(it has \.bin\)"):
        wanted_files(["config.json", "pytorch_model.bin"])


class FakeHub:
    """Answers for huggingface_hub's three calls, from files with sizes."""

    def __init__(self, folder: Path, sizes: dict[str, int], cached: set[str]) -> None:
        self.folder, self.sizes, self.cached = folder, sizes, cached
        self.error: Exception | None = None
        self.downloads: list[list[str]] = []

    def model_info(self, repo: str, **options: Any) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        files = [SimpleNamespace(rfilename=name, size=size) for name, size in self.sizes.items()]
        return SimpleNamespace(sha="c0ffee", siblings=files)

    def snapshot_download(self, repo: str, **options: Any) -> str:
        if options.get("local_files_only"):
            if not self.cached:
                raise hub_errors.LocalEntryNotFoundError("nothing here")
        else:
            assert options["revision"] == "c0ffee"
            self.downloads.append(options["allow_patterns"])
        return str(self.folder)

    def try_to_load_from_cache(self, repo: str, name: str, **options: Any) -> str | None:
        return str(self.folder / name) if name in self.cached else None


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeHub]:
    def build(sizes: dict[str, int], cached: set[str] | None = None) -> FakeHub:
        folder = model_folder(tmp_path / "snapshot")
        (folder / "model.safetensors").touch()
        fake = FakeHub(folder, sizes, cached or set())
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", fake.try_to_load_from_cache)
        return fake

    return build


SIZES = {"config.json": 1000, "model.safetensors": 2 * GIB, "README.md": 5}


def test_a_download_says_its_size_and_takes_one_commit(fake_hub: Callable[..., FakeHub]) -> None:
    fake, said = fake_hub(SIZES), list[str]()
    found = resolve_model("owner/name", {}, say=said.append)
    assert (found.name, found.folder) == ("owner/name", fake.folder)
    assert fake.downloads == [["config.json", "model.safetensors"]]
    assert "2.00 GiB in 2 files" in said[0]


def test_what_is_cached_is_not_announced(fake_hub: Callable[..., FakeHub]) -> None:
    fake_hub(SIZES, {"config.json", "model.safetensors"})
    said: list[str] = []
    resolve_model("owner/name", {}, say=said.append)
    assert said == []


def test_a_full_disk_is_seen_before_the_first_byte(
    fake_hub: Callable[..., FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fake_hub(SIZES)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda place: SimpleNamespace(free=int(2.5 * GIB)))
    with pytest.raises(StartupError, match=r"needs 2\.00 GiB .* 2\.50 GiB free"):
        resolve_model("owner/name", {})
    assert fake.downloads == []


def test_without_a_network_the_downloaded_copy_serves(fake_hub: Callable[..., FakeHub]) -> None:
    fake, said = fake_hub(SIZES, {"config.json"}), list[str]()
    fake.error = hub_errors.OfflineModeIsEnabled("offline")
    assert resolve_model("owner/name", {}, say=said.append).folder == fake.folder
    assert "using the copy" in said[0]


def test_without_a_network_and_a_copy_the_error_says_both(fake_hub: Callable[..., FakeHub]) -> None:
    fake_hub(SIZES).error = hub_errors.OfflineModeIsEnabled("offline")
    with pytest.raises(StartupError, match=r"not on this disk and the hub cannot be reached"):
        resolve_model("owner/name", {})


def test_a_half_downloaded_copy_is_not_served_offline(fake_hub: Callable[..., FakeHub]) -> None:
    fake = fake_hub(SIZES, {"config.json"})
    (fake.folder / "model.safetensors").unlink()
    fake.error = hub_errors.OfflineModeIsEnabled("offline")
    with pytest.raises(StartupError, match="not on this disk"):
        resolve_model("owner/name", {})


def test_the_real_client_offline_gives_the_same_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StartupError, match="not on this disk"):
        resolve_model("owner/name", {}, download_dir=str(tmp_path))
