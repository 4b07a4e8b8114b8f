"""What goes where in device memory, decided before a byte is touched: shape + config + free bytes → MemoryPlan.

Pure arithmetic, no torch. `ws serve` obeys the plan and afterwards compares it with what was measured.

    budget = min(gpu_memory_utilization × total − context, free − reserve)
    kv     = budget − weights − workspace − logits − sampler − graphs        (or exactly what was asked for)

On the CPU there is no share of a card to fill: the pool takes what was asked for, else min(2 GiB, RAM / 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from workstation.architecture import ModelShape
from workstation.config import EngineConfig
from workstation.errors import ConfigError, OutOfMemoryError

GIB = 1 << 30
MIB = 1 << 20
CUDA_CONTEXT_BYTES = 426 * MIB  # 421 with all kernels loaded (H200, driver 580): docs/memory.md
LIBRARY_BYTES = 48 * MIB  # cuBLAS's own workspace, and counters of ours
GRAPH_NODES_BYTES = 192 * MIB  # what the driver keeps for some sixty captured steps
DISPLAY_RESERVE_BYTES = GIB
CPU_POOL_BYTES = 2 * GIB
LEAST_CONTEXT = 4096
MLP_TOKENS = 2048  # the feed-forward part of a larger step runs in pieces of this many tokens, which bounds its activations
# A captured step with prompts has up to so many of their tokens, beside decodes; but no more than keep a GPU about as long
# as the CPU takes to launch the layers kernel by kernel: 1,024 tokens of an 8B model, 256 of a 70B.
GRAPH_PROMPTS = (64, 128, 256, 512, 1024, 2048)
GRAPH_DECODES = (0, 16, 64, 256)
GRAPH_WORK = 230_000_000_000  # tokens × a layer's weights
GRAPH_CHUNKS = 16  # of prompts that a captured step has room for, each with logits of its own
SAMPLING_ROWS = 32  # likewise for sampling that needs temporaries of [rows, vocabulary]
# Temporaries live beside their inputs for a moment, and the allocator rounds up.
ALLOCATOR_SLACK = 1.1
# Penalties on [rows, vocabulary]: logits in float32, counts, and three temporaries of the same size. On the CPU, a full sort:
# values (4), 64-bit indices (8), probabilities and running sum (8).
SAMPLER_BYTES_PER_LOGIT = 20
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FP8_BYTES = 1


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """One device, in bytes, as the driver (CUDA's view, not NVML's) or the kernel reports it at the start.

    Attributes:
        has_context: `free_bytes` was read after this process made its CUDA context.
        display: a screen hangs on the card, so 1 GiB stays free.
    """

    kind: Literal["cuda", "cpu"]
    total_bytes: int
    free_bytes: int
    has_context: bool = True
    display: bool = False


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose; `num_blocks` counts the null block (block 0), so sequences share `num_blocks - 1`.

    Attributes:
        weights: parameters as they are kept.  kv: the pool.  workspace: activations and tables of the largest step.
        logits: [rows, vocabulary] in the model's dtype.  sampler: penalties, sorting, per-row state.
        context, graphs: what CUDA takes for itself.  reserve: left alone for a display.
        budget: what weights, kv, workspace, logits, sampler and graphs may take together.
        note: one sentence when something nobody asked for was made smaller, else "".
    """

    weights: int
    kv: int
    workspace: int
    logits: int
    sampler: int
    context: int
    graphs: int
    reserve: int
    budget: int
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_batched_tokens: int
    note: str = ""

    @property
    def total(self) -> int:
        """Everything this process will hold on the device, in bytes."""
        return self.weights + self.kv + self.workspace + self.logits + self.sampler + self.context + self.graphs

    @property
    def kv_tokens(self) -> int:
        return (self.num_blocks - 1) * self.block_size

    def as_dict(self) -> dict[str, int]:
        """The byte counts by name, for logs and EngineInfo.plan."""
        names = ("weights", "kv", "workspace", "logits", "sampler", "context", "graphs", "reserve", "budget")
        return {name: getattr(self, name) for name in names}


def gib(count: int) -> str:
    """Bytes for people: binary gibibytes with two digits."""
    return f"{count / GIB:.2f} GiB"


