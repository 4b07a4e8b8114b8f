"""Every setting of `ws serve`, declared once: name, kind, default, limits, help, and what is refused and why.

The command line makes its flags from this table (`--max-model-len`), the environment its names (`WS_MAX_MODEL_LEN`) and
models.toml its keys (`serve.max_model_len`). `resolve` decides: flag > environment > models.toml > default.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fractions import Fraction
from typing import Any, Literal

from workstation.errors import ConfigError

Kind = Literal["text", "int", "float", "bool", "length", "list", "json"]
Source = Literal["flag", "environment", "models.toml", "default"]
INT_MAX = 2**31 - 1
_SUFFIX = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
_LENGTH = re.compile(r"(\d+(?:\.\d+)?)([kmgKMG]?)")
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting.

    Attributes:
        name: snake_case; the flag, the variable and the key follow from it.
        kind: "length" also takes 32k (thousands) and 32K (1,024s); "list" repeats on the command line, commas elsewhere.
        short: further spellings on the command line.  choices, low, high: limits.
        only: the values that work in this version; any other is refused with `why`.
        secret: never from models.toml, never shown.
    """

    name: str
    kind: Kind
    default: Any
    help: str
    short: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    low: float = 0
    high: float = INT_MAX
    only: tuple[Any, ...] | None = None
    why: str = ""
    secret: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "WS_" + self.name.upper()

    def parse(self, value: Any, label: str) -> Any:
        """A clean value from a string or a TOML value. Raises ConfigError naming `label`, value and limit."""
        parsed = self._convert(value, label)
        if parsed is not None and self.choices and parsed not in self.choices:
            near = get_close_matches(str(parsed), self.choices, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise self._refuse(label, value, f"one of {', '.join(self.choices)}{hint}")
        if self.only is not None and parsed not in self.only:
            raise ConfigError(f"{label}={parsed} is not served yet: {self.why}", param=self.name)
        return parsed

    def _convert(self, value: Any, label: str) -> Any:
        if self.kind == "bool":
            return self._bool(value, label)
        if isinstance(value, bool):
            raise self._refuse(label, value, "a number" if self.kind in ("int", "float", "length") else "text")
        if self.kind in ("int", "float", "length"):
            return self._number(value, label)
        if self.kind == "list":
            items = value.split(",") if isinstance(value, str) else list(value)
            return tuple(str(item).strip() for item in items if str(item).strip())
        if self.kind == "json":
            return self._json(value, label)
        if not isinstance(value, str) or not value or "\0" in value:
            raise self._refuse(label, value, "a non-empty text")
        return value

    def _bool(self, value: Any, label: str) -> bool:
        if isinstance(value, bool):
            return value
        word = str(value).strip().lower()
        if word not in _TRUE | _FALSE:
            raise self._refuse(label, value, "true or false")
        return word in _TRUE

    def _number(self, value: Any, label: str) -> int | float | None:
        if self.kind == "length" and isinstance(value, str):
            if value.strip() in ("auto", "-1"):
                return None
            found = _LENGTH.fullmatch(value.strip()[:32])
            if not found:
                raise self._refuse(label, value, "a whole number, or a form like 32k (32,000) or 32K (32,768), or auto")
            scaled = Fraction(found[1]) * _SUFFIX.get(found[2], 1)
            value = int(scaled) if scaled.denominator == 1 else str(float(scaled))
        try:
            number = float(value) if self.kind == "float" else int(str(value).strip())
        except (TypeError, ValueError):
            raise self._refuse(label, value, "a number" if self.kind == "float" else "a whole number") from None
        if self.kind == "length" and number == -1:
            return None
        if not (self.low <= number <= self.high):  # false for NaN, too
            raise self._refuse(label, value, f"between {_plain(self.low)} and {_plain(self.high)}")
        return number

    def _json(self, value: Any, label: str) -> dict[str, Any]:
        if isinstance(value, Mapping):
            return dict(value)
        try:
            parsed = json.loads(value)
        except (TypeError, ValueError):
            parsed = None
        if not isinstance(parsed, dict):
            raise self._refuse(label, value, 'a JSON object such as \'{"temperature": 0.7}\'')
        return parsed

    def _refuse(self, label: str, value: Any, limit: str) -> ConfigError:
        shown = "…" if self.secret else repr(value)[:80]
        return ConfigError(f"{label} must be {limit}, got {shown}", param=self.name)


def _plain(number: float) -> str:
    """A limit for people: whole numbers without a point or an exponent."""
    return str(int(number)) if number == int(number) else f"{number:g}"


@dataclass(frozen=True, slots=True)
class Settings:
    """Resolved settings: `values` by name, and where each came from."""

    values: dict[str, Any]
    sources: dict[str, Source] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def chosen(self, name: str) -> bool:
        """Somebody asked for it: it is not the default."""
        return self.sources.get(name, "default") != "default"


def resolve(
    table: tuple[Setting, ...],
    flags: Mapping[str, Any],
    environment: Mapping[str, str],
    catalogue: Mapping[str, Any] | None = None,
    *,
    where: str = "models.toml",
) -> Settings:
    """Flag > environment > models.toml > default, each checked whoever wins.

    Args:
        flags: by setting name; None means "not typed".  environment: such as os.environ.
        catalogue: the `serve` table of the model's entry.  where: how errors name it.
    Raises:
        ConfigError: an unknown key, or a value outside its limits; names the place it was written.
    """
    known = {setting.name: setting for setting in table}
    catalogue = catalogue or {}
    for key in catalogue:
        if key not in known or known[key].secret:
            raise unknown_key(f"{where}: {key!r}", key, [name for name in known if not known[name].secret])
    values: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    for setting in table:
        found: list[tuple[Source, Any]] = [("default", setting.default)]
        if setting.name in catalogue:
            value = setting.parse(catalogue[setting.name], f"{where}: {setting.name}")
            found.append(("models.toml", value))
        if environment.get(setting.variable, "") != "":
            found.append(("environment", setting.parse(environment[setting.variable], setting.variable)))
        if flags.get(setting.name) not in (None, (), []):
            found.append(("flag", setting.parse(flags[setting.name], setting.flag)))
        sources[setting.name], values[setting.name] = found[-1]
    return Settings(values, sources)


def unknown_key(label: str, key: str, known: list[str]) -> ConfigError:
    """An error that names the nearest known key."""
    near = get_close_matches(key, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"
    return ConfigError(f"{label} is not a known key{hint}", param=key)


def unknown_variables(table: tuple[Setting, ...], environment: Mapping[str, str]) -> list[str]:
    """A sentence for each WS_… variable that looks like a misspelt setting."""
    known = {setting.variable for setting in table}
    notes = []
    for name in sorted(environment):
        near = get_close_matches(name, sorted(known), 1, cutoff=0.85)
        if name.startswith("WS_") and name not in known and near:
            notes.append(f"{name} is not a setting and was ignored; did you mean {near[0]}?")
    return notes
