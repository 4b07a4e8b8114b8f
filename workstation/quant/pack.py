"""A 16- or 32-bit weight → the tensors `written` names. What loading them gives is what quantising while loading gives."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from workstation.kernels.code_tables import kept_groups
from workstation.kernels.code_weights import CodeWeight, unpack_scales
from workstation.kernels.code_weights import unpack as unpack_codes
from workstation.kernels.int_weights import unpack
from workstation.quant.codes import Codes
from workstation.quant.forms import Part
from workstation.quant.integers import NAMES, Groups, Packing, words
from workstation.quant.quantise import FP8, quantise_groups, quantise_rows
from workstation.quant.quantise_codes import quantise_codes
from workstation.quant.written import STATE, quant_state

SCALE_NAMES = ("weight_scale", "weight.absmax")
SCALES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def quantised_tensors(module: str, weight: torch.Tensor, part: Part, dtype: str) -> dict[str, torch.Tensor]:
    """The stored tensors of one layer. weight: [N, K], stored as `dtype`. Raises ValueError where it is not finite."""
    made = _tensors(module, weight, part, dtype)
    for name in SCALE_NAMES:
        if (scale := made.get(f"{module}.{name}")) is not None and not scale.isfinite().all():
            raise ValueError("holds values that are not finite")
    return made


def _tensors(module: str, weight: torch.Tensor, part: Part, dtype: str) -> dict[str, torch.Tensor]:
    if isinstance(part.groups, Codes):
        return {f"{module}.{name}": tensor for name, tensor in _table_codes(weight, part.groups, dtype).items()}
    if isinstance(part.groups, Groups):
        return {f"{module}.{name}": tensor for name, tensor in _integers(weight, part.groups).items()}
    quantised = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    quantise_rows(weight, quantised, scale)
    return {f"{module}.weight": quantised, f"{module}.weight_scale": scale[:, None].bfloat16()}


def _integers(weight: torch.Tensor, groups: Groups) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    kept = torch.empty(rows, words(groups.bits, columns), dtype=torch.int16, device=weight.device)
    scale = torch.empty(groups.count(columns), rows, dtype=SCALES[groups.scale_dtype], device=weight.device)
    quantise_groups(weight, kept, scale, groups.bits)
    return integer_tensors(unpack(kept, groups.bits, columns), scale.t(), groups.bits)


def integer_tensors(codes: torch.Tensor, scale: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """The stored tensors by last name. codes: [N, K] uint8, unsigned.  scale: [N, G] of the stored dtype."""
    names = NAMES[Packing.PACKED]
    return {names.codes: packed_rows(codes, bits), names.scale: scale.contiguous(), "weight_shape": torch.tensor(codes.shape)}


def integer_weight(codes: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """What codes and scale of `integer_tensors` mean: [N, K] float32."""
    rows, columns = codes.shape
    signed = codes.float() - (1 << bits - 1)
    return (signed.view(rows, scale.shape[1], -1) * scale.float()[:, :, None]).view(rows, columns)


def _table_codes(weight: torch.Tensor, codes: Codes, dtype: str) -> dict[str, torch.Tensor]:
    (rows, columns), device = weight.shape, weight.device
    table = torch.tensor(codes.table, dtype=torch.float32, device=device)
    kept = CodeWeight(
        torch.empty(rows, words(4, columns), dtype=torch.int16, device=device),
        torch.empty(kept_groups(codes.size, columns), rows, dtype=torch.float32, device=device), None, table, codes.table,
        codes.scale, codes.size, columns)
    quantise_codes(weight, kept)
    flat = unpack_codes(kept.words, columns, kept.kind).reshape(-1)
    state = quant_state(codes, rows, columns, dtype)
    return {"weight": (flat[0::2] << 4 | flat[1::2])[:, None], "weight.absmax": unpack_scales(kept).flatten(),
            "weight.quant_map": table, STATE: torch.frombuffer(bytearray(state), dtype=torch.uint8)}


def packed_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes [N, K] uint8 → [N, ⌈K·bits/32⌉] int32, lowest bits first; a row is filled up with zeros."""
    filled = pad(codes, (0, -codes.shape[1] % (32 // bits)))
    if bits == 4:
        filled = filled[:, 0::2] | filled[:, 1::2] << 4
    return filled.contiguous().view(torch.int32)
