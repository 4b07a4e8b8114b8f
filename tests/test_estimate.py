"""`ws estimate`: the plan that the engine obeys, asked many questions. Figures are computed, and compared with known ones."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from workstation.cards import find_card
from workstation.catalog import catalogue_files, demo_folder, load_catalogue
from workstation.cli.main import main
from workstation.config import EngineConfig
from workstation.errors import ConfigError, ModelFolderError, OutOfMemoryError, StartupError
from workstation.estimate import Estimate, Machine, Question, advice, estimate, kv_bytes_per_token, longest, verdict
from workstation.estimate_model import EstimatedModel, find_model, form_bytes
from workstation.estimate_speed import decode_seconds, prompt_seconds
from workstation.memory import GIB, DeviceMemory, plan_memory
from workstation.safetensors_header import checkpoint_bytes

ENTRIES = load_catalogue(catalogue_files({"XDG_CONFIG_HOME": "/nowhere"}))


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def small_folder(path: Path) -> Path:
    """A copy of the demo model that a test may damage."""
    path.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(demo_folder() / name, path / name)
    return path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["estimate", *arguments])
    return int(caught.value.code or 0)


def card(name: str) -> Machine:
    found = find_card(name)
    memory = DeviceMemory("cuda", found.total_bytes, found.total_bytes, has_context=False)
    return Machine(found.name, memory, found.source, found.bandwidth, found.dense16, found.dense8)


def ask(name: str, machine: str, *, form: str | None = None, kv: str = "auto", at_once: int = 1, **config: Any) -> Estimate:
    model = find_model(name, ENTRIES)
    question = Question(EngineConfig(name, **config), model.weights(form), kv, at_once)
    return estimate(model, card(machine), question)


def test_the_headline_model_fits_a_96_gb_card_with_twice_the_context_in_fp8_kv() -> None:
    found = ask("llama-70b-fp8", "rtx-pro-6000", online=True)  # as `ws estimate` and `ws serve` have it
    plain, small = longest(found, "auto"), longest(found, "fp8")
    assert found.fit.fits and 40_000 < plain < 60_000
    assert 1.95 < small / plain < 2.01
    manual = (Path(__file__).parent.parent / "docs" / "estimate.md").read_text()
    assert f"{plain:,} tokens" in manual and f"{small:,} tokens" in manual
    assert f"one request of {plain:,} tokens" in verdict(found)


def test_what_the_estimate_says_is_what_the_engines_plan_gives() -> None:
    found = ask("llama-70b-fp8", "rtx-pro-6000")
    shape, memory = found.model.shape, found.machine.memory
    plan = plan_memory(shape, found.question.config, found.fit.weight_bytes, memory, dtype_bytes=2)
    assert found.plan == plan
    longer = replace(found.question.config, max_model_len=plan.max_model_len + 32)
    with pytest.raises(OutOfMemoryError):
        plan_memory(shape, longer, found.fit.weight_bytes, memory, dtype_bytes=2)


@pytest.mark.parametrize(("name", "nbytes"), [
    ("llama-2-13b", 819_200), ("llama-8b", 131_072), ("llama-70b-fp8", 327_680), ("qwen3-8b", 147_456)])
def test_a_tokens_kv_has_its_known_bytes(name: str, nbytes: int) -> None:
    assert kv_bytes_per_token(find_model(name, ENTRIES).shape, 2) == nbytes


@pytest.mark.parametrize(("name", "form", "gigabytes"), [
    ("llama-70b", "16-bit", 141.1), ("llama-70b", "fp8", 72.7), ("llama-70b", "int4", 39.5), ("llama-70b", "int8", 72.7),
    ("llama-70b", "nvfp4", 42.7), ("llama-70b", "nf4", 42.7),
    ("llama-2-13b", "16-bit", 26.0)])
def test_the_forms_have_their_known_sizes(name: str, form: str, gigabytes: float) -> None:
    assert form_bytes(find_model(name, ENTRIES).shape, form) / 1e9 == pytest.approx(gigabytes, abs=0.06)


def test_the_frontier_holds_as_many_sequences_as_it_says_and_not_one_more() -> None:
    found = ask("llama-8b", "rtx-4090")
    for row in found.frontier:
        if row.auto:
            exact = ask("llama-8b", "rtx-4090", at_once=row.auto, max_model_len=row.context)
            assert exact.fit.fits
            assert not ask("llama-8b", "rtx-4090", at_once=row.auto + 1, max_model_len=row.context).fit.fits


def test_bytes_short_are_exactly_what_is_missing() -> None:
    short = ask("llama-8b", "rtx-4090", max_model_len=65536).fit.short_bytes
    machine = card("rtx-4090")

    def fits(extra: int) -> bool:
        memory = replace(machine.memory, total_bytes=machine.memory.total_bytes + extra,
                         free_bytes=machine.memory.free_bytes + extra)
        model = find_model("llama-8b", ENTRIES)
        config = EngineConfig("x", max_model_len=65536)
        return estimate(model, replace(machine, memory=memory), Question(config, model.own)).fit.fits

    assert fits(int(short / 0.9) + 2) and not fits(int(short / 0.9) - 2)


def test_a_number_of_requests_without_a_context_gets_the_longest_that_fits_them_all() -> None:
    context = ask("llama-8b", "rtx-4090", at_once=8).plan.max_model_len
    assert context > 4096
    assert ask("llama-8b", "rtx-4090", at_once=8, max_model_len=context).fit.fits
    assert not ask("llama-8b", "rtx-4090", at_once=8, max_model_len=context + 16).fit.fits


def test_what_does_not_fit_is_told_what_would() -> None:
    lines = advice(ask("llama-70b", "rtx-pro-6000"))
    assert lines[0].startswith("--quantization fp8 fits: 67.69 GiB")
    longest = re.match(r"--context (\d+) is the longest", advice(ask("llama-8b", "rtx-4090", max_model_len=65536))[0])
    assert longest and ask("llama-8b", "rtx-4090", max_model_len=int(longest[1])).fit.fits
    assert not ask("llama-8b", "rtx-4090", max_model_len=int(longest[1]) + 16).fit.fits
    assert "no form of it fits" in advice(ask("llama-70b", "rtx-4090"))[0]
    assert advice(ask("llama-8b", "h200")) == []


def test_a_form_is_said_to_be_unserved_when_it_is(tmp_path: Path) -> None:
    awq = find_model(described(tmp_path, {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}), ENTRIES)
    assert (awq.own.name, awq.own.served) == ("nvfp4", False)
    machine = card("h100")
    found = estimate(awq, machine, Question(EngineConfig("x", max_model_len=8192), awq.own))
    assert "does not serve it yet" in verdict(found)
    assert "serve" not in verdict(ask("llama-70b", "h100", form="nvfp4"))
    assert "serve" not in verdict(ask("llama-70b-int4", "h100"))
    assert "serve" not in verdict(ask("llama-8b", "h200", kv="fp8"))
    assert "serve" not in verdict(ask("llama-8b", "h200", form="fp8"))


def test_two_cards_hold_half_of_the_weights_each() -> None:
    model = find_model("llama-70b", ENTRIES)
    found = estimate(model, card("h100"), Question(EngineConfig("x"), model.own, ranks=2))
    assert found.fit.fits and found.fit.weight_bytes == -(-model.own.nbytes // 2)
    assert found.kv_bytes_per_token == 163_840 and "2 × h100" in verdict(found)
    with pytest.raises(ConfigError, match="must divide the model's num_heads"):
        estimate(model, card("h100"), Question(EngineConfig("x"), model.own, ranks=3))


# docs/performance.md, one H200: milliseconds of a decode step at about 200 tokens of context.
MEASURED_STEPS = [
    ("llama-8b", 1, 4.14), ("llama-8b", 32, 4.64), ("llama-8b", 128, 6.36), ("llama-8b-fp8", 1, 2.56),
    ("llama-8b-fp8", 32, 2.90), ("llama-8b-fp8", 128, 4.43), ("qwen3-0.6b", 1, 0.80), ("qwen3-0.6b", 128, 1.86),
    ("llama-70b-fp8", 1, 18.3), ("llama-70b-fp8", 32, 19.6), ("llama-70b-fp8", 128, 27.2),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rows", "measured"), MEASURED_STEPS)
def test_predicted_steps_are_within_25_percent_of_those_measured(name: str, rows: int, measured: float) -> None:
    model = find_model(name, ENTRIES)
    speed = card("h200").speed(model.own.name)
    assert speed is not None
    predicted = decode_seconds(model.shape, model.own.nbytes, speed, rows=rows, context=200)
    assert predicted * 1e3 == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize(("name", "tokens", "measured"), [
    ("llama-8b", 2048, 0.050), ("llama-8b", 32768, 1.25), ("llama-8b-fp8", 2048, 0.029), ("llama-8b-fp8", 32768, 0.93),
    ("qwen3-0.6b", 32768, 0.29), ("llama-70b-fp8", 2048, 0.245)])
def test_predicted_prompts_are_within_25_percent_of_those_measured(name: str, tokens: int, measured: float) -> None:
    model = find_model(name, ENTRIES)
    speed = card("h200").speed(model.own.name)
    assert speed is not None
    assert prompt_seconds(model.shape, model.own.nbytes, speed, tokens) == pytest.approx(measured, rel=0.25)


def test_without_rates_no_first_token_is_predicted_and_without_bandwidth_nothing() -> None:
    found = ask("qwen3-8b", "rtx-4080-super", form="fp8")
    assert found.prediction is not None and found.prediction.time_to_first_token_s is None
    model = find_model("qwen3-8b", ENTRIES)
    sized = Machine("x", DeviceMemory("cuda", 48 * GIB, 48 * GIB), "given")
    assert estimate(model, sized, Question(EngineConfig("x"), model.own)).prediction is None


def test_a_folders_weights_are_counted_from_its_headers(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "tiny")
    for name in (str(folder), str(folder / "config.json")):
        found = find_model(name, ENTRIES)
        assert found.own.source == ("headers" if name == str(folder) else "shape")
    assert find_model(str(folder), ENTRIES).own.nbytes <= checkpoint_bytes(folder)


def described(tmp_path: Path, description: dict[str, Any]) -> str:
    path = tmp_path / "config.json"
    values = {**ENTRIES["llama-70b"].shape, "architectures": ["LlamaForCausalLM"], "quantization_config": description}
    path.write_text(json.dumps(values))
    return str(path)


@pytest.mark.parametrize(("description", "form"), [
    ({"quant_method": "awq", "bits": 4, "group_size": 128}, "int4"), ({"quant_method": "gptq", "bits": 4}, "int4"),
    ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {
        "targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}}}}, "int4"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
], ids=lambda value: str(value)[:40])
def test_a_checkpoints_description_gives_its_form(tmp_path: Path, description: dict[str, Any], form: str) -> None:
    assert find_model(described(tmp_path, description), ENTRIES).own.name == form


@pytest.mark.parametrize(("description", "said"), [
    ({"quant_method": "gptq", "bits": 3}, "bits must be 4 or 8, got 3"), ({"quant_method": "bitsandbytes"}, "load_in_4bit")])
def test_a_description_whose_bytes_cannot_be_told_is_refused(tmp_path: Path, description: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelFolderError, match=said):
        find_model(described(tmp_path, description), ENTRIES)


@pytest.mark.parametrize(("change", "said"), [
    ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer between 1"),
    ({"hidden_size": -4}, "hidden_size must be"), ({"vocab_size": 10**12}, "vocab_size must be"),
    ({"num_attention_heads": None}, "num_attention_heads must be an integer"), ({"model_type": "gpt2"}, "gpt2"),
    ({"num_key_value_heads": 3}, "a divisor of num_attention_heads"),
])
def test_a_config_that_cannot_be_read_is_one_line_naming_the_field(
    tmp_path: Path, change: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str],
) -> None:
    values = {**ENTRIES["llama-8b"].shape, "architectures": ["LlamaForCausalLM"], **change}
    if change.get("model_type"):
        values["architectures"] = ["GPT2LMHeadModel"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    assert run(str(path), "--gpu", "h200") == 2
    text = capsys.readouterr().err
    assert said in text and text.count("\n") == 1


@pytest.mark.parametrize(("arguments", "said"), [
    (["lama-8b", "--gpu", "h200"], "did you mean 'llama-8b'"), (["llama-8b", "--gpu", "rtx-409"], "did you mean 'rtx-4090'"),
    (["llama-8b", "--vram", "lots"], "--vram must be"), (["llama-8b", "--vram", "24G", "--gpu", "h200"], "give one"),
    (["llama-8b", "--gpu", "h200", "--kv-cache-dtype", "int2"], "--kv-cache-dtype must be one of auto, fp8"),
    (["llama-8b", "--gpu", "h200", "--quantization", "q4"], "--quantization must be one of"),
    (["llama-8b", "--gpu", "h200", "--context", "200k"], "between 1 and 131072"),
    (["llama-8b", "--gpu", "h200", "--gpu-memory-utilization", "1.5"], "between 0"),
    (["llama-8b", "--gpu", "h200", "--concurrency", "9", "--max-num-seqs", "8"], "more than --max-num-seqs 8"),
    (["/nowhere", "--gpu", "h200"], "there is no folder"), (["gpt-oss-20b", "--gpu", "h200"], "cannot be estimated"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_a_wrong_question_is_one_line_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*arguments) == 2
    text = capsys.readouterr().err
    assert said in text and text.count("\n") == 1


def test_a_truncated_header_is_refused_naming_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = small_folder(tmp_path / "tiny")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert run(str(folder), "--gpu", "h200") == 2
    assert "model.safetensors is truncated" in capsys.readouterr().err


def test_a_machine_without_a_gpu_is_told_to_name_a_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("workstation.gpu.sample", lambda *a, **k: None)
    assert run("llama-8b") == 2
    assert "--gpu rtx-4090" in capsys.readouterr().err


def test_this_machines_card_is_recognised(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = SimpleNamespace(name="NVIDIA GeForce RTX 4090", total_bytes=24564 << 20, free_bytes=20 * GIB, display=True)
    monkeypatch.setattr("workstation.gpu.sample", lambda *a, **k: seen)
    assert run("qwen3-8b", "--quantization", "fp8", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["gpu"]["free_bytes"] == 20 * GIB and said["plan"]["reserve"] == GIB
    assert said["prediction"]["decode_tokens_per_s"] > 50


def test_the_printed_estimate_has_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("llama-70b-fp8", "--gpu", "rtx-pro-6000") == 0
    text = capsys.readouterr().out
    for part in ("fits on rtx-pro-6000", "weights (fp8", "327,680 bytes", "parameters × bytes: 70.55 billion = 141.1 GB",
                 "39.5 GB", "longest of one", "nvfp4 ", "predicted, not measured"):
        assert part in text
    assert max(map(len, text.splitlines()[1:])) <= 128


def test_fp8_kv_is_half_of_it_however_it_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    for arguments, variable in ((["--kv-cache-dtype", "fp8"], ""), (["--kv-cache-dtype", "fp8_e4m3"], ""), ([], "fp8")):
        monkeypatch.setenv("WS_KV_CACHE_DTYPE", variable)
        assert run("llama-70b-fp8", "--gpu", "rtx-pro-6000", "--json", *arguments) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["kv_cache_dtype"], said["kv_bytes_per_token"], said["served"]) == ("fp8", 163_840, True)
        assert said["max_model_len"] == said["longest_context"]["fp8"] > 1.9 * said["longest_context"]["auto"]


def test_a_checkpoint_that_describes_an_fp8_cache_is_estimated_with_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    path = described(tmp_path, {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme,
                                "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}})
    for asked, found in ((["--kv-cache-dtype", "bfloat16"], "auto"), ([], "fp8")):
        assert run(path, "--gpu", "h200", "--json", *asked) == 0
        assert json.loads(capsys.readouterr().out)["kv_cache_dtype"] == found


def test_the_json_has_the_documented_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("llama-8b", "--gpu", "l4", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    manual = (Path(__file__).parent.parent / "docs" / "estimate.md").read_text()
    assert [key for key in said if f"| `{key}` |" not in manual] == []
    assert said["version"] == 1 and said["fits"] and said["longest_context"]["auto"] == said["max_model_len"]


def test_an_estimate_needs_no_torch_and_no_hub_client() -> None:
    code = ("import sys; from workstation.cli.main import main\n"
            "try: main(['estimate', 'llama-70b-fp8', '--gpu', 'rtx-pro-6000'])\nexcept SystemExit: pass\n"
            "print([name for name in ('torch', 'triton', 'transformers', 'huggingface_hub') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


class FakeRemote:
    """The two calls an estimate makes of the hub's client: a config, and headers read by range requests."""

    def __init__(self, folder: Path, shape: dict[str, Any], dtype: str) -> None:
        (folder / "remote.json").write_text(json.dumps(shape))
        self.config, self.dtype, self.error = folder / "remote.json", dtype, None
        self.asked: list[str] = []

    def hf_hub_download(self, repo: str, name: str, **options: Any) -> str:
        self.asked.append(name)
        if self.error is not None:
            raise self.error
        return str(self.config)

    def get_safetensors_metadata(self, repo: str, **options: Any) -> SimpleNamespace:
        tensor = SimpleNamespace(dtype=self.dtype, shape=[8, 8], data_offsets=(0, 64))
        return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors={"other": tensor})})


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRemote:
    fake = FakeRemote(tmp_path, {**ENTRIES["llama-8b"].shape, "architectures": ["LlamaForCausalLM"]}, "BF16")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    return fake


