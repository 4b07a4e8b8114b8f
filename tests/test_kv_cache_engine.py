"""The engine over an FP8 cache: answers stay good, and do not depend on chunks, cache or preemption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import drain, make_engine, run, submit
from quant_models import rewrite
from quantised import SIZES, write_quantised
from test_engine import PROMPTS, RANDOM, greedy, prompts_of
from tiny import write_tiny

from workstation.catalog import demo_folder
from workstation.cli.evaluate import answerer, encoder
from workstation.demo.evaluate import average, evaluate
from workstation.engine.request import SamplingParams
from workstation.llm import LLM

FP8: dict[str, Any] = {"kv_cache_dtype": "fp8", "dtype": "float32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("kv8") / "qwen3", "qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("kv8") / "mistral", "mistral", sliding_window=20)


def logprobs(folder: Path, tokens: list[int], **changes: Any) -> torch.Tensor:
    """Log-probability of each token after the first."""
    engine = make_engine(folder, **changes)
    submit(engine, [tokens], [SamplingParams(max_tokens=1, prompt_logprobs=0)])
    rows = drain(engine)["0", 0].prompt_logprobs
    assert rows is not None
    return torch.tensor([row.logprobs[0] for row in rows[1:] if row is not None])


@pytest.mark.usefixtures("no_forecast")
@pytest.mark.parametrize("changes", [
    {"max_num_batched_tokens": 1}, {"max_num_batched_tokens": 7}, {"overlap": True}, {"enable_prefix_caching": False},
    {"max_num_seqs": 2}, {"num_blocks": 12, "max_model_len": 128}, {"num_blocks": 12, "max_model_len": 128, "overlap": True},
], ids=str)
@pytest.mark.parametrize("kind", ["folder", "sliding"])
def test_tokens_do_not_depend_on_chunks_cache_batches_or_preemption(
    kind: str, changes: dict[str, Any], request: pytest.FixtureRequest,
) -> None:
    model = request.getfixturevalue(kind)
    assert run(model, PROMPTS, RANDOM, **FP8, **changes) == run(model, PROMPTS, RANDOM, **FP8)


def test_a_cached_prefix_gives_the_same_tokens(folder: Path) -> None:
    prompt = prompts_of(100, seed=8)
    engine = make_engine(folder, **FP8)
    answers = []
    for _ in range(2):
        submit(engine, prompt, [greedy(20)])
        answers.append(drain(engine)["0", 0])
    assert answers[1].cached == 96 and answers[1].tokens == answers[0].tokens


def test_samples_that_diverge_copy_their_block(folder: Path) -> None:
    params = SamplingParams(temperature=1.0, seed=3, n=4, max_tokens=20)
    assert run(folder, prompts_of(21), params, **FP8) == run(folder, prompts_of(21), params, **FP8, enable_prefix_caching=False)


@pytest.mark.parametrize("kind", ["folder", "sliding"])
def test_rounding_moves_logprobs_a_little(kind: str, request: pytest.FixtureRequest) -> None:
    tokens = prompts_of(150, seed=5)[0]
    model = request.getfixturevalue(kind)
    exact, ours = logprobs(model, tokens), logprobs(model, tokens, **FP8)
    assert 0.0 < (exact - ours).abs().mean() < 0.25


def test_scales_of_the_checkpoint_are_used(tmp_path: Path) -> None:
    """Keys far below e4m3's smallest number live by their scale."""
    plain, _ = write_quantised(tmp_path, "ct_weight_only")
    tokens = prompts_of(60, seed=6)[0]

    def shrink(weights: dict[str, torch.Tensor]) -> None:
        for layer in range(SIZES["num_hidden_layers"]):
            attention = f"model.layers.{layer}.self_attn."
            weights[attention + "v_proj.weight_scale"] *= 2.0**-12
            weights[attention + "o_proj.weight_scale"] *= 2.0**12

    rewrite(plain, shrink)
    exact = logprobs(plain, tokens)
    lost = logprobs(plain, tokens, **FP8)
    rewrite(plain, lambda weights: weights.update({
        f"model.layers.{layer}.self_attn.{name}": torch.tensor(scale) for layer in range(SIZES["num_hidden_layers"])
        for name, scale in (("k_scale", 1.0), ("v_scale", 2.0**-12))}))
    kept = logprobs(plain, tokens, **FP8)
    assert (kept - exact).abs().mean() < 0.3 * (lost - exact).abs().mean()


def test_a_recycled_block_of_a_broken_sequence_harms_nobody(folder: Path) -> None:
    """Every block is filled with NaN codes behind the engine's back; only the null block keeps its zeros."""
    expected = run(folder, PROMPTS, greedy(), **FP8)
    engine = make_engine(folder, **FP8)
    engine._runner.pool[1:] = torch.nan
    submit(engine, PROMPTS, [greedy()] * len(PROMPTS))
    answers = drain(engine)
    assert [answers[str(number), 0].tokens for number in range(len(PROMPTS))] == expected


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    yield LLM("demo", device="cpu", dtype="float32", kv_cache_dtype="fp8", num_threads=1, num_gpu_blocks_override=600)


def test_the_demo_model_solves_its_tasks(demo: LLM) -> None:
    scores = evaluate(encoder(demo_folder()), answerer(demo, 200), n=3, seed=11)
    assert average(scores) >= 0.9


def test_the_demo_model_answers_alike_in_pieces(demo: LLM) -> None:
    prompts = ["1, 2, 3,", "The quick brown fox", "red green blue red green"] * 2
    greedily = SamplingParams(temperature=0.0, max_tokens=40)
    whole = [output.outputs[0].token_ids for output in demo.generate(prompts, greedily, use_tqdm=False)]
    pieces = LLM("demo", device="cpu", **FP8, num_threads=1, num_gpu_blocks_override=40, max_model_len=256,
                 max_num_batched_tokens=5, enable_prefix_caching=False)
    assert [output.outputs[0].token_ids for output in pieces.generate(prompts, greedily, use_tqdm=False)] == whole


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["folder", "sliding"])
def test_greedy_tokens_on_a_gpu_in_fp32_are_nearly_the_cpu_twins(kind: str, request: pytest.FixtureRequest) -> None:
    """A last bit may round a key to the next code, so log-probabilities are compared, not tokens."""
    model, tokens = request.getfixturevalue(kind), prompts_of(150, seed=5)[0]
    for changes in ({}, {"max_num_batched_tokens": 13}, {"max_num_batched_tokens": 1}):
        ours = logprobs(model, tokens, device="cuda", **FP8, **changes)
        assert (ours - logprobs(model, tokens, **FP8)).abs().mean() < 0.02


@pytest.mark.gpu
def test_graphs_serve_an_fp8_cache(folder: Path) -> None:
    assert run(folder, PROMPTS, greedy(), **FP8, device="cuda") == run(
        folder, PROMPTS, greedy(), **FP8, device="cuda", enforce_eager=True)
    written = run(folder, PROMPTS, greedy(), device="cuda", dtype="bfloat16", kv_cache_dtype="fp8")
    assert {len(tokens) for tokens in written} == {12}
