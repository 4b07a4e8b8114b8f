"""NF4 layers against bitsandbytes' own: `PYTHONPATH=.:benchmarks python benchmarks/bitsandbytes_layers.py [--rows 1 8 32]`.

The four products of an 8B Llama layer, NF4 in groups of 64 with float32 scales, bf16 activations: `bitsandbytes.nn.Linear4bit`
and ours, each captured in a CUDA graph over as many weights as outrun the L2, on one machine in turns. Gate and up are one
matrix, and neither side multiplies them. Prints a JSON line a product, and the sums. Needs bitsandbytes and a GPU.
"""

from __future__ import annotations

import argparse
import json
from functools import partial

import bitsandbytes
import torch
from gemm_measure import Weights, time_graph

from workstation.kernels import ops
from workstation.kernels.tuning import Problem

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
REPEATS = 15


def theirs(n: int, k: int, count: int) -> list[bitsandbytes.nn.Linear4bit]:
    """Layers with random weights, quantised by the library as it puts them on the GPU."""
    made = []
    for _ in range(count):
        kind = {"compress_statistics": False, "quant_type": "nf4"}
        layer = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, **kind)
        layer.weight = bitsandbytes.nn.Params4bit(torch.randn(n, k, dtype=torch.bfloat16), requires_grad=False, **kind)
        made.append(layer.cuda())
    return made


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    arguments = parser.parse_args()
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    weights = Weights(l2, 1 << 27)
    sums = {rows: [0.0, 0.0] for rows in arguments.rows}
    for name, (n, k) in SHAPES.items():
        windows = weights.windows(Problem("nf4", "linear", 1, n, k))
        layers = theirs(n, k, len(windows))
        for rows in arguments.rows:
            x = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda")
            took = [time_graph([partial(layer, x) for layer in layers], REPEATS) / len(layers),
                    time_graph([partial(ops.linear_codes, x, weight) for weight in windows], REPEATS) / len(windows)]
            sums[rows] = [a + b for a, b in zip(sums[rows], took, strict=True)]
            print(json.dumps({"layer": name, "rows": rows, "bitsandbytes_us": round(took[0], 2), "ours_us": round(took[1], 2),
                              "ratio": round(took[0] / took[1], 2)}), flush=True)
        del layers
        torch.cuda.empty_cache()
    for rows, (other, own) in sums.items():
        print(json.dumps({"layer": "all four", "rows": rows, "bitsandbytes_us": round(other, 2), "ours_us": round(own, 2),
                          "ratio": round(other / own, 2)}), flush=True)


if __name__ == "__main__":
    main()
