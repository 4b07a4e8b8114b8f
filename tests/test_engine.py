"""The engine on a tiny model: the same tokens whatever the batch, the chunks, the cache and the preemptions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import drain, make_engine, run, submit
from tiny import write_tiny
from transformers import AutoModelForCausalLM

from workstation.engine.request import BeamSearchParams, EngineRequest, SamplingParams
from workstation.errors import ContextLengthError, InvalidRequestError, OverloadedError


def greedy(count: int = 12, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, **fields)


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 128) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("engine") / "qwen3", "qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("engine") / "mistral", "mistral", sliding_window=20)


PROMPTS = prompts_of(5, 40, 17, 90, 33, 1, 64)
RANDOM = [SamplingParams(temperature=0.9, top_p=0.95, seed=number, n=2, max_tokens=10, frequency_penalty=0.3)
          for number in range(len(PROMPTS))]


def test_greedy_tokens_equal_transformers_generate(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = run(folder, PROMPTS, greedy())
    for prompt, tokens in zip(PROMPTS, ours, strict=True):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False,
                                eos_token_id=None, pad_token_id=0)
        assert tokens == theirs[0, len(prompt):].tolist()


@pytest.mark.parametrize("changes", [
    {"max_num_batched_tokens": 1}, {"max_num_batched_tokens": 7}, {"max_num_batched_tokens": 16}, {"overlap": True},
    {"overlap": True, "max_num_batched_tokens": 5}, {"enable_prefix_caching": False}, {"max_num_seqs": 2},
    {"num_blocks": 12, "max_model_len": 128}, {"num_blocks": 12, "max_model_len": 128, "overlap": True},
], ids=str)
@pytest.mark.usefixtures("no_forecast")
@pytest.mark.parametrize("kind", ["folder", "sliding"])
def test_tokens_do_not_depend_on_chunks_batches_cache_overlap_or_preemption(
        kind: str, changes: dict[str, Any], request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    assert run(model, PROMPTS, RANDOM, **changes) == run(model, PROMPTS, RANDOM)


@pytest.mark.parametrize("budget", range(1, 41))
def test_every_chunk_size_gives_the_same_tokens(folder: Path, budget: int) -> None:
    prompt = prompts_of(40, seed=3)
    assert run(folder, prompt, greedy(4), max_num_batched_tokens=budget) == run(folder, prompt, greedy(4))


@pytest.mark.usefixtures("no_forecast")
def test_a_tiny_pool_preempts_and_still_finishes_everyone(folder: Path) -> None:
    engine = make_engine(folder, num_blocks=14, max_model_len=128)
    submit(engine, prompts_of(30, 31, 32, 33, seed=5), [greedy(60)] * 4)
    answers = drain(engine)
    assert engine.stats().preemptions > 0
    assert {len(answer.tokens) for answer in answers.values()} == {60}
    assert engine.stats().blocks_held == 0


def test_a_request_alone_equals_the_same_request_among_31_others(folder: Path) -> None:
    crowd = prompts_of(*range(2, 33), seed=9)
    mine = prompts_of(25, seed=10)[0]
    params = SamplingParams(temperature=1.0, seed=77, max_tokens=16)
    others = [SamplingParams(temperature=1.0, seed=number, max_tokens=3 + number % 20) for number in range(31)]
    alone = run(folder, [mine], [params])[0]
    together = run(folder, [mine, *crowd], [params, *others], max_num_seqs=32, num_blocks=400)[0]
    assert together == alone


def test_sample_k_of_n_equals_sample_k_of_a_larger_n(folder: Path) -> None:
    prompt = prompts_of(21, seed=4)
    few = run(folder, prompt, SamplingParams(temperature=1.0, seed=5, n=2, max_tokens=12))
    many = run(folder, prompt, SamplingParams(temperature=1.0, seed=5, n=6, max_tokens=12))
    assert many[:2] == few
    assert len({tuple(tokens) for tokens in many}) > 1


def test_n_samples_compute_their_prompt_once_and_share_its_blocks(folder: Path) -> None:
    engine = make_engine(folder)
    submit(engine, prompts_of(100), [SamplingParams(n=4, seed=1, max_tokens=5)])
    engine.step()
    stats = engine.stats()
    assert stats.computed_prompt_tokens == 100
    assert stats.blocks_held == 7  # ceil(100 / 16), once
    drain(engine)


def test_a_shared_prefix_is_stored_once_and_computed_once_for_simultaneous_requests(folder: Path) -> None:
    system = prompts_of(320, seed=2)[0]
    tails = prompts_of(*[7] * 32, seed=6)
    engine = make_engine(folder, max_num_seqs=32, num_blocks=200)
    submit(engine, [system + tail for tail in tails], [greedy(4)] * 32)
    answers = drain(engine)
    assert engine.stats().computed_prompt_tokens == 320 + 32 * 7
    assert sorted(answer.cached for answer in answers.values()) == [0] + [320] * 31


def test_a_full_hit_still_computes_its_last_token(folder: Path) -> None:
    prompt = prompts_of(48)[0]
    engine = make_engine(folder)
    submit(engine, [prompt], [greedy(3)])
    first = drain(engine)["0", 0]
    submit(engine, [prompt], [greedy(3)])
    again = drain(engine)["0", 0]
    assert again.cached == 32
    assert again.tokens == first.tokens


def test_generated_tokens_are_cached_for_the_next_turn(folder: Path) -> None:
    prompt = prompts_of(20)[0]
    engine = make_engine(folder)
    submit(engine, [prompt], [greedy(30)])
    turn = prompt + drain(engine)["0", 0].tokens
    submit(engine, [[*turn, 5, 6, 7]], [greedy(2)])
    assert drain(engine)["0", 0].cached == 48


def test_salts_do_not_share_prefixes(folder: Path) -> None:
    prompt = prompts_of(64)
    engine = make_engine(folder)
    submit(engine, prompt, [greedy(1)], cache_salt="one")
    drain(engine)
    submit(engine, prompt, [greedy(1)], cache_salt="two")
    assert drain(engine)["0", 0].cached == 0


def test_an_eos_id_ends_a_sample_and_a_stop_id_is_named(folder: Path) -> None:
    prompt = prompts_of(9)
    tokens = run(folder, prompt, greedy(10))[0]
    engine = make_engine(folder, overlap=True)
    submit(engine, prompt, [greedy(10)], eos_token_ids=[tokens[3]])
    by_eos = drain(engine)["0", 0]
    submit(engine, prompt, [greedy(10, stop_token_ids=[tokens[3]])])
    by_stop = drain(engine)["0", 0]
    cut = tokens.index(tokens[3]) + 1
    assert (by_eos.tokens, by_eos.reason, by_eos.stop_reason) == (tokens[:cut], "stop", None)
    assert (by_stop.tokens, by_stop.reason, by_stop.stop_reason) == (tokens[:cut], "stop", tokens[3])


def test_min_tokens_holds_the_end_back_and_ignore_eos_drops_it(folder: Path) -> None:
    prompt = prompts_of(9)
    plain = run(folder, prompt, greedy(10))[0]
    engine = make_engine(folder)
    submit(engine, prompt, [greedy(10, min_tokens=6)], eos_token_ids=[plain[0]])
    held = drain(engine)["0", 0]
    assert plain[0] not in held.tokens[:6]
    submit(engine, prompt, [greedy(10, ignore_eos=True)], eos_token_ids=[plain[0]])
    assert drain(engine)["0", 0].tokens == plain


def test_a_bad_word_of_two_tokens_never_appears_and_its_parts_may(folder: Path) -> None:
    prompt = prompts_of(9)
    plain = run(folder, prompt, greedy(12))[0]
    word = plain[4:6]
    for overlap in (False, True):
        found = run(folder, prompt, greedy(12, bad_word_ids=[word]), overlap=overlap)[0]
        assert found[:5] == plain[:5]
        assert all(found[i:i + 2] != word for i in range(len(found)))


def test_prompt_logprobs_cover_the_prompt_whatever_the_chunks(folder: Path) -> None:
    prompt = prompts_of(37)[0]
    seen = []
    for budget in (64, 5):
        engine = make_engine(folder, max_num_batched_tokens=budget)
        for _ in range(2):  # the second time the prompt is in the prefix cache, which must not shorten the answer
            submit(engine, [prompt], [greedy(1, prompt_logprobs=2)])
            rows = drain(engine)["0", 0].prompt_logprobs
            assert rows is not None and rows[0] is None and len(rows) == 37
            seen.append([row for row in rows if row is not None])
    assert [row.token_ids[0] for row in seen[0]] == prompt[1:]
    for other in seen[1:]:
        assert [row.token_ids for row in other] == [row.token_ids for row in seen[0]]
        for mine, theirs in zip(other, seen[0], strict=True):
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_logprobs_are_those_of_transformers(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = prompts_of(13)[0]
    engine = make_engine(folder)
    submit(engine, [prompt], [SamplingParams(temperature=0.7, seed=1, max_tokens=8, logprobs=3)])
    answer = drain(engine)["0", 0]
    with torch.no_grad():
        theirs = model(torch.tensor([prompt + answer.tokens])).logits[0].log_softmax(-1)
    for place, row in enumerate(answer.logprobs):
        expected = theirs[len(prompt) - 1 + place]
        assert row.logprobs[0] == pytest.approx(expected[answer.tokens[place]].item(), abs=1e-4)
        assert row.logprobs[1:] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("changes", [{}, {"overlap": True}, {"num_blocks": 16, "max_model_len": 64}], ids=str)
def test_beam_search_equals_transformers(folder: Path, changes: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = prompts_of(20, seed=8)[0]
    theirs = model.generate(torch.tensor([prompt]), num_beams=4, num_return_sequences=4, max_new_tokens=10, do_sample=False,
                            eos_token_id=None, pad_token_id=0)[:, len(prompt):].tolist()
    engine = make_engine(folder, **changes)
    engine.submit(EngineRequest("0", prompt, greedy(10), beam=BeamSearchParams(4, 10)))
    answers = drain(engine)
    assert [answers["0", index].tokens for index in range(4)] == theirs
    assert engine.stats().blocks_held == 0


def test_two_beam_requests_in_a_pool_for_one_both_finish(folder: Path) -> None:
    engine = make_engine(folder, num_blocks=20, max_model_len=96, max_num_seqs=5)
    for number, prompt in enumerate(prompts_of(30, 33, seed=1)):
        engine.submit(EngineRequest(str(number), prompt, greedy(30), beam=BeamSearchParams(4, 30)))
    answers = drain(engine)
    assert len(answers) == 8


def test_logits_that_are_not_finite_end_only_their_request(folder: Path) -> None:
    neighbours = prompts_of(8, 9, seed=1)
    alone = run(folder, neighbours, greedy(8))
    engine = make_engine(folder)
    weights = engine._runner.model  # a NaN embedding row makes exactly the requests that use it fail
    poison = 3
    with torch.inference_mode():
        for parameter in (weights.embedding,):
            parameter[poison] = float("nan")
    clean = [[token for token in prompt if token != poison] for prompt in neighbours]
    assert clean == neighbours
    submit(engine, [*neighbours, [poison, 5, 6, 7] * 8], [greedy(8)] * 3)
    answers = drain(engine)
    assert answers["2", 0].reason == "error" and "not finite" in (answers["2", 0].error or "")
    assert [answers[str(number), 0].tokens for number in (0, 1)] == alone
    assert engine.stats().blocks_cached <= 2  # none of the poisoned request's four blocks can be found


def test_an_aborted_request_frees_its_blocks_and_leaves_its_neighbour_alone(folder: Path) -> None:
    prompts = prompts_of(40, 50)
    expected = run(folder, prompts[1:], greedy(12))[0]
    engine = make_engine(folder, overlap=True)
    submit(engine, prompts, [greedy(50), greedy(12)])
    for _ in range(3):
        engine.step()
    events = engine.abort("0")
    assert [event.finish_reason for event in events] == ["abort"] and events[0].finished
    assert engine.abort("0") == []
    tokens: list[int] = []
    engine2 = make_engine(folder, overlap=True)
    submit(engine2, prompts, [greedy(50), greedy(12)])
    for turn in range(200):
        if turn == 3:
            engine2.abort("0")
        tokens += [token for event in engine2.step() if event.request_id == "1" for token in event.token_ids]
    assert tokens == expected
    assert engine2.stats().blocks_held == 0


def test_priority_runs_the_lower_number_first(folder: Path) -> None:
    engine = make_engine(folder, scheduling_policy="priority", max_num_seqs=1)
    order = []
    for number, priority in enumerate((5, 1, 3)):
        engine.submit(EngineRequest(str(number), [4, 5, 6], greedy(2), priority=priority))
    while engine.has_work:
        order += [event.request_id for event in engine.step() if event.finished]
    assert order == ["1", "2", "0"]


@pytest.mark.parametrize(("prompt", "params", "message"), [
    ([], greedy(), "at least one token"),
    ([128], greedy(), "between 0 and 127, got 128"),
    ([-1], greedy(), "got -1"),
    ([5], greedy(stop_token_ids=[128]), "stop_token_ids"),
    ([5], greedy(logit_bias={500: 1.0}), "logit_bias"),
    ([5], greedy(allowed_token_ids=[999]), "allowed_token_ids"),
    ([5], SamplingParams(n=9), "max_num_seqs"),
])
def test_what_can_never_run_is_refused_and_nothing_else_is_disturbed(
        folder: Path, prompt: list[int], params: SamplingParams, message: str) -> None:
    engine = make_engine(folder)
    with pytest.raises(InvalidRequestError, match=message):
        engine.submit(EngineRequest("bad", prompt, params))
    submit(engine, [[5, 6, 7]], [greedy(2)])
    assert len(drain(engine)["0", 0].tokens) == 2


def test_a_prompt_as_long_as_the_window_is_refused_by_number(folder: Path) -> None:
    engine = make_engine(folder, max_model_len=64)
    with pytest.raises(ContextLengthError, match="64 tokens"):
        engine.submit(EngineRequest("long", [5] * 64, greedy()))


def test_a_full_queue_is_refused_as_overload(folder: Path) -> None:
    engine = make_engine(folder, max_num_queued_reqs=2)
    submit(engine, [[5], [6]], [greedy(1)] * 2)
    with pytest.raises(OverloadedError, match="2 requests"):
        engine.submit(EngineRequest("more", [7], greedy(1)))


def test_a_restarted_engine_gives_the_same_tokens_for_the_same_seed(folder: Path) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=9)
    assert run(folder, PROMPTS[:3], params, seed=3) == run(folder, PROMPTS[:3], params, seed=3)
    assert run(folder, PROMPTS[:3], params, seed=3) != run(folder, PROMPTS[:3], params, seed=4)


def test_one_sample_can_be_ended_while_its_siblings_go_on(folder: Path) -> None:
    prompt = prompts_of(21, seed=4)
    params = SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=12)
    expected = run(folder, prompt, params)
    engine = make_engine(folder)
    submit(engine, prompt, [params])
    engine.step()
    events = engine.abort("0", 1)
    assert [(event.index, event.finish_reason, event.finished) for event in events] == [(1, "abort", False)]
    answers = drain(engine)
    assert [[expected[index][0], *answers["0", index].tokens] for index in (0, 2)] == [expected[0], expected[2]]
    assert ("0", 1) not in answers and engine.stats().blocks_held == 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("failing", [1, 2, 5, 9])
@pytest.mark.parametrize("kind", ["folder", "sliding"])
def test_a_step_without_memory_ends_its_newest_request_and_the_others_as_they_would(
        kind: str, failing: int, overlap: bool, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    expected = dict(zip([(str(number), index) for number in range(len(PROMPTS)) for index in range(2)],
                        run(model, PROMPTS, RANDOM), strict=True))
    engine = make_engine(model, overlap=overlap, max_num_batched_tokens=100)
    launch, steps, newest = engine._runner.launch, 0, ""

    def scarce(batch: Any) -> Any:
        nonlocal steps, newest
        steps += 1
        if steps != failing:
            return launch(batch)
        newest = max(batch.chunks, key=lambda chunk: chunk.seq.order).seq.request.request_id
        engine._runner._inputs.update_tables(batch)
        raise torch.OutOfMemoryError("nothing left")

    engine._runner.launch = scarce  # type: ignore[method-assign]
    submit(engine, PROMPTS, RANDOM)
    answers = drain(engine)
    ended = {request_id for (request_id, _), answer in answers.items() if answer.reason == "error"}
    assert ended == {newest}
    assert all("out of memory" in (answer.error or "") for answer in answers.values() if answer.reason == "error")
    assert {key: answer.tokens for key, answer in answers.items() if key[0] != newest} == {
        key: tokens for key, tokens in expected.items() if key[0] != newest}
