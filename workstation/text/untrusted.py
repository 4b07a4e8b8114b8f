"""Text from outside never becomes a control token.

A rendered prompt mixes what the template wrote (`<|im_start|>` is a token there) with what people wrote (`<|im_start|>` is
twelve characters there). Before rendering, `Guard` breaks every control string inside untrusted text with a mark, a Unicode
noncharacter that occurs nowhere in the conversation. After rendering, the control strings still whole are the template's.
Nothing is marked unless untrusted text could form a control string, so usual conversations are rendered untouched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

# U+FDEF is left out: sealed.py keeps it for itself.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDEF)]
# What a model itself writes in its turns; clients send these turns back, and they must read as the model wrote them.
MODEL_WRITTEN_TAGS = frozenset({
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]",
})
_TRUSTED_KEYS = frozenset({"role", "type"})


class Guard:
    """Breaks control strings in untrusted text.

    Args:
        special: strings of added tokens flagged special; broken everywhere (but see MODEL_WRITTEN_TAGS in assistant turns).
        ordinary: strings of other added tokens; those that look like tags are broken in user and tool text.
        normalize: the tokenizer's normaliser when some control string is matched after it, else None.
    """

    def __init__(self, special: Iterable[str], ordinary: Iterable[str] = (),
                 normalize: Callable[[str], str] | None = None) -> None:
        strict = {text for text in special if len(text) > 1}
        tags = {text for text in ordinary if text[:1] in "<[" and text[-1:] in ">]" and len(text) > 2}
        self._by_role = {
            "user": _Breaker(strict | tags, normalize), "tool": _Breaker(strict | tags, normalize),
            "assistant": _Breaker(strict - MODEL_WRITTEN_TAGS, normalize),
        }
        self._default = _Breaker(strict, normalize)

    def pick_mark(self, values: Any, count: int = 3) -> list[str]:
        """`count` noncharacters that occur in no string of `values`."""
        present = set().union(*(set(text) & set(_NONCHARACTERS) for text in _strings(values)), set())
        return [mark for mark in _NONCHARACTERS if mark not in present][:count]

    def break_messages(self, messages: list[dict[str, Any]], mark: str) -> tuple[list[dict[str, Any]], bool]:
        """Messages with control strings broken by `mark`, and whether anything was broken."""
        broken = False
        out: list[dict[str, Any]] = []
        for message in messages:
            breaker = self._by_role.get(message.get("role", ""), self._default)
            clean, changed = breaker.walk(message, mark)
            out.append(clean)
            broken = broken or changed
        return out, broken

    def break_value(self, value: Any, mark: str) -> tuple[Any, bool]:
        """The same for tools and template variables."""
        return self._default.walk(value, mark)


class _Breaker:
    def __init__(self, controls: set[str], normalize: Callable[[str], str] | None) -> None:
        ordered = sorted((text for text in controls if text), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        self._longest = len(ordered[0]) if ordered else 0
        self._heads = {text[:size] for text in ordered for size in range(1, len(text))}
        self._tails = {text[size:] for text in ordered for size in range(1, len(text))}
        self._normalize = normalize

    def walk(self, value: Any, mark: str) -> tuple[Any, bool]:
        if isinstance(value, str):
            return self._break(value, mark)
        if isinstance(value, list):
            pairs = [self.walk(item, mark) for item in value]
            return [clean for clean, _ in pairs], any(changed for _, changed in pairs)
        if isinstance(value, dict):
            out: dict[Any, Any] = {}
            changed = False
            for key, item in value.items():
                clean_key, key_changed = self._break(key, mark, edges=False)
                clean, item_changed = (item, False) if key in _TRUSTED_KEYS and _is_word(item) else self.walk(item, mark)
                out[clean_key] = clean
                changed = changed or key_changed or item_changed
            return out, changed
        return value, False

    def _break(self, text: str, mark: str, *, edges: bool = True) -> tuple[str, bool]:
        if self._pattern is None or not text:
            return text, False
        out = self._pattern.sub(lambda match: match[0][0] + mark + match[0][1:], text)
        if edges:
            out = self._break_edges(out, mark)
        if out == text and self._normalize is not None and self._pattern.search(self._normalize(text)):
            return text, True  # whole only after normalisation: nothing to break here, but the careful path is needed
        return out, out != text

    def _break_edges(self, text: str, mark: str) -> str:
        """A control string may also form across the seam of template and text: `<` + `|im_end|>`."""
        start, end = len(text) - len(text.lstrip()), len(text.rstrip())
        if start >= end:
            return text
        sizes = range(1, min(self._longest, end - start) + 1)
        if any(text[end - size:end] in self._heads for size in sizes):
            text = text[:end] + mark + text[end:]
        if any(text[start:start + size] in self._tails for size in sizes):
            text = text[:start] + mark + text[start:]
        return text


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value.replace("_", "").isalnum()


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
