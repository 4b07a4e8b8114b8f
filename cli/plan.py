"""MODEL, flags and environment → everything a launch needs, decided before torch is imported or a byte downloaded."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

from workstation import gpu
from workstation.catalog import ModelEntry, load_catalogue
from workstation.cli.serve_settings import SERVE_SETTINGS
from workstation.config import DType, EngineConfig
from workstation.errors import ConfigError, DeviceError, WorkstationError
from workstation.hub import ResolvedModel, check_name, resolve_model
from workstation.settings import Settings, resolve, unknown_variables

_DTYPE_ALIASES = {"half": "float16", "float": "float32"}


@dataclass(frozen=True, slots=True)
class Launch:
    """What will run: the model as it was named, its folder, the resolved settings and the engine's configuration."""

    asked: str
    model: ResolvedModel
    settings: Settings
    config: EngineConfig

    def llm_arguments(self) -> dict[str, Any]:
        """The configuration as keyword arguments of `LLM`, which looks the model up by the name that was asked for."""
        defaults = {item.name: item.default for item in fields(EngineConfig)}
        changed = {name: value for name, value in asdict(self.config).items() if value != defaults[name]}
        where = {name: self.settings[name] for name in ("revision", "download_dir", "hf_token")}
        return {**changed, **where, "model": self.asked}


def note(text: str) -> None:
    """One line of talk; stdout stays for data."""
    print(f"ws: {text}", file=sys.stderr, flush=True)


def settle(model: str, flags: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[Settings, ModelEntry | None]:
    """Settings by precedence, for this model. Raises ConfigError."""
    entry = load_catalogue().get(model)
    for sentence in unknown_variables(SERVE_SETTINGS, environment):
        note(sentence)
    where = f"{entry.source}: [{entry.name}] serve" if entry else "models.toml"
    settings = resolve(SERVE_SETTINGS, flags, environment, entry.serve if entry else None, where=where)
    if settings["kv_cache_memory_bytes"] is not None and settings["num_gpu_blocks_override"] is not None:
        raise ConfigError("--kv-cache-memory-bytes and --num-gpu-blocks-override both size the KV pool; give one")
    return settings, entry


def choose_device(asked: str, *, is_demo: bool) -> str:
    """The device, by name. A model is never put on the CPU unasked; only the demo is. Raises ConfigError, DeviceError."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", asked):
        raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N, got {asked!r}", param="device")
    if asked != "auto":
        return asked
    if gpu.has_usable_gpu():
        return "cuda"
    if is_demo:
        return "cpu"
    gpu.require_cuda(gpu.torch_build(), 0)
    raise DeviceError("no usable GPU; give --device cpu to run on the CPU", param="device")


def plan_launch(model: str, flags: Mapping[str, Any], environment: Mapping[str, str]) -> Launch:
    """Resolve settings, device and model, downloading the model when it must be. Raises WorkstationError."""
    settings, entry = settle(model, flags, environment)
    check_name(model, load_catalogue())  # a misspelt name is told before a missing GPU
    device = choose_device(settings["device"], is_demo=entry is not None and entry.is_bundled)
    found = resolve_model(
        model, load_catalogue(), revision=settings["revision"], token=settings["hf_token"],
        download_dir=settings["download_dir"], weights=settings["load_format"] != "dummy", say=note,
    )  # fmt: skip
    return Launch(model, found, settings, engine_config(settings, str(found.folder), device))


def form_of(launch: Launch) -> str:
    """How the weights will be kept, as `ws estimate` names it (16-bit, fp8, …); "" where it cannot tell."""
    from workstation.estimate_model import find_model

    try:
        found = find_model(launch.asked, load_catalogue(), revision=launch.settings["revision"])
        return found.weights(launch.settings["quantization"]).name
    except WorkstationError:
        return ""


def engine_config(settings: Settings, folder: str, device: str) -> EngineConfig:
    """The engine's part of the settings, in its own names."""
    dtype = _DTYPE_ALIASES.get(settings["dtype"], settings["dtype"])
    same = (
        "load_format", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization",
        "kv_cache_memory_bytes", "block_size", "enable_prefix_caching", "enable_chunked_prefill", "scheduling_policy",
        "max_num_queued_reqs", "seed", "num_threads", "enforce_eager", "quantization",
        "kv_cache_dtype",
    )  # fmt: skip
    return EngineConfig(
        model=folder, device=device, dtype=cast(DType, dtype), num_blocks=settings["num_gpu_blocks_override"],
        overlap=settings["async_scheduling"], **{name: settings[name] for name in same},
    )  # fmt: skip
