"""Writes `code_vectors.safetensors`: small matrices as the libraries that define the formats store them, and read them back.

Run by hand (`python tests/code_vectors.py`) where bitsandbytes and compressed-tensors are installed; tests read the file.
Every matrix `name` has its stored tensors as `name/…`, `name/meaning` (float32 from bitsandbytes, bfloat16 from
compressed-tensors) and `name/shape`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

VECTORS = Path(__file__).parent / "code_vectors.safetensors"
# name: (rows, columns, quant type, block size, nested, storage)
BNB = {
    "nf4": (24, 128, "nf4", 64, False, torch.uint8), "nf4_nested": (136, 128, "nf4", 64, True, torch.uint8),
    "fp4": (24, 128, "fp4", 64, False, torch.uint8), "fp4_nested_bf16": (24, 256, "fp4", 128, True, torch.bfloat16),
    "nf4_ragged": (5, 72, "nf4", 64, False, torch.uint8), "nf4_float32": (8, 96, "nf4", 32, False, torch.float32),
    "nf4_wide_blocks": (10, 128, "nf4", 512, True, torch.float16),
}  # fmt: skip


def weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) / columns**0.5


def bitsandbytes_vectors() -> dict[str, torch.Tensor]:
    from bitsandbytes import functional

    found = {}
    for name, (rows, columns, kind, block, nested, storage) in BNB.items():
        codes, state = functional.quantize_4bit(weight(rows, columns), blocksize=block, quant_type=kind,
                                                compress_statistics=nested, quant_storage=storage)
        found[f"{name}/weight"] = codes
        found |= {f"{name}/weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        found[f"{name}/meaning"] = functional.dequantize_4bit(codes, state)
        found[f"{name}/shape"] = torch.tensor((rows, columns))
    return found


def compressed_vectors() -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    found = {}
    for name, size, compressor in (("mxfp4", 32, MXFP4PackedCompressor), ("nvfp4", 16, NVFP4PackedCompressor)):
        rows, columns = 24, 160
        args = QuantizationArgs(num_bits=4, type="float", strategy="group" if size == 32 else "tensor_group", group_size=size,
                                symmetric=True, scale_dtype=torch.uint8 if size == 32 else torch.float8_e4m3fn)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        plain = weight(rows, columns)
        largest = plain.view(rows, -1, size).abs().amax(2) / 6
        stored = {"weight": plain}
        if size == 32:
            stored["weight_scale"] = 2.0 ** largest.log2().ceil()
        else:
            overall = 6 * 448 / plain.abs().max().reshape(1)
            stored |= {"weight_global_scale": overall, "weight_scale": (largest * overall).to(torch.float8_e4m3fn).float()}
        packed = compressor.compress(stored, scheme)
        found |= {f"{name}/{key}": value.contiguous() for key, value in packed.items()}
        found[f"{name}/meaning"] = compressor.decompress(packed, scheme)["weight"].contiguous()
        found[f"{name}/shape"] = torch.tensor((rows, columns))
    return found


if __name__ == "__main__":
    save_file(bitsandbytes_vectors() | compressed_vectors(), VECTORS)
