"""`ws bench` remembers, `ws estimate --measured` carries over: the file, the arithmetic, the two commands."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from commands import run
from tiny import write_tiny

from workstation import measurements, runtime
from workstation.catalog import demo_folder
from workstation.cli import bench_offline
from workstation.cli.bench_http import Outcome, summary
from workstation.cli.bench_memory import remember_served
from workstation.cli.bench_steps import Step, decode_steps
from workstation.cli.bench_workload import decode_context
from workstation.config import EngineConfig
from workstation.errors import ConfigError
from workstation.estimate import Estimate, Machine, Question, estimate
from workstation.estimate_measured import with_measured
from workstation.estimate_model import EstimatedModel, find_model
from workstation.estimate_speed import decode_seconds, prompt_seconds
from workstation.measurements import Measurement
from workstation.memory import GIB, DeviceMemory

CARD = "NVIDIA GeForce RTX 4090"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "cache" / "ws"


def result(**changed: Any) -> Measurement:
    made: dict[str, Any] = {
        "bench": "latency", "model": "demo", "folder": str(demo_folder().resolve()), "form": "16-bit", "kv_cache_dtype": "auto",
        "device": CARD, "measured": 1.8e9, "requests": 8, "input_len": 64.0, "output_len": 72.0, "rows": 8.0, "context": 100.0,
        "decode_step_s": 0.002, "prompts": 8, "prompt_tokens": 64.0, "first_token_s": 0.01,
    }  # fmt: skip
    return Measurement(**made | changed)


def asked(*, rows: int = 1, context: int = 1024, kv: str = "auto", **rates: float | None) -> Estimate:
    model: EstimatedModel = find_model("demo", {"demo": _demo_entry()})
    given: dict[str, float | None] = {"bandwidth": 1.0e12, "dense16": 165e12, "dense8": 330e12} | rates
    machine = Machine(CARD, DeviceMemory("cuda", 24 * GIB, 24 * GIB), "test", **given)  # type: ignore[arg-type]
    return estimate(model, machine, Question(EngineConfig("demo", max_model_len=context), model.own, kv, rows))


def _demo_entry() -> Any:
    from workstation.catalog import load_catalogue

    return load_catalogue()["demo"]


def test_a_result_is_read_as_it_was_written(cache: Path) -> None:
    measurements.remember(result(figures={"p50_s": 0.5, "odd": None}))
    assert measurements.read() == [result(figures={"p50_s": 0.5, "odd": None})]
    assert [path.name for path in cache.iterdir()] == ["measurements.json"]


def test_a_repeated_run_takes_the_place_of_its_earlier_one() -> None:
    for value in (result(measured=1.0), result(measured=2.0, requests=4), result(measured=3.0)):
        measurements.remember(value)
    assert [found.measured for found in measurements.read()] == [2.0, 3.0]


def test_the_file_holds_a_bounded_number_of_results_the_newest() -> None:
    for count in range(measurements.KEPT + 3):
        measurements.remember(result(requests=count + 1))
    assert [found.requests for found in measurements.read()] == list(range(4, measurements.KEPT + 4))


@pytest.mark.parametrize("text", ["", "[{]", '[{"bench": 3}]', "{}"])
def test_a_damaged_file_holds_nothing_and_is_written_anew(cache: Path, text: str) -> None:
    cache.mkdir(parents=True)
    (cache / "measurements.json").write_text(text)
    assert measurements.read() == []
    measurements.remember(result())
    assert measurements.read() == [result()]


def test_what_was_measured_as_it_is_asked_comes_back_as_measured() -> None:
    found = with_measured(asked(rows=8, context=1024), [result(context=1024.0, prompts=1, prompt_tokens=1024.0)])
    assert found.prediction is not None
    assert found.prediction.decode_tokens_per_s_all == pytest.approx(8 / 0.002)
    assert found.prediction.time_to_first_token_s == 0.01


@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_a_machine_k_times_slower_than_the_formula_stays_so_for_other_rows_context_and_kv(kv: str) -> None:
    plain = asked(rows=32, context=4096, kv=kv)
    shape, weight, speed = plain.model.shape, plain.fit.weight_bytes, plain.machine.speed("16-bit")
    assert plain.prediction is not None and speed is not None
    step = 1.7 * decode_seconds(shape, weight, speed, rows=8, context=100)
    first = 1.4 * (prompt_seconds(shape, weight, speed, 64, 8) or 0)
    found = with_measured(plain, [result(decode_step_s=step, first_token_s=first)]).prediction
    assert found is not None and found.time_to_first_token_s is not None and plain.prediction.time_to_first_token_s is not None
    assert found.decode_tokens_per_s == pytest.approx(plain.prediction.decode_tokens_per_s / 1.7)
    assert found.decode_tokens_per_s_all == pytest.approx(plain.prediction.decode_tokens_per_s_all / 1.7)
    assert found.time_to_first_token_s == pytest.approx(plain.prediction.time_to_first_token_s * 1.4)


def test_prompts_that_begin_together_take_as_many_times_the_work_of_one() -> None:
    plain = asked()
    speed = plain.machine.speed("16-bit")
    assert speed is not None
    overhead = plain.model.shape.num_layers * 16e-6
    one, four = (prompt_seconds(plain.model.shape, plain.fit.weight_bytes, speed, 4096, count) or 0 for count in (1, 4))
    assert four - overhead == pytest.approx(4 * (one - overhead))


def test_the_newest_result_counts_for_decode_and_for_the_first_token_each() -> None:
    serve = result(bench="serve", measured=3e9, first_token_s=None, prompts=0, prompt_tokens=0.0)
    basis = with_measured(asked(), [serve, result(measured=2e9), result(measured=1e9)]).measured
    assert basis is not None and basis.first_token is not None
    assert (basis.decode.measured, basis.first_token.measured) == (3e9, 2e9)


def test_without_matrix_rates_a_first_token_of_another_length_is_not_told() -> None:
    found = with_measured(asked(dense16=None, dense8=None), [result()]).prediction
    assert found is not None and found.time_to_first_token_s is None and found.decode_tokens_per_s > 0


def test_without_a_bandwidth_nothing_is_carried_over() -> None:
    with pytest.raises(ConfigError, match="the bandwidth of NVIDIA GeForce RTX 4090 is not known"):
        with_measured(asked(bandwidth=None), [result()])


@pytest.mark.parametrize(
    "other", [{"device": "NVIDIA H200"}, {"form": "fp8"}, {"folder": "/elsewhere"}, {"decode_step_s": None}],
    ids=lambda other: str(next(iter(other))),
)
def test_results_of_another_card_form_or_model_or_without_a_decode_step_do_not_count(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no `ws bench` of demo in 16-bit"):
        with_measured(asked(), [result(**other)])


def test_decode_steps_leave_out_prompts_the_step_after_them_and_calls_without_work() -> None:
    seen = [Step(0.0, 1, 64, 64, 64, 4), Step(1.0, 2, 4, 0, 68, 5), Step(1.5, 3, 4, 0, 72, 5), Step(1.8, 4, 2, 0, 74, 5),
            Step(9.0, 4, 2, 0, 0, 0)]  # fmt: skip
    found = decode_steps(seen)
    assert found is not None and (found.rows, found.seconds) == (3.0, pytest.approx(0.4))
    assert decode_steps(seen[:2]) is None


def test_a_sequences_mean_context_counts_each_of_its_steps() -> None:
    assert decode_context([(100, 50)]) == 125.0
    assert decode_context([(100, 50), (10, 10)]) == pytest.approx((50 * 125 + 10 * 15) / 60)


def test_latency_remembers_what_it_ran_and_both_times(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny", "llama", vocab_size=160)
    flags: dict[str, Any] = {"device": "cpu", "num_threads": "1", "dtype": "float32", "kv_cache_memory_bytes": "16M"}
    figures = bench_offline.latency(str(folder), flags, bench_offline.Shape(2, 8, 4, False, 0), 1, 1)
    (kept,) = measurements.read()
    assert (kept.bench, kept.folder, kept.form, kept.model) == ("latency", str(folder.resolve()), "32-bit", "tiny")
    assert (kept.requests, kept.input_len, kept.output_len, kept.context) == (2, 8.0, 4.0, 10.0)
    assert (kept.rows, kept.prompts, kept.prompt_tokens) == (2.0, 2, 8.0)
    assert kept.decode_step_s and kept.first_token_s and kept.figures == figures


def served(outcomes: list[Outcome], concurrency: int, *, url: str = "http://127.0.0.1:8000") -> None:
    """A run over HTTP against a server that this machine knows."""
    runtime.write(runtime.describe("127.0.0.1", 8000, "demo", folder="/models/demo", form="fp8"))
    model = {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "device": "cuda", "device_name": CARD}

    async def go() -> None:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, json={"model": model}))
        async with httpx.AsyncClient(transport=transport, base_url=url) as client:
            await remember_served(client, url, outcomes, summary(outcomes, 10.0), concurrency)

    asyncio.run(go())


def outcome(error: str = "") -> Outcome:
    return Outcome(prompt_tokens=100, output_tokens=51, first=1.0, total=6.0, error=error)


def test_a_served_run_remembers_the_rows_that_decoded_and_the_time_between_tokens() -> None:
    served([outcome() for _ in range(8)], 0)
    (kept,) = measurements.read()
    assert (kept.bench, kept.folder, kept.device) == ("serve", "/models/demo", CARD)
    assert (kept.form, kept.kv_cache_dtype) == ("fp8", "fp8")
    assert (kept.rows, kept.decode_step_s, kept.context) == (4.0, 0.1, 125.5)
    assert kept.first_token_s is None  # others' prompts were in front of it


def test_a_served_run_of_one_at_a_time_remembers_the_first_token() -> None:
    served([outcome(), outcome()], 1)
    (kept,) = measurements.read()
    assert (kept.prompts, kept.prompt_tokens, kept.first_token_s) == (1, 100.0, 1.0)


def test_a_run_that_failed_in_part_or_ran_elsewhere_is_not_remembered() -> None:
    served([outcome(), outcome("503")], 0)
    served([outcome()], 0, url="http://192.0.2.1:8000")
    assert measurements.read() == []


@pytest.fixture
def rtx_4090(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = SimpleNamespace(name=CARD, total_bytes=24564 << 20, free_bytes=23 * GIB, display=False)
    monkeypatch.setattr("workstation.gpu.sample", lambda *a, **k: seen)


def test_the_estimate_says_what_was_measured_and_when(rtx_4090: None, capsys: pytest.CaptureFixture[str]) -> None:
    measurements.remember(result())
    assert run("estimate", "demo", "--measured") == 0
    text = capsys.readouterr().out
    for part in ("from measurements: ", "`ws bench latency` of 2027-01-15T08:00:00Z: 2.00 ms a step of 8.0 rows at 100 tokens",
                 "0.010 s for 8 prompts of 64 tokens", "carried over"):
        assert part in text


def test_a_first_token_that_was_not_measured_is_told_with_the_command_that_does(
    rtx_4090: None, capsys: pytest.CaptureFixture[str]
) -> None:
    measurements.remember(result(first_token_s=None))
    assert run("estimate", "demo", "--measured", "--context", "1024") == 0
    assert "first token: not measured; `ws bench latency demo --batch-size 1 --input-len 1024`" in capsys.readouterr().out


def test_the_json_names_both_measurements_by_documented_keys(rtx_4090: None, capsys: pytest.CaptureFixture[str]) -> None:
    measurements.remember(result())
    assert run("estimate", "demo", "--measured", "--json") == 0
    said = json.loads(capsys.readouterr().out)["measured"]
    manual = (Path(__file__).parent.parent / "docs" / "estimate.md").read_text()
    assert [key for part in said.values() for key in part if f"`{key}`" not in manual] == []
    assert (said["decode"]["decode_step_s"], said["first_token"]["first_token_s"]) == (0.002, 0.01)


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "no `ws bench` of demo in 16-bit on NVIDIA GeForce RTX 4090 is remembered; measure it with `ws bench latency demo`"),
    (["--quantization", "int8"], "of demo in int8 on"),
    (["--gpu", "h200"], "leave --gpu and --vram out"),
    (["-tp", "2"], "--measured knows one card"),
])
def test_what_cannot_be_told_from_measurements_is_one_line_and_exit_code_2(
    rtx_4090: None, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    measurements.remember(result(form="fp8"))
    assert run("estimate", "demo", "--measured", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_an_estimate_from_measurements_needs_no_torch(cache: Path) -> None:
    measurements.remember(result())
    code = ("import sys; from types import SimpleNamespace as N\n"
            "from workstation import gpu; from workstation.cli.main import main\n"
            f"gpu.sample = lambda *a: N(name={CARD!r}, total_bytes=24 << 30, free_bytes=23 << 30, display=False)\n"
            "try: main(['estimate', 'demo', '--measured'])\nexcept SystemExit as ended: assert not ended.code\n"
            "print([name for name in ('torch', 'triton', 'transformers', 'huggingface_hub') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=os.environ)
    assert done.stdout.splitlines()[-1] == "[]"
