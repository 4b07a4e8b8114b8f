"""The values that 4-bit codes stand for, by code. No torch: the memory plan names them too."""

from __future__ import annotations

from enum import StrEnum

Table = tuple[float, ...]  # 16 float32 values
CHUNK = 128  # columns: what 32 words of 16 bits hold

# Quantiles of a normal distribution, zero among them (arXiv:2305.14314, appendix E).
NF4: Table = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# bitsandbytes' own 4-bit float: multiples of 1/12, and the sign in bit 3.
_FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
FP4: Table = (*_FP4, *(-value for value in _FP4))
# Sign, two bits of exponent, one of mantissa (OCP Microscaling formats 1.0, section 5.3.3).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1: Table = (*_E2M1, *(-value for value in _E2M1))


class ScaleKind(StrEnum):
    """What a scale is: as safetensors names the type it is stored in."""

    F32 = "F32"
    E4M3 = "F8_E4M3"  # 1 sign, 4 exponent, 3 mantissa bits
    E8M0 = "F8_E8M0"  # 2^(byte − 127)

    @property
    def nbytes(self) -> int:
        return 4 if self is ScaleKind.F32 else 1


def kept_groups(size: int, columns: int) -> int:
    """Groups of a row that are kept: whole chunks of them where a chunk has several."""
    return -(-columns // CHUNK) * (CHUNK // size) if size < CHUNK and CHUNK % size == 0 else columns // size
