"""Will it fit, how much context for how many, in which form, how fast: the plan that `ws serve` obeys, read aloud. No torch.

Everything here is arithmetic on a ModelShape, an EngineConfig and a card: `memory.plan_memory` is asked again for each
context, form and KV width, so that an estimate cannot differ from what the engine will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from workstation.architecture import ModelShape
from workstation.config import EngineConfig
from workstation.errors import ConfigError, OutOfMemoryError
from workstation.estimate_model import AT_LOAD, EstimatedModel, Weights
from workstation.estimate_speed import Speed, decode_seconds, prompt_seconds
from workstation.measurements import Basis
from workstation.memory import DeviceMemory, MemoryPlan, blocks_for, gib, least_plan, plan_memory

DTYPE_BYTES = 2
KV_BYTES = {"auto": 2, "fp8": 1}
JSON_VERSION = 1
CONTEXTS = tuple(1 << power for power in range(11, 21))
PROMPT_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Machine:
    """The card an estimate is for.

    Attributes:
        memory: as the plan takes it.  source: where the total comes from.
        bandwidth: bytes/s; dense16, dense8: FLOP/s; None when unknown.
    """

    name: str
    memory: DeviceMemory
    source: str
    bandwidth: float | None = None
    dense16: float | None = None
    dense8: float | None = None

    def speed(self, form: str) -> Speed | None:
        """What a form of weights runs at here; without FP8 units FP8 weights meet 16-bit activations."""
        if self.bandwidth is None:
            return None
        return Speed(self.bandwidth, self.dense8 if form == "fp8" and self.dense8 else self.dense16, self.dense16)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked. `config.max_model_len` is the context asked for, None for as much as fits.

    Attributes:
        concurrency: requests of that context at once.  kv_cache_dtype: "auto" (16-bit) or "fp8".
        ranks: cards that share every layer; figures are for one of them.
    """

    config: EngineConfig
    weights: Weights
    kv_cache_dtype: str = "auto"
    concurrency: int = 1
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether one form fits: how many requests of the context at once, the longest context of one, or bytes short."""

    form: str
    weight_bytes: int
    kv_cache_dtype: str
    served: bool
    fits: bool
    longest_context: int
    kv_tokens: int
    short_bytes: int


@dataclass(frozen=True, slots=True)
class Frontier:
    """How many sequences of `context` tokens the pool holds at once, by KV width; 0: not even one."""

    context: int
    auto: int
    fp8: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted, not measured: one stream and `rows` streams at `context` tokens, and the first token of a prompt."""

    context: int
    rows: int
    decode_tokens_per_s: float
    decode_tokens_per_s_all: float
    prompt_tokens: int
    time_to_first_token_s: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """All an estimate says; `plan` is what one request would need when `fit.fits` is false.

    measured: what the prediction was carried over from; None when it is the card's table.
    """

    model: EstimatedModel
    machine: Machine
    question: Question
    plan: MemoryPlan
    fit: Fit
    frontier: tuple[Frontier, ...]
    forms: tuple[Fit, ...]
    prediction: Prediction | None
    measured: Basis | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        shape = shard(self.model.shape, self.question.ranks)
        return kv_bytes_per_token(shape, KV_BYTES[self.question.kv_cache_dtype])

    def as_dict(self) -> dict[str, Any]:
        """The estimate as JSON, documented in docs/estimate.md; bytes and tokens are integers."""
        plan, memory = self.plan, self.machine.memory
        return {
            "version": JSON_VERSION, "model": self.model.name, "parameters": self.model.shape.num_parameters,
            "gpu": {"name": self.machine.name, "total_bytes": memory.total_bytes, "free_bytes": memory.free_bytes,
                    "source": self.machine.source},
            "weights": {"form": self.question.weights.name, "bytes": self.fit.weight_bytes,
                        "source": self.question.weights.source},
            "kv_cache_dtype": self.question.kv_cache_dtype, "kv_bytes_per_token": self.kv_bytes_per_token,
            "concurrency": self.question.concurrency, "tensor_parallel_size": self.question.ranks,
            "fits": self.fit.fits, "served": is_served(self), "short_bytes": self.fit.short_bytes,
            "max_model_len": plan.max_model_len, "kv_tokens": plan.kv_tokens, "plan": plan.as_dict(),
            "longest_context": {name: longest(self, name) for name in KV_BYTES},
            "frontier": [asdict(row) for row in self.frontier], "quantizations": [asdict(row) for row in self.forms],
            "prediction": asdict(self.prediction) if self.prediction else None,
            "measured": self.measured.as_dict() if self.measured else None, "verdict": verdict(self),
            "advice": advice(self),
        }  # fmt: skip


