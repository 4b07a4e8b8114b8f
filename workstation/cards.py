"""GPUs by name: memory as CUDA sees it, bandwidth and dense matrix rates, each row with where its figures come from.

Rates are dense (no 2:4 sparsity) and accumulate in float32, as the vendor's datasheet or architecture paper states them;
GeForce cards run that at half the rate of the same chip in a workstation card. Where CUDA's own total is not known, it is
derived from the memory the card is sold with (`SEEN_SHARE`), and `Card.is_derived` says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from workstation.errors import ConfigError
from workstation.memory import GIB

# What CUDA reports of the memory on the box. The smallest ratio among the rows below whose total is known:
# GDDR6 with error correction on gives a sixteenth to the codes (L40: 44.40 of 48), the rest loses about 2 %.
SEEN_SHARE, SEEN_SHARE_ECC = 0.98, 0.925


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU.

    Attributes:
        memory_gib: as sold.  seen_gib: the total CUDA reports, None where no report is at hand.
        bandwidth: bytes/s.  dense16, dense8: FLOP/s with 16-bit and FP8 operands; None: not stated, or no such hardware.
        fp8, fp4: the matrix units take such operands.  ecc: GDDR6 with error correction on as delivered.
        source: of bandwidth and rates.  seen_source: of `seen_gib`.
    """

    name: str
    title: str
    capability: tuple[int, int]
    memory_gib: int
    bandwidth: float
    dense16: float | None
    dense8: float | None
    source: str
    seen_gib: float | None = None
    seen_source: str = ""
    ecc: bool = False

    @property
    def fp8(self) -> bool:
        return self.capability >= (8, 9)

    @property
    def fp4(self) -> bool:
        return self.capability >= (10, 0)

    @property
    def is_derived(self) -> bool:
        return self.seen_gib is None

    @property
    def total_bytes(self) -> int:
        """What CUDA reports as the card's memory, or the derived figure."""
        seen = self.seen_gib
        return int((self.memory_gib * (SEEN_SHARE_ECC if self.ecc else SEEN_SHARE) if seen is None else seen) * GIB)


_OOM = "total capacity in PyTorch's out-of-memory message"
_GA102 = "NVIDIA Ampere GA102 whitepaper"
_ADA = "NVIDIA Ada GPU architecture whitepaper"
_RTX50 = "NVIDIA RTX Blackwell GPU architecture whitepaper"


def _card(
    name: str, title: str, capability: tuple[int, int], memory: int, gb_s: float, tera16: float | None, tera8: float | None,
    source: str, seen: float | None = None, seen_source: str = _OOM, *, ecc: bool = False,
) -> Card:  # fmt: skip
    """A row in the units of datasheets: GB/s and TFLOP/s."""
    return Card(
        name, title, capability, memory, gb_s * 1e9, tera16 and tera16 * 1e12, tera8 and tera8 * 1e12, source,
        seen, seen_source if seen else "", ecc,
    )  # fmt: skip


