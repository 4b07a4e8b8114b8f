"""llguidance, imported when the first grammar comes: a model's vocabulary and its compiled grammars."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from tokenizers import AddedToken

from workstation.errors import InvalidRequestError
from workstation.grammar.lark import missing_library, translated
from workstation.grammar.matcher import Matcher, readable
from workstation.text.folder import read_folder

Result = TypeVar("Result")
END = "<|ws end of answer|>"  # the one end that the library is told of; what ends an answer, each request says itself
CACHE_BYTES = 32 * 1024 * 1024
LEAST_BYTES = 64 * 1024  # a compiled grammar's own size is not told
MAX_LEXER_STATES = 50_000  # 1 to 2 KB each, made as an answer needs them, by each matcher for itself


class Vocabulary:
    """The tokens of one model, with what each adds to a text as bytes. Making one takes a second or more for 128,000 tokens,
    in which no other thread of the process runs.

    Args:
        folder: the model's, for its tokenizer.  width: of the logits; ids that are no tokens are never allowed.

    Raises InvalidRequestError when llguidance is missing, or cannot read the tokenizer.
    """

    def __init__(self, folder: str | Path, width: int) -> None:
        try:
            import llguidance
        except ImportError:
            raise missing_library("structured_outputs") from None
        backend = read_folder(Path(folder)).backend
        self._end = int(backend.get_vocab_size(with_added_tokens=True))
        backend.add_special_tokens([AddedToken(END, special=True, normalized=False)])
        size = max(width, self._end + 1)
        self._words = -(-size // 32)
        self._library = llguidance
        self._tokenizer = _guarded(lambda: llguidance.LLTokenizer(backend.to_str(), n_vocab=size, eos_token=self._end),
                                   "the model's tokenizer cannot be used for structured output")
        self._limits = llguidance.LLParserLimits(verbose_errors=False, max_lexer_states=MAX_LEXER_STATES)

    def compile(self, source: str) -> Matcher:
        """A matcher at the start of an answer. May take very long or need a deep stack for a hostile grammar.

        Raises InvalidRequestError saying what the grammar lacks.
        """
        whole = translated(source)
        inner = _guarded(lambda: self._library.LLMatcher(self._tokenizer, whole, log_level=0, limits=self._limits),
                         "the grammar cannot be compiled")
        matcher = Matcher(inner, self._end, self._words)
        if matcher.fault is None:
            matcher.fill(np.empty(matcher.words, dtype=np.int32))
        if matcher.fault is not None:
            raise InvalidRequestError(matcher.fault, param="structured_outputs")
        if matcher.complete and not matcher.accepting:
            raise InvalidRequestError("the grammar allows no answer at all", param="structured_outputs")
        return matcher


class Grammars:
    """Compiled grammars of one vocabulary, the least used forgotten first. For one thread at a time."""

    def __init__(self, vocabulary: Vocabulary, limit: int = CACHE_BYTES) -> None:
        self._vocabulary, self._limit, self._held = vocabulary, limit, 0
        self._kept: OrderedDict[str, Matcher] = OrderedDict()

    def get(self, source: str) -> Matcher:
        """Compiled now or before. Raises as `Vocabulary.compile` does."""
        found = self._kept.get(source)
        if found is None:
            found = self._kept[source] = self._vocabulary.compile(source)
            self._held += _cost(source)
            while self._held > self._limit and len(self._kept) > 1:
                dropped, _ = self._kept.popitem(last=False)
                self._held -= _cost(dropped)
        self._kept.move_to_end(source)
        return found


def _cost(source: str) -> int:
    return LEAST_BYTES + 8 * len(source)


def _guarded(work: Callable[[], Result], what: str) -> Result:
    """Run library code: its panics are no Exceptions, and no fault of the process."""
    try:
        return work()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InvalidRequestError(f"{what}: {readable(str(error))}", param="structured_outputs") from None
