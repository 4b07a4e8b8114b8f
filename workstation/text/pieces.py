"""Token ids to text, one token at a time, equal to the full decode whatever the chunking.

Two kinds of decoder cover nearly every model and are exact here: byte-level BPE (Llama 3, Qwen, GPT-2: every token is a
string of bytes) and SentencePiece style (Llama 2, Mistral, Gemma: pieces with a space mark, plus `<0xNN>` byte tokens). Whole
words without a decoder are a third. Any other decoder goes through `tokenizers.decoders.DecodeStream`. What a token adds is
remembered, so that a token costs about one look into a dictionary.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Any, Protocol

from tokenizers.decoders import DecodeStream

UNKNOWN = -1  # in place of a byte: the tokenizer does not know the id


class PieceStream(Protocol):
    """`step` returns the text a token completes ("" while a character is incomplete); `finish` returns what is left."""

    def step(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins: bytes that print stand for themselves, the others are shifted to U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(0x100 + index): byte for index, byte in enumerate(hidden)})
    return table


_BYTE_OF_CHAR = _byte_of_char()


class DecoderSpec:
    """What a tokenizer.json's decoder section does, reduced to the kinds above.

    Attributes:
        kind: "bytes", "pieces", "words" (no decoder: tokens joined by spaces) or "other".
        replacements: (pattern, text) pairs applied to a piece.
        byte_fallback: `<0xNN>` pieces are bytes.  strip: spaces dropped from the start of the whole text.
        first_drops_marks: Metaspace: the first token loses all its space marks.
    """

    def __init__(self, spec: dict[str, Any] | None) -> None:
        self.kind = "other" if spec else "words"
        self.replacements: list[tuple[str, str]] = []
        self.byte_fallback = False
        self.strip = 0
        self.first_drops_marks = ""
        steps = (spec or {}).get("decoders", [spec]) if spec else []
        if len(steps) == 1 and steps[0].get("type") == "ByteLevel":
            self.kind = "bytes"
        elif steps and self._read_pieces(steps):
            self.kind = "pieces"

    def _read_pieces(self, steps: list[dict[str, Any]]) -> bool:
        fused = False
        for step in steps:
            kind = step.get("type")
            if kind == "Replace" and "String" in step.get("pattern", {}) and not fused and not self.byte_fallback:
                self.replacements.append((step["pattern"]["String"], step["content"]))
            elif kind == "ByteFallback" and not fused:
                self.byte_fallback = True
            elif kind == "Fuse":
                fused = True
            elif kind == "Strip" and fused and step.get("content") == " " and step.get("stop") == 0:
                self.strip = int(step["start"])
            elif kind == "Metaspace" and len(steps) == 1:
                self.replacements.append((step["replacement"], " "))
                if step.get("prepend_scheme", "always") != "never":
                    self.first_drops_marks = step["replacement"]
            else:
                return False
        return True


class TokenTable:
    """Token id → its text as bytes, remembered; special ids are known so that they can be skipped."""

    def __init__(self, backend: Any, spec: DecoderSpec, special_ids: frozenset[int]) -> None:
        self.backend = backend
        self.spec = spec
        self.special_ids = special_ids
        self._bytes: dict[int, bytes] = {}
        self._parts: dict[int, str | int] = {}

    def piece(self, token_id: int) -> str | None:
        """The vocabulary's own string; None for ids the tokenizer does not know (padding of the logits)."""
        piece: str | None = self.backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        return piece

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes a token adds to a text; part of a character for some tokens."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._compute(token_id)
        return found

    def _compute(self, token_id: int) -> bytes:
        piece = self.piece(token_id)
        if piece is None:
            return b""
        if self.spec.kind == "bytes":
            values = [_BYTE_OF_CHAR.get(char, -1) for char in piece]
            return piece.encode() if -1 in values else bytes(values)
        if self.spec.kind == "pieces":
            byte = byte_value(piece) if self.spec.byte_fallback else None
            return self.replaced(piece).encode() if byte is None else bytes([byte])
        text: str = self.backend.decode([token_id], skip_special_tokens=False)
        return text.encode()

    def part_of(self, token_id: int) -> str | int:
        """A piece's text, or the byte it stands for, or UNKNOWN."""
        found = self._parts.get(token_id)
        if found is None:
            found = self._parts[token_id] = self._part(token_id)
        return found

    def _part(self, token_id: int) -> str | int:
        piece = self.piece(token_id)
        if piece is None:
            return UNKNOWN
        byte = byte_value(piece) if self.spec.byte_fallback else None
        return self.replaced(piece) if byte is None else byte

    def replaced(self, piece: str) -> str:
        for pattern, text in self.spec.replacements:
            piece = piece.replace(pattern, text)
        return piece

    def stream(self, skip_special_tokens: bool, keep: frozenset[int] = frozenset()) -> PieceStream:
        """`keep`: special ids that are text nevertheless, because a parser reads them."""
        skipped = self.special_ids - keep if skip_special_tokens else frozenset()
        if self.spec.kind == "bytes":
            return _ByteStream(self, skipped)
        if self.spec.kind == "pieces":
            return _SentencePieceStream(self, skipped)
        if self.spec.kind == "words":
            return _WordStream(self, skipped)
        return _LibraryStream(self.backend, skipped)