def test_a_hub_id_is_estimated_from_its_config_and_headers_alone(remote: FakeRemote) -> None:
    found: EstimatedModel = find_model("owner/name", ENTRIES)
    assert (found.name, found.own.nbytes, found.own.source) == ("owner/name", 16_060_522_496, "headers")
    assert remote.asked == ["config.json"]


@pytest.mark.parametrize(("error", "kind", "said"), [
    (hub_errors.OfflineModeIsEnabled("offline"), StartupError, "hub cannot be reached"),
    (hub_errors.LocalEntryNotFoundError("nothing"), StartupError, "hub cannot be reached"),
    (TimeoutError("slow"), StartupError, "hub cannot be reached"),
    (hub_errors.EntryNotFoundError("404"), ModelFolderError, "no config.json"),
])
def test_a_hub_that_does_not_answer_is_one_sentence(
    remote: FakeRemote, error: Exception, kind: type[Exception], said: str,
) -> None:
    remote.error = error  # type: ignore[assignment]
    with pytest.raises(kind, match=said):
        find_model("owner/name", ENTRIES)


def test_a_downloaded_model_is_estimated_from_its_own_headers(tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "models--owner--tiny" / "snapshots" / "c0ffee"
    snapshot.parent.mkdir(parents=True)
    small_folder(snapshot)
    assert find_model("owner/tiny", ENTRIES).own.source == "headers"
