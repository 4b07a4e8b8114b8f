"""What crosses the engine's border: requests, sampling parameters, events. Plain slotted data, no torch, no sockets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from workstation.errors import InvalidRequestError
from workstation.grammar.params import StructuredOutputsParams

FinishReason = Literal["stop", "length", "abort", "error"]
Pooling = Literal["last", "mean"]
Stage = Literal["weights", "kernels", "graphs"]  # of an engine's start: read, compiled, captured

MAX_N = 64
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_BYTES = 4096
MAX_TOKEN_LIST = 1024
MAX_SEED = 2**63 - 1
GREEDY_TEMPERATURE = 1e-5
STEP_TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def _refuse(name: str, value: object, limit: str) -> InvalidRequestError:
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return InvalidRequestError(f"{name} must be {limit}, got {shown}", param=name)


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _refuse(name, value, "a number")
    inside = low < value <= high if open_low else low <= value <= high
    if not (math.isfinite(value) and inside):
        raise _refuse(name, value, f"{'above' if open_low else 'at least'} {low:g} and at most {high:g}")
    return float(value)


def _integer(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _refuse(name, value, "an integer")
    if not low <= value <= high:
        raise _refuse(name, value, f"between {low} and {high}")
    return value


def _token_list(name: str, value: object) -> list[int]:
    if not isinstance(value, (list, tuple)):
        raise _refuse(name, value, "a list of token ids")
    if len(value) > MAX_TOKEN_LIST:
        raise InvalidRequestError(f"{name} holds {len(value)} entries; the limit is {MAX_TOKEN_LIST}", param=name)
    return [_integer(name, item, 0, 2**31 - 1) for item in value]


@dataclass(slots=True)
class SamplingParams:
    """How one request is sampled; vLLM's names and meanings.

    `validate()` runs on construction and raises InvalidRequestError naming the field, the value and the limit.
    Token ids are checked against the model's logits width by `check_token_ids`, at admission.

    Attributes:
        n: samples of one prompt, 1…64; they share the prompt's blocks.
        temperature: below 1e-5 means greedy. top_k: 0 or -1 keeps all. logprobs: extra top entries, -1 is refused.
        max_tokens: None means "what the context leaves". seed: None draws from the engine's own seed.
        bad_words: filled into `bad_word_ids` (token sequences) by the text layer, which owns the tokenizer.
        structured_outputs: likewise made into the request's grammar; the engine reads that alone.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    bad_words: list[str] = field(default_factory=list)
    bad_word_ids: list[list[int]] = field(default_factory=list)
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: list[int] | None = None
    skip_reading_prefix_cache: bool = False
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self.normalise()
        self.validate()

    def normalise(self) -> None:
        """Accept the shorthands vLLM accepts: a single stop string, None lists, seed -1, top_k -1."""
        if self.stop is None:
            self.stop = []
        elif isinstance(self.stop, str):
            self.stop = [self.stop]
        for name in ("stop_token_ids", "bad_words", "bad_word_ids"):
            if getattr(self, name) is None:
                setattr(self, name, [])
        if self.logit_bias is None:
            self.logit_bias = {}
        if self.seed == -1:
            self.seed = None
        if self.top_k == -1:
            self.top_k = 0

    def validate(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        self.presence_penalty = _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        self.frequency_penalty = _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        self.repetition_penalty = _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        self.temperature = _number("temperature", self.temperature, 0.0, 100.0)
        self.top_p = _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        self.min_p = _number("min_p", self.min_p, 0.0, 1.0)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        if self.seed is not None:
            _integer("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _refuse("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens",
                     "include_stop_str_in_output", "skip_reading_prefix_cache"):
            if not isinstance(getattr(self, name), bool):
                raise _refuse(name, getattr(self, name), "true or false")
        self._validate_strings("stop")
        self._validate_strings("bad_words")
        self.stop_token_ids = _token_list("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _token_list("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise _refuse("allowed_token_ids", [], "null or a list of at least one token id")
        self._validate_logit_bias()
        if len(self.bad_word_ids) > MAX_TOKEN_LIST:
            raise InvalidRequestError(f"bad_words holds {len(self.bad_word_ids)} sequences; the limit is "
                                      f"{MAX_TOKEN_LIST}", param="bad_words")
        self.bad_word_ids = [_token_list("bad_word_ids", word) for word in self.bad_word_ids]
        if not isinstance(self.structured_outputs, (StructuredOutputsParams, type(None))):
            raise _refuse("structured_outputs", self.structured_outputs, "StructuredOutputsParams or None")

    def _validate_strings(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise _refuse(name, value, "a string or a list of strings")
        if len(value) > MAX_STOP_STRINGS:
            raise InvalidRequestError(f"{name} holds {len(value)} strings; the limit is {MAX_STOP_STRINGS}", param=name)
        for item in value:
            if not item or len(item.encode(errors="surrogatepass")) > MAX_STOP_BYTES:
                raise _refuse(name, item, f"non-empty strings of at most {MAX_STOP_BYTES} bytes")

    def _validate_logit_bias(self) -> None:
        if not isinstance(self.logit_bias, dict):
            raise _refuse("logit_bias", self.logit_bias, "an object from token id to bias")
        if len(self.logit_bias) > MAX_TOKEN_LIST:
            raise InvalidRequestError(f"logit_bias holds {len(self.logit_bias)} entries; the limit is "
                                      f"{MAX_TOKEN_LIST}", param="logit_bias")
        clean: dict[int, float] = {}
        for key, value in self.logit_bias.items():
            if isinstance(key, str):
                if not key.isascii() or not key.isdigit():
                    raise _refuse("logit_bias", key, "an object whose keys are token ids")
                key = int(key)
            clean[_integer("logit_bias", key, 0, 2**31 - 1)] = _number("logit_bias", value, -100.0, 100.0)
        self.logit_bias = clean

    def check_token_ids(self, logits_width: int) -> None:
        """Refuse ids the model has no logit for. Raises InvalidRequestError."""
        listed: list[tuple[str, list[int]]] = [
            ("stop_token_ids", self.stop_token_ids), ("logit_bias", list(self.logit_bias)),
            ("allowed_token_ids", self.allowed_token_ids or []),
            ("bad_words", [token for word in self.bad_word_ids for token in word]),
        ]
        for name, ids in listed:
            for token in ids:
                if token >= logits_width:
                    raise _refuse(name, token, f"token ids below {logits_width}")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    def clone(self, **changes: Any) -> SamplingParams:
        """A validated copy with some fields changed."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return SamplingParams(**{**values, **changes})


@dataclass(slots=True)
class BeamSearchParams:
    """Beam search; score = cumulative log-probability / length ** length_penalty.

    A temperature above 0 divides the logits before the log-probabilities are taken; 0 leaves them.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        _integer("beam_width", self.beam_width, 1, MAX_N)
        _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        self.temperature = _number("temperature", self.temperature, 0.0, 100.0)
        self.length_penalty = _number("length_penalty", self.length_penalty, -10.0, 10.0)


@dataclass(slots=True)
class Grammar:
    """What the tokens of an answer must spell, each sample for itself.

    Attributes:
        source: a grammar for llguidance.  matched: so many of the prompt's last tokens are the grammar's first.
    """

    source: str
    matched: int = 0


@dataclass(slots=True)
class EngineRequest:
    """One prompt on its way into the engine.

    Attributes:
        request_id: made by the server, unique.  prompt_token_ids: at least one id, all below the logits width.
        params: for a beam request only max_tokens, ignore_eos and stop_token_ids are read.
        eos_token_ids: from generation_config.json; they end a sequence unless params.ignore_eos.
        priority: lower runs earlier under the priority policy.  cache_salt: prefix blocks are shared inside one salt only.
        arrival: time.monotonic() in seconds.  label, route: who asked and where, for the dashboard.
        grammar: every sample spells it and ends where it ends. Its end is an EOS token, whatever `ignore_eos` and `min_tokens`
            say; those hold the end back only while the grammar can go on.
        pooling: nothing is sampled; the last token's final hidden state, or the mean of all tokens', is the answer. Of params,
            n must be 1 and max_tokens is not read.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    eos_token_ids: list[int] = field(default_factory=list)
    beam: BeamSearchParams | None = None
    priority: int = 0
    cache_salt: str = ""
    arrival: float = 0.0
    label: str = ""
    route: str = ""
    grammar: Grammar | None = None
    pooling: Pooling | None = None


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: the chosen (or given) token first, then the top ones.

    Attributes:
        token_ids: [1 + k] ids.  logprobs: [1 + k] natural logarithms of the *raw* model distribution.
        rank: 1-based rank of the first token.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


@dataclass(slots=True)
class RequestTimes:
    """time.monotonic() seconds; 0.0 means "not yet"."""

    arrival: float = 0.0
    scheduled: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0


@dataclass(slots=True)
class TokenEvent:
    """New tokens of one sample of one request. A step sends at most one event a sample.

    Attributes:
        index: which of the request's n samples (or beams, best first).
        token_ids: the new tokens; a stop token or EOS that ended the sample is included.
        logprobs: one entry a new token when asked for.
        finish_reason: set on the sample's last event; stop_reason: the stop id that ended it (None for EOS).
        finished: the request's last event: no event follows. Exactly one event a request has it.
        prompt_logprobs: on the first event when asked for; entry 0 is None.
        num_cached_tokens: prompt tokens read from the prefix cache.  error: a sentence, with finish_reason "error".
        cumulative_logprob: of the whole sample, set for beams.
        plain: one token, and nothing the request's earlier events did not say: all that has to travel is the token.
        embedding: [H] float32 in little-endian bytes, on the only event of a request with pooling.
    """

    request_id: str
    index: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    finished: bool = False
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    cumulative_logprob: float | None = None
    times: RequestTimes | None = None
    num_preemptions: int = 0
    plain: bool = False
    embedding: bytes | None = None


@dataclass(slots=True)
class EngineInfo:
    """What a ready engine says about itself, once. plan, measured: bytes by part of the device's memory."""

    model: str = ""
    architecture: str = ""
    dtype: str = ""
    kv_cache_dtype: str = ""
    quantization: str = ""
    device: str = ""
    device_name: str = ""
    device_uuid: str = ""
    max_model_len: int = 0
    logits_width: int = 0
    hidden_size: int = 0
    num_blocks: int = 0
    block_size: int = 16
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    weight_bytes: int = 0
    kv_bytes: int = 0
    load_seconds: float = 0.0
    ready_seconds: float = 0.0
    plan: dict[str, int] = field(default_factory=dict)
    measured: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class EngineStats:
    """One picture of a live engine; counters run since its start.

    steps_by_tokens: steps of up to so many tokens, by STEP_TOKEN_BOUNDS, and of more.  tokens_of_steps: of all steps.
    """

    time: float = 0.0
    running: int = 0
    waiting: int = 0
    blocks_free: int = 0
    blocks_cached: int = 0
    blocks_held: int = 0
    blocks_total: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    evictions: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    step_seconds: float = 0.0
    step_tokens: int = 0
    step_prompt_tokens: int = 0
    kv_tokens_held: int = 0
    steps_by_tokens: list[int] = field(default_factory=lambda: [0] * (len(STEP_TOKEN_BOUNDS) + 1))
    tokens_of_steps: int = 0


__all__ = [
    "BeamSearchParams", "EngineInfo", "EngineRequest", "EngineStats", "FinishReason", "Grammar", "Pooling", "RequestTimes",
    "SamplingParams", "StructuredOutputsParams", "TokenEvent", "TokenLogprobs",
]
