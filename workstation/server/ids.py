"""Identifiers of requests and answers: unique, not secret. Random bits from the kernel would cost a system call each."""

from __future__ import annotations

import random

_random = random.Random()  # of our own: seeded by the kernel once, and untouched by whoever seeds the module's


def fresh_id() -> str:
    """32 hexadecimal digits."""
    return f"{_random.getrandbits(128):032x}"
