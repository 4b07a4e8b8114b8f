"""Incremental decoding: equal to the full decode whatever the chunking; stop strings cut text, usage and log-probabilities."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fakes import write_byte_level_folder, write_sentencepiece_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from workstation.text.detokenizer import Detokenizer
from workstation.text.stops import StopMatcher
from workstation.text.tokenizer import Tokenizer as WsTokenizer

TEXT = "Grüße 日本語 🙂👩‍👩‍👧 end. hello world, naïve café\n\ttab"


def _metaspace(path: Path) -> Path:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁hello", -1.0), ("▁", -2.0), *((char, -3.0) for char in "helowrd,")]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, False))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def _wordpiece(path: Path) -> Path:
    vocab = {piece: index for index, piece in enumerate(["[UNK]", "hello", "##s", "world", ",", "[SEP]"])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[SEP]"])
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def _words(path: Path) -> Path:
    vocab = {piece: index for index, piece in enumerate(["[UNK]", "hello", "wörld", "", ",", "[SEP]"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[SEP]"])
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module", params=["byte level", "sentencepiece", "metaspace", "wordpiece", "words"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WsTokenizer:
    writers = {
        "byte level": write_byte_level_folder,
        "sentencepiece": write_sentencepiece_folder,
        "metaspace": _metaspace,
        "wordpiece": _wordpiece,
        "words": _words,
    }
    return WsTokenizer.from_folder(writers[request.param](tmp_path_factory.mktemp("detok") / "folder"))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> WsTokenizer:
    return WsTokenizer.from_folder(write_byte_level_folder(tmp_path_factory.mktemp("detok_bytes")))


def _in_chunks(detokenizer: Detokenizer, ids: list[int], rng: random.Random) -> str:
    out, position = "", 0
    while position < len(ids):
        size = rng.randrange(1, 6)
        out += detokenizer.feed(ids[position : position + size])
        position += size
    return out + detokenizer.finish()


@pytest.mark.parametrize("skip", [True, False], ids=["skip specials", "keep specials"])
def test_random_ids_in_random_chunks_equal_the_full_decode(tokenizer: WsTokenizer, skip: bool) -> None:
    rng = random.Random(0)
    for _ in range(400):
        ids = [rng.randrange(tokenizer.vocab_size + 3) for _ in range(rng.randrange(40))]
        made = _in_chunks(tokenizer.detokenizer(skip_special_tokens=skip), ids, rng)
        assert made == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60), seed=st.integers(0, 2**16))
def test_any_text_comes_back_in_any_chunks(byte_level: WsTokenizer, text: str, seed: int) -> None:
    ids = byte_level.encode(text, add_special_tokens=False)
    assert _in_chunks(byte_level.detokenizer(skip_special_tokens=False), ids, random.Random(seed)) == byte_level.decode(ids)


def test_a_character_is_never_split(byte_level: WsTokenizer) -> None:
    detokenizer = byte_level.detokenizer()
    pieces = [detokenizer.feed([index]) for index in byte_level.encode(TEXT)]
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_character_are_shown_at_the_end(byte_level: WsTokenizer) -> None:
    half = byte_level.encode("🙂", add_special_tokens=False)[:1]
    detokenizer = byte_level.detokenizer()
    assert detokenizer.feed(half) == ""
    assert detokenizer.finish() == "\ufffd"


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("stop", [["world"], ["ello w"], ["o w", "world"], ["zzz"], ["\n\t"], ["🙂"], ["h"]])
@pytest.mark.parametrize("include", [False, True], ids=["cut", "kept"])
def test_a_stop_string_cuts_the_text_alike_in_all_chunks(
    byte_level: WsTokenizer, size: int, stop: list[str], include: bool
) -> None:
    ids = byte_level.encode(TEXT, add_special_tokens=False)
    detokenizer = byte_level.detokenizer(stop=stop, include_stop=include)
    out = "".join(detokenizer.feed(ids[start : start + size]) for start in range(0, len(ids), size)) + detokenizer.finish()
    ends = {text: TEXT.find(text) + len(text) for text in stop if text in TEXT}
    if not ends:
        assert (out, detokenizer.stopped) == (TEXT, None)
        return
    first = min(ends, key=ends.__getitem__)
    assert detokenizer.stopped == first
    assert out == TEXT[: ends[first] - (0 if include else len(first))]


def test_text_that_may_become_a_stop_string_is_held_back(byte_level: WsTokenizer) -> None:
    detokenizer = byte_level.detokenizer(stop=["abcd"])
    ids = byte_level.encode("xabcx", add_special_tokens=False)
    assert [detokenizer.feed([index]) for index in ids] == ["x", "", "", "", "abcx"]
    assert detokenizer.stopped is None


def test_text_held_back_is_shown_when_the_sample_ends(byte_level: WsTokenizer) -> None:
    detokenizer = byte_level.detokenizer(stop=["abcd"])
    assert detokenizer.feed(byte_level.encode("xabc", add_special_tokens=False)) == "x"
    assert detokenizer.finish() == "abc"


def test_tokens_after_the_stop_string_count_for_nothing(byte_level: WsTokenizer) -> None:
    ids = byte_level.encode("xyzq.rest of it", add_special_tokens=False)
    for size in (1, len(ids)):
        detokenizer = byte_level.detokenizer(stop=["q."])
        for start in range(0, len(ids), size):
            detokenizer.feed(ids[start : start + size])
        assert detokenizer.num_tokens == 5  # x y z q . : the stop string's own tokens were needed to see it
        assert detokenizer.num_shown == 3  # only x, y and z are in the text
        assert detokenizer.feed(ids) == ""
        assert detokenizer.num_tokens == 5


def test_a_stop_string_inside_the_first_min_tokens_is_passed_over(byte_level: WsTokenizer) -> None:
    ids = byte_level.encode("x.y.z", add_special_tokens=False)
    detokenizer = byte_level.detokenizer(stop=["."], min_tokens=2)
    assert detokenizer.feed(ids) + detokenizer.finish() == "x.y"


def test_starts_are_the_offsets_of_tokens_in_the_text(byte_level: WsTokenizer) -> None:
    ids = byte_level.encode("hello world", add_special_tokens=False)
    detokenizer = byte_level.detokenizer()
    text = detokenizer.feed(ids) + detokenizer.finish()
    assert [text[start:] for start in detokenizer.starts] == [byte_level.decode(ids[index:]) for index in range(len(ids))]


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab", max_size=40), stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4))
def test_the_matcher_finds_what_a_plain_search_finds(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    read = matcher.feed(text)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert read == (min(ends) if ends else None)
    if read is None:
        tails = [size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
        assert matcher.held == max(tails, default=0)


@pytest.mark.parametrize("stop", ["]", "^a", "\\", "-b"])
def test_a_stop_string_of_punctuation_is_found(stop: str) -> None:
    assert StopMatcher([stop, "z-"]).feed(f"some {stop} text") == 5 + len(stop)


def test_many_long_stop_strings_cost_no_quadratic_time() -> None:
    matcher = StopMatcher(["a" * 4095 + chr(ord("b") + index) for index in range(8)])
    assert matcher.feed("a" * 20_000) is None
    assert matcher.held == 4095