CARDS = (
    _card("rtx-3090", "GeForce RTX 3090", (8, 6), 24, 936, 71, None, _GA102),
    _card("rtx-3090-ti", "GeForce RTX 3090 Ti", (8, 6), 24, 1008, 80, None, "NVIDIA product page; " + _GA102),
    _card("rtx-4060-ti-16gb", "GeForce RTX 4060 Ti 16GB", (8, 9), 16, 288, None, None, "NVIDIA product page"),
    _card("rtx-4070-ti-super", "GeForce RTX 4070 Ti SUPER", (8, 9), 16, 672, None, None, "NVIDIA product page"),
    _card("rtx-4080", "GeForce RTX 4080", (8, 9), 16, 716.8, 97.5, 194.9, _ADA),
    _card("rtx-4080-super", "GeForce RTX 4080 SUPER", (8, 9), 16, 736, None, None, "NVIDIA product page"),
    _card("rtx-4090", "GeForce RTX 4090", (8, 9), 24, 1008, 165.2, 330.3, _ADA, 23.52, _OOM + ", vllm#42049"),
    _card("rtx-5070-ti", "GeForce RTX 5070 Ti", (12, 0), 16, 896, 87.9, 175.8, _RTX50),
    _card("rtx-5080", "GeForce RTX 5080", (12, 0), 16, 960, 112.6, 225.1, _RTX50),
    _card("rtx-5090", "GeForce RTX 5090", (12, 0), 32, 1792, 209.5, 419, _RTX50, 31.36, _OOM + ", TrajectoryCrafter#20"),
    _card("rtx-a5000", "RTX A5000", (8, 6), 24, 768, 111.1, None, _GA102),
    _card("rtx-a6000", "RTX A6000", (8, 6), 48, 768, 154.8, None, _GA102),
    _card("rtx-6000-ada", "RTX 6000 Ada Generation", (8, 9), 48, 960, 364.2, 728.5, _ADA),
    _card("rtx-pro-5000", "RTX PRO 5000 Blackwell", (12, 0), 48, 1344, None, None, "NVIDIA datasheet"),
    _card("rtx-pro-6000", "RTX PRO 6000 Blackwell", (12, 0), 96, 1792, 503.8, 1007.6,
          "NVIDIA RTX PRO Blackwell architecture whitepaper", 94.97),
    _card("a10", "A10", (8, 6), 24, 600, 125, None, "NVIDIA A10 datasheet", ecc=True),
    _card("a30", "A30", (8, 0), 24, 933, 165, None, "NVIDIA A30 datasheet"),
    _card("a40", "A40", (8, 6), 48, 696, 149.7, None, "NVIDIA A40 datasheet", ecc=True),
    _card("a100-40gb", "A100 40GB", (8, 0), 40, 1555, 312, None, "NVIDIA A100 datasheet"),
    _card("a100-80gb", "A100 SXM4 80GB", (8, 0), 80, 2039, 312, None, "NVIDIA A100 datasheet", 79.15),
    _card("l4", "L4", (8, 9), 24, 300, 121, 242, "NVIDIA L4 datasheet", ecc=True),
    _card("l20", "L20", (8, 9), 48, 864, 119.5, 239, "NVIDIA L20 product brief", ecc=True),
    _card("l40", "L40", (8, 9), 48, 864, 181, 362, "NVIDIA L40 datasheet", 44.40, _OOM + ", Qwen3-VL#2097", ecc=True),
    _card("l40s", "L40S", (8, 9), 48, 864, 362, 733, "NVIDIA L40S datasheet", ecc=True),
    _card("h20", "H20 96GB", (9, 0), 96, 4000, 148, 296, "NVIDIA H20 product brief"),
    _card("h100-pcie", "H100 PCIe", (9, 0), 80, 2000, 756, 1513, "NVIDIA H100 datasheet"),
    _card("h100", "H100 SXM5 80GB", (9, 0), 80, 3350, 989, 1979, "NVIDIA H100 datasheet", 79.11, _OOM + ", vllm#27508"),
    _card("h100-nvl", "H100 NVL", (9, 0), 94, 3900, 835, 1671, "NVIDIA H100 datasheet"),
    _card("h200", "H200 SXM 141GB", (9, 0), 141, 4800, 989, 1979, "NVIDIA H200 datasheet", 139.80),
    _card("b200", "B200 SXM", (10, 0), 180, 8000, 2250, 4500, "NVIDIA DGX B200 datasheet", 178.35),
)
BY_NAME = {card.name: card for card in CARDS}


def _plain(text: str) -> str:
    """A name as it is compared: lower case, without the maker, words joined by dashes."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-").split("-")
    return "-".join(word for word in words if word not in ("nvidia", "geforce", "generation", "blackwell", "tesla"))


def find_card(name: str) -> Card:
    """The card called `name`, in any usual spelling ("RTX 4090", "NVIDIA H200"). Raises ConfigError naming the nearest."""
    wanted = _plain(name)
    spellings = {_plain(card.title): card for card in CARDS} | BY_NAME
    if wanted in spellings:
        return spellings[wanted]
    near = get_close_matches(wanted, list(BY_NAME), 1, 0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"--gpu {name!r} is not a card ws knows; {hint}Known are {', '.join(BY_NAME)}; --vram 24G works for "
                      "any other", param="gpu")


def recognise(driver_name: str) -> Card | None:
    """The row for a card as its driver names it ("NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3"), or None."""
    plain = _plain(driver_name)
    if plain.startswith(("h100-80gb-hbm3", "h100-sxm")):
        return BY_NAME["h100"]
    if plain.startswith("a100"):
        return BY_NAME["a100-80gb" if "80gb" in plain else "a100-40gb"]
    if "laptop" in plain or "max-q" in plain:
        return None  # the same name on slower memory
    found = [card for card in CARDS for name in (card.name, _plain(card.title))
             if plain == name or plain.startswith(name + "-")]
    return max(found, key=lambda card: len(card.name), default=None)
