"""Runs the few PTX instructions of the decoders on arrays of 32-bit words, a thread each: what they compute, without a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch

Words = np.ndarray


def _prmt(a: Words, b: Words, selector: Words) -> Words:
    """Bytes of b:a picked by the selector's lowest four nibbles; none of them may ask for a sign (bit 3)."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    pool = np.stack([word >> np.uint32(8 * i) & np.uint32(255) for word in (a, b) for i in range(4)])
    found = np.zeros(a.shape, dtype=np.uint32)
    for place in range(4):
        index = selector >> np.uint32(4 * place) & np.uint32(15)
        assert (index < 8).all()
        found |= np.take_along_axis(pool, index[None].astype(np.int64), 0)[0] << np.uint32(8 * place)
    return found


def _lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    assert int(table) == 0xEA
    return a & b | c


def _fma(dtype: torch.dtype) -> Callable[..., Words]:
    """Two of them: the halves of words."""

    def halves(word: Words) -> torch.Tensor:
        pairs = np.array(word, dtype=np.uint32, ndmin=1)[:, None].view(np.int16)
        return torch.from_numpy(pairs.copy()).view(dtype).double()

    return lambda a, b, c: (halves(a) * halves(b) + halves(c)).to(dtype).view(torch.int16).numpy().view(np.uint32)[:, 0]


NO_MORE = np.uint32(0x80008000)  # two zeros that leave a zero's sign

OPERATIONS: dict[str, Callable[..., Words]] = {
    "mov.b32": lambda a: a, "and.b32": lambda a, b: a & b, "shl.b32": lambda a, b: a << b, "shr.b32": lambda a, b: a >> b,
    "mul.lo.u32": lambda a, b: a * b, "mad.lo.u32": lambda a, b, c: a * b + c, "xor.b32": lambda a, b: a ^ b,
    "prmt.b32": _prmt, "lop3.b32": _lop3, "fma.rn.bf16x2": _fma(torch.bfloat16), "fma.rn.f16x2": _fma(torch.float16),
    "mul.rn.bf16x2": lambda a, b: _fma(torch.bfloat16)(a, b, NO_MORE),
    "mul.rn.f16x2": lambda a, b: _fma(torch.float16)(a, b, NO_MORE),
}


def run(assembly: str, outputs: int, memory: Words | None = None, **inputs: Words) -> list[Words]:
    """The registers $0 … after the assembly. inputs: by name without the dollar, as `_4`.

    memory: shared memory, [words], which loads read and stores of four equal words change.
    """
    state = {name.replace("_", "$"): value for name, value in inputs.items()}

    def value(word: str) -> Words:
        return state[word] if word in state else np.uint32(int(word, 0))

    for line in re.split(r"[;\n]+|(?<!, )\{|(?<=\n)\}", assembly):
        words = line.strip(" }").replace(",", " ").split()
        if not words or words[0] == ".reg":
            continue
        operation, target, *sources = words
        if operation in ("ld.shared.b32", "st.shared.v4.b32"):
            assert memory is not None
            base, _, offset = (target if operation.startswith("st") else sources[0]).strip("[]").partition("+")
            at = (value(base) + np.uint32(offset or 0)) // np.uint32(4)
            if operation == "ld.shared.b32":
                state[target] = memory[at]
            else:
                stored = value(sources[0].strip("{"))
                for i in range(4):
                    memory[at + np.uint32(i)] = stored
            continue
        values = [value(word) for word in sources]
        state[target] = OPERATIONS[operation](*values)
    return [state[f"${i}"] for i in range(outputs)]
