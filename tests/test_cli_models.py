"""Model names on the command line: what is listed, what is on disk, what is misspelt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import main_ends

from workstation.catalog import ModelEntry
from workstation.cli.models import state
from workstation.cli.plan import plan_launch
from workstation.errors import ModelNotFoundError


def test_models_lists_names_that_can_be_served(capsys: pytest.CaptureFixture[str]) -> None:
    main_ends("models", "--json")
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["demo"]["state"] == "bundled"
    assert rows["llama-70b-fp8"]["quantization"] == "fp8"


def test_a_downloaded_model_is_on_disk(tmp_path: Path) -> None:
    entry, home = ModelEntry("m", "owner/name"), {"HF_HUB_CACHE": str(tmp_path)}
    assert state(entry, home) == "not downloaded"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    assert state(entry, home) == "on disk"


@pytest.mark.parametrize(("model", "message"), [("dmeo", "demo"), ("/no/such/folder", "/no/such/folder")])
def test_a_misspelt_model_is_told_before_a_missing_gpu(model: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workstation.gpu.has_usable_gpu", lambda: False)
    with pytest.raises(ModelNotFoundError, match=message):
        plan_launch(model, {}, {})
