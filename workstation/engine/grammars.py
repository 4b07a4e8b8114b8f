"""GrammarDesk: grammars are compiled beside the loop; a request waits here until its own is ready."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any, TypeVar

from workstation.engine.request import EngineRequest, Grammar
from workstation.errors import InvalidRequestError, WorkstationError
from workstation.grammar.library import Grammars, Vocabulary
from workstation.grammar.matcher import Bits, Matcher

Result = TypeVar("Result")
MANY = 4  # masks from which waking threads is worth its cost
MOST_THREADS = 6  # more make a step's masks slower: they wait for each other's memory
STACK_BYTES = 64 * 1024 * 1024  # the compiler recurses; the server has tried each grammar in a process with far less


class GrammarDesk:
    """Makes matchers for requests with a grammar, in a thread of its own.

    Args:
        folder: the model's, for its tokenizer.  width: of the logits.
    Attributes:
        used: a grammar has been compiled.  threads: that make the masks of a step.
    """

    def __init__(self, folder: str, width: int) -> None:
        self.used = False
        self.threads = min(len(os.sched_getaffinity(0)) - 1, MOST_THREADS)
        self._executor: Any = None
        self._folder, self._width = folder, width
        self._thread: ThreadPoolExecutor | None = None
        self._compiled: Grammars | None = None
        self._waiting: dict[str, tuple[EngineRequest, Future[Matcher]]] = {}

    def prepare(self) -> None:
        """Load the library and the vocabulary now rather than in the middle of others' answers; without the library, later
        requests say so."""
        self._run(self._grammars)

    def compile(self, grammar: Grammar) -> None:
        """Compile now what a request will bring. Raises InvalidRequestError saying what the grammar lacks."""
        self._run(lambda: self._grammars().get(grammar.source)).result()

    def submit(self, request: EngineRequest) -> None:
        """Begin to compile a request's grammar. Raises InvalidRequestError for what a grammar cannot be combined with."""
        if request.beam is not None:
            raise InvalidRequestError("structured output cannot be combined with beam search", param="structured_outputs")
        if not any(0 <= token < self._width for token in request.eos_token_ids):
            raise InvalidRequestError("structured output needs a token that ends an answer, and this model names none",
                                      param="structured_outputs")
        assert request.grammar is not None
        source = request.grammar.source
        self._waiting[request.request_id] = request, self._run(lambda: self._grammars().get(source))

    def ready(self) -> list[tuple[EngineRequest, Matcher | WorkstationError]]:
        """Requests whose grammar has been compiled since the last call, or why it could not be, in the order they came."""
        found: list[tuple[EngineRequest, Matcher | WorkstationError]] = []
        while self._waiting:
            request, future = next(iter(self._waiting.values()))
            if not future.done():
                break
            del self._waiting[request.request_id]
            error = future.exception()
            if error is None:
                self.used = True
                found.append((request, future.result()))
            elif isinstance(error, WorkstationError):
                found.append((request, error))
            else:
                raise error
        return found

    def drop(self, request_id: str) -> bool:
        """Forget a request that waits here; False when none does."""
        return self._waiting.pop(request_id, None) is not None

    def matcher(self, request: EngineRequest, compiled: Matcher) -> Matcher:
        """One for a sample of the request."""
        assert request.grammar is not None
        count = request.grammar.matched
        return compiled.fork(request.eos_token_ids, request.prompt_token_ids[-count:] if count else [])

    def wait(self, seconds: float) -> None:
        """Until the next grammar is ready, for so long at most."""
        if self._waiting:
            wait_for([next(iter(self._waiting.values()))[1]], timeout=seconds)

    def fill(self, matchers: Sequence[Matcher], bits: Bits, hold_ends: Sequence[bool]) -> None:
        """Write what may follow each, as `Matcher.fill` does: bits [M, words] int32. Many go to several threads."""
        if len(matchers) < MANY or self.threads < 2:
            for row, (matcher, hold_end) in enumerate(zip(matchers, hold_ends, strict=True)):
                matcher.fill(bits[row], hold_end=hold_end)
            return
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor(self.threads)
        Matcher.fill_all(self._executor, matchers, bits, hold_ends)

    def __len__(self) -> int:
        return len(self._waiting)

    def _run(self, work: Callable[[], Result]) -> Future[Result]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
            before = threading.stack_size(STACK_BYTES)
            try:
                return self._thread.submit(work)  # which starts the thread
            finally:
                threading.stack_size(before)
        return self._thread.submit(work)

    def _grammars(self) -> Grammars:
        """In the desk's thread alone."""
        if self._compiled is None:
            self._compiled = Grammars(Vocabulary(self._folder, self._width))
        return self._compiled
