"""A device that remembers what every KV slot holds, and a "model" whose outputs are known without any scheduler.

`ToyDevice` does what a GPU does with a batch, with one number a slot instead of K and V: the digest of the token's whole
history. So a stale table, a lost copy-on-write, a block shared across salts or freed too early reads as a wrong number.
"""

from __future__ import annotations

from workstation.architecture import KVGroup
from workstation.engine.batch import Batch, Chunk, Sample, StepResult
from workstation.engine.request import EngineRequest, TokenLogprobs
from workstation.engine.sequence import Sequence

EOS = 0
VOCAB = 8
GROUPS = {
    "full": (KVGroup("full", (0, 1)),),
    "mixed": (KVGroup("full", (0,)), KVGroup("sliding", (1,), window=5)),
    "sliding": (KVGroup("sliding", (0, 1), window=6),),
}
Slot = tuple[int, int]  # KV group, history


def extend(history: int, token: int) -> int:
    """The digest of a history with one more token (a 64-bit multiplicative step)."""
    return ((history ^ (token + 1)) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & (2**64 - 1)


def histories(salt: str, tokens: list[int]) -> list[int]:
    found, history = [], len(salt) + 1
    for token in tokens:
        history = extend(history, token)
        found.append(history)
    return found


def next_token(history: int, index: int) -> int:
    """The toy model's choice for sample `index`; EOS about one time in sixteen."""
    bits = extend(history, 1000 + index) >> 40
    return EOS if bits % 16 == 0 else 1 + bits // 16 % (VOCAB - 1)


def expected_output(request: EngineRequest, index: int, max_len: int) -> tuple[list[int], str]:
    """What a sample must produce whatever the scheduler does: its tokens and its finish reason."""
    params, prompt = request.params, request.prompt_token_ids
    room = max_len - len(prompt)
    limit = room if params.max_tokens is None else min(params.max_tokens, room)
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else request.eos_token_ids)}
    history, output = histories(request.cache_salt, prompt)[-1], list[int]()
    while True:
        output.append(next_token(history, index))
        history = extend(history, output[-1])
        if output[-1] in stops and len(output) > params.min_tokens:
            return output, "stop"
        if len(output) >= limit:
            return output, "length"


def beam_scores(history: int) -> list[tuple[float, int]]:
    """The toy model's (log-probability, token) pairs for the next token, best first."""
    return sorted(((-1.0 - (extend(history, 500 + token) >> 44) / 2**19, token) for token in range(VOCAB)), reverse=True)


def expected_beams(request: EngineRequest, max_len: int) -> list[list[int]]:
    """Beam search by its definition, over plain lists: the outputs, best first."""
    beam = request.beam
    assert beam is not None
    limit = min(beam.max_tokens, max_len - len(request.prompt_token_ids))
    stops = {*request.params.stop_token_ids, *(() if beam.ignore_eos else request.eos_token_ids)}
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    done: list[tuple[float, list[int]]] = []
    for length in range(1, limit + 1):
        grown = [(total + value, [*output, token]) for total, output in live
                 for value, token in beam_scores(histories(request.cache_salt, request.prompt_token_ids + output)[-1])
                 [:2 * beam.beam_width]]
        done += [item for item in grown if item[1][-1] in stops]
        live = sorted((item for item in grown if item[1][-1] not in stops), reverse=True)[:beam.beam_width]
        scores = sorted((total / len(output) ** beam.length_penalty for total, output in done), reverse=True)
        if length == limit:
            done += live
        if not live or (len(scores) >= beam.beam_width
                        and live[0][0] / limit ** beam.length_penalty <= scores[beam.beam_width - 1]):
            break
    done.sort(key=lambda item: item[0] / len(item[1]) ** beam.length_penalty, reverse=True)
    return [output for _, output in done[:beam.beam_width]]


