"""Builds the demo's tokenizer: byte-level BPE in which a leading space is merged last.

Because the space joins after all letters have, a word breaks into the same pieces at the start of a string, after a quote and
after a space; only its first piece has a variant with the space. Copying an unseen name from a sentence into JSON is then a
one-to-one map between pieces, which a small model learns. Digits are single tokens.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from workstation.demo.mixture import long_task, short_task
from workstation.demo.template import END_OF_TEXT, IM_END, IM_START, document, jinja_source

VOCAB_SIZE = 4096
SPECIAL_TOKENS = (
    END_OF_TEXT,
    IM_START,
    IM_END,
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
    *(f"<|reserved_{index}|>" for index in range(20)),
)
# Those that carry meaning in the text and must survive `skip_special_tokens`, as the parsers read them.
_VISIBLE = {"<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"}
_SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_BASE_SHARE = 0.62  # of the merged vocabulary: pieces without a space; the rest are their variants with one
_SPACE = "\u0120"  # how byte-level BPE writes a space


def build(documents: int = 60_000, seed: int = 0) -> Any:
    """Trains the tokenizer on generated training documents. Returns a `tokenizers.Tokenizer`."""
    texts = list(_texts(documents, seed))
    base = _base_bpe(texts, VOCAB_SIZE - len(SPECIAL_TOKENS))
    vocab, merges = json.loads(base.to_str())["model"]["vocab"], json.loads(base.to_str())["model"]["merges"]
    return _with_spaces(vocab, [tuple(pair) for pair in merges], texts)


def _texts(documents: int, seed: int) -> Iterable[str]:
    rng = Random(seed)
    for index in range(documents):
        text = document(long_task(rng) if index % 200 == 0 else short_task(rng))
        for token in SPECIAL_TOKENS:
            text = text.replace(token, "\n")
        yield text


def _base_bpe(texts: list[str], size: int) -> Any:
    """BPE over words that never hold a space, of part of the vocabulary."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT.replace(" ?", "")), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=256 + round((size - 256) * _BASE_SHARE), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _with_spaces(vocab: dict[str, int], merges: list[tuple[str, str]], texts: list[str]) -> Any:
    """The base merges, then (space, piece) for the pieces that most often follow a space."""
    ordered = [piece for piece, _ in sorted(vocab.items(), key=lambda entry: entry[1])]
    counts: Counter[str] = Counter()
    counted = _assembled(ordered, merges)
    for text in texts[:20_000]:
        tokens = counted.encode(text, add_special_tokens=False).tokens
        counts.update(piece for space, piece in pairwise(tokens) if space == _SPACE)
    room = VOCAB_SIZE - len(SPECIAL_TOKENS) - len(ordered)
    spaced = [piece for piece, _ in counts.most_common() if _joins(piece) and _SPACE + piece not in vocab][:room]
    return _assembled(ordered + [_SPACE + piece for piece in spaced], merges + [(_SPACE, piece) for piece in spaced])


def _joins(piece: str) -> bool:
    return not piece.startswith(_SPACE) and not piece[0].isdigit() and piece[0] != "\u010a"


def _assembled(ordered: list[str], merges: list[tuple[str, str]]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {piece: index for index, piece in enumerate([*SPECIAL_TOKENS, *ordered])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token in SPECIAL_TOKENS:
        added = AddedToken(token, special=token not in _VISIBLE, normalized=False)
        (tokenizer.add_tokens if token in _VISIBLE else tokenizer.add_special_tokens)([added])
    return tokenizer


def save(tokenizer: Any, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": IM_END, "pad_token": END_OF_TEXT}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_prefix_space": False,
        "chat_template": jinja_source(),
        **special,
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", special)
    (folder / "chat_template.jinja").write_text(jinja_source(), encoding="utf-8")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """`python -m workstation.demo.tokenizer FOLDER` writes the tokenizer that training then uses."""
    save(build(), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
