"""`LLM`: the engine and the text layer in one process, with vLLM's names, arguments and outputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from workstation import gpu
from workstation.architecture import read_shape
from workstation.catalog import load_catalogue
from workstation.collector import calm_collector
from workstation.config import EngineConfig
from workstation.engine.request import (
    BeamSearchParams,
    EngineRequest,
    EngineStats,
    Grammar,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from workstation.engine.start import build_engine
from workstation.errors import ConfigError, EngineError, InvalidRequestError
from workstation.generation_config import read_generation_defaults
from workstation.hub import resolve_model
from workstation.outputs import BeamSearchOutput, BeamSearchSequence, CompletionOutput, Logprob, RequestOutput
from workstation.text.detokenizer import Detokenizer
from workstation.text.tokenizer import Tokenizer

Prompt = str | list[int] | Mapping[str, Any]
UNLIMITED_QUEUE = 2**31 - 1
_ENGINE_FIELDS = {item.name for item in fields(EngineConfig)} - {"model"}
# vLLM's arguments whose feature has one value here: (accepted values, why no other).
_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tensor_parallel_size": ((1,), "one GPU is used"),
    "pipeline_parallel_size": ((1,), "one GPU is used"),
    "trust_remote_code": ((False,), "code from model folders is never run"),
    "disable_log_stats": ((True, False), ""),
    "tokenizer_mode": (("auto",), "there is one tokenizer mode"),
    "cpu_offload_gb": ((0, 0.0), "weights stay on the device"),
    "swap_space": ((0, 0.0, 4, 4.0), "preempted requests are recomputed, never swapped"),
}


@dataclass(slots=True)
class _Sample:
    """One sample while it grows."""

    detokenizer: Detokenizer | None
    keep_stop: bool
    output: CompletionOutput
    text: list[str] = field(default_factory=list)

    def take(self, event: TokenEvent, name: Callable[[int], str | None]) -> None:
        """Add an event's tokens; text, tokens and logprobs are cut at a stop string."""
        if self.output.finish_reason is not None:
            return
        kept = len(event.token_ids)
        if self.detokenizer is not None:
            before = self.detokenizer.num_tokens
            hidden = event.finish_reason == "stop" and not self.keep_stop
            self.text.append(self.detokenizer.feed(event.token_ids[:-1] if hidden else event.token_ids))
            if event.finish_reason is not None:
                self.text.append(self.detokenizer.finish())
            if self.detokenizer.stopped is not None:
                kept = self.detokenizer.num_tokens - before
        self.output.token_ids += event.token_ids[:kept]
        if event.logprobs is not None and self.output.logprobs is not None:
            self.output.logprobs += [_logprobs(item, name) for item in event.logprobs[:kept]]
            self.output.cumulative_logprob = (self.output.cumulative_logprob or 0.0) + sum(
                item.logprobs[0] for item in event.logprobs[:kept])
        if self.detokenizer is not None and self.detokenizer.stopped is not None:
            self._end("stop", self.detokenizer.stopped)
        elif event.finish_reason is not None:
            self._end(event.finish_reason, event.stop_reason)

    def _end(self, reason: str, stop_reason: int | str | None) -> None:
        self.output.finish_reason, self.output.stop_reason = reason, stop_reason
        self.output.text = "".join(self.text)


