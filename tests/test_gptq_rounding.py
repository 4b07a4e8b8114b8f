"""GPTQ rounding: its algebra, layers calibrated one by one, `ws quantize --rounding gptq`, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import make_engine
from quant_models import CPU, rewrite
from quantised import SIZES
from test_cli import run
from tiny import write_tiny

from workstation.architecture import read_shape
from workstation.catalog import demo_folder
from workstation.cli import calibration_text
from workstation.engine.fidelity import Document, final_states
from workstation.errors import ConfigError, ModelFolderError, OutOfMemoryError
from workstation.kernels import ops
from workstation.model import calibration, quantised_folder
from workstation.model.calibration import CalibratedRounding, CalibrationText
from workstation.model.loader import checked_entries
from workstation.model.quantised_folder import quantise_folder
from workstation.quant.at_load import forms_at_load
from workstation.quant.forms import WeightForms
from workstation.quant.gptq_rounding import DAMPINGS, compensation, damped, gptq_groups
from workstation.quant.pack import integer_weight
from workstation.quant.quantise import search_scale, signed_codes
from workstation.text.tokenizer import Tokenizer

Q = "model.layers.1.self_attn.q_proj"
WINDOWS = [torch.randint(3, 128, (count,), generator=torch.Generator().manual_seed(count)).tolist() for count in (40, 64, 7)]
TEXT = CalibrationText("windows", lambda: WINDOWS)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "plain", "mistral", dtype=torch.bfloat16, **{**SIZES, "sliding_window": 24})


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.t() @ inputs


# ── algebra ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def naive(weight: torch.Tensor, hessian: torch.Tensor, size: int) -> torch.Tensor:
    """Optimal brain quantisation in the order of columns: the inverse for the columns that are left, made anew for each."""
    rest, curvature = weight.double(), damped(hessian, DAMPINGS[0])
    rounded = torch.empty_like(rest)
    for column in range(rest.shape[1]):
        if column % size == 0:
            group = slice(column, column + size)
            scale = search_scale(rest[:, None, group].float(), 4, torch.bfloat16, curvature.diagonal()[group])[:, 0]
        rounded[:, column] = (signed_codes(rest[:, column:column + 1].float(), scale, 4) * scale)[:, 0]
        inverse = curvature[column:, column:].double().inverse()
        error = (rest[:, column] - rounded[:, column]) / inverse[0, 0]
        rest[:, column:] -= error[:, None] * inverse[0]
    return rounded.float()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_codes_are_those_of_the_naive_algorithm(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workstation.quant.gptq_rounding.CHUNK_ELEMENTS", 5 * 64)
    weight, hessian = normal(12, 64), hessian_of(normal(200, 64, seed=1) @ normal(64, 64, seed=2))
    found = integer_weight(*gptq_groups(weight, hessian, groups, 4, torch.bfloat16), 4)
    expected = naive(weight, hessian, 64 // groups)
    assert ((found - expected).abs() > 1e-5).float().mean() < 0.01  # a tie may fall either way


def test_outputs_move_less_than_with_each_weight_rounded_for_itself() -> None:
    weight, inputs = normal(64, 128), normal(500, 32, seed=1) @ normal(32, 128, seed=2)
    codes, scale = gptq_groups(weight, hessian_of(inputs), 4, 4, torch.bfloat16)
    values = weight.view(64, 4, 32)
    alone = search_scale(values, 4, torch.bfloat16)
    errors = [((rounded - weight) @ inputs.t()).square().mean() for rounded in (
        integer_weight(codes, scale, 4), (signed_codes(values, alone, 4) * alone).view_as(weight))]
    assert errors[0] < errors[1] / 4


def test_inputs_that_were_always_zero_leave_their_columns_to_the_search() -> None:
    weight, inputs = normal(16, 64), normal(200, 64, seed=1)
    inputs[:, 32:] = 0
    codes, scale = gptq_groups(weight, hessian_of(inputs), 2, 4, torch.bfloat16)
    alone = search_scale(weight[:, None, 32:], 4, torch.bfloat16)[:, 0]
    assert torch.equal(scale[:, 1:].float(), alone)
    assert torch.equal(integer_weight(codes, scale, 4)[:, 32:], signed_codes(weight[:, 32:], alone, 4) * alone)
    assert gptq_groups(weight, torch.zeros(64, 64), 2, 4, torch.bfloat16)[1].isfinite().all()


def test_the_factor_is_the_inverses() -> None:
    hessian = hessian_of(normal(40, 64))  # singular before it is damped
    factor = compensation(hessian)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.t() @ factor @ damped(hessian, DAMPINGS[0]), torch.eye(64), atol=1e-3, rtol=0)


def test_inputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="inputs that are not finite"):
        gptq_groups(normal(4, 32), torch.full((32, 32), torch.inf), 1, 4, torch.bfloat16)


# ── layer by layer ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_hidden_states_behind_the_last_layer_are_the_written_models(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "STEP_WINDOWS", 2)
    shape = read_shape(plain)
    rounding = CalibratedRounding(shape, forms_at_load(shape, "int4-g32"), checked_entries(plain, shape, WeightForms()),
                                  WINDOWS, {}, CPU)
    rounding.take(f"model.layers.{shape.num_layers - 1}.mlp.down_proj")
    target = plain.parent / "small"
    quantise_folder(plain, target, "int4-g32", device=CPU, calibration=TEXT)
    engine = make_engine(target, dtype="float32")
    expected = final_states(engine, [Document(window) for window in WINDOWS])
    found = ops.rms_norm(torch.cat(rounding.states), engine.model.final_norm, shape.norm_eps)
    for ours, theirs in zip(found.split([len(window) for window in WINDOWS]), expected, strict=True):
        torch.testing.assert_close(ours[:-1], theirs, atol=1e-4, rtol=1e-4)


def test_a_stopped_run_goes_on_and_gives_the_same_folder(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised_folder, "SHARD_BYTES", 60_000)
    whole, target = plain.parent / "whole", plain.parent / "small"
    quantise_folder(plain, whole, "int4", device=CPU, calibration=TEXT)

    def stop(done: int, total: int) -> None:
        if done > total * 0.8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantise_folder(plain, target, "int4", device=CPU, calibration=TEXT, progress=stop)
    rounded = []
    monkeypatch.setattr(calibration, "gptq_groups", lambda *given: rounded.append(given) or gptq_groups(*given))
    report = quantise_folder(plain, target, "int4", device=CPU, calibration=TEXT)
    assert 0 < report.found < report.shards
    assert 0 < len(rounded) < 4 * read_shape(plain).num_layers  # whole layers that were there are read back
    assert all((target / path.name).read_bytes() == path.read_bytes() for path in whole.iterdir())


def test_another_text_or_rounding_is_not_gone_on_with(plain: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    target = plain.parent / "small"
    with pytest.raises(KeyboardInterrupt):
        quantise_folder(plain, target, "int4", device=CPU, calibration=TEXT, progress=stop)
    for other in (None, CalibrationText("another", TEXT.make)):
        with pytest.raises(ConfigError, match="beginning of something else"):
            quantise_folder(plain, target, "int4", device=CPU, calibration=other)


def test_a_weight_that_is_not_finite_is_named(plain: Path) -> None:
    rewrite(plain, lambda weights: weights[f"{Q}.weight"][3, 5].fill_(torch.nan))
    with pytest.raises(ModelFolderError, match=f"{Q}.weight in .* not finite"):
        quantise_folder(plain, plain.parent / "small", "int4", device=CPU, calibration=TEXT)


def test_activations_that_are_not_finite_are_told_with_their_layer(plain: Path) -> None:
    rewrite(plain, lambda weights: weights["model.layers.1.input_layernorm.weight"].fill_(3e38))
    with pytest.raises(ModelFolderError, match=f"layer {Q} has inputs that are not finite"):
        quantise_folder(plain, plain.parent / "small", "int4", device=CPU, calibration=TEXT)


def test_a_device_without_room_is_told_with_the_layer(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(calibration, "gptq_groups", full)
    with pytest.raises(OutOfMemoryError, match="calibrating layer 0 does not fit"):
        quantise_folder(plain, plain.parent / "small", "int4", device=CPU, calibration=TEXT)


@pytest.mark.parametrize(("windows", "said"), [
    ([], "1 to 128 windows, got 0"), ([[5]] * 129, "got 129"), ([[5], []], "window 1 has 0 tokens"),
    ([[5] * 513], "window 0 has 513 tokens; 1 to 512"), ([[3, 999_999]], "window 0 has the tokens 3 to 999999")])
def test_windows_that_cannot_be_read_are_refused(windows: list[list[int]], said: str, plain: Path) -> None:
    assert read_shape(plain).max_position >= 512
    with pytest.raises(ConfigError, match=said):
        quantise_folder(plain, plain.parent / "small", "int4", device=CPU, calibration=CalibrationText("", lambda: windows))


# ── the command and its texts ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("arguments", "said"), [
    (["--to", "int4", "--rounding", "awq"], "--rounding must be search or gptq, got 'awq'"),
    (["--to", "nf4", "--rounding", "gptq"], "--rounding gptq goes with --to int4, int4-g64, int4-g32, got 'nf4'"),
    (["--to", "int4", "--calibration", "text"], "--calibration goes with --rounding gptq"),
    (["--to", "int4", "--rounding", "gptq", "--calibration", "/no/such/text"], "--calibration /no/such/text cannot be read")])
def test_the_command_refuses_what_does_not_go_together(
    arguments: list[str], said: str, plain: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("quantize", str(plain), str(plain.parent / "small"), "--device", "cpu", *arguments) == 2
    assert said in capsys.readouterr().err and not (plain.parent / "small").exists()


def test_a_text_is_cut_into_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "WINDOW_TOKENS", 8)
    monkeypatch.setattr(calibration, "MAX_WINDOWS", 3)
    text = "The sum of 2 and 3 is 5. "
    whole = Tokenizer.from_folder(demo_folder()).encode(text * 20, add_special_tokens=False)
    assert calibration_text.of_text(text * 20, demo_folder()) == [whole[:8], whole[8:16], whole[16:24]]
    with pytest.raises(ConfigError, match="has 1 tokens; at least 8"):
        calibration_text.of_text("a", demo_folder())


def test_a_model_writes_its_own_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "WINDOW_TOKENS", 12)
    monkeypatch.setattr(calibration, "MAX_WINDOWS", 3)
    windows = calibration_text.of_model("demo", {"device": "cpu", "max_model_len": "64", "num_gpu_blocks_override": "64"})
    assert [len(window) for window in windows] == [12] * 3
    assert len({window[0] for window in windows}) == len({tuple(window[1:]) for window in windows}) == 3
