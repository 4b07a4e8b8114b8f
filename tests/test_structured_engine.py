"""Grammars in the engine: what is sampled is what a naive loop samples, whatever the batch, the overlap and the preemptions."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import Answer, drain, make_engine
from tiny import write_tiny
from transformers import AutoModelForCausalLM

from workstation import LLM
from workstation.engine.engine import Engine
from workstation.engine.request import BeamSearchParams, EngineRequest, Grammar, SamplingParams
from workstation.errors import InvalidRequestError
from workstation.grammar.answer import Wanted, grammars
from workstation.grammar.library import Vocabulary
from workstation.grammar.params import StructuredOutputsParams
from workstation.text.tokenizer import Tokenizer

DEMO = Path(__file__).parent.parent / "workstation" / "demo" / "model"
WIDTH = 4160  # the demo's tokenizer has 4,096 tokens; the rest is padding
EOS = 2
PERSON = {"type": "object", "properties": {
    "name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
    "tags": {"type": "array", "items": {"enum": ["a", "bc", "é"]}, "maxItems": 2}}, "required": ["name", "age"],
    "additionalProperties": False}
KINDS: list[dict[str, Any]] = [
    {"json": PERSON, "disable_any_whitespace": True}, {"regex": r"[a-z]{3,9}(é|ü|日本){2}[0-9]{1,4}"},
    {"choice": ["red", "green", "dark green"]}, {"grammar": 'start: item ("," item){2}\nitem: /[0-9]{1,3}/ | "(" item ")"'},
]


def grammar(**fields: Any) -> Grammar:
    return Grammar(grammars(Wanted(StructuredOutputsParams(**fields)))[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny(tmp_path_factory.mktemp("structured") / "model", vocab_size=WIDTH, num_hidden_layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, path)
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


def prompts_of(count: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(40, 4000) for _ in range(rng.randrange(3, 40))] for _ in range(count)]


def ask(engine: Engine, prompts: list[list[int]], params: list[SamplingParams], wanted: list[Grammar | None]) -> None:
    for number, (prompt, given, item) in enumerate(zip(prompts, params, wanted, strict=True)):
        engine.submit(EngineRequest(str(number), prompt, given, eos_token_ids=[EOS], grammar=item))


def answers(folder: Path, prompts: list[list[int]], params: list[SamplingParams], wanted: list[Grammar | None], **changes: Any,
            ) -> dict[tuple[str, int], Answer]:
    engine = make_engine(folder, **{name: value for name, value in changes.items() if name != "threads"})
    engine.grammars.threads = changes.get("threads", 1)
    ask(engine, prompts, params, wanted)
    found = drain(engine)
    assert engine.refused() == []
    return found


def one(folder: Path, params: SamplingParams, wanted: Grammar, **fields: Any) -> Answer:
    return answers(folder, prompts_of(1), [params], [wanted], **fields)["0", 0]


def naive(folder: Path, prompt: list[int], wanted: Grammar, count: int) -> list[int]:
    """One step at a time: the whole text through transformers, a fresh matcher told all tokens so far, an argmax."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    vocabulary = Vocabulary(folder, WIDTH)
    out: list[int] = []
    while len(out) < count and EOS not in out:
        matcher = vocabulary.compile(wanted.source).fork([EOS], out)
        bits = np.empty(matcher.words, dtype=np.int32)
        matcher.fill(bits)
        allowed = np.unpackbits(bits.view(np.uint8), bitorder="little")[:WIDTH].astype(bool)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + out])).logits[0, -1]
        out.append(int(logits.masked_fill(torch.from_numpy(~allowed), float("-inf")).argmax()))
    return out


def mixed(count: int) -> tuple[list[list[int]], list[SamplingParams], list[Grammar | None]]:
    """Requests of every kind, greedy and random, with company that has no grammar."""
    params = [SamplingParams(temperature=0.9 * (number % 3 > 0), top_p=0.9, seed=number, n=1 + number % 2, max_tokens=24)
              for number in range(count)]
    wanted = [None if number % 5 == 4 else grammar(**KINDS[number % 5]) for number in range(count)]
    return prompts_of(count), params, wanted


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_greedy_tokens_are_those_of_a_naive_loop(folder: Path, kind: int) -> None:
    wanted = grammar(**KINDS[kind])
    prompt = prompts_of(1)[0]
    expected = naive(folder, prompt, wanted, 20)
    for overlap in (False, True):
        assert one(folder, SamplingParams(temperature=0.0, max_tokens=20), wanted, overlap=overlap).tokens == expected


@pytest.mark.usefixtures("no_forecast")
@pytest.mark.parametrize("changes", [
    {"max_num_seqs": 2}, {"overlap": True, "threads": 2}, {"overlap": True, "max_num_batched_tokens": 16},
    {"overlap": True, "num_blocks": 11, "max_model_len": 96},
], ids=str)
def test_tokens_do_not_depend_on_batches_overlap_chunks_or_preemption(folder: Path, changes: dict[str, Any]) -> None:
    case = mixed(10)
    expected = {key: (item.tokens, item.reason) for key, item in answers(folder, *case).items()}
    found = answers(folder, *case, **changes)
    assert {key: (item.tokens, item.reason) for key, item in found.items()} == expected
    if "num_blocks" in changes:
        assert any(item.preemptions for item in found.values())


