"""The commands as a person meets them: what they print, refuse and hand over."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import main_ends, run

from workstation.cli.main import dashed
from workstation.cli.serve import ready_text, served_names
from workstation.cli.serve_settings import REMOVED_FLAGS, SERVE_SETTINGS


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in ("serve", "chat", "generate", "ps", "stop", "models", "eval", "bench"))


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == "ws 0.1.0\n"


def test_serve_help_names_the_flags_that_work_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("serve", "--help") == 0
    words = capsys.readouterr().out.split()
    assert not [setting.flag for setting in SERVE_SETTINGS if setting.only is None and setting.flag not in words]


def test_the_manual_names_every_setting_and_removed_flag() -> None:
    text = (Path(__file__).parent.parent / "docs" / "cli.md").read_text()
    named = [setting.flag for setting in SERVE_SETTINGS] + [flag.flag for flag in REMOVED_FLAGS]
    assert not [flag for flag in named if f"| `{flag}`" not in text]
    rows = [line for line in text.splitlines() if line.startswith("| `--")]
    assert len(rows) == len(named)


def test_underscores_in_flags_are_dashes() -> None:
    given = ["serve", "--max_model_len=4_0", "--max_num_seqs", "a_b", "my_model", "--", "--as_is"]
    assert dashed(given) == ["serve", "--max-model-len=4_0", "--max-num-seqs", "a_b", "my_model", "--", "--as_is"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["serve"], 2, "name a model"),
        (["serve", "demo", "--model", "other"], 2, "two models are named"),
        (["serve", "demo", "--quantization", "awq"], 2, "one of fp8, int8, int4, int4-g64, int4-g32, nf4, got 'awq'"),
        (["serve", "demo", "-tp", "2"], 2, "--tensor-parallel-size=2 is not served yet"),
        (["serve", "demo", "--max_model_len", "many"], 2, "--max-model-len must be a whole number"),
        (["serve", "demo", "--rope-theta", "1e6"], 2, "config.json; change it there"),
        (["serve", "demo", "--calculate-kv-scales"], 2, "--calculate-kv-scales is gone from vLLM"),
        (["serve", "demo", "--device", "gpu"], 2, "--device must be auto, cpu, cuda or cuda:N"),
        (["serve", "demo", "--host", "no.such.host.invalid"], 2, "no.such.host.invalid"),
        (["serve", "dmo", "--device", "cpu", "--port", "0"], 2, "did you mean 'demo'"),
        (["generate", "demo", "   "], 2, "the prompt is empty"),
        (["generate", "demo", "hi", "--raw", "--system", "x"], 2, "--system needs the chat template"),
        (["generate", "demo", "hi", "--url", "http://h", "--device", "cpu"], 2, "--device is the server's to decide"),
        (["generate", "demo", "hi", "--url", "http://127.0.0.1:9"], 1, "no server answers at http://127.0.0.1:9"),
        (["chat", "hi"], 1, "no server runs here"),
        (["chat", "hi", "--url", "localhost:8000"], 2, "must begin with http://"),
        (["stop"], 1, "no server runs here"),
        (["eval", "demo", "--skill", "juggling"], 2, "'juggling' is not one of"),
        (["bench", "serve"], 1, "no server runs here"),
        (["bench", "throughput", "demo", "--against", "vllm"], 2, "--against knows transformers only"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_deliberate_error_is_one_line_and_an_exit_code(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == code
    text = capsys.readouterr().err
    assert said in text and text.startswith("ws: ") and text.count("\n") == 1


def test_an_unknown_flag_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("serve", "demo", "--max-modle-len", "5") == 2
    assert "--max-modle-len" in capsys.readouterr().err


def test_a_model_that_is_not_the_demo_needs_a_gpu_or_the_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("workstation.gpu.has_usable_gpu", lambda: False)
    monkeypatch.setattr("workstation.gpu.sample", lambda *a, **k: None)
    assert run("serve", "qwen3-8b", "--port", "0") == 1
    assert "no NVIDIA GPU was found" in capsys.readouterr().err


def test_a_taken_port_is_told_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("workstation.cli.serve.plan_launch", lambda *a: pytest.fail("loading began"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run("serve", "demo", "--port", str(port)) == 1
    assert f"port {port} on 127.0.0.1 is taken" in capsys.readouterr().err


class Handed:
    """What `ws serve` hands to the server, instead of serving."""

    def __init__(self) -> None:
        self.options: Any = None
        self.engine: Any = None

    def __call__(self, options: Any, engine: Any, load_model: Any, *, on_ready: Any, **others: Any) -> None:
        self.options, self.engine = options, engine


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Handed:
    caught = Handed()
    monkeypatch.setattr("workstation.server.serve.run", caught)
    folder = tmp_path / "some-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return caught


def test_flags_variables_and_the_catalogue_reach_engine_and_server(
    handed: Handed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    catalogue = tmp_path / "config" / "ws"
    catalogue.mkdir(parents=True)
    (catalogue / "models.toml").write_text(
        f'[mine]\nmodel = "{tmp_path}/some-model"\nserve = {{ max_num_seqs = 7, max_model_len = "2k", seed = 5 }}\n'
    )
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("WS_MAX_MODEL_LEN", "3k")
    monkeypatch.setenv("WS_SEED", "6")
    main_ends("serve", "mine", "--device", "cpu", "--seed", "9", "--port", "0", "--no-enable-prefix-caching")
    config = handed.engine._config
    assert (config.max_num_seqs, config.max_model_len, config.seed) == (7, 3000, 9)
    assert (config.enable_prefix_caching, config.model) == (False, str(tmp_path / "some-model"))
    assert (handed.options.host, handed.options.port, handed.options.api_keys) == ("127.0.0.1", 0, ())


def test_a_bind_beyond_loopback_makes_and_prints_a_key(handed: Handed, capsys: pytest.CaptureFixture[str]) -> None:
    main_ends("serve", "./some-model", "--device", "cpu", "--host", "0.0.0.0", "--port", "0")
    (key,) = handed.options.api_keys
    assert len(key) > 30 and key in capsys.readouterr().err


def test_a_given_key_is_used_and_not_printed(
    handed: Handed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WS_API_KEY", "sk-quiet")
    main_ends("serve", "./some-model", "--device", "cpu", "--host", "0.0.0.0", "--port", "0")
    assert handed.options.api_keys == ("sk-quiet",)
    assert "sk-quiet" not in "".join(capsys.readouterr())


def test_harmless_removed_flags_are_answered_with_a_sentence(handed: Handed, capsys: pytest.CaptureFixture[str]) -> None:
    main_ends("serve", "./some-model", "--device", "cpu", "--port", "0", "--swap-space", "4", "--disable-log-requests")
    said = capsys.readouterr().err
    assert "--swap-space is not needed" in said and "--disable-log-requests is not needed" in said


def test_an_override_of_sampling_with_an_unknown_key_is_refused(handed: Handed, capsys: pytest.CaptureFixture[str]) -> None:
    code = run("serve", "./some-model", "--device", "cpu", "--port", "0", "--override-generation-config", '{"topp": 1}')
    assert code == 2 and "did you mean 'top_p'" in capsys.readouterr().err
    assert handed.options is None


def test_the_served_names_are_the_given_ones_or_the_catalogues_and_the_hubs() -> None:
    entry = SimpleNamespace(model="owner/name", is_bundled=False)

    def launch(names: tuple[str, ...], entry: Any) -> Any:
        return SimpleNamespace(settings={"served_model_name": names}, model=SimpleNamespace(name="short", entry=entry))

    assert served_names(launch(("a", "b"), entry)) == ("a", "b")
    assert served_names(launch((), entry)) == ("short", "owner/name")
    assert served_names(launch((), None)) == ("short",)


def test_the_ready_text_holds_a_curl_that_can_be_pasted() -> None:
    from workstation.engine.request import EngineInfo

    info = EngineInfo(device_name="CPU", dtype="float32", num_blocks=100, kv_bytes=1 << 30, max_model_len=8192)
    text = ready_text("http://127.0.0.1:8000", "demo", info, keyed=True)
    words = shlex.split(text.splitlines()[2])
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert "Authorization: Bearer YOUR_KEY" in words
    assert json.loads(words[-1])["model"] == "demo"
    assert "1600 tokens of KV cache (1.00 GiB)" in text


def test_a_reader_that_goes_away_is_answered_with_silence() -> None:
    command = f"{sys.executable} -m workstation.cli.main models | head -c 5"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stderr, done.stdout) == ("", "NAME ")
