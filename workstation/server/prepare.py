"""From a validated body to engine requests: prompt ids, limits, sampling. Runs in a worker thread, off the event loop."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import msgspec

from workstation.engine.client import EngineClient
from workstation.engine.request import BeamSearchParams, EngineRequest, SamplingParams
from workstation.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError
from workstation.server.body import show
from workstation.server.ids import fresh_id
from workstation.server.options import ServedModel, ServerOptions
from workstation.server.schemas import PromptRequest, SamplingRequest

MAX_SALT_BYTES = 128
MAX_LABEL_CHARS = 64
MAX_PRIORITY = 2**31 - 1
BYTES_PER_TOKEN = 8
MIN_TEXT_CAP = 65536
_SAMPLING_FIELDS = (
    "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p", "seed",
    "stop", "stop_token_ids", "bad_words", "ignore_eos", "min_tokens", "skip_special_tokens", "spaces_between_special_tokens",
    "include_stop_str_in_output", "logit_bias", "allowed_token_ids", "skip_reading_prefix_cache",
)
_BEAM_FIELDS = frozenset({"n", "temperature", "ignore_eos", "stop_token_ids", "skip_special_tokens", "seed",
                          "spaces_between_special_tokens", "include_stop_str_in_output"})


@dataclass(frozen=True, slots=True)
class Service:
    """What every route needs: the engine, the model it serves, the server's options."""

    engine: EngineClient
    model: ServedModel
    options: ServerOptions

    @property
    def window(self) -> int:
        return self.engine.info.max_model_len or self.model.window

    @property
    def logits_width(self) -> int:
        return self.engine.info.logits_width or self.model.tokenizer.vocab_size

    def check_model(self, name: str | None) -> str:
        """The name to answer with. Raises ModelNotFoundError."""
        if name is None or name == "":
            return self.model.name
        if name not in self.model.names:
            raise ModelNotFoundError(f"the model {show(name)} does not exist; this server serves {self.model.name!r}",
                                     param="model")
        return name

    def check_text(self, length: int, param: str) -> None:
        """Refuse text so long that it could not fit, before time is spent on tokenising it. `length` in characters."""
        cap = max(BYTES_PER_TOKEN * self.window, MIN_TEXT_CAP)
        if length > cap:
            raise ContextLengthError(f"This model's maximum context length is {self.window} tokens. However, your {param} "
                                     f"holds {length} characters, more than the {cap} that are tokenised.", param=param,
                                     tokens=length // BYTES_PER_TOKEN, limit=self.window)

    def check_ids(self, ids: list[Any], param: str) -> list[int]:
        """Prompt ids the model has an embedding for. Raises InvalidRequestError."""
        width = self.logits_width
        try:
            checked: list[int] = msgspec.convert(ids, _ids_below(width))
            return checked
        except msgspec.ValidationError:
            pass
        for item in ids:
            if type(item) is not int:
                raise InvalidRequestError(f"{param} must hold token ids, got {show(item)}", param=param)
        bad = next(item for item in ids if not 0 <= item < width)
        raise InvalidRequestError(f"{param} must hold token ids from 0 to {width - 1}, got {show(bad)}", param=param)


@lru_cache(maxsize=4)
def _ids_below(width: int) -> Any:
    """The type of a list of token ids, for msgspec, which checks 1,000 of them in some microseconds."""
    return list[Annotated[int, msgspec.Meta(ge=0, lt=width)]]


def prompt_items(value: Any, param: str) -> list[Any]:
    """A string, a list of strings, a list of ids or a list of lists of ids → a list of strings or of lists."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise InvalidRequestError(f"{param} must be a non-empty string, list of strings, list of token ids, or list of lists "
                                  f"of token ids, got {show(value)}", param=param)
    if not isinstance(value[0], (str, list)):
        return [value]
    other = next((item for item in value if type(item) is not type(value[0])), None)
    if other is not None:
        raise InvalidRequestError(f"{param} mixes kinds: it begins with {show(value[0])} and holds {show(other)}", param=param)
    return value


def prompt_ids(service: Service, item: str | list[Any], param: str, *, add_special: bool) -> list[int]:
    """Checked ids of one of `prompt_items`."""
    if isinstance(item, str):
        service.check_text(len(item), param)
        item = service.model.tokenizer.encode(item, add_special_tokens=add_special)
    return service.check_ids(item, param)


def truncated(service: Service, ids: list[int], keep: int | None, max_tokens: int | None) -> list[int]:
    """The last `keep` ids; -1 keeps what leaves room for max_tokens."""
    if keep is None:
        return ids
    if keep == -1:
        keep = max(service.window - (max_tokens or 1), 1)
    if not 1 <= keep <= service.window:
        raise InvalidRequestError(f"truncate_prompt_tokens must be -1 or between 1 and {service.window}, got {show(keep)}",
                                  param="truncate_prompt_tokens")
    return ids[-keep:]


def room(service: Service, prompt_tokens: int, max_tokens: int | None, default: int | None, param: str) -> int:
    """The max_tokens to run with. `default` None means what the window leaves. Raises ContextLengthError."""
    window = service.window
    left = window - prompt_tokens
    configured = service.model.default_sampling.get("max_tokens")
    if prompt_tokens == 0:
        raise InvalidRequestError(f"{param} is empty; send at least one token", param=param)
    if left < 1:
        raise ContextLengthError(f"This model's maximum context length is {window} tokens. However, your {param} resulted in "
                                 f"{prompt_tokens} tokens, which leaves no room for an answer. Please reduce the length of the "
                                 f"{param}.", param=param, tokens=prompt_tokens, limit=window)
    if max_tokens is None:
        wanted = configured if configured is not None else default
        return left if wanted is None else min(int(wanted), left)
    if max_tokens > left:
        raise ContextLengthError(f"This model's maximum context length is {window} tokens. However, you requested "
                                 f"{prompt_tokens + max_tokens} tokens ({prompt_tokens} in the {param}, {max_tokens} in the "
                                 f"completion). Please reduce the length of the {param} or completion.", param=param,
                                 tokens=prompt_tokens + max_tokens, limit=window)
    return max_tokens


def sampling_params(service: Service, body: SamplingRequest, *, max_tokens: int | None, logprobs: int | None,
                    prompt_logprobs: int | None) -> SamplingParams:
    """Request over the model's defaults over the API's. Raises InvalidRequestError naming field, value and limit."""
    defaults = service.model.default_sampling
    values = {name: getattr(body, name) for name in _SAMPLING_FIELDS if getattr(body, name) is not None}
    merged = {**{name: defaults[name] for name in _SAMPLING_FIELDS if name in defaults}, **values}
    params = SamplingParams(**merged, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    if params.bad_words:
        try:
            params = params.clone(bad_word_ids=service.model.tokenizer.bad_word_ids(params.bad_words))
        except InvalidRequestError as error:
            raise InvalidRequestError(f"bad_words: {error.message}", param="bad_words") from None
    params.check_token_ids(service.logits_width)
    return params


def beam_params(body: SamplingRequest, max_tokens: int, logprobs: int | None) -> BeamSearchParams | None:
    """Beam search, with everything it does not use refused by name."""
    if not body.use_beam_search:
        if body.length_penalty is not None and body.length_penalty != 1.0:
            raise InvalidRequestError("length_penalty is only used with use_beam_search", param="length_penalty")
        return None
    if body.stream:
        raise InvalidRequestError("beam search cannot be streamed: beams change until the end", param="stream")
    used = [name for name in _SAMPLING_FIELDS if name not in _BEAM_FIELDS and getattr(body, name) not in (None, [], {}, False)]
    used += ["logprobs"] * (logprobs is not None) + ["prompt_logprobs"] * (body.prompt_logprobs is not None)
    if used:
        raise InvalidRequestError(f"{used[0]} cannot be combined with use_beam_search", param=used[0])
    penalty = body.length_penalty if body.length_penalty is not None else 1.0
    return BeamSearchParams(beam_width=body.n if body.n is not None else 1, max_tokens=max_tokens,
                            ignore_eos=bool(body.ignore_eos), temperature=body.temperature or 0.0, length_penalty=penalty)


def engine_requests(service: Service, body: PromptRequest, public_id: str, prompts: list[list[int]],
                    params: list[SamplingParams], beams: list[BeamSearchParams | None], label: str) -> list[EngineRequest]:
    """One engine request a prompt."""
    now = time.monotonic()
    salt, priority = cache_salt(body), request_priority(service, body)
    ids = [public_id] if len(prompts) == 1 else [f"{public_id}-{index}" for index in range(len(prompts))]
    return [
        EngineRequest(ids[index], prompt, params[index], list(service.model.eos_token_ids), beams[index], priority, salt, now,
                      label)
        for index, prompt in enumerate(prompts)
    ]


def check_fan_out(service: Service, samples: int, prompts: int) -> None:
    limit = service.options.max_sequences_per_request
    if samples * prompts > limit:
        param = "n" if samples > 1 else "prompt"
        raise InvalidRequestError(f"n × prompts is {samples * prompts}; the limit is {limit}", param=param)


def cache_salt(body: PromptRequest) -> str:
    salt = body.cache_salt
    if salt is None:
        return ""
    if not salt or len(salt.encode(errors="surrogatepass")) > MAX_SALT_BYTES:
        raise InvalidRequestError(f"cache_salt must be a non-empty string of at most {MAX_SALT_BYTES} bytes, got {show(salt)}",
                                  param="cache_salt")
    return salt


def request_priority(service: Service, body: PromptRequest) -> int:
    priority = body.priority or 0
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise InvalidRequestError(f"priority must be between {-MAX_PRIORITY} and {MAX_PRIORITY}, got {show(priority)}",
                                  param="priority")
    if priority and not service.options.priority_scheduling:
        raise InvalidRequestError("priority needs a server started with the priority scheduling policy", param="priority")
    return priority


def clean_label(client: str | None, user: str | None) -> str:
    """Who asked, for the dashboard: the X-Client header, else the `user` field; printable and short."""
    text = client or user or ""
    return "".join(char for char in text[:MAX_LABEL_CHARS] if char.isprintable())


def new_id(prefix: str) -> str:
    """`chatcmpl-…`, or `resp_…` for a prefix that brings its own sign."""
    return f"{prefix}{fresh_id()}" if prefix.endswith("_") else f"{prefix}-{fresh_id()}"