class ToyDevice:
    """Executes batches in launch order: copies, table updates, all writes of a step, then all reads."""

    def __init__(self, num_blocks: int, block_size: int, groups: tuple[KVGroup, ...], max_rows: int) -> None:
        self.size = block_size
        self.groups = groups
        self.memory: list[list[Slot | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.tables: list[list[dict[int, int]]] = [[{} for _ in range(max_rows)] for _ in groups]
        self.last_token = [-1] * max_rows
        self.poisoned: set[Sequence] = set()

    def launch(self, batch: Batch, broken: set[int]) -> StepResult:
        """broken: places among the samples whose logits are not finite."""
        for source, target in batch.copies:
            self.memory[target] = list(self.memory[source])
        written: set[tuple[int, int]] = set()
        truths = []
        for chunk in batch.chunks:
            for group, entry, block in chunk.table_updates:
                self.tables[group][chunk.row][entry] = block
            truths.append(self._write(chunk, written))
        for chunk, truth in zip(batch.chunks, truths, strict=True):
            self._read(chunk, truth)
        return self._sample(batch, truths, broken)

    def _write(self, chunk: Chunk, written: set[tuple[int, int]]) -> list[int]:
        seq = chunk.seq
        tokens = [*seq.tokens, self.last_token[chunk.row]] if chunk.pending else seq.tokens
        assert chunk.count > 0 and chunk.start + chunk.count <= len(tokens), "a chunk beyond the known tokens"
        truth = histories(seq.request.request.cache_salt, tokens)
        if chunk.pending and seq not in self.poisoned:
            assert tokens[-1] == next_token(truth[-2], seq.index), "the row's last token is not this sequence's"
        for group in range(len(self.groups)):
            for place in range(chunk.start, chunk.start + chunk.count):
                block, offset = self.tables[group][chunk.row].get(place // self.size, 0), place % self.size
                assert block != 0, "a token is written to the null block"
                assert (block, offset) not in written, "two tokens of a step are written to one slot"
                written.add((block, offset))
                self.memory[block][offset] = (group, truth[place])
        return truth

    def _read(self, chunk: Chunk, truth: list[int]) -> None:
        for group, shape in enumerate(self.groups):
            first = max(0, chunk.start - shape.window + 1) if shape.window else 0
            table = self.tables[group][chunk.row]
            for place in range(first, chunk.start + chunk.count):
                held = self.memory[table.get(place // self.size, 0)][place % self.size]
                assert held == (group, truth[place]), f"{chunk.seq.request.request_id} reads a foreign key at {place}"

    def _sample(self, batch: Batch, truths: list[list[int]], broken: set[int]) -> StepResult:
        rows = [sample.row for sample in batch.samples]
        assert len(set(rows)) == len(rows), "two samples share a row"
        tokens, logprobs = [], []
        for place, sample in enumerate(batch.samples):
            chunk = batch.chunks[sample.chunk]
            assert sample.position == chunk.start + chunk.count, "a sample is not at its chunk's end"
            history = truths[sample.chunk][sample.position - 1]
            token = next_token(history, sample.seq.index)
            if place in broken:
                token = 0
                self.poisoned.add(sample.seq)
            self.last_token[sample.row] = token
            tokens.append(token)
            logprobs.append(self._beam_candidates(sample, history, token))
        prompts = {number: rows for number, chunk in enumerate(batch.chunks) if (rows := _prompt_rows(chunk))}
        return StepResult(tokens, [place not in broken for place in range(len(tokens))], logprobs, prompts)

    def _beam_candidates(self, sample: Sample, history: int, token: int) -> TokenLogprobs | None:
        beam = sample.seq.request.request.beam
        if beam is None:
            return None
        scores = beam_scores(history)[:2 * beam.beam_width]
        return TokenLogprobs([token, *(other for _, other in scores)], [0.0, *(value for value, _ in scores)], 1)


def _prompt_rows(chunk: Chunk) -> list[TokenLogprobs]:
    request = chunk.seq.request.request
    if request.params.prompt_logprobs is None:
        return []
    targets = request.prompt_token_ids[chunk.start + 1:chunk.start + 1 + chunk.count]
    return [TokenLogprobs([target], [-1.0], 1) for target in targets]
