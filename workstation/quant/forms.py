"""The forms a weight may take on the device, which layer has which, and the bytes that makes. No torch.

A form says how a matrix W [N, K] is kept; a checkpoint's formats are many, the forms are few:

    dense        w                                             16- or 32-bit, the model's dtype
    fp8_channel  w[n, k] = q[n, k] · scale[n]                  q float8_e4m3fn, scale [N] float32
    fp8_block    w[n, k] = q[n, k] · scale[n // 128, k // 128] q float8_e4m3fn, scale [⌈N/128⌉, ⌈K/128⌉] float32
    int4, int8   w[n, k] = (q[n, k] − z[g, n]) · scale[g, n]   g the group of column k: see `integers.py`
    nf4, fp4, mxfp4, nvfp4    w[n, k] = table[q[n, k]] · scale[n, g] · factor[n]                see `codes.py`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod

from workstation.architecture import ModelShape
from workstation.quant.codes import Blocks, CodePacking, Codes
from workstation.quant.integers import Groups, Packing

BLOCK = 128
SCRATCH_BYTES = 64 << 20  # of weights that are widened at a time, in the activations' type
HEAD_MODULE = "lm_head"


class Form(StrEnum):
    DENSE = "dense"
    FP8_CHANNEL = "fp8_channel"
    FP8_BLOCK = "fp8_block"
    INT4 = "int4"
    INT8 = "int8"
    NF4 = "nf4"
    FP4 = "fp4"
    MXFP4 = "mxfp4"
    NVFP4 = "nvfp4"


class Granularity(StrEnum):
    """What one stored scale covers: the whole matrix, a row, or 128 × 128 elements."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    BLOCK = "block"

    def stored_shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        """The shapes in which checkpoints store the scales of a [rows, columns] matrix."""
        if self is Granularity.TENSOR:
            return (), (1,), (1, 1)
        if self is Granularity.CHANNEL:
            return (rows, 1), (rows,)
        down, across = scale_grid(rows, columns)
        return (down, across), (down, 1, across, 1)


@dataclass(frozen=True, slots=True)
class Activations:
    """What meets an FP8 weight in the product.

    Attributes:
        quantised: activations may be rounded to FP8, each token by its own largest value; else they stay 16-bit.
        bound: the largest value a token's scale may come from, None for no limit (FBGEMM's `activation_scale_ub`).
    """

    quantised: bool = True
    bound: float | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """How one linear layer of the checkpoint is stored, and what it becomes. The default is a plain dense layer.

    Attributes:
        scale_name: the stored scales' tensor, "" when there is none.  granularity: what each of them covers.
        scale_dtypes: what the scales may be stored in.
        at_load: the stored weight is 16- or 32-bit and is quantised while it is loaded.
        groups, packing: of integers and 4-bit codes: what is kept, and how the checkpoint stores it.
        blocks: what bitsandbytes' scales cover.
    """

    form: Form = Form.DENSE
    scale_name: str = ""
    granularity: Granularity = Granularity.CHANNEL
    activations: Activations = field(default_factory=Activations)
    scale_dtypes: tuple[str, ...] = ("F32", "BF16", "F16")
    at_load: bool = False
    groups: Groups | Codes | None = None
    packing: Packing | CodePacking | None = None
    blocks: Blocks | None = None


@dataclass(frozen=True, slots=True)
class FusedLinear:
    """A linear layer of ours and the checkpoint's layers whose rows it stacks: (module name, rows) in order."""

    parts: tuple[tuple[str, int], ...]
    in_features: int
    bias: bool = False

    @property
    def out_features(self) -> int:
        return sum(rows for _, rows in self.parts)


@dataclass(frozen=True, slots=True)
class LayerLinears:
    """The four fused layers of a decoder layer. Module names are those of transformers' `…ForCausalLM`."""

    qkv: FusedLinear
    o: FusedLinear
    gate_up: FusedLinear
    down: FusedLinear

    def __iter__(self) -> Iterator[FusedLinear]:
        return iter((self.qkv, self.o, self.gate_up, self.down))


def layer_linears(shape: ModelShape, layer: int) -> LayerLinears:
    """The linear layers of decoder layer `layer`."""
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden, ffn = shape.hidden_size, shape.intermediate_size

    def fused(block: str, in_features: int, bias: bool, **rows: int) -> FusedLinear:
        parts = tuple((f"model.layers.{layer}.{block}.{name}", count) for name, count in rows.items())
        return FusedLinear(parts, in_features, bias)

    return LayerLinears(
        fused("self_attn", hidden, shape.qkv_bias, q_proj=q_size, k_proj=kv_size, v_proj=kv_size),
        fused("self_attn", q_size, shape.o_bias, o_proj=hidden),
        fused("mlp", hidden, shape.mlp_bias, gate_proj=ffn, up_proj=ffn),
        fused("mlp", ffn, shape.mlp_bias, down_proj=hidden),
    )


