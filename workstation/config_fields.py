"""Typed reading of a parsed config.json: every wrong value is an error that names the field, the value and the limit.

Knows types and ranges; which fields a model has is `architecture.py`'s business. Imports no torch.
"""

from __future__ import annotations

import math
from typing import Any

from workstation.errors import ModelFolderError
from workstation.model_folder import shown

MISSING: Any = object()


class Fields:
    """A JSON object whose values are asked for by name and type; remembers which names were asked for.

    `default` is returned when the field is absent or null; without a default that is an error.
    """

    def __init__(self, values: dict[str, Any], where: str = "config.json") -> None:
        self.values = values
        self.where = where
        self.asked: set[str] = set()

    def refuse(self, name: str, limit: str) -> ModelFolderError:
        """An error for the field's present value; to be raised by the caller."""
        value = self.values.get(name, MISSING)
        if value is MISSING:
            return ModelFolderError(f"{self.where}: the field {name} is missing; it must be {limit}", param=name)
        return ModelFolderError(f"{self.where}: {name} must be {limit}, got {shown(value)}", param=name)

    def raw(self, name: str, default: Any = None) -> Any:
        """The value as parsed; null counts as absent."""
        self.asked.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def integer(self, name: str, low: int, high: int, default: Any = MISSING) -> Any:
        """A whole number in low…high (a JSON float such as 4096.0 is refused)."""
        value = self.raw(name)
        if value is None and default is not MISSING:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refuse(name, f"an integer between {low} and {high}")
        return value

    def number(self, name: str, low: float, high: float, default: Any = MISSING) -> Any:
        """A finite number in low…high."""
        value = self.raw(name)
        if value is None and default is not MISSING:
            return default
        good = not isinstance(value, bool) and isinstance(value, (int, float))
        if not good or not (abs(value) < 1e300 and math.isfinite(value) and low <= value <= high):
            raise self.refuse(name, f"a number between {low:g} and {high:g}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.raw(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        value = self.raw(name, default)
        if not isinstance(value, str):
            raise self.refuse(name, "a string")
        return value

    def numbers(self, name: str, length: int, low: float, high: float) -> tuple[float, ...]:
        """A list of exactly `length` finite numbers in low…high."""
        value = self.raw(name)
        if not isinstance(value, list) or len(value) != length:
            raise self.refuse(name, f"a list of {length} numbers")
        return tuple(Fields({name: item}, self.where).number(name, low, high) for item in value)

    def token_ids(self, name: str, vocab_size: int, default: Any = None) -> tuple[int, ...]:
        """One id or a list of ids, each below vocab_size; absent gives `default` (None means no ids)."""
        value = self.raw(name, default)
        listed = [] if value is None else list(value) if isinstance(value, list) else [value]
        if len(listed) > 1024:
            raise self.refuse(name, "at most 1024 token ids")
        for item in listed:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab_size:
                raise self.refuse(name, f"token ids between 0 and {vocab_size - 1}")
        return tuple(dict.fromkeys(listed))

    def unasked(self) -> list[str]:
        """Names that are present, not null, and that nobody has asked for."""
        return [name for name, value in self.values.items() if value is not None and name not in self.asked]