def element_bytes(config: EngineConfig, shape: ModelShape, kind: str) -> int:
    """Bytes of one weight or activation. `auto` means the checkpoint's dtype on a GPU and float32 on the CPU."""
    if config.dtype != "auto":
        return ELEMENT_BYTES[config.dtype]
    return 4 if kind == "cpu" else ELEMENT_BYTES.get(shape.dtype, 2)


def default_token_budget(device: DeviceMemory, *, online: bool = False) -> int:
    """Tokens a step may compute when nobody said.

    Large cards hide more prompt work behind one step; on a server the gap between two tokens of a stream is as long as the
    longest step, which is why it stops at half of that.
    """
    if device.kind == "cpu" or device.total_bytes < 70 * GIB:
        return 2048
    return 4096 if online else 8192


def blocks_for(shape: ModelShape, tokens: int, block_size: int, token_budget: int) -> int:
    """Blocks one sequence of `tokens` holds at its worst moment, over all KV groups.

    A sliding group gives back what left the window, but a prefill chunk needs its window and itself at once.
    """
    total = 0
    for group in shape.kv_groups:
        held = tokens if group.kind == "full" else min(tokens, group.window + token_budget)
        total += math.ceil(held / block_size) + (1 if held < tokens else 0)
    return total


@dataclass(frozen=True, slots=True)
class _Needs:
    """The fixed part of a plan for one context length: everything but the pool."""

    workspace: int
    logits: int
    sampler: int

    @property
    def total(self) -> int:
        return self.workspace + self.logits + self.sampler


def logit_rows(max_rows: int) -> int:
    """Rows of logits a step may have: its samples', or a captured step's, whose prompts have room of their own."""
    return max_rows + GRAPH_CHUNKS


def graph_prompts(shape: ModelShape, max_tokens: int) -> list[int]:
    """Prompt tokens that captured steps have room for, ascending; max_tokens: a step's budget."""
    heads = shape.num_heads + shape.num_kv_heads  # q and o, k and v
    weights = shape.hidden_size * (2 * heads * shape.head_dim + 3 * shape.intermediate_size)
    return [tokens for tokens in GRAPH_PROMPTS if tokens <= max_tokens and tokens * weights <= GRAPH_WORK]


def _graph_bytes(shape: ModelShape, rows: int, max_tokens: int, dtype_bytes: int) -> int:
    """Captured steps share one pool, so the largest one's activations count."""
    tokens = max(graph_prompts(shape, max_tokens), default=0) + min(rows, max(GRAPH_DECODES))
    return GRAPH_NODES_BYTES + _activations(shape, max(tokens, min(rows, 512)), dtype_bytes)


def _activations(shape: ModelShape, tokens: int, dtype_bytes: int) -> int:
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim + shape.num_heads * shape.head_dim
    ffn = 3 * shape.intermediate_size * min(tokens, MLP_TOKENS)  # gate and up, then their product
    return int((3 * tokens * shape.hidden_size + max(tokens * heads, ffn)) * dtype_bytes * ALLOCATOR_SLACK)


def _needs(shape: ModelShape, *, dtype_bytes: int, rows: int, tokens: int, max_len: int, block_size: int) -> _Needs:
    indices = tokens * 8 * (3 + len(shape.kv_groups))
    tables = len(shape.kv_groups) * rows * math.ceil(max_len / block_size) * 4
    rope = max_len * shape.rope.rotary_dim * 4
    logits = logit_rows(rows) * shape.vocab_size * dtype_bytes
    row_state = rows * 256
    penalties = min(rows, 64) * shape.vocab_size * 4
    sampler = min(rows, SAMPLING_ROWS) * shape.vocab_size * SAMPLER_BYTES_PER_LOGIT + row_state + penalties
    return _Needs(_activations(shape, tokens, dtype_bytes) + indices + tables + rope, logits, sampler)


def plan_memory(
    shape: ModelShape,
    config: EngineConfig,
    weight_bytes: int,
    device: DeviceMemory,
    *,
    dtype_bytes: int | None = None,
    kv_dtype_bytes: int | None = None,
    scratch_bytes: int = 0,
) -> MemoryPlan:
    """The plan for one engine on one device.

    Args:
        weight_bytes: of the parameters as they will lie on the device.
        dtype_bytes: of one activation; None derives it from config and shape (`element_bytes`).
        kv_dtype_bytes: of one KV element; None is 1 when config asks for FP8 by name, else `dtype_bytes`.
        scratch_bytes: what products with these weights need beside activations (`quant.forms.scratch_bytes`).
    Raises:
        ConfigError: numbers that contradict each other or the model's window.
        OutOfMemoryError: something does not fit; names what would.
    """
    width = dtype_bytes or element_bytes(config, shape, device.kind)
    return _Planner(shape, config, weight_bytes, device, width, kv_dtype_bytes, scratch_bytes).plan()