def byte_value(piece: str) -> int | None:
    """0…255 for a piece of the form `<0xNN>`."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return int(piece[3:5], 16)
        except ValueError:
            return None
    return None


class _ByteStream:
    """Byte-level BPE: bytes into an incremental UTF-8 decoder, which holds back an unfinished character."""

    __slots__ = ("_bytes_of", "_decoder", "_open", "_skipped")

    def __init__(self, table: TokenTable, skipped: frozenset[int]) -> None:
        self._bytes_of: Callable[[int], bytes] = table.bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._open = False  # a character has begun
        self._skipped = skipped

    def step(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        data = self._bytes_of(token_id)
        if not self._open and data.isascii():
            return data.decode()
        text = self._decoder.decode(data)
        self._open = bool(self._decoder.getstate()[0])
        return text

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class _SentencePieceStream:
    """Pieces and byte runs. A run of byte tokens is text only as a whole, so it is held until another kind of token."""

    __slots__ = ("_first", "_run", "_skipped", "_strip", "_table")

    def __init__(self, table: TokenTable, skipped: frozenset[int]) -> None:
        self._table = table
        self._skipped = skipped
        self._run = bytearray()
        self._strip = table.spec.strip
        self._first = True

    def step(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        part = self._table.part_of(token_id)
        if isinstance(part, int):
            if part != UNKNOWN:
                self._run.append(part)
            return ""
        if self._first:
            return self._begin(token_id)
        if self._run:
            part = self._flush() + part
        return self._stripped(part) if self._strip else part

    def _begin(self, token_id: int) -> str:
        """The first piece of text."""
        piece = self._table.piece(token_id) or ""
        if self._table.spec.first_drops_marks:
            piece = piece.replace(self._table.spec.first_drops_marks, "")
        self._first = False
        return self._stripped(self._flush() + self._table.replaced(piece))

    def finish(self) -> str:
        return self._stripped(self._flush())

    def _flush(self) -> str:
        if not self._run:
            return ""
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            text = "\ufffd" * len(self._run)
        self._run.clear()
        return text

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text


class _WordStream:
    """Tokens joined by single spaces."""

    __slots__ = ("_first", "_part_of", "_skipped")

    def __init__(self, table: TokenTable, skipped: frozenset[int]) -> None:
        self._part_of: Callable[[int], str | int] = table.part_of
        self._skipped = skipped
        self._first = True

    def step(self, token_id: int) -> str:
        part = self._part_of(token_id)
        if token_id in self._skipped or isinstance(part, int):
            return ""
        if self._first:
            self._first = False
            return part
        return " " + part

    def finish(self) -> str:
        return ""


class _LibraryStream:
    """Decoders of other shapes: the tokenizers library's own incremental decoder."""

    __slots__ = ("_backend", "_ids", "_sent", "_skipped", "_stream")

    def __init__(self, backend: Any, skipped: frozenset[int]) -> None:
        self._backend = backend
        self._skipped = skipped
        self._stream = DecodeStream(skip_special_tokens=False)
        self._ids: list[int] = []
        self._sent = 0

    def step(self, token_id: int) -> str:
        if token_id in self._skipped or self._backend.id_to_token(token_id) is None:
            return ""
        self._ids.append(token_id)
        text: str = self._stream.step(self._backend, token_id) or ""
        self._sent += len(text)
        return text

    def finish(self) -> str:
        whole: str = self._backend.decode(self._ids, skip_special_tokens=False)
        return whole[self._sent:]
