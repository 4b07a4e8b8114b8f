"""Start-up: config → device, dtype, plan, weights, pool → Engine. Everything that can be refused is refused here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import torch

from workstation import gpu
from workstation.architecture import ModelShape, read_shape
from workstation.config import EngineConfig
from workstation.engine.admission import SchedulerLimits
from workstation.engine.blocks import BlockPool
from workstation.engine.engine import Engine
from workstation.engine.grammars import GrammarDesk
from workstation.engine.host import keep_large_buffers, release_stacks
from workstation.engine.ledger import MemoryLedger
from workstation.engine.request import EngineInfo, Stage
from workstation.engine.runner import ModelRunner
from workstation.engine.scheduler import Scheduler
from workstation.errors import ConfigError, DeviceError, OutOfMemoryError
from workstation.memory import DeviceMemory, MemoryPlan, gib, plan_memory
from workstation.model.loader import load_model, read_forms
from workstation.quant.forms import scratch_bytes, weight_bytes
from workstation.quant.kv_cache import KVCacheForm, kv_cache_form
from workstation.safetensors_header import read_checkpoint

log = logging.getLogger("ws.engine")

Progress = Callable[[Stage, int, int], None]
FP8 = torch.float8_e4m3fn
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """"auto" is the first GPU; the CPU must be asked for by name. Raises DeviceError, ConfigError."""
    if name == "cpu":
        return torch.device("cpu")
    wanted = "cuda:0" if name in ("auto", "cuda") else name
    kind, _, number = wanted.partition(":")
    if kind != "cuda" or not number.isdigit():
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}", param="device")
    gpu.require_cuda(torch.version.cuda, torch.cuda.device_count() if torch.cuda.is_available() else 0, index=int(number))
    return torch.device("cuda", int(number))


def choose_dtype(config: EngineConfig, shape: ModelShape, device: torch.device) -> torch.dtype:
    """"auto": the checkpoint's dtype on a GPU (bfloat16 for float32 checkpoints), float32 on the CPU."""
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if device.type == "cpu":
        return torch.float32
    return DTYPES.get(shape.dtype, torch.bfloat16) if shape.dtype != "float32" else torch.bfloat16


def device_memory(device: torch.device) -> DeviceMemory:
    """What the device has now, in bytes, beside this process's CUDA context, which is made here.

    Raises DeviceError when the card cannot be opened."""
    if device.type == "cpu":
        return gpu.host_memory()
    try:
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            release_stacks()
        free, total = torch.cuda.mem_get_info(device)
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    except RuntimeError as error:
        raise DeviceError(f"{device} cannot be opened: {error}", param="device") from error
    card = gpu.sample(uuid=uuid)
    return DeviceMemory("cuda", total, free, display=bool(card and card.display))


