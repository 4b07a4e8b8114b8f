"""The engine on a GPU: equal to the CPU's in fp32, and in bf16 no further from fp32 than transformers is."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
from engines import drain, make_engine, run, submit
from test_embeddings import embedded
from test_engine import PROMPTS, RANDOM, greedy, prompts_of
from tiny import write_tiny
from transformers import AutoModelForCausalLM

from workstation.catalog import demo_folder
from workstation.engine.graphs import StepGraphs
from workstation.engine.request import SamplingParams

pytestmark = pytest.mark.gpu
GPU: dict[str, Any] = {"device": "cuda", "dtype": "float32"}
KINDS = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("gpu")
    extra = {"mistral": {"sliding_window": 20}}
    return {kind: write_tiny(root / kind, kind, **extra.get(kind, {})) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_in_fp32_equal_the_cpu_twins(folders: dict[str, Path], kind: str) -> None:
    assert run(folders[kind], PROMPTS, greedy(), **GPU) == run(folders[kind], PROMPTS, greedy())


@pytest.mark.parametrize("changes", [
    {"max_num_batched_tokens": 1}, {"max_num_batched_tokens": 7}, {"overlap": False}, {"enable_prefix_caching": False},
    {"max_num_seqs": 2}, {"num_blocks": 12, "max_model_len": 128}, {"enforce_eager": True},
], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_do_not_depend_on_the_schedule_in_fp32(folders: dict[str, Path], kind: str, changes: dict[str, Any]) -> None:
    assert run(folders[kind], PROMPTS, RANDOM, **GPU, **changes) == run(folders[kind], PROMPTS, RANDOM, **GPU)


@pytest.mark.parametrize("changes", [{}, {"max_num_batched_tokens": 13}, {"enforce_eager": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_in_fp32_equal_the_cpu_twins_beside_captured_decodes(
        folders: dict[str, Path], kind: str, changes: dict[str, Any]) -> None:
    for pooling in ("last", "mean"):
        engine = make_engine(folders[kind], **GPU, **changes)
        submit(engine, prompts_of(20, 9, seed=3), [greedy(30), greedy(30)])
        ours = embedded(engine, PROMPTS, pooling)  # type: ignore[arg-type]
        theirs = embedded(make_engine(folders[kind]), PROMPTS, pooling)  # type: ignore[arg-type]
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)


def _teacher_forced(folder: Path, tokens: list[int], **changes: Any) -> torch.Tensor:
    """Log-probability of each token after the first, through the engine."""
    engine = make_engine(folder, **changes)
    submit(engine, [tokens], [SamplingParams(max_tokens=1, prompt_logprobs=0)])
    rows = drain(engine)["0", 0].prompt_logprobs
    assert rows is not None
    return torch.tensor([row.logprobs[0] for row in rows[1:] if row is not None])


@torch.no_grad()
def _transformers_gap(folder: Path, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([tokens], device="cuda")
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).cuda()
        logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
        found.append(logprobs.gather(1, ids[0, 1:, None])[:, 0].cpu())
    return found[0], found[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"max_num_batched_tokens": 13}], ids=["whole", "chunks"])
def test_bf16_is_no_further_from_fp32_than_transformers(folders: dict[str, Path], kind: str, changes: dict[str, Any]) -> None:
    tokens = prompts_of(200, seed=21)[0]
    exact, theirs = _transformers_gap(folders[kind], tokens)
    ours = _teacher_forced(folders[kind], tokens, device="cuda", dtype="bfloat16", **changes)
    gap, their_gap = (ours - exact).abs(), (theirs - exact).abs()
    print(f"{kind}: mean gap {gap.mean():.4f} (transformers {their_gap.mean():.4f}), "
          f"max {gap.max():.4f} ({their_gap.max():.4f})")
    assert gap.mean() <= 1.25 * their_gap.mean() and gap.max() <= 1.5 * their_gap.max()


def test_the_demo_model_in_bf16_stays_near_its_fp32_twin() -> None:
    tokens = prompts_of(300, seed=2)[0]
    exact = _teacher_forced(demo_folder(), tokens, num_blocks=600)
    ours = _teacher_forced(demo_folder(), tokens, device="cuda", dtype="bfloat16", num_blocks=600)
    _, theirs = _transformers_gap(demo_folder(), tokens)
    print(f"demo: mean gap {(ours - exact).abs().mean():.4f} (transformers {(theirs - exact).abs().mean():.4f})")
    assert (ours - exact).abs().mean() <= 1.25 * (theirs - exact).abs().mean()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_decoding_in_bf16_is_no_further_from_fp32_than_transformers(tmp_path: Path, kind: str, head_dim: int) -> None:
    """Token by token through graphs and chained kernels, in a batch whose contexts differ."""
    folder = write_tiny(tmp_path / kind, kind, head_dim=head_dim, hidden_size=256, intermediate_size=512)
    engine = make_engine(folder, device="cuda", dtype="bfloat16")
    prompts = prompts_of(150, 3, 70, 33, seed=5)
    submit(engine, prompts, [SamplingParams(temperature=0.0, max_tokens=60, logprobs=0, ignore_eos=True)] * len(prompts))
    answers = drain(engine)
    for number, prompt in enumerate(prompts):
        answer = answers[str(number), 0]
        ours = torch.tensor([row.logprobs[0] for row in answer.logprobs])
        exact, theirs = (found[len(prompt) - 1:] for found in _transformers_gap(folder, prompt + answer.tokens))
        assert (ours - exact).abs().mean() <= 1.25 * (theirs - exact).abs().mean() + 1e-3


def test_a_long_context_decodes_like_the_cpu_twin(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "long", "llama", max_position_embeddings=8192)
    prompt = prompts_of(6000, seed=7)
    settings = {"num_blocks": 600, "max_model_len": 8192}
    assert run(folder, prompt, greedy(8), **GPU, **settings) == run(folder, prompt, greedy(8), **settings)


@pytest.mark.parametrize("changes", [{}, {"enforce_eager": True}, {"kv_cache_dtype": "fp8"}, {"quantization": "fp8"},
                                     {"quantization": "int4"}], ids=str)
def test_a_ready_engine_compiles_nothing_more(tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up have channels enough for rings of many rows."""
    folder = write_tiny(tmp_path / "m", "llama", head_dim=128, hidden_size=256, intermediate_size=2048, num_attention_heads=8,
                        max_position_embeddings=8192)
    engine = make_engine(folder, device="cuda", dtype="bfloat16", max_num_seqs=64, num_blocks=1500, max_model_len=8192,
                         max_num_batched_tokens=4096, enable_prefix_caching=False, **changes)
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *, fn, **_: compiled.append(fn.name))
    drawn = SamplingParams(temperature=0.8, top_p=0.9, top_k=20, max_tokens=8, seed=1, presence_penalty=0.5, logprobs=3)
    for lengths in ([1], [5], [40], [300], [900], [2500], [6000], [600] * 6, [1] * 60, [3] * 60, [30, 2100], [17] * 64):
        prompts = prompts_of(*lengths, seed=len(lengths))
        submit(engine, prompts, [greedy(8) if number % 2 else drawn for number in range(len(prompts))])
        drain(engine)
    assert compiled == []


def test_an_engine_is_captured_while_another_is_garbage(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Python may collect at any allocation; here it does at every step that is captured, if it may."""
    cycle: list[Any] = [make_engine(folders["llama"], device="cuda", dtype="bfloat16", max_num_seqs=4)]
    cycle.append(cycle)
    run_step = StepGraphs._run

    def collecting(*inputs: Any) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing() and gc.isenabled():
            gc.collect()
        return run_step(*inputs)

    monkeypatch.setattr(StepGraphs, "_run", collecting)
    del cycle
    engine = make_engine(folders["llama"], device="cuda", dtype="bfloat16", max_num_seqs=4)
    assert engine._runner._graphs._captured


def test_steps_do_not_wait_for_the_device(folders: dict[str, Path]) -> None:
    engine = make_engine(folders["qwen3"], device="cuda", dtype="bfloat16")
    submit(engine, prompts_of(30, 40), [greedy(40), SamplingParams(temperature=0.8, top_p=0.9, max_tokens=40, seed=1)])
    for _ in range(6):
        engine.step()  # kernels are compiled and lazily made buffers exist
    launch = engine._runner.launch

    def guarded(batch: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine._runner.launch = guarded  # type: ignore[method-assign]
    drain(engine)