class LLM:
    """A model, loaded and ready, for offline use.

    Args:
        model: a models.toml name, a folder or a Hugging Face id.  tokenizer: another folder or id to take the tokenizer from.
        skip_tokenizer_init: token ids in, token ids out.
        Others: EngineConfig's fields (dtype, max_model_len, gpu_memory_utilization, …) under vLLM's names.

    Raises:
        ConfigError naming an argument that is unknown or has not landed; any StartupError of the engine.
    """

    def __init__(self, model: str, *, tokenizer: str | None = None, skip_tokenizer_init: bool = False,
                 chat_template: str | None = None, revision: str | None = None, download_dir: str | None = None,
                 hf_token: str | None = None, **options: Any) -> None:
        settings = _engine_settings(options)
        entries = load_catalogue()
        found = resolve_model(model, entries, revision=revision, download_dir=download_dir, token=hf_token,
                              weights=settings.get("load_format") != "dummy")
        if settings.get("device", "auto") == "auto" and found.is_demo and not gpu.has_usable_gpu():
            settings["device"] = "cpu"  # only the demo goes to the CPU unasked
        settings.setdefault("max_num_queued_reqs", UNLIMITED_QUEUE)
        self._tokenizer: Tokenizer | None = None
        if not skip_tokenizer_init:
            source = found.folder if tokenizer is None else resolve_model(tokenizer, entries, weights=False).folder
            template = Path(chat_template).read_text() if chat_template and Path(chat_template).is_file() else chat_template
            self._tokenizer = Tokenizer.from_folder(source, chat_template=template)
        shape = read_shape(found.folder)
        sampling = found.entry.sampling if found.entry else None
        self._defaults = read_generation_defaults(found.folder, shape.eos_token_ids, sampling)
        self.engine = build_engine(EngineConfig(model=str(found.folder), **settings))
        self._count = 0

    # ── what people call ────────────────────────────────────────────────────────────────────────────────────────────

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ConfigError under skip_tokenizer_init."""
        if self._tokenizer is None:
            raise ConfigError("there is no tokenizer: skip_tokenizer_init was given", param="skip_tokenizer_init")
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams(**self._defaults.sampling)

    def get_metrics(self) -> EngineStats:
        return self.engine.stats()

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix."""
        self.engine.reset_prefix_cache()
        return True

    def generate(self, prompts: Prompt | Sequence[Prompt],
                 sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, use_tqdm: bool = True,
                 priority: Sequence[int] | None = None) -> list[RequestOutput]:
        """Complete prompts; outputs come in the order of the prompts.

        Args:
            prompts: a text, a list of token ids, {"prompt": …} or {"prompt_token_ids": …}, or a list of such.
            sampling_params: one for all or one each; None is the model's default.
        Raises:
            InvalidRequestError: before anything runs, naming the field.  EngineError: a request failed inside the engine.
        """
        many = _as_list(prompts)
        params = _one_each("sampling_params", sampling_params or self.get_default_sampling_params(), len(many))
        ranks = list(priority) if priority is not None else [0] * len(many)
        if len(ranks) != len(many):
            raise InvalidRequestError(f"priority holds {len(ranks)} entries for {len(many)} prompts", param="priority")
        requests, texts = [], []
        for prompt, given, rank in zip(many, params, ranks, strict=True):
            text, ids = self._tokens(prompt)
            texts.append(text)
            requests.append(self._request(ids, given, rank))
        return self._run(requests, texts, use_tqdm)

    def chat(self, messages: list[Any], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
             use_tqdm: bool = True, *, chat_template: str | None = None, add_generation_prompt: bool = True,
             continue_final_message: bool = False, tools: list[dict[str, Any]] | None = None,
             chat_template_kwargs: dict[str, Any] | None = None) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or several (a list of lists)."""
        if chat_template is not None:
            raise ConfigError("give chat_template to LLM(…), not to chat", param="chat_template")
        tokenizer = self.get_tokenizer()
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts: list[Prompt] = [tokenizer.encode_chat(
            [dict(message) for message in conversation], tools=tools, add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message, template_kwargs=chat_template_kwargs)
            for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm)

    def beam_search(self, prompts: Sequence[Prompt], params: BeamSearchParams) -> list[BeamSearchOutput]:
        """Beam search over each prompt; beams share the prompt's blocks."""
        requests, texts = [], []
        for prompt in prompts:
            text, ids = self._tokens(prompt)
            texts.append(text)
            greedy = SamplingParams(temperature=0.0, max_tokens=params.max_tokens, n=params.beam_width,
                                    ignore_eos=params.ignore_eos)
            request = self._request(ids, greedy, 0)
            request.beam = params
            requests.append(request)
        found = []
        for output in self._run(requests, texts, False):
            found.append(BeamSearchOutput([BeamSearchSequence(
                output.prompt_token_ids + beam.token_ids, beam.text if self._tokenizer else None,
                beam.cumulative_logprob or 0.0, beam.finish_reason) for beam in output.outputs]))
        return found

    # ── running ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _tokens(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if prompt.get("prompt_token_ids") is not None:
                return prompt.get("prompt"), list(prompt["prompt_token_ids"])
            if not isinstance(prompt.get("prompt"), str):
                raise InvalidRequestError("a prompt object needs prompt_token_ids or prompt", param="prompt")
            return prompt["prompt"], self.get_tokenizer().encode(prompt["prompt"])
        if isinstance(prompt, str):
            return prompt, self.get_tokenizer().encode(prompt)
        return None, list(prompt)

    def _request(self, ids: list[int], params: SamplingParams, priority: int) -> EngineRequest:
        if params.bad_words and not params.bad_word_ids:
            params = params.clone(bad_word_ids=self.get_tokenizer().bad_word_ids(params.bad_words))
        if params.stop and (self._tokenizer is None or not params.detokenize):
            raise InvalidRequestError("stop strings need detokenised text; use stop_token_ids", param="stop")
        grammar = None
        if params.structured_outputs is not None:
            kind = params.structured_outputs.kind
            from workstation.grammar.answer import Wanted, grammars  # and with it the parsers, which a start need not load

            grammar = Grammar(grammars(Wanted(params.structured_outputs, kind))[0])
            self.engine.grammars.compile(grammar)
            params = params.clone(structured_outputs=None)
        self._count += 1
        return EngineRequest(str(self._count - 1), ids, params, list(self._defaults.eos_token_ids), priority=priority,
                             arrival=time.monotonic(), grammar=grammar)

    def _run(self, requests: list[EngineRequest], texts: list[str | None], progress: bool) -> list[RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        samples: dict[str, list[_Sample]] = {}
        try:
            for request, text in zip(requests, texts, strict=True):
                self.engine.submit(request)
                outputs[request.request_id] = RequestOutput(request.request_id, text, request.prompt_token_ids)
                samples[request.request_id] = self._samples(request)
                outputs[request.request_id].outputs = [sample.output for sample in samples[request.request_id]]
            with _progress(len(requests), progress) as advance, calm_collector():
                while self.engine.has_work:
                    for event in self.engine.step():
                        self._take(event, outputs[event.request_id], samples[event.request_id], advance)
        except BaseException:
            for request_id in outputs:
                self.engine.abort(request_id)
            while self.engine.has_work:
                self.engine.step()
            raise
        return [outputs[request.request_id] for request in requests]

    def _samples(self, request: EngineRequest) -> list[_Sample]:
        params = request.params
        made = []
        for index in range(params.n):
            detokenizer = None
            if self._tokenizer is not None and params.detokenize:
                detokenizer = self._tokenizer.detokenizer(
                    skip_special_tokens=params.skip_special_tokens, stop=params.stop,
                    include_stop=params.include_stop_str_in_output, min_tokens=params.min_tokens)
            logprobs: list[dict[int, Logprob]] | None = [] if params.logprobs is not None else None
            made.append(_Sample(detokenizer, params.include_stop_str_in_output,
                                CompletionOutput(index, "", [], logprobs=logprobs)))
        return made

    def _take(self, event: TokenEvent, output: RequestOutput, samples: list[_Sample], advance: Callable[[], None]) -> None:
        if output.finished:
            return
        if event.error is not None:
            raise EngineError(f"request {event.request_id}: {event.error}")
        sample = samples[event.index]
        sample.take(event, self._name)
        if sample.output.finish_reason is not None and event.finish_reason is None:
            self.engine.abort(event.request_id, event.index)  # a stop string: its siblings go on
        if event.cumulative_logprob is not None:
            sample.output.cumulative_logprob = event.cumulative_logprob
        if not event.plain:
            output.num_cached_tokens = event.num_cached_tokens
        if event.prompt_logprobs is not None:
            output.prompt_logprobs = [None if row is None else _logprobs(row, self._name) for row in event.prompt_logprobs]
        if event.times is not None:
            output.metrics = event.times
        if event.finished or all(each.output.finish_reason is not None for each in samples):
            output.finished = True
            advance()

    def _name(self, token: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.decode([token])


def _engine_settings(options: dict[str, Any]) -> dict[str, Any]:
    """EngineConfig's arguments among vLLM's keyword arguments. Raises ConfigError."""
    settings: dict[str, Any] = {}
    for name, value in options.items():
        if name == "num_gpu_blocks_override":
            name = "num_blocks"
        if name in _FIXED:
            accepted, why = _FIXED[name]
            if value not in accepted:
                raise ConfigError(f"{name}={value!r} is not served: {why}", param=name)
        elif name in _ENGINE_FIELDS:
            settings[name] = str(value).removeprefix("torch.") if name == "dtype" else value
        else:
            near = get_close_matches(name, sorted(_ENGINE_FIELDS | set(_FIXED)), 1)
            raise ConfigError(f"LLM has no argument {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""), param=name)
    aliases = {"half": "float16", "float": "float32"}
    if "dtype" in settings:
        settings["dtype"] = aliases.get(settings["dtype"], settings["dtype"])
    return settings


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)) or (prompts and all(isinstance(item, int) for item in prompts)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _one_each(name: str, given: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    if isinstance(given, SamplingParams):
        return [given] * count
    if len(given) != count:
        raise InvalidRequestError(f"{name} holds {len(given)} entries for {count} prompts", param=name)
    return list(given)


def _logprobs(row: TokenLogprobs, name: Callable[[int], str | None]) -> dict[int, Logprob]:
    """vLLM's shape: the top entries by rank, and the token itself wherever it ranks."""
    found = {token: Logprob(value, rank, name(token))
             for rank, (token, value) in enumerate(zip(row.token_ids[1:], row.logprobs[1:], strict=True), start=1)}
    found[row.token_ids[0]] = Logprob(row.logprobs[0], row.rank, name(row.token_ids[0]))
    return found


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    """A bar on stderr when asked for and stderr is a terminal."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("prompts", total=total)
        yield lambda: bar.advance(task)