def build_engine(config: EngineConfig, progress: Progress | None = None) -> Engine:
    """Load a model and make it ready. Raises a StartupError that names the cause and the cure.

    progress: called with (stage, done, in all): bytes of weights, kernels compiled, graphs captured.
    """
    progress = progress or _unseen
    begun = time.monotonic()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    shape = read_shape(config.model)
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_large_buffers()
    ledger = MemoryLedger(device)
    dtype = choose_dtype(config, shape, device)
    memory = device_memory(device)
    forms = read_forms(config.model, shape, load_format=config.load_format, quantization=config.quantization)
    cache = read_cache(config, shape, dtype)
    kv_dtype = FP8 if cache.fp8 else dtype
    plan = plan_memory(shape, config, weight_bytes(shape, dtype.itemsize, forms), memory, dtype_bytes=dtype.itemsize,
                       kv_dtype_bytes=kv_dtype.itemsize, scratch_bytes=scratch_bytes(shape, dtype.itemsize, forms))
    if plan.note:
        log.warning(plan.note)
    grammars = GrammarDesk(config.model, shape.vocab_size)
    if config.online:
        grammars.prepare()  # stops other threads of this process for a second, which must not be in the middle of answers
    try:
        with ledger.part("workspace"):
            model = load_model(config.model, shape, dtype=dtype, device=device, max_model_len=plan.max_model_len,
                               load_format=config.load_format, forms=forms, kv_scales=cache.scales,
                               progress=partial(progress, "weights"))
        loaded = time.monotonic()
        with ledger.part("workspace"):
            runner = ModelRunner(model, shape, num_blocks=plan.num_blocks, block_size=config.block_size,
                                 max_rows=config.max_num_seqs, max_model_len=plan.max_model_len, kv_dtype=kv_dtype,
                                 device=device)
        if device.type == "cuda":
            _make_ready(runner, ledger, plan, progress, eager=config.enforce_eager)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(f"the plan ({gib(plan.total)}) did not fit beside what else is on {device}: {error}") from error
    pool = BlockPool(plan.num_blocks, config.block_size)
    limits = SchedulerLimits(
        max_tokens=plan.max_num_batched_tokens, max_rows=config.max_num_seqs, max_len=plan.max_model_len,
        max_queue=config.max_num_queued_reqs, chunked_prefill=config.enable_chunked_prefill,
        priority=config.scheduling_policy == "priority")
    scheduler = Scheduler(pool, shape.kv_groups, limits, caching=config.enable_prefix_caching, seed=config.seed)
    overlap = device.type == "cuda" if config.overlap is None else config.overlap
    info = _info(config, shape, plan, device, dtype, kv_dtype)
    info.quantization = forms.name
    info.load_seconds, info.ready_seconds = loaded - begun, time.monotonic() - begun
    info.measured = ledger.close(plan)
    return Engine(scheduler, runner, info, overlap=overlap, grammars=grammars)


def _unseen(stage: Stage, done: int, total: int) -> None:
    """Nobody watches."""


def _make_ready(runner: ModelRunner, ledger: MemoryLedger, plan: MemoryPlan, progress: Progress, *, eager: bool) -> None:
    """Nothing is compiled or taken later that could be now: compile for all steps, run the largest, capture the others."""
    model = runner.model
    for part, count in (("weights", model.weight_bytes - model.cos_sin.nbytes), ("kv", runner.pool.nbytes),
                        ("logits", runner.logits_room.nbytes)):
        ledger.move("workspace", part, count)  # what is left of it: tables, rows, and what allocations were rounded up by
    with ledger.working():
        runner.compile_ahead(plan.max_num_batched_tokens, partial(progress, "kernels"))
        runner.warm_up(plan.max_num_batched_tokens)
    if not eager:
        with ledger.capturing():
            runner.capture(plan.max_num_batched_tokens, partial(progress, "graphs"))


def read_cache(config: EngineConfig, shape: ModelShape, dtype: torch.dtype) -> KVCacheForm:
    """What the pool holds, and its scales. Raises ConfigError, ModelFolderError as `kv_cache_form` does."""
    stored = None if config.load_format == "dummy" else read_checkpoint(config.model)
    return kv_cache_form(config.kv_cache_dtype, _name(dtype), shape, stored)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _info(config: EngineConfig, shape: ModelShape, plan: MemoryPlan, device: torch.device, dtype: torch.dtype,
          kv_dtype: torch.dtype) -> EngineInfo:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return EngineInfo(
        model=config.model, architecture=shape.architecture, dtype=_name(dtype),
        kv_cache_dtype="fp8" if kv_dtype == FP8 else _name(kv_dtype), device=str(device), device_name=name,
        max_model_len=plan.max_model_len, logits_width=shape.vocab_size, hidden_size=shape.hidden_size,
        num_blocks=plan.num_blocks - 1, block_size=config.block_size, max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens, weight_bytes=plan.weights, kv_bytes=plan.kv, plan=plan.as_dict(),
        device_uuid=f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else "")
