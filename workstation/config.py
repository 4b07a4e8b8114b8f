"""What the engine and the server are told at start: frozen, decided once. Flag > environment > models.toml > default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["auto", "bfloat16", "float16", "float32"]
KVCacheDType = Literal["auto", "fp8", "fp8_e4m3", "bfloat16", "float16", "float32"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """All an engine needs to start.

    Attributes:
        model: path of a folder with config.json and (unless load_format is "dummy") safetensors.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: of weights and activations; "auto" is the checkpoint's (float32 checkpoints and the CPU: see runner).
        quantization: the form that the linear layers of a 16-bit checkpoint take while loading; a quantised checkpoint's
            own format is found without it.
        kv_cache_dtype: "fp8" (or "fp8_e4m3") keeps keys and values in a byte each; "auto" does so only where the checkpoint
            describes an FP8 cache; the name of the model's dtype never does.
        max_model_len: tokens of prompt + output a sequence may hold; None takes the model's window, shrunk to fit.
        max_num_batched_tokens: a step's token budget; None picks by device, and `online` (a server's streams wait for every
            step, prompts of others included) picks at most 4,096.
        gpu_memory_utilization: share of the device's memory the engine may use, 0…1.
        kv_cache_memory_bytes / num_blocks: exact size of the KV pool, in bytes or blocks; overrides the share.
        overlap: schedule step N+1 while step N runs; None means "on a GPU".
        enforce_eager: launch kernel by kernel, without CUDA graphs.
    """

    model: str
    device: str = "auto"
    dtype: DType = "auto"
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    online: bool = False
    gpu_memory_utilization: float = 0.90
    kv_cache_memory_bytes: int | None = None
    num_blocks: int | None = None
    block_size: int = 16
    quantization: Literal["fp8", "int8", "int4", "int4-g64", "int4-g32", "nf4"] | None = None
    kv_cache_dtype: KVCacheDType = "auto"
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    max_num_queued_reqs: int = 2048
    overlap: bool | None = None
    enforce_eager: bool = False
    seed: int = 0
    num_threads: int | None = None