def test_every_answer_spells_its_grammar_and_ends_with_it(folder: Path, tokenizer: Tokenizer) -> None:
    prompts, _, _ = mixed(16)
    params = [SamplingParams(temperature=1.0, seed=number, max_tokens=200) for number in range(16)]
    found = answers(folder, prompts, params, [grammar(**KINDS[number % 4]) for number in range(16)], overlap=True)
    for number in range(16):
        answer = found[str(number), 0]
        assert (answer.reason, answer.stop_reason, answer.tokens[-1]) == ("stop", None, EOS)
        assert max(answer.tokens) < tokenizer.vocab_size
        assert not tokenizer.special_ids & set(answer.tokens[:-1])
        text = tokenizer.decode(answer.tokens[:-1])
        match number % 4:
            case 0:
                value = json.loads(text)
                assert set(value) >= {"name", "age"} and 0 <= value["age"] <= 150
            case 1:
                assert re.fullmatch(KINDS[1]["regex"], text)
            case 2:
                assert text in KINDS[2]["choice"]
            case _:
                assert re.fullmatch(r"(\(*\d{1,3}\)*)(,\(*\d{1,3}\)*){2}", text)


def test_ignore_eos_and_min_tokens_put_the_end_off_while_the_grammar_can_go_on(folder: Path) -> None:
    wanted = grammar(regex="[a-z ]{1,12}")
    greedy = {"temperature": 0.0, "max_tokens": 60}
    plain = one(folder, SamplingParams(**greedy, logit_bias={EOS: 100.0}), wanted)
    longer = one(folder, SamplingParams(**greedy, logit_bias={EOS: 100.0}, min_tokens=4), wanted)
    endless = one(folder, SamplingParams(**greedy, logit_bias={EOS: 100.0}, ignore_eos=True), wanted)
    assert len(plain.tokens) == 2 and len(longer.tokens) == 5
    assert len(endless.tokens) >= len(longer.tokens) and endless.tokens[-1] == EOS and endless.reason == "stop"


