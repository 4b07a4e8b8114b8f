"""StructuredOutputsParams: what an answer must look like, in vLLM's terms. Plain data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from workstation.errors import InvalidRequestError

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
MAX_GRAMMAR_BYTES = 256 * 1024
MAX_CHOICES = 1024


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse(name: str, value: object, limit: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} must be {limit}, got {shown(value)}", param=name)


@dataclass(slots=True)
class StructuredOutputsParams:
    """Exactly one of json, regex, choice, grammar, json_object and structural_tag.

    Attributes:
        json: a JSON schema, as an object, true or JSON text.  regex: Rust's syntax; the whole answer must match.
        choice: the answer is one of these strings.  grammar: Lark (llguidance's dialect), or EBNF as llama.cpp writes it.
        json_object: any JSON object.  structural_tag: {"type": "structural_tag", "structures": [{begin, schema, end}],
            "triggers": […]}, as an object or JSON text.
        disable_any_whitespace: JSON without white space.  whitespace_pattern: a regex for the white space in JSON.
        disable_additional_properties: objects of a schema hold nothing that it does not list, unless they say so themselves.

    Raises InvalidRequestError naming the field, on construction.
    """

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in KINDS if not _absent(getattr(self, name))]
        if len(given) != 1:
            raise InvalidRequestError(f"structured_outputs must hold exactly one of {', '.join(KINDS)}, got "
                                      f"{' and '.join(given) or 'none'}", param="structured_outputs")
        for name in ("json", "structural_tag"):
            setattr(self, name, _parsed(name, getattr(self, name)))
        for name in ("regex", "grammar", "whitespace_pattern"):
            self._check_text(name)
        self._check_choice()
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise _refuse(name, getattr(self, name), "true or false")
        if self.structural_tag is not None and not isinstance(self.structural_tag, dict):
            raise _refuse("structural_tag", self.structural_tag, "an object or its JSON text")
        if self.json is not None and not isinstance(self.json, (dict, bool)):
            raise _refuse("json", self.json, "a JSON schema (an object) or its JSON text")

    @property
    def kind(self) -> str:
        """Which of the six was given."""
        return next(name for name in KINDS if not _absent(getattr(self, name)))

    def _check_text(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if not isinstance(value, str) or not value:
            raise _refuse(name, value, "a string that is not empty")
        size = len(value.encode(errors="surrogatepass"))
        if size > MAX_GRAMMAR_BYTES:
            raise InvalidRequestError(f"{name} is {size} bytes long; the limit is {MAX_GRAMMAR_BYTES}", param=name)

    def _check_choice(self) -> None:
        if self.choice is None:
            return
        if not isinstance(self.choice, list) or not all(isinstance(item, str) and item for item in self.choice):
            raise _refuse("choice", self.choice, "a list of strings that are not empty")
        if not 1 <= len(self.choice) <= MAX_CHOICES:
            raise InvalidRequestError(f"choice must hold 1 to {MAX_CHOICES} strings, got {len(self.choice)}", param="choice")


def _absent(value: Any) -> bool:
    """False asks for nothing: as a schema it would allow nothing."""
    return value is None or value is False


def _parsed(name: str, value: Any) -> Any:
    """JSON given as text is read."""
    if not isinstance(value, str):
        return value
    if len(value) > MAX_GRAMMAR_BYTES:
        raise InvalidRequestError(f"{name} is {len(value)} characters long; the limit is {MAX_GRAMMAR_BYTES}", param=name)
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{name} must be JSON: {error}", param=name) from None


__all__ = ["KINDS", "MAX_GRAMMAR_BYTES", "StructuredOutputsParams"]
