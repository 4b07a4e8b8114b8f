"""Filling in the middle: the tokens a model was trained with, and prompts made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workstation.errors import InvalidRequestError
from workstation.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class FimTokens:
    """Control strings of one family. `suffix_first`: the suffix stands before the prefix, and no mark calls for the middle."""

    prefix: str
    suffix: str
    middle: str = ""
    suffix_first: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.prefix, self.suffix, self.middle) if name)


FAMILIES = (
    FimTokens("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), FimTokens("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    FimTokens("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    FimTokens("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"), FimTokens("▁<PRE>", "▁<SUF>", "▁<MID>"),
    FimTokens("<PRE>", "<SUF>", "<MID>"), FimTokens("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    FimTokens("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>"), FimTokens("[PREFIX]", "[SUFFIX]", suffix_first=True),
)
# What ends a middle, beside the model's own ends.
_ENDS = ("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<fim_pad>", "<file_sep>", "▁<EOT>", "<EOT>",
         "<｜end▁of▁sentence｜>")
_FILE_MARKS = ("<|file_sep|>", "<file_sep>")


def fim_tokens(tokenizer: Tokenizer) -> FimTokens:
    """The family whose tokens the vocabulary has. Raises InvalidRequestError that names what is missing."""
    for family in FAMILIES:
        if all(tokenizer.token_id(name) is not None for name in family.names):
            return family
    raise InvalidRequestError(f"suffix is not supported by this model: its tokenizer has none of the tokens for it, neither "
                              f"{', '.join(FAMILIES[0].names)} nor another family's", param="suffix")


def fim_prompt(tokenizer: Tokenizer, prefix: str, suffix: str, extra: Sequence[tuple[str, str]] = ()) -> list[int]:
    """Ids that ask for what stands between prefix and suffix. `extra`: (name, text) of other files, shown before.

    Raises InvalidRequestError for a model without the tokens.
    """
    family = fim_tokens(tokenizer)
    before, after = _ids(tokenizer, prefix), _ids(tokenizer, suffix)
    head, tail = [_id(tokenizer, family.prefix), *before], [_id(tokenizer, family.suffix), *after]
    middle = [_id(tokenizer, family.middle)] if family.middle else []
    asked = [*tail, *head] if family.suffix_first else [*head, *tail, *middle]
    bos = tokenizer.bos_token_id
    start = [bos] if bos is not None and tokenizer.encode("a")[0] == bos else []
    return [*start, *_files(tokenizer, extra), *asked]


def _files(tokenizer: Tokenizer, extra: Sequence[tuple[str, str]]) -> list[int]:
    mark = next((name for name in _FILE_MARKS if tokenizer.token_id(name) is not None), None)
    out: list[int] = []
    for name, text in extra:
        if mark is not None:
            out += [_id(tokenizer, mark), *_ids(tokenizer, f"{name}\n{text}\n")]
        else:
            out += _ids(tokenizer, f"--- {name} ---\n{text}\n\n")
    return [*out, _id(tokenizer, mark)] if out and mark is not None else out


def fim_stops(tokenizer: Tokenizer) -> list[int]:
    """Ids that end a middle."""
    names = (*fim_tokens(tokenizer).names, *_ENDS)
    return [index for index in map(tokenizer.token_id, names) if index is not None]


def _id(tokenizer: Tokenizer, name: str) -> int:
    found = tokenizer.token_id(name)
    assert found is not None
    return found


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False) if text else []
