"""Which tensor of a checkpoint goes where in a Decoder. Names are those of transformers' `…ForCausalLM`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from workstation.architecture import ModelShape
from workstation.model.linear import DenseLinear, Linear
from workstation.model.linear_codes import CodeLinear
from workstation.model.linear_forms import pieces
from workstation.model.linear_fp8 import Fp8BlockLinear, Fp8ChannelLinear, Fp8Linear
from workstation.model.linear_int import IntLinear
from workstation.model.targets import Copied, CopiedFp8, CopiedScale, Quantised, SpreadScale, Target
from workstation.model.targets_codes import (
    Absmax,
    ByteScales,
    Factor,
    NestedAbsmax,
    QuantisedCodes,
    StoredCodes,
    storage_shapes,
)
from workstation.model.targets_int import GroupScales, GroupZeros, PackedCodes, QuantisedGroups, SignedCodes
from workstation.model.transformer import Decoder
from workstation.quant.code_layers import NESTED_SCALE, NESTED_TABLE
from workstation.quant.codes import CODE_TENSORS, CodePacking
from workstation.quant.forms import BLOCK, FusedLinear, Granularity, Part, WeightForms, head_linear, layer_linears
from workstation.quant.integers import NAMES, SIGNED, Packing, stored_shapes

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FP8_DTYPES = ("F8_E4M3",)

Targets = Iterator[tuple[str, Target]]


def destinations(decoder: Decoder) -> dict[str, torch.Tensor]:
    """Every tensor a checkpoint must hold, by name: the (part of a fused) weight it fills, as a contiguous view."""
    return {name: target.tensor for name, target in targets(decoder).items()}


def targets(decoder: Decoder) -> dict[str, Target]:
    """Every tensor a checkpoint must hold, by name: the place it fills, and what may be stored for it."""
    shape, forms = decoder.shape, decoder.forms
    table: dict[str, Target] = {EMBEDDING: Copied(decoder.embedding), "model.norm.weight": Copied(decoder.final_norm)}
    for number, layer in enumerate(decoder.layers):
        prefix, attention = f"model.layers.{number}.", layer.attention
        table[prefix + "input_layernorm.weight"] = Copied(layer.attention_norm)
        table[prefix + "post_attention_layernorm.weight"] = Copied(layer.mlp_norm)
        if attention.q_norm is not None and attention.k_norm is not None:
            table[prefix + "self_attn.q_norm.weight"] = Copied(attention.q_norm)
            table[prefix + "self_attn.k_norm.weight"] = Copied(attention.k_norm)
        ours = (attention.qkv, attention.o, layer.gate_up, layer.down)
        for linear, fused in zip(ours, layer_linears(shape, number), strict=True):
            table.update(_linear(linear, fused, forms))
    if not shape.tie_embeddings:
        table.update(_linear(decoder.head, head_linear(shape), forms))
    return table


def is_surplus(name: str, shape: ModelShape) -> bool:
    """Tensors that old or careless exporters add and that hold nothing of their own."""
    return name.endswith("rotary_emb.inv_freq") or (shape.tie_embeddings and name == HEAD)


def _linear(linear: Linear, fused: FusedLinear, forms: WeightForms) -> Targets:
    for segment, piece in zip(forms.segments(fused), pieces(linear), strict=True):
        start = 0
        for name, count in segment.linear.parts:
            yield from _part(name, slice(start, start + count), piece, forms.part(name))
            start += count


def _part(name: str, rows: slice, linear: Linear, part: Part) -> Targets:
    """The named row range of a layer's weight, of its scales and of its bias."""
    if isinstance(linear, DenseLinear):
        yield f"{name}.weight", Copied(linear.weight[rows])
    elif isinstance(linear, Fp8Linear):
        yield from _fp8(name, rows, linear, part)
    elif isinstance(linear, IntLinear):
        yield from _integers(name, rows, linear, part)
    elif isinstance(linear, CodeLinear):
        yield from code_targets(name, rows, linear, part)
    else:
        raise TypeError(f"weights are loaded before they are packed, not into {type(linear).__name__}")
    if linear.bias is not None:
        yield f"{name}.bias", Copied(linear.bias[rows])


def _fp8(name: str, rows: slice, linear: Fp8Linear, part: Part) -> Targets:
    weight = linear.weight[rows]
    if part.at_load:
        yield f"{name}.weight", Quantised(weight, linear.scale[rows])
        return
    yield f"{name}.weight", CopiedFp8(weight, dtypes=FP8_DTYPES)
    shapes = part.granularity.stored_shapes(*weight.shape)
    if isinstance(linear, Fp8BlockLinear):
        # A part that does not begin at a block of 128 rows is a segment of its own (`WeightForms.segments`).
        scale = linear.scale[rows.start // BLOCK:-(-rows.stop // BLOCK)]
        yield part.scale_name, CopiedScale(scale, shapes, part.scale_dtypes)
    elif isinstance(linear, Fp8ChannelLinear) and part.granularity is Granularity.TENSOR:
        yield part.scale_name, SpreadScale(linear.scale[rows], shapes, part.scale_dtypes)
    else:
        yield part.scale_name, CopiedScale(linear.scale[rows], shapes, part.scale_dtypes)


def _integers(name: str, rows: slice, linear: IntLinear, part: Part) -> Targets:
    weight, count = linear.weight.part(rows.start, rows.stop), rows.stop - rows.start
    bits, columns = weight.bits, weight.columns
    if not isinstance(part.packing, Packing):
        yield f"{name}.weight", QuantisedGroups(weight.words, weight.scale, bits, columns)
        return
    names = NAMES[part.packing]
    shapes = stored_shapes(part.packing, bits, count, columns, weight.scale.shape[0])
    if part.packing in SIGNED:
        yield f"{name}.{names.codes}", SignedCodes(weight.words, shapes[names.codes])
    else:
        yield f"{name}.{names.codes}", PackedCodes(weight.words, shapes[names.codes], part.packing, bits, columns, linear.order)
    yield part.scale_name, GroupScales(weight.scale, (shapes[names.scale],), part.scale_dtypes, part.packing)
    if weight.zero is not None:
        yield f"{name}.{names.zero}", GroupZeros(weight.zero, shapes[names.zero], part.packing, bits, count)


def code_targets(name: str, rows: slice, linear: CodeLinear, part: Part) -> Targets:
    """The named row range of a layer of 4-bit codes: its codes, scales and factor, as its checkpoint stores them."""
    weight, count = linear.weight.part(rows.start, rows.stop), rows.stop - rows.start
    columns = weight.columns
    if not isinstance(part.packing, CodePacking):
        yield f"{name}.weight", QuantisedCodes(weight)
        return
    names = CODE_TENSORS[part.packing]
    if part.blocks is not None:
        shapes, dtypes = storage_shapes(count * columns)
        yield f"{name}.{names.codes}", StoredCodes(weight, shapes, dtypes, first_is_high=True)
        if not part.blocks.nested_size:
            yield part.scale_name, Absmax(weight, part.blocks)
            return
        nested = NestedAbsmax(weight, part.blocks)
        yield part.scale_name, nested.absmax
        yield f"{name}.{NESTED_SCALE}", nested.scale
        yield f"{name}.{NESTED_TABLE}", nested.table
        return
    yield f"{name}.{names.codes}", StoredCodes(weight, ((count, columns // 2),), ("U8",))
    yield part.scale_name, ByteScales(weight, part.scale_dtypes)
    if weight.factor is not None:
        yield f"{name}.{names.factor}", Factor(weight.factor, divides=weight.divides)