def least_plan(
    shape: ModelShape,
    config: EngineConfig,
    weight_bytes: int,
    device: DeviceMemory,
    *,
    dtype_bytes: int | None = None,
    kv_dtype_bytes: int | None = None,
    scratch_bytes: int = 0,
) -> MemoryPlan:
    """What one sequence of the asked context (or the least context) takes, whether it fits or not; arguments as above.

    The plan fits when `total - context` is at most `budget`. Raises ConfigError.
    """
    width = dtype_bytes or element_bytes(config, shape, device.kind)
    return _Planner(shape, config, weight_bytes, device, width, kv_dtype_bytes, scratch_bytes).least()


class _Planner:
    def __init__(
        self, shape: ModelShape, config: EngineConfig, weight_bytes: int, device: DeviceMemory, dtype_bytes: int,
        kv_dtype_bytes: int | None = None, scratch_bytes: int = 0,
    ) -> None:  # fmt: skip
        if not 0.0 < config.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"gpu_memory_utilization must be above 0 and at most 1, got {config.gpu_memory_utilization:g}",
                param="gpu_memory_utilization",
            )
        if config.max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs must be at least 1, got {config.max_num_seqs}", param="max_num_seqs")
        self.shape, self.config, self.device = shape, config, device
        self.weights, self.dtype_bytes, self.scratch = weight_bytes, dtype_bytes, scratch_bytes
        asked = FP8_BYTES if config.kv_cache_dtype.startswith("fp8") else dtype_bytes
        self.block_bytes = shape.kv_bytes_per_block(config.block_size, kv_dtype_bytes or asked)
        cuda = device.kind == "cuda"
        self.context = CUDA_CONTEXT_BYTES if cuda else 0
        tokens = config.max_num_batched_tokens or default_token_budget(device, online=config.online)
        captured = cuda and not config.enforce_eager
        # Captured steps have a pool of their own, and so scratch of their own.
        self.graphs = _graph_bytes(shape, config.max_num_seqs, tokens, dtype_bytes) + scratch_bytes if captured else 0
        self.reserve = DISPLAY_RESERVE_BYTES if device.display else 0
        self.free = device.free_bytes - self.reserve - (0 if device.has_context else self.context)
        share = int(config.gpu_memory_utilization * device.total_bytes) - self.context
        self.budget = min(share, self.free) if cuda else self.free

    def plan(self) -> MemoryPlan:
        asked, window = self._asked_length(), self.shape.max_position
        length = asked or window
        plan = self._try(length)
        if plan is not None:
            return plan
        floor = min(LEAST_CONTEXT, window)
        best = self._largest(floor if asked is None else 1, length)
        if asked is None and best:
            plan = self._try(best)
            if plan is not None:
                note = (
                    f"max_model_len is {best} instead of the model's {window}: the KV pool holds "
                    f"{plan.kv_tokens} tokens ({gib(plan.kv)})."
                )
                return replace(plan, note=note)
        raise self._refusal(length if asked is not None else floor, best if asked is not None else 0)

    def least(self) -> MemoryPlan:
        length = self._asked_length() or min(LEAST_CONTEXT, self.shape.max_position)
        blocks = blocks_for(self.shape, length, self.config.block_size, self._tokens(length)) + 1
        return self._made(length, self._needs(length), blocks)

    def _asked_length(self) -> int | None:
        asked, window = self.config.max_model_len, self.shape.max_position
        if asked is not None and not 1 <= asked <= window:
            raise ConfigError(
                f"max_model_len must be between 1 and {window} (the model's own window), got {asked}",
                param="max_model_len",
            )
        return asked

    def _tokens(self, length: int) -> int:
        """The step's token budget for one context length. Without chunks a whole prompt must fit in a step."""
        given = self.config.max_num_batched_tokens
        if given is not None and given < 1:
            raise ConfigError(f"max_num_batched_tokens must be at least 1, got {given}", param="max_num_batched_tokens")
        tokens = given or default_token_budget(self.device, online=self.config.online)
        if self.config.enable_chunked_prefill or tokens >= length:
            return tokens
        if given is None:
            return length
        raise ConfigError(
            f"without chunked prefill max_num_batched_tokens must be at least max_model_len ({length}), got {given}",
            param="max_num_batched_tokens",
        )

    def _needs(self, length: int) -> _Needs:
        tokens = self._tokens(length)
        needs = _needs(
            self.shape, dtype_bytes=self.dtype_bytes, rows=self.config.max_num_seqs, tokens=tokens, max_len=length,
            block_size=self.config.block_size,
        )  # fmt: skip
        libraries = LIBRARY_BYTES if self.device.kind == "cuda" else 0
        return replace(needs, workspace=needs.workspace + self.scratch + libraries)

    def _pool_bytes(self, needs: _Needs) -> int:
        """Bytes the KV pool gets beside `needs`; may be negative when nothing is left."""
        left = self.budget - self.weights - needs.total - self.graphs
        asked = self._asked_pool()
        if asked is not None:
            # An exact size overrides the share of the card, never what is physically there.
            return asked if asked <= self.free - self.weights - needs.total - self.graphs else -1
        if self.device.kind == "cpu":
            return min(left, CPU_POOL_BYTES, self.device.total_bytes // 4)
        return left

    def _asked_pool(self) -> int | None:
        if self.config.num_blocks is not None:
            return self.config.num_blocks * self.block_bytes
        return self.config.kv_cache_memory_bytes

    def _try(self, length: int) -> MemoryPlan | None:
        """A plan in which one sequence of `length` tokens fits, or None."""
        needs = self._needs(length)
        pool = self._pool_bytes(needs)
        num_blocks = max(pool, 0) // self.block_bytes
        if num_blocks - 1 < blocks_for(self.shape, length, self.config.block_size, self._tokens(length)):
            return None
        return self._made(length, needs, num_blocks)

    def _made(self, length: int, needs: _Needs, num_blocks: int) -> MemoryPlan:
        return MemoryPlan(
            weights=self.weights, kv=num_blocks * self.block_bytes, workspace=needs.workspace, logits=needs.logits,
            sampler=needs.sampler, context=self.context, graphs=self.graphs, reserve=self.reserve, budget=self.budget,
            num_blocks=num_blocks, block_size=self.config.block_size, max_model_len=length,
            max_num_batched_tokens=self._tokens(length),
        )  # fmt: skip

    def _largest(self, low: int, high: int) -> int:
        """The longest context that fits, a whole number of blocks where possible; 0 when not even `low` does."""
        if self._try(low) is None:
            return 0
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (low, middle - 1) if self._try(middle) is None else (middle, high)
        whole = low // self.config.block_size * self.config.block_size
        return whole if whole >= min(LEAST_CONTEXT, self.shape.max_position) else low

    def _refusal(self, length: int, best: int) -> OutOfMemoryError:
        needs = self._needs(length)
        where = "GPU" if self.device.kind == "cuda" else "host"
        fixed = self.weights + needs.total + self.graphs
        if self._asked_pool() is None and fixed >= self.budget:
            return OutOfMemoryError(
                f"the weights ({gib(self.weights)}) and a step's workspace ({gib(needs.total + self.graphs)}) need "
                f"{gib(fixed)}, and the budget is {gib(max(self.budget, 0))} of {gib(self.device.total_bytes)} {where} "
                f"memory ({gib(self.device.free_bytes)} free); use a smaller model, a lower --max-num-seqs or a lower "
                "--max-num-batched-tokens",
                param="model",
            )
        needed = (blocks_for(self.shape, length, self.config.block_size, self._tokens(length)) + 1) * self.block_bytes
        text = f"one sequence of {length} tokens needs {gib(needed)} of KV cache"
        asked = self._asked_pool()
        if asked is not None:
            text += f" and {gib(asked)} was asked for, with {gib(max(self.free - fixed, 0))} free beside the weights"
        else:
            text += f" and {gib(max(self._pool_bytes(needs), 0))} is left for it"
        text += f"; the longest context that fits is --max-model-len {best}" if best else "; no context fits"
        return OutOfMemoryError(text, param="max_model_len")
