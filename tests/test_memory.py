"""The memory plan: pure arithmetic, so every promise of it is checked with numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest

from workstation.architecture import KVGroup, LayerKind, ModelShape, RopeShape
from workstation.config import EngineConfig
from workstation.errors import ConfigError, OutOfMemoryError
from workstation.memory import (
    CPU_POOL_BYTES,
    CUDA_CONTEXT_BYTES,
    DISPLAY_RESERVE_BYTES,
    GIB,
    DeviceMemory,
    blocks_for,
    graph_prompts,
    plan_memory,
)


def llama_8b(window: int = 131072) -> ModelShape:
    return ModelShape(
        architecture="llama", num_layers=32, hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=8,
        head_dim=128, vocab_size=128256, norm_eps=1e-5, rope=RopeShape("llama3", 500000.0, 128), max_position=window,
        tie_embeddings=False, qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False, window=0,
        layer_kinds=("full",) * 32, kv_groups=(KVGroup("full", tuple(range(32))),), dtype="bfloat16",
        eos_token_ids=(128001,), bos_token_id=128000,
    )  # fmt: skip


WEIGHTS = 16_060_522_496
H200 = DeviceMemory("cuda", total_bytes=140 * GIB, free_bytes=139 * GIB)
SMALL = DeviceMemory("cuda", total_bytes=24 * GIB, free_bytes=23 * GIB)
CONFIG = EngineConfig(model="somewhere")


def test_captured_prompts_end_where_the_gpu_takes_as_long_as_the_launches() -> None:
    shape = llama_8b()
    large = replace(shape, hidden_size=8192, intermediate_size=28672, num_heads=64)
    assert graph_prompts(shape, 8192)[-1] == 1024
    assert graph_prompts(large, 8192)[-1] == 256
    assert graph_prompts(shape, 300) == [64, 128, 256]
    assert graph_prompts(shape, 10) == []


def test_graphs_take_what_their_largest_step_does_and_nothing_when_there_are_none() -> None:
    whole = plan_memory(llama_8b(), CONFIG, WEIGHTS, H200)
    small = plan_memory(llama_8b(), replace(CONFIG, max_num_batched_tokens=64, max_num_seqs=16), WEIGHTS, H200)
    eager = plan_memory(llama_8b(), replace(CONFIG, enforce_eager=True), WEIGHTS, H200)
    assert whole.graphs > small.graphs > eager.graphs == 0


def test_what_products_need_beside_activations_comes_out_of_the_pool() -> None:
    plain, scratch = (plan_memory(llama_8b(), CONFIG, WEIGHTS, H200, scratch_bytes=count) for count in (0, 64 << 20))
    assert scratch.workspace == plain.workspace + (64 << 20) and scratch.graphs == plain.graphs + (64 << 20)
    assert plain.num_blocks - scratch.num_blocks == 64  # of 2 MiB


def test_a_block_of_llama_8b_is_two_mebibytes() -> None:
    assert llama_8b().kv_bytes_per_block(16, 2) == 2 * 1024 * 1024


def test_a_large_card_serves_the_whole_window_and_stays_inside_its_share() -> None:
    plan = plan_memory(llama_8b(), CONFIG, WEIGHTS, H200)
    assert plan.max_model_len == 131072
    assert plan.note == ""
    assert plan.total <= 0.9 * H200.total_bytes
    assert plan.kv == plan.num_blocks * 2 * 1024 * 1024
    assert 0.9 * H200.total_bytes - plan.total < 2 * 1024 * 1024 + 1


def test_utilisation_counts_the_cuda_context() -> None:
    plan = plan_memory(llama_8b(), CONFIG, WEIGHTS, H200)
    assert plan.budget == int(0.9 * H200.total_bytes) - CUDA_CONTEXT_BYTES


def test_free_memory_limits_the_budget_when_another_program_holds_the_card() -> None:
    busy = replace(H200, free_bytes=40 * GIB)
    plan = plan_memory(llama_8b(), CONFIG, WEIGHTS, busy)
    assert plan.budget == 40 * GIB
    assert plan.total - plan.context <= 40 * GIB


def test_free_memory_read_before_the_context_existed_is_charged_for_it() -> None:
    busy = replace(H200, free_bytes=40 * GIB, has_context=False)
    assert plan_memory(llama_8b(), CONFIG, WEIGHTS, busy).budget == 40 * GIB - CUDA_CONTEXT_BYTES


@pytest.mark.parametrize("asked", ["fp8", "fp8_e4m3"])
def test_fp8_kv_halves_a_block_and_leaves_the_rest_of_the_plan(asked: Literal["fp8", "fp8_e4m3"]) -> None:
    plain, small = (plan_memory(llama_8b(), replace(CONFIG, kv_cache_dtype=kv), WEIGHTS, H200) for kv in ("bfloat16", asked))
    assert small.kv == small.num_blocks * 1024 * 1024
    assert small.num_blocks - 2 * plain.num_blocks in (0, 1)
    assert (small.weights, small.workspace, small.logits) == (plain.weights, plain.workspace, plain.logits)
    assert small == plan_memory(llama_8b(), replace(CONFIG, kv_cache_dtype=asked), WEIGHTS, H200, kv_dtype_bytes=1)


def test_a_display_keeps_a_gibibyte() -> None:
    busy = replace(H200, free_bytes=40 * GIB, display=True)
    plan = plan_memory(llama_8b(), CONFIG, WEIGHTS, busy)
    assert plan.reserve == DISPLAY_RESERVE_BYTES
    assert plan.budget == 39 * GIB


def test_a_context_nobody_asked_for_shrinks_with_a_sentence() -> None:
    plan = plan_memory(llama_8b(), CONFIG, WEIGHTS, SMALL)
    assert 4096 <= plan.max_model_len < 131072
    assert plan.max_model_len % 16 == 0
    assert str(plan.max_model_len) in plan.note and "131072" in plan.note
    assert plan.num_blocks - 1 >= plan.max_model_len // 16


def test_the_shrunk_context_is_the_longest_that_fits() -> None:
    plan = plan_memory(llama_8b(), CONFIG, WEIGHTS, SMALL)
    asked = replace(CONFIG, max_model_len=plan.max_model_len)
    assert plan_memory(llama_8b(), asked, WEIGHTS, SMALL).num_blocks == plan.num_blocks
    with pytest.raises(OutOfMemoryError):
        plan_memory(llama_8b(), replace(CONFIG, max_model_len=plan.max_model_len + 32), WEIGHTS, SMALL)


def test_a_context_never_shrinks_below_4096() -> None:
    nearly_full = DeviceMemory("cuda", total_bytes=24 * GIB, free_bytes=WEIGHTS + GIB)
    with pytest.raises(OutOfMemoryError, match="4096 tokens needs"):
        plan_memory(llama_8b(), replace(CONFIG, num_blocks=200), WEIGHTS, SMALL)
    with pytest.raises(OutOfMemoryError):
        plan_memory(llama_8b(), CONFIG, WEIGHTS, nearly_full)


def test_a_context_that_was_asked_for_and_does_not_fit_names_the_number_that_does() -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        plan_memory(llama_8b(), replace(CONFIG, max_model_len=100_000), WEIGHTS, SMALL)
    best = int(caught.value.message.rsplit("--max-model-len ", 1)[1])
    assert plan_memory(llama_8b(), replace(CONFIG, max_model_len=best), WEIGHTS, SMALL).max_model_len == best


def test_a_context_beyond_the_window_is_refused_naming_the_window() -> None:
    with pytest.raises(ConfigError, match="between 1 and 131072") as caught:
        plan_memory(llama_8b(), replace(CONFIG, max_model_len=131073), WEIGHTS, H200)
    assert caught.value.param == "max_model_len"


def test_weights_that_do_not_fit_are_named_in_gibibytes() -> None:
    with pytest.raises(OutOfMemoryError, match=r"the weights \(131\.\d\d GiB\).*21\.\d\d GiB"):
        plan_memory(llama_8b(), CONFIG, 141_000_000_000, SMALL)


def test_an_exact_pool_overrides_the_share_of_the_card() -> None:
    short = replace(CONFIG, max_model_len=8000)
    by_blocks = plan_memory(llama_8b(), replace(short, num_blocks=1000), WEIGHTS, H200)
    by_bytes = plan_memory(llama_8b(), replace(short, kv_cache_memory_bytes=3 * GIB), WEIGHTS, H200)
    assert by_blocks.num_blocks == 1000
    assert by_bytes.num_blocks == 1536


def test_an_exact_pool_that_is_not_there_is_refused() -> None:
    config = replace(CONFIG, kv_cache_memory_bytes=30 * GIB, max_model_len=4096)
    with pytest.raises(OutOfMemoryError, match=r"30\.00 GiB was asked for"):
        plan_memory(llama_8b(), config, WEIGHTS, SMALL)


def test_the_cpu_pool_is_two_gibibytes_or_a_quarter_of_the_machine() -> None:
    shape = llama_8b(window=8192)
    large = plan_memory(shape, CONFIG, 0, DeviceMemory("cpu", 256 * GIB, 200 * GIB), dtype_bytes=2)
    small = plan_memory(shape, CONFIG, 0, DeviceMemory("cpu", 7 * GIB, 6 * GIB), dtype_bytes=2)
    assert large.kv == CPU_POOL_BYTES
    assert small.kv <= 7 * GIB // 4 < small.kv + 2 * 1024 * 1024
    assert large.context == large.graphs == 0


def test_without_chunks_a_step_holds_the_longest_prompt() -> None:
    config = replace(CONFIG, enable_chunked_prefill=False, max_model_len=20_000)
    assert plan_memory(llama_8b(), config, WEIGHTS, H200).max_num_batched_tokens == 20_000
    with pytest.raises(ConfigError, match="at least max_model_len"):
        plan_memory(llama_8b(), replace(config, max_num_batched_tokens=8192), WEIGHTS, H200)


def test_a_server_on_a_large_card_computes_4096_tokens_a_step_and_offline_twice_that() -> None:
    online = replace(CONFIG, online=True)
    assert plan_memory(llama_8b(), online, WEIGHTS, H200).max_num_batched_tokens == 4096
    assert plan_memory(llama_8b(), CONFIG, WEIGHTS, H200).max_num_batched_tokens == 8192
    assert plan_memory(llama_8b(), online, WEIGHTS, SMALL).max_num_batched_tokens == 2048


def test_a_token_budget_that_was_asked_for_is_obeyed_on_a_server_too() -> None:
    asked = replace(CONFIG, online=True, max_num_batched_tokens=8192)
    assert plan_memory(llama_8b(), asked, WEIGHTS, H200).max_num_batched_tokens == 8192


def test_a_larger_step_takes_more_workspace_and_leaves_fewer_blocks() -> None:
    small = plan_memory(llama_8b(), replace(CONFIG, max_num_batched_tokens=2048), WEIGHTS, H200)
    large = plan_memory(llama_8b(), replace(CONFIG, max_num_batched_tokens=16384), WEIGHTS, H200)
    assert large.workspace > 2 * small.workspace
    assert large.num_blocks < small.num_blocks


def test_a_sliding_group_holds_its_window_and_one_chunk() -> None:
    kinds: tuple[LayerKind, ...] = ("full", "sliding") * 16
    groups = (KVGroup("full", tuple(range(0, 32, 2))), KVGroup("sliding", tuple(range(1, 32, 2)), window=1024))
    shape = replace(llama_8b(), layer_kinds=kinds, kv_groups=groups, window=1024)
    assert blocks_for(shape, 512, 16, 2048) == 2 * 32
    assert blocks_for(shape, 65536, 16, 2048) == 4096 + (1024 + 2048) // 16 + 1


@pytest.mark.parametrize("utilisation", [0.0, -0.1, 1.01, float("nan")])
def test_a_share_outside_zero_to_one_is_refused(utilisation: float) -> None:
    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        plan_memory(llama_8b(), replace(CONFIG, gpu_memory_utilization=utilisation), WEIGHTS, H200)


@pytest.mark.parametrize(("name", "value"), [("max_num_seqs", 0), ("max_num_batched_tokens", 0), ("max_model_len", 0)])
def test_counts_below_one_are_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=name):
        plan_memory(llama_8b(), replace(CONFIG, **{name: value}), WEIGHTS, H200)


def test_without_graphs_their_memory_goes_to_the_pool() -> None:
    graphed = plan_memory(llama_8b(), CONFIG, WEIGHTS, H200)
    eager = plan_memory(llama_8b(), replace(CONFIG, enforce_eager=True), WEIGHTS, H200)
    assert eager.graphs == 0
    assert eager.kv - graphed.kv == pytest.approx(graphed.graphs, abs=2 * 1024 * 1024)
