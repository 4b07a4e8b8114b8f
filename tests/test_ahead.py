"""Kernels compiled ahead: launches that only compile, which kernels steps may meet, and a model's kinds of layers."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from engines import make_engine
from kernel_cases import Heads, paged_case
from test_compile_attention import pretend
from test_tuning import A100, B200, H200, L40S, PRO_6000
from tiny import write_tiny
from triton.runtime.jit import JITFunction

from workstation.architecture import read_shape
from workstation.engine.graphs import Shape
from workstation.kernels import launch_hopper, launch_prefill
from workstation.kernels.ahead import compiling_ahead
from workstation.kernels.offline import targeting
from workstation.kernels.paging import FP8, KVScales
from workstation.kernels.tuning import Device
from workstation.model.transformer import Decoder
from workstation.quant.forms import Form, Part, WeightForms


@triton.jit
def add_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at) + 1)


@triton.jit
def broken_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names and block sizes of the kernels that get compiled, with a cache of their own."""
    found: list[str] = []

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> None:
        found.append(f"{fn.name.rpartition('.')[2]} {next(iter(compile['constants'].values()))}")

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # else Triton 3.9 warns
    for kernel in (add_kernel, broken_kernel):
        kernel.device_caches.clear()
    return found


def test_a_launch_compiles_and_writes_nothing(compiled: list[str]) -> None:
    out = torch.zeros(32)
    with targeting(90), compiling_ahead(2):
        add_kernel[(1,)](torch.ones(32), out, BLOCK=16)
        add_kernel[(1,)](torch.ones(32), out, BLOCK=32)
        add_kernel[(1,)](torch.ones(32), out, BLOCK=16)
    assert sorted(compiled) == ["add_kernel 16", "add_kernel 32"]
    assert not out.any()


def test_afterwards_kernels_are_launched_again_and_those_compiled_ahead_are_ready(compiled: list[str]) -> None:
    before = JITFunction.run
    with targeting(90):
        with compiling_ahead(1):
            add_kernel[(1,)](torch.ones(32), torch.zeros(32), BLOCK=16)
        add_kernel.warmup(torch.ones(32), torch.zeros(32), BLOCK=16, grid=(1,))
    assert compiled == ["add_kernel 16"]
    assert JITFunction.run is before


def test_a_kernel_that_does_not_compile_is_left_to_its_launch(compiled: list[str]) -> None:
    with targeting(90):
        with compiling_ahead(2):
            broken_kernel[(1,)](torch.ones(32), BLOCK=16)
            add_kernel[(1,)](torch.ones(32), torch.zeros(32), BLOCK=16)
        assert compiled == ["add_kernel 16"]
        with pytest.raises(triton.CompilationError):
            broken_kernel.warmup(torch.ones(32), BLOCK=16, grid=(1,))


def test_an_error_within_gives_launching_back() -> None:
    before = JITFunction.run
    with pytest.raises(KeyError), compiling_ahead(1):
        raise KeyError
    assert JITFunction.run is before


@pytest.mark.parametrize("window", [0, 64, 2048])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("cache", [torch.bfloat16, FP8])
@pytest.mark.parametrize("device", [A100, L40S, H200, B200, PRO_6000], ids=lambda device: str(device.capability))
def test_shortest_and_longest_chunks_and_contexts_choose_every_prefill_kernel_there_is(
        device: Device, cache: torch.dtype, head_dim: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, device)
    monkeypatch.setattr(launch_hopper, "is_hopper", lambda _: device.capability == 90)
    case = paged_case(Heads(8, 2, head_dim), [(8, 8)], dtype=torch.bfloat16, scales=KVScales() if cache == FP8 else None)

    def chosen(longest: int, context: int) -> launch_prefill.PrefillConfig:
        plan = replace(case.plan, max_query_len=longest, max_context_len=context, window=window)
        return launch_prefill.choose(case.q, case.kv_layer, plan)

    ahead = {chosen(*bounds) for bounds in itertools.product((1, 8191), (1, 131_072))}
    steps = itertools.product((1, 2, 15, 16, 17, 100, 1024, 8191), (1, 16, 63, 64, 1023, 1024, 1025, 9000, 131_072))
    assert {chosen(longest, context) for longest, context in steps} <= ahead


def test_an_idle_step_takes_its_bounds_from_the_caller(tmp_path: Path) -> None:
    graphs = make_engine(write_tiny(tmp_path / "m", "llama"))._runner._graphs
    plan = graphs.idle(Shape(1, 16, 2), 3, 7).plans[0]
    assert (plan.max_query_len, plan.max_context_len, plan.num_decodes) == (3, 7, 1)
    own = graphs.idle(Shape(1, 16, 2)).plans[0]
    assert (own.max_query_len, own.max_context_len) == (16, graphs._max_model_len)


def sample(folder: Path, forms: WeightForms) -> tuple[Decoder, Decoder]:
    whole = Decoder(read_shape(folder), dtype=torch.float32, device=torch.device("cpu"), max_model_len=64, forms=forms)
    return whole, whole.sample_of_layers()


def test_a_sample_has_two_of_equal_layers(tmp_path: Path) -> None:
    whole, some = sample(write_tiny(tmp_path / "m", "llama", num_hidden_layers=5), WeightForms())
    assert some.layers == whole.layers[:2] and len(whole.layers) == 5
    assert some.embedding is whole.embedding and some.head is whole.head


def test_a_sample_has_two_of_each_form_of_weights(tmp_path: Path) -> None:
    parts = {f"model.layers.{layer}.mlp.down_proj": Part(form=Form.FP8_CHANNEL) for layer in (1, 3, 4)}
    whole, some = sample(write_tiny(tmp_path / "m", "llama", num_hidden_layers=6), WeightForms(parts))
    assert some.layers == [whole.layers[number] for number in (0, 1, 2, 3)]


def test_it_says_how_many_kernels_are_compiled_and_ends_with_all_of_them(compiled: list[str]) -> None:
    said: list[tuple[int, int]] = []
    with targeting(90), compiling_ahead(1, lambda *now: said.append(now)):
        add_kernel[(1,)](torch.ones(32), torch.zeros(32), BLOCK=16)
        add_kernel[(1,)](torch.ones(32), torch.zeros(32), BLOCK=32)
        assert said == []
    assert len(compiled) == 2
    assert said == sorted(said) and said[-1] == (2, 2)


def test_it_says_nothing_when_there_was_nothing_to_compile() -> None:
    said: list[tuple[int, int]] = []
    with compiling_ahead(1, lambda *now: said.append(now)):
        pass
    assert said == []
