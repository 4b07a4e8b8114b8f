"""Runs a script with the dummy weights that vLLM draws: `python benchmarks/peer_weights.py SCRIPT [ARGUMENTS …]`.

vLLM's `load_format="dummy"` fills every tensor of floats uniformly from ±1e-3, FP8 ones by way of float16, and leaves integers
as they are allocated. The least e4m3 number is 2⁻⁹, so 98 of 100 FP8 weights become zero, and keys and values with them. A GPU
at its power limit multiplies zeros faster than numbers, hence figures of two engines compare only with equal weights; ours are
spread as those of a trained model are. Engines of this process only.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from workstation.kernels.int_weights import IntWeight
from workstation.model import loader
from workstation.model.linear import Linear
from workstation.model.linear_forms import pieces
from workstation.model.transformer import Decoder

LIMIT = 1e-3
PIECE = 1 << 26  # elements that pass through float16 at a time


def fill(decoder: Decoder, seed: int) -> None:
    """In place of `loader.fill_random`."""
    generator = torch.Generator(decoder.device).manual_seed(seed)
    for tensor in (decoder.embedding, *decoder.norms()):
        _uniform(tensor, generator)
    for linear in decoder.linears():
        for piece in pieces(linear):
            for tensor in _tensors(piece):
                _uniform(tensor, generator)


def _tensors(linear: Linear) -> Iterator[torch.Tensor]:
    names = {name for kind in type(linear).__mro__ for name in getattr(kind, "__slots__", ())}
    for value in (getattr(linear, name, None) for name in sorted(names)):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, IntWeight):
            yield from (value.words, value.scale)


def _uniform(tensor: torch.Tensor, generator: torch.Generator) -> None:
    if not tensor.is_floating_point():
        tensor.zero_()  # fresh memory of the driver's
    elif tensor.itemsize > 1:
        tensor.uniform_(-LIMIT, LIMIT, generator=generator)
    else:
        for part in tensor.view(-1).split(PIECE):  # type: ignore[no-untyped-call]
            half = torch.empty(part.shape, dtype=torch.float16, device=part.device)
            part.copy_(half.uniform_(-LIMIT, LIMIT, generator=generator).to(part.dtype))


if __name__ == "__main__":
    loader.fill_random = fill
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