def kv_bytes_per_token(shape: ModelShape, kv_dtype_bytes: int) -> int:
    """Bytes of KV a token takes in the layers that keep all tokens, or in all layers when each of them slides."""
    full = sum(len(group.layers) for group in shape.kv_groups if group.kind == "full")
    return (full or shape.num_layers) * 2 * shape.num_kv_heads * shape.head_dim * kv_dtype_bytes


def shard(shape: ModelShape, ranks: int) -> ModelShape:
    """One card's part when every layer is cut into `ranks`. Raises ConfigError when something does not divide."""
    for name in ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size"):
        if getattr(shape, name) % ranks:
            raise ConfigError(f"--tensor-parallel-size must divide the model's {name} ({getattr(shape, name)}), got {ranks}",
                              param="tensor_parallel_size")
    return shape if ranks == 1 else replace(
        shape, num_heads=shape.num_heads // ranks, num_kv_heads=shape.num_kv_heads // ranks,
        intermediate_size=shape.intermediate_size // ranks)


def estimate(model: EstimatedModel, machine: Machine, question: Question) -> Estimate:
    """Answer a question. Raises ConfigError for numbers that contradict each other or the model's window."""
    shape = shard(model.shape, question.ranks)
    weight = _share(question.weights, question.ranks)
    question = _with_context(shape, machine, question, weight)
    fit, plan = _fit(shape, machine, question, question.weights, weight)
    forms = []
    for form in model.others:
        for kv in KV_BYTES:
            asked = replace(question, weights=form, kv_cache_dtype=kv)
            forms.append(_fit(shape, machine, asked, form, _share(form, question.ranks))[0])
    rows = _frontier(shape, machine, question, weight)
    return Estimate(model, machine, question, plan, fit, rows, tuple(forms), _predict(shape, machine, question, plan, fit))


def _with_context(shape: ModelShape, machine: Machine, question: Question, weight: int) -> Question:
    """The question with the longest context at which its requests fit together, when it names none."""
    if question.config.max_model_len is not None or question.concurrency == 1:
        return question
    plan = _plan(shape, question.config, machine, weight, question.kv_cache_dtype, question.weights.scratch)
    if plan is None:
        return question
    size, low, high = plan.block_size, 0, plan.max_model_len // plan.block_size
    while low < high:
        middle = (low + high + 1) // 2
        count = _at_once(shape, machine, question, weight, middle * size, question.kv_cache_dtype)
        low, high = (middle, high) if count >= question.concurrency else (low, middle - 1)
    return replace(question, config=replace(question.config, max_model_len=low * size)) if low else question


def _share(weights: Weights, ranks: int) -> int:
    return -(-weights.nbytes // ranks)


def _plan(
    shape: ModelShape, config: EngineConfig, machine: Machine, weight: int, kv_cache_dtype: str, scratch: int,
) -> MemoryPlan | None:
    try:
        return plan_memory(shape, config, weight, machine.memory, dtype_bytes=DTYPE_BYTES,
                           kv_dtype_bytes=KV_BYTES[kv_cache_dtype], scratch_bytes=scratch)
    except OutOfMemoryError:
        return None


def _fit(
    shape: ModelShape, machine: Machine, question: Question, form: Weights, weight: int,
) -> tuple[Fit, MemoryPlan]:
    """Whether the question's context and concurrency fit, and the plan (of one request, when they do not)."""
    config, kv = question.config, question.kv_cache_dtype
    plan = _plan(shape, config, machine, weight, kv, form.scratch)
    free = replace(config, max_model_len=None)
    open_plan = plan if config.max_model_len is None else _plan(shape, free, machine, weight, kv, form.scratch)
    least = least_plan(shape, config, weight, machine.memory, dtype_bytes=DTYPE_BYTES, kv_dtype_bytes=KV_BYTES[kv],
                       scratch_bytes=form.scratch)
    wanted = least if plan is None or config.max_model_len is not None else plan
    blocks = blocks_for(shape, wanted.max_model_len, wanted.block_size, wanted.max_num_batched_tokens)
    needed = (question.concurrency * blocks + 1) * shape.kv_bytes_per_block(wanted.block_size, KV_BYTES[kv])
    short = wanted.total - wanted.context - wanted.kv + needed - wanted.budget
    fits = plan is not None and needed <= plan.kv
    longest = open_plan.max_model_len if open_plan else 0
    made = Fit(form.name, weight, kv, form.served and question.ranks == 1, fits, longest,
               plan.kv_tokens if plan else 0, 0 if fits else max(short, 1))
    return made, plan or least


def _frontier(shape: ModelShape, machine: Machine, question: Question, weight: int) -> tuple[Frontier, ...]:
    contexts = [length for length in CONTEXTS if length < shape.max_position] + [shape.max_position]
    asked = question.config.max_model_len
    return tuple(Frontier(context, *(_at_once(shape, machine, question, weight, context, kv) for kv in KV_BYTES))
                 for context in sorted({*contexts, *([asked] if asked else [])}))


def _at_once(shape: ModelShape, machine: Machine, question: Question, weight: int, context: int, kv: str) -> int:
    plan = _plan(shape, replace(question.config, max_model_len=context), machine, weight, kv, question.weights.scratch)
    if plan is None:
        return 0
    return (plan.num_blocks - 1) // blocks_for(shape, context, plan.block_size, plan.max_num_batched_tokens)


def _predict(shape: ModelShape, machine: Machine, question: Question, plan: MemoryPlan, fit: Fit) -> Prediction | None:
    speed = machine.speed(question.weights.name)
    if speed is None or not fit.fits or question.ranks > 1:
        return None
    context = min(plan.max_model_len, question.config.max_model_len or PROMPT_TOKENS)
    prompt = min(context, PROMPT_TOKENS)
    kv = KV_BYTES[question.kv_cache_dtype]
    rows = question.concurrency
    one, all_rows = (decode_seconds(shape, fit.weight_bytes, speed, rows=count, context=context, kv_dtype_bytes=kv)
                     for count in (1, rows))
    return Prediction(context, rows, 1 / one, rows / all_rows, prompt,
                      prompt_seconds(shape, fit.weight_bytes, speed, prompt))


def longest(found: Estimate, kv_cache_dtype: str) -> int:
    """The longest context of one request with the asked weights; 0 when none fits."""
    question = replace(found.question, config=replace(found.question.config, max_model_len=None), concurrency=1,
                       kv_cache_dtype=kv_cache_dtype)
    shape = shard(found.model.shape, question.ranks)
    plan = _plan(shape, question.config, found.machine, found.fit.weight_bytes, kv_cache_dtype, question.weights.scratch)
    return plan.max_model_len if plan else 0


def is_served(found: Estimate) -> bool:
    """Whether this version of `ws serve` can do what was asked."""
    needs = found.model.entry.needs if found.model.entry else ""
    return found.fit.served and not needs


def verdict(found: Estimate) -> str:
    """The answer in one sentence."""
    fit, plan, asked = found.fit, found.plan, found.question
    what = f"{found.model.name} in {fit.form}" if fit.form != "16-bit" else f"{found.model.name} in 16-bit"
    where = found.machine.name if asked.ranks == 1 else f"{asked.ranks} × {found.machine.name}"
    count = f"{asked.concurrency} requests" if asked.concurrency > 1 else "one request"
    load = f"{count} of {plan.max_model_len:,} tokens"
    if not fit.fits:
        return f"{what} does not fit on {where}: for {load} it is {gib(fit.short_bytes)} short."
    end = "" if is_served(found) else "; this version does not serve it yet"
    return (f"{what} fits on {where}: {gib(fit.weight_bytes)} of weights leave {gib(plan.kv)} of KV cache, "
            f"{plan.kv_tokens:,} tokens, enough for {load}{end}.")


def advice(found: Estimate) -> list[str]:
    """What to change, nearest first; empty when all fits and nothing is gained."""
    if found.fit.fits:
        return []
    lines = [*_shorter(found), *_smaller(found.forms, found.fit)]
    if lines:
        return lines
    least = min(found.forms, key=lambda form: form.short_bytes)
    return [f"no form of it fits this card: {least.form} with {least.kv_cache_dtype} KV is {gib(least.short_bytes)} short; "
            "take a smaller model or a larger card"]


def _shorter(found: Estimate) -> list[str]:
    if found.fit.longest_context and (found.question.config.max_model_len or 0) > found.fit.longest_context:
        return [f"--context {found.fit.longest_context} is the longest that fits one request"]
    if found.fit.longest_context and found.question.concurrency > 1:
        context = found.plan.max_model_len
        row = next((row for row in found.frontier if row.context >= context), None)
        count = getattr(row, found.question.kv_cache_dtype) if row else 0
        return [f"--concurrency {count} fits at {row.context:,} tokens"] if row and count else []
    return []


def _smaller(forms: Sequence[Fit], fit: Fit) -> list[str]:
    better = [form for form in forms if form.fits and (form.form, form.kv_cache_dtype) != (fit.form, fit.kv_cache_dtype)]
    lines = []
    for form in sorted(better, key=lambda form: (not form.served, -form.weight_bytes, form.kv_cache_dtype != "auto"))[:2]:
        kv = " with --kv-cache-dtype fp8" if form.kv_cache_dtype == "fp8" else ""
        later = "" if form.served else " (this version does not serve it yet)"
        how = f"--quantization {form.form}" if form.form in AT_LOAD else f"a checkpoint in {form.form}"
        lines.append(f"{how}{kv} fits: {gib(form.weight_bytes)} of weights, "
                     f"one request up to {form.longest_context:,} tokens{later}")
    return lines