def head_linear(shape: ModelShape) -> FusedLinear:
    """The output head; a layer of its own only when the embeddings are not tied."""
    return FusedLinear(((HEAD_MODULE, shape.vocab_size),), shape.hidden_size)


def all_linears(shape: ModelShape) -> Iterator[FusedLinear]:
    """Every layer with weights of its own, the head last."""
    for layer in range(shape.num_layers):
        yield from layer_linears(shape, layer)
    if not shape.tie_embeddings:
        yield head_linear(shape)


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring parts of a fused layer that share one form, and so one tensor."""

    linear: FusedLinear
    form: Form
    activations: Activations
    groups: Groups | Codes | None = None


@dataclass(frozen=True, slots=True)
class WeightForms:
    """The form of every linear layer of one model.

    Attributes:
        parts: by the checkpoint's module name; a module that is absent is dense.
        unused: stored tensors that the method writes and this server does not need (static activation scales, …).
        method: the checkpoint format, or what 16-bit weights are quantised to while loading; "" for plain weights.
    """

    parts: Mapping[str, Part] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    method: str = ""

    def part(self, module: str) -> Part:
        return self.parts.get(module, PLAIN)

    @property
    def name(self) -> str:
        """What most quantised layers are, for a person: "fp8", "int4 gptq"; "" for plain weights."""
        counts = Counter(part.form for part in self.parts.values() if part.form is not Form.DENSE)
        if not counts:
            return ""
        form = counts.most_common(1)[0][0].value.partition("_")[0]
        return self.method if form in self.method else f"{form} {self.method}".rstrip()

    def segments(self, linear: FusedLinear) -> tuple[Segment, ...]:
        """Cut a fused layer where the form changes, and where a 128-row block of scales would span two parts."""
        runs: list[list[tuple[str, int]]] = []
        last = PLAIN
        for name, rows in linear.parts:
            part = self.part(name)
            same = bool(runs) and _kind(part) == _kind(last)
            if same and part.form is Form.FP8_BLOCK:
                same = sum(count for _, count in runs[-1]) % BLOCK == 0
            if same:
                runs[-1].append((name, rows))
            else:
                runs.append([(name, rows)])
            last = part
        kinds = [self.part(run[0][0]) for run in runs]
        return tuple(Segment(FusedLinear(tuple(run), linear.in_features, linear.bias), *_kind(kind))
                     for run, kind in zip(runs, kinds, strict=True))


PLAIN = Part()


def _kind(part: Part) -> tuple[Form, Activations, Groups | Codes | None]:
    """What parts in one tensor have in common."""
    return part.form, part.activations, part.groups


def scale_grid(rows: int, columns: int) -> tuple[int, int]:
    """The shape of 128 × 128 block scales; the last block of a row or column may be partial."""
    return -(-rows // BLOCK), -(-columns // BLOCK)


def weight_bytes(shape: ModelShape, dtype_bytes: int, quant: WeightForms | None = None) -> int:
    """Bytes of all parameters as they lie on the device (the rotary table is workspace).

    Args:
        dtype_bytes: of an element of what is not quantised.  quant: the layers' forms; None means all dense.
    """
    forms = quant or WeightForms()
    linears = sum(_segment_bytes(segment, dtype_bytes) for linear in all_linears(shape)
                  for segment in forms.segments(linear))
    norms = shape.num_layers * (2 * shape.hidden_size + 2 * shape.head_dim * shape.qk_norm) + shape.hidden_size
    return linears + (norms + shape.vocab_size * shape.hidden_size) * dtype_bytes


def scratch_bytes(shape: ModelShape, dtype_bytes: int, quant: WeightForms) -> int:
    """Bytes that products of many rows take to widen integers and codes, a part of a matrix at a time."""
    sizes = [segment.linear.out_features * segment.linear.in_features * dtype_bytes for linear in all_linears(shape)
             for segment in quant.segments(linear) if segment.groups is not None]
    return min(max(sizes, default=0), SCRATCH_BYTES)


def _segment_bytes(segment: Segment, dtype_bytes: int) -> int:
    rows, columns = segment.linear.out_features, segment.linear.in_features
    bias = rows * segment.linear.bias * dtype_bytes
    if segment.form is Form.DENSE:
        return rows * columns * dtype_bytes + bias
    if segment.groups is not None:
        return segment.groups.nbytes(rows, columns) + bias
    scales = rows if segment.form is Form.FP8_CHANNEL else prod(scale_grid(rows, columns))
    return rows * columns + 4 * scales + bias
