"""What grammars cost on the host: `PYTHONPATH=. python benchmarks/masks.py [FOLDER]`, of a model or a made-up tokenizer.

JSON lines: seconds to make the vocabulary (other threads of the process stand still meanwhile), milliseconds to compile a
schema, and microseconds a row and step for its mask and for telling it a token, over answers of 64 rows that follow one
schema. All of it CPU time of one thread.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from workstation.grammar.answer import Wanted, grammars
from workstation.grammar.library import Vocabulary
from workstation.grammar.params import StructuredOutputsParams
from workstation.text.tokenizer import Tokenizer

SCHEMA = {"type": "array", "items": {"type": "object", "properties": {
    "name": {"type": "string", "maxLength": 40}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
    "email": {"type": "string", "format": "email"}, "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4}},
    "required": ["name", "age", "email", "tags"], "additionalProperties": False}}
NAMES = ("Anna Berg", "José Ortiz", "Mei Ling", "Olu", "Zoë")
ROWS = 64


def made_up(folder: Path, size: int) -> Path:
    """A byte-level BPE of random merges, as large as Llama 3's."""
    rng = random.Random(0)
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = {piece: index for index, piece in enumerate(pieces)}, []
    while len(vocabulary) < size:
        left, right = rng.choice(pieces), rng.choice(pieces)
        if len(left + right) <= 12 and left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
            merges.append((left, right))
            pieces.append(left + right)
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return folder


def answer(number: int) -> str:
    """What a row writes."""
    rng = random.Random(number)
    people = [{"name": rng.choice(NAMES), "age": rng.randrange(150), "email": f"x{rng.randrange(9999)}@example.org",
               "tags": [rng.choice(("red", "large", "very new")) for _ in range(rng.randrange(4))]} for _ in range(6)]
    return json.dumps(people, ensure_ascii=False)


def measure(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    eos = tokenizer.eos_token_id
    assert eos is not None
    began = time.thread_time()
    vocabulary = Vocabulary(folder, tokenizer.vocab_size)
    print(json.dumps({"tokens": tokenizer.vocab_size, "vocabulary_s": round(time.thread_time() - began, 2)}), flush=True)
    source = grammars(Wanted(StructuredOutputsParams(json=SCHEMA)))[0]
    compiles = []
    for _ in range(20):
        began = time.thread_time()
        compiled = vocabulary.compile(source)
        compiles.append(time.thread_time() - began)
    rows = [compiled.fork([eos]) for _ in range(ROWS)]
    texts = [tokenizer.encode(answer(number), add_special_tokens=False) for number in range(ROWS)]
    bits = np.empty(compiled.words, dtype=np.int32)
    masks, accepts = [], []
    for step in range(max(map(len, texts))):
        live = [(row, text[step]) for row, text in zip(rows, texts, strict=True) if step < len(text)]
        begun = time.thread_time()
        for row, _ in live:
            row.fill(bits)
        filled = time.thread_time()
        for row, token in live:
            row.accept(token)
            assert row.fault is None
        masks.append((filled - begun) / len(live))
        accepts.append((time.thread_time() - filled) / len(live))
    print(json.dumps({
        "compile_ms": round(statistics.median(compiles) * 1e3, 2), "steps": len(masks),
        "mask_us_a_row": round(statistics.median(masks) * 1e6, 1), "mask_us_a_row_worst_step": round(max(masks) * 1e6, 1),
        "accept_us_a_row": round(statistics.median(accepts) * 1e6, 1)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="a model's; without it a tokenizer of random merges")
    parser.add_argument("--size", type=int, default=128_000, help="of the made-up tokenizer")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        measure(arguments.folder or made_up(Path(place), arguments.size))


if __name__ == "__main__":
    main()
