"""Why did it miss? Each client's newest prompts, and where a new one leaves the nearest of them. Indices come out, never text.

A conversation that grows begins with all of its earlier prompt, whose blocks are still cached. One that differs earlier (a date
in the system prompt, an edited turn, tools in another order) loses everything after the first difference; this file says where.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import zip_longest
from threading import Lock
from typing import Any

import msgspec

from workstation.engine.request import EngineRequest
from workstation.server.job import Divergence, Job

PROMPTS_A_CLIENT = 8
MAX_CLIENTS = 128
MAX_BYTES = 16 << 20
REMEMBERED = 1024
TOKEN_BYTES = array("i").itemsize


def message_digests(messages: Sequence[dict[str, Any]]) -> tuple[bytes, ...]:
    """One short digest a message: tells which one differs without keeping any."""
    return tuple(blake2b(msgspec.msgpack.encode(message), digest_size=8).digest() for message in messages)


@dataclass(slots=True)
class _Prompt:
    """Token ids as an array's bytes: two are compared by the C library, not by a loop."""

    ids: bytes
    messages: tuple[bytes, ...]


class PrefixHistory:
    """The newest prompts by client and salt, bounded in clients, prompts and bytes. May be called from several threads.

    Args:
        block_size: tokens of a KV block; less than a block lost is no miss.
    """

    def __init__(self, block_size: int = 16, max_bytes: int = MAX_BYTES) -> None:
        self._block_size = block_size
        self._max_bytes = max_bytes
        self._clients: OrderedDict[tuple[str, str], deque[_Prompt]] = OrderedDict()
        self._found: OrderedDict[str, Divergence] = OrderedDict()
        self._lock = Lock()
        self.bytes = 0

    def admit(self, job: Job, client: str) -> None:
        """Set the job's `divergence`, and remember its prompts for those that follow."""
        readers = [request for request in job.requests if _reads_cache(request)]
        prompts = [_Prompt(array("i", request.prompt_token_ids).tobytes(), job.messages) for request in readers]
        with self._lock:
            for place, (request, prompt) in enumerate(zip(readers, prompts, strict=True)):
                found = self._compare(client, request.cache_salt, prompt)
                if found is not None:
                    found.prompt = place
                    job.divergence = job.divergence or found
                    self._note(request.request_id, found)
            for request, prompt in zip(readers, prompts, strict=True):
                self._remember(client, request.cache_salt, prompt)

    def of(self, request_id: str) -> Divergence | None:
        """What was found for one of the newest requests."""
        return self._found.get(request_id)

    def _note(self, request_id: str, found: Divergence) -> None:
        self._found[request_id] = found
        while len(self._found) > REMEMBERED:
            self._found.popitem(last=False)

    def _compare(self, client: str, salt: str, prompt: _Prompt) -> Divergence | None:
        """Where the prompt leaves the earlier one it shares most with; None when it holds all whole blocks of it."""
        best: _Prompt | None = None
        shared = -1
        for earlier in reversed(self._clients.get((client, salt), ())):
            common = _common(earlier.ids, prompt.ids)
            if common > shared:
                best, shared = earlier, common
        if best is None or shared * TOKEN_BYTES == len(prompt.ids):
            return None
        length = len(best.ids) // TOKEN_BYTES
        if shared // self._block_size >= length // self._block_size:
            return None
        pairs = enumerate(zip_longest(best.messages, prompt.messages))
        message = next((index for index, (theirs, ours) in pairs if theirs != ours), None)
        return Divergence(token=shared, message=message, earlier_tokens=length)

    def _remember(self, client: str, salt: str, prompt: _Prompt) -> None:
        if len(prompt.ids) > self._max_bytes:
            return
        kept = self._clients.setdefault((client, salt), deque())
        self._clients.move_to_end((client, salt))
        for earlier in [earlier for earlier in kept if prompt.ids.startswith(earlier.ids)]:
            kept.remove(earlier)  # the same conversation, grown
            self.bytes -= len(earlier.ids)
        kept.append(prompt)
        self.bytes += len(prompt.ids)
        if len(kept) > PROMPTS_A_CLIENT:
            self.bytes -= len(kept.popleft().ids)
        while self.bytes > self._max_bytes or len(self._clients) > MAX_CLIENTS:
            oldest = next(iter(self._clients))
            self.bytes -= len(self._clients[oldest].popleft().ids)
            if not self._clients[oldest]:
                del self._clients[oldest]


def _reads_cache(request: EngineRequest) -> bool:
    return not request.params.skip_reading_prefix_cache and request.params.prompt_logprobs is None


def _common(first: bytes, second: bytes) -> int:
    """Tokens that two prompts begin with alike: equal prefixes are bisected."""
    low, high = 0, min(len(first), len(second)) // TOKEN_BYTES
    one, two = memoryview(first), memoryview(second)
    while low < high:
        middle = (low + high + 1) // 2
        if one[low * TOKEN_BYTES:middle * TOKEN_BYTES] == two[low * TOKEN_BYTES:middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low
