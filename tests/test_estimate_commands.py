"""`ws show`, `pull`, `rm` and `doctor`: what they print, refuse and touch."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from workstation import gpu
from workstation.cli import doctor
from workstation.cli.main import COMMANDS, main
from workstation.hub import ResolvedModel
from workstation.memory import GIB, DeviceMemory


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "cache"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


def put(cache: Path, repo: str, size: int = 1000) -> Path:
    """A downloaded repository as the hub's client lays it out: a blob, and a link to it."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True)
    (folder / "blobs" / "b").write_bytes(bytes(size))
    (folder / "snapshots" / "c0ffee").mkdir(parents=True)
    (folder / "snapshots" / "c0ffee" / "model.safetensors").symlink_to("../../blobs/b")
    return folder


def test_the_manual_has_a_row_for_every_command() -> None:
    text = (Path(__file__).parent.parent / "docs" / "cli.md").read_text()
    names = list(COMMANDS)
    assert {"estimate", "show", "pull", "rm", "doctor"} <= set(names)
    assert [name for name in names if not re.search(rf"^\| `ws {name}\b", text, re.MULTILINE)] == []


def test_show_names_weights_and_bytes_of_kv(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "llama-70b-fp8") == 0
    text = capsys.readouterr().out
    assert "RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic" in text and "72,683,241,472" in text and "327,680" in text


def test_show_speaks_json_for_every_entry_that_has_a_shape_and_for_one_that_waits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("qwen3-8b-fp8", "demo", "gpt-oss-20b", "llama-70b-int4"):
        assert run("show", name, "--json") == 0
        assert json.loads(capsys.readouterr().out)["name"] == name


def test_show_of_an_unknown_name_tells_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "lama-8b") == 2
    assert "did you mean 'llama-8b'" in capsys.readouterr().err


def test_pull_downloads_by_the_catalogues_name_and_prints_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    asked: dict[str, Any] = {}

    def resolve(model: str, entries: Any, **options: Any) -> ResolvedModel:
        asked.update(options, model=model)
        return ResolvedModel(model, tmp_path)

    monkeypatch.setattr("workstation.hub.resolve_model", resolve)
    assert run("pull", "qwen3-8b", "--download-dir", str(tmp_path), "--revision", "v1") == 0
    assert capsys.readouterr().out == f"{tmp_path}\n"
    assert (asked["model"], asked["download_dir"], asked["revision"]) == ("qwen3-8b", str(tmp_path), "v1")


def test_pull_refuses_what_cannot_be_served(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pull", "gpt-oss-20b") == 2
    assert "it needs experts in MXFP4" in capsys.readouterr().err


def test_rm_deletes_one_download_and_nothing_else(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone, kept = put(cache, "Qwen/Qwen3-8B"), put(cache, "Qwen/Qwen3-4B")
    assert run("rm", "qwen3-8b", "--yes") == 0
    assert not gone.exists() and kept.exists()
    assert "of Qwen/Qwen3-8B deleted" in capsys.readouterr().out
    assert run("rm", "Qwen/Qwen3-4B", "--yes") == 0
    assert not kept.exists()


def test_rm_without_a_person_to_ask_wants_the_word(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = put(cache, "Qwen/Qwen3-8B", 3 << 20)
    assert run("rm", "qwen3-8b") == 2
    assert "give --yes" in capsys.readouterr().err and folder.exists()


def test_rm_leaves_what_is_being_served(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put(cache, "Qwen/Qwen3-8B")
    monkeypatch.setattr("workstation.runtime.servers", lambda: [SimpleNamespace(model="qwen3-8b")])
    assert run("rm", "qwen3-8b", "--yes") == 1
    assert folder.exists()


def test_rm_follows_no_link(cache: Path, tmp_path: Path) -> None:
    own = put(tmp_path / "elsewhere", "Qwen/Qwen3-8B")
    cache.mkdir()
    (cache / own.name).symlink_to(own)
    assert run("rm", "qwen3-8b", "--yes") == 1
    assert own.exists()


@pytest.mark.parametrize(("name", "code", "said"), [
    ("demo", 2, "was not downloaded"), ("qwen3-8b", 1, "nothing of Qwen/Qwen3-8B"), ("../etc", 2, "neither a catalogue name"),
    ("/etc", 2, "delete a folder yourself"), ("nobody", 2, "no model is called"), ("a/b/c", 2, "neither a catalogue name"),
])
def test_rm_refuses_what_did_not_come_from_the_hub(
    name: str, code: int, said: str, capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("rm", name, "--yes") == code
    assert said in capsys.readouterr().err


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "sample", lambda *a, **k: None)
    monkeypatch.setattr(gpu, "has_usable_gpu", lambda: False)


def test_the_doctor_looks_at_everything_and_names_cures(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    run("doctor", "--json")
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(found) == {"torch", "driver", "CUDA", "Triton", "memory", "disk", "port", "proxy", "models"}
    assert found["driver"]["state"] == "warn" and "install NVIDIA's driver" in found["driver"]["cure"]
    assert all(row["cure"] for row in found.values() if row["state"] == "fail")


def test_the_kernel_check_runs_what_it_says() -> None:
    assert doctor.triton_check("cpu").state == "ok"


def test_a_kernel_that_fails_is_a_finding_with_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "KERNEL_CHECK", "raise RuntimeError('no C compiler')")
    found = doctor.triton_check("cpu")
    assert found.state == "fail" and "no C compiler" in found.says and "gcc" in found.cure


def test_a_driver_older_than_torchs_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA L4", driver="470.1", cuda=(11, 4))
    monkeypatch.setattr(gpu, "sample", lambda *a, **k: card)
    monkeypatch.setattr(gpu, "torch_build", lambda: "13.0")
    found = doctor.cuda_check()
    assert found.state == "fail" and "built for CUDA 13.0" in found.says


def test_a_gpu_held_by_another_program_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "sample", lambda *a, **k: SimpleNamespace(total_bytes=24 * GIB, free_bytes=2 * GIB))
    assert "nvidia-smi" in doctor.memory_check().cure


def test_little_ram_is_a_warning(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    monkeypatch.setattr(gpu, "host_memory", lambda: DeviceMemory("cpu", 16 * GIB, GIB))
    assert doctor.memory_check().state == "warn"


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=GIB))
    assert "HF_HUB_CACHE" in doctor.disk_check({"HF_HUB_CACHE": str(tmp_path / "none" / "yet")}).cure


def test_a_taken_port_is_a_warning() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert doctor.port_check(taken.getsockname()[1]).state == "warn"


@pytest.mark.parametrize(("environment", "state"), [
    ({}, "ok"), ({"http_proxy": "http://p:1"}, "warn"), ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "localhost"}, "warn"),
    ({"HTTP_PROXY": "http://p:1", "no_proxy": "localhost, 127.0.0.1"}, "ok"), ({"ALL_PROXY": "x", "NO_PROXY": "*"}, "ok"),
])
def test_a_proxy_that_catches_loopback_is_a_warning(environment: dict[str, str], state: str) -> None:
    assert doctor.proxy_check(environment).state == state


def test_a_broken_catalogue_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "config" / "ws").mkdir(parents=True)
    (tmp_path / "config" / "ws" / "models.toml").write_text("[a\n")
    found = doctor.catalogue_check()
    assert found.state == "fail" and "models.toml" in found.says
