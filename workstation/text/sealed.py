"""Encoding a prompt in which only the template's control strings are tokens."""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

from workstation.errors import InvalidRequestError

# Private to this file: a rendered text never holds it, for it is refused on the way in.
_SEAL = "\ufdef"


class SealedEncoder:
    """A second tokenizer in which every control string is wrapped in a seal character.

    The template's own control strings get the seal before encoding; those from outside do not and are spelled out by the
    ordinary vocabulary. Pre-tokenisation, space marks and merges stay the library's own. Built when first needed, because
    most conversations hold no control strings.

    Args:
        backend: the ordinary tokenizers.Tokenizer.  special_ids: the control ids.
    """

    def __init__(self, backend: Any, special_ids: frozenset[int]) -> None:
        added = backend.get_added_tokens_decoder()
        self._source = backend
        self._added = {index: token.content for index, token in added.items()
                       if len(token.content) > 1 and not token.single_word}
        self._special_ids = special_ids & self._added.keys()
        ordered = sorted(self._added.values(), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        self._backend: Any = None
        self._real_id: dict[int, int] = {}

    def prepared(self) -> SealedEncoder:
        """Build the second tokenizer once (call under a lock)."""
        if self._backend is None:
            backend = tokenizers.Tokenizer.from_str(self._with_sealed_tokens(self._source.to_str()))
            self._real_id = {backend.token_to_id(_SEAL + text + _SEAL): index for index, text in self._added.items()}
            self._backend = backend
        return self

    def _with_sealed_tokens(self, text: str) -> str:
        """tokenizer.json with every added token wrapped; only that one list is parsed, for vocabularies are large."""
        key = '"added_tokens":'
        start = text.index(key) + len(key)
        start += len(text[start:start + 64]) - len(text[start:start + 64].lstrip())
        listed, end = json.JSONDecoder().raw_decode(text, start)
        wrapped = set(self._added.values())
        for token in listed:
            if token["content"] in wrapped:
                token["content"] = _SEAL + token["content"] + _SEAL
        return text[:start] + json.dumps(listed) + text[end:]

    def encode(self, text: str, *, mark: str) -> list[int]:
        """Ids of a rendered text; `mark` breaks the control strings that came from outside and is removed."""
        if _SEAL in text:
            raise InvalidRequestError("messages holds the Unicode noncharacter U+FDEF", param="messages")
        sealed = self._pattern.sub(lambda match: _SEAL + match[0] + _SEAL, text) if self._pattern else text
        sealed = sealed.replace(mark, "").replace(json.dumps(mark)[1:-1], "")
        out: list[int] = []
        for index in self._backend.encode(sealed, add_special_tokens=False).ids:
            if index in self._real_id:
                out.append(self._real_id[index])
            elif index in self._special_ids:
                out.extend(self._spelled(index))
            else:
                out.append(index)
        return out

    def _spelled(self, index: int) -> list[int]:
        """Some vocabularies (Unigram, ignore_merges) hold control strings as plain pieces too: spell them letter by letter."""
        out: list[int] = []
        for char in self._added[index]:
            names = [char] if self._backend.token_to_id(char) is not None else [f"<0x{byte:02X}>" for byte in char.encode()]
            ids = [self._backend.token_to_id(name) for name in names]
            if any(item is None for item in ids):
                raise InvalidRequestError(f"messages holds the control string {self._added[index]!r}, which this model's "
                                          "vocabulary cannot spell as ordinary text", param="messages")
            out.extend(ids)
        return out