def test_log_probabilities_are_those_of_the_model_before_the_mask(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = prompts_of(1)[0]
    answer = one(folder, SamplingParams(temperature=0.0, max_tokens=6, logprobs=2), grammar(regex="[a-z]{20}"), overlap=True)
    with torch.no_grad():
        theirs = model(torch.tensor([prompt + answer.tokens])).logits[0].log_softmax(-1)
    for place, row in enumerate(answer.logprobs):
        expected = theirs[len(prompt) - 1 + place]
        assert row.logprobs[0] == pytest.approx(expected[answer.tokens[place]].item(), abs=1e-4)
        assert row.logprobs[1:] == pytest.approx(expected.topk(2).values.tolist(), abs=1e-4)


def test_a_stop_token_of_the_request_ends_an_answer_before_its_grammar_does(folder: Path) -> None:
    wanted = grammar(regex="[a-z]{40}")
    plain = one(folder, SamplingParams(temperature=0.0, max_tokens=8), wanted)
    stopped = one(folder, SamplingParams(temperature=0.0, max_tokens=8, stop_token_ids=[plain.tokens[3]]), wanted)
    assert (stopped.reason, stopped.stop_reason) == ("stop", plain.tokens[3])
    assert stopped.tokens == plain.tokens[:plain.tokens.index(plain.tokens[3]) + 1]


def test_the_last_tokens_of_a_prompt_may_be_the_first_of_a_grammar(folder: Path, tokenizer: Tokenizer) -> None:
    begun = tokenizer.encode("dark", add_special_tokens=False)
    wanted = Grammar(grammar(choice=["red", "dark green"]).source, matched=len(begun))
    answer = answers(folder, [[50, 60, *begun]], [SamplingParams(temperature=0.0)], [wanted])["0", 0]
    assert tokenizer.decode(answer.tokens[:-1]) == " green"


def test_a_ban_that_leaves_nothing_of_a_grammar_ends_that_request_alone(folder: Path) -> None:
    prompts = prompts_of(2)
    params = [SamplingParams(temperature=0.0, max_tokens=5, allowed_token_ids=ids) for ids in ([100], None)]
    found = answers(folder, prompts, params, [grammar(regex="[0-9]+"), None], overlap=True)
    assert found["0", 0].reason == "error" and "allow-list leave no token" in (found["0", 0].error or "")
    assert found["1", 0].reason == "length"


def test_a_step_without_memory_between_forward_pass_and_sampling_costs_its_newest_request_alone(folder: Path) -> None:
    """The step before has been committed by then, and may have ended sequences of the step that fails."""
    case = mixed(6)
    expected = {key: item.tokens for key, item in answers(folder, *case).items()}
    engine = make_engine(folder, overlap=True)
    sample, failed = engine._runner._sampler.sample, list[int]()

    def scarce(*arguments: Any) -> Any:
        engine._runner._sampler.state.flush()
        if engine.stats().generated_tokens > 20 and not failed and engine._in_flight is None:
            failed.append(1)
            raise torch.OutOfMemoryError("nothing left")
        return sample(*arguments)

    engine._runner._sampler.sample = scarce  # type: ignore[method-assign]
    ask(engine, *case)
    found = drain(engine)
    ended = {request_id for (request_id, _), item in found.items() if item.reason == "error"}
    assert failed and len(ended) == 1
    assert {key: item.tokens for key, item in found.items() if key[0] not in ended} == {
        key: tokens for key, tokens in expected.items() if key[0] not in ended}


@pytest.mark.parametrize("bound", [False, True])
def test_the_step_before_is_collected_while_the_forward_pass_runs(folder: Path, monkeypatch: pytest.MonkeyPatch,
                                                                  bound: bool) -> None:
    """And only then: without a grammar nothing stands between a forward pass and its sampling."""
    engine = make_engine(folder, overlap=True)
    runner, order = engine._runner, list[str]()

    def told(name: str, work: Any) -> Any:
        return lambda *given, **options: (order.append(name), work(*given, **options))[1]

    monkeypatch.setattr(runner.model, "forward", told("forward", runner.model.forward))
    monkeypatch.setattr(runner._sampler, "sample", told("sample", runner._sampler.sample))
    monkeypatch.setattr(runner, "collect", told("collect", runner.collect))
    wanted = [grammar(regex="[a-z]{30}") if bound else None, None]
    ask(engine, prompts_of(2), [SamplingParams(temperature=0.0, max_tokens=4)] * 2, wanted)
    while len(engine.grammars):
        engine._queue_compiled()
    drain(engine)
    one = ["forward", "collect", "sample"] if bound else ["forward", "sample", "collect"]
    assert order == ["forward", "sample", *(one * 3), "collect"]


def test_an_engine_starts_and_answers_without_the_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    engine = make_engine(folder, online=True)
    ask(engine, prompts_of(2), [SamplingParams(max_tokens=3)] * 2, [None, grammar(regex="a")])
    assert set(drain(engine)) == {("0", 0)}
    (_, error), = engine.refused()
    assert "pip install llguidance" in error.message


def test_what_cannot_be_compiled_is_refused_and_the_others_go_on(folder: Path) -> None:
    engine = make_engine(folder)
    ask(engine, prompts_of(2), [SamplingParams(max_tokens=3)] * 2, [Grammar("start: nope"), None])
    assert set(drain(engine)) == {("1", 0)}
    (request_id, error), = engine.refused()
    assert request_id == "0" and isinstance(error, InvalidRequestError) and 'unknown name: "nope"' in error.message


def test_a_request_that_waits_for_its_grammar_can_be_aborted(folder: Path) -> None:
    engine = make_engine(folder)
    ask(engine, prompts_of(1), [SamplingParams()], [grammar(regex="a+")])
    assert [event.finish_reason for event in engine.abort("0")] == ["abort"]
    assert not engine.has_work


def test_beams_and_models_without_an_end_are_refused(folder: Path) -> None:
    engine = make_engine(folder)
    with pytest.raises(InvalidRequestError, match="beam search"):
        engine.submit(EngineRequest("0", [50], SamplingParams(), [EOS], BeamSearchParams(2, 4), grammar=grammar(regex="a")))
    with pytest.raises(InvalidRequestError, match="ends an answer"):
        engine.submit(EngineRequest("0", [50], SamplingParams(), [WIDTH], grammar=grammar(regex="a")))


def test_offline_answers_follow_a_grammar_too(folder: Path) -> None:
    llm = LLM(str(folder), device="cpu", num_threads=1, max_num_seqs=4, num_blocks=64, max_model_len=256)
    wanted = StructuredOutputsParams(regex="[a-z]{1,12} is [0-9]{2}")
    params = SamplingParams(temperature=0, max_tokens=40, structured_outputs=wanted)
    outputs = llm.generate(["Anna", "Bo"], params, use_tqdm=False)
    for output in outputs:
        assert output.outputs[0].finish_reason == "stop"
        assert re.fullmatch("[a-z]{1,12} is [0-9]{2}", output.outputs[0].text)
    with pytest.raises(InvalidRequestError, match="look-around"):
        llm.generate("Anna", SamplingParams(structured_outputs=StructuredOutputsParams(regex="(?=a)b")), use_tqdm=False)
    assert not llm.engine.has_work


@pytest.mark.gpu
@pytest.mark.parametrize("eager", [False, True])
def test_a_gpu_samples_under_grammars_what_the_cpu_samples(folder: Path, eager: bool) -> None:
    case = mixed(8)
    expected = {key: item.tokens for key, item in answers(folder, *case).items()}
    found = answers(folder, *case, device="cuda", dtype="float32", enforce_eager=eager)
    assert {key: item.tokens for key, item in found.items()} == expected
