"""The sampling kernels: compiled for GPUs that are not here, and, where there is one, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from products import some_of
from sampling_checks import check_draws, check_token_mask, kernels, logits_of, state_of, twin
from test_tuning import A100, B200, H200, L40S, PRO_6000

from workstation.engine.sampler import Sampler
from workstation.kernels import launch_sampling, ops_sampling
from workstation.kernels.gemm_launch import Call
from workstation.kernels.offline import resources, targeting
from workstation.kernels.tuning import Device

RULES: list[dict[str, Any]] = [
    {"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 1.0}, {"min_p": 0.05},
    {"top_k": 20, "top_p": 0.95, "temperature": 0.6}, {"top_p": 0.9}, {"top_k": 50},
    {"top_p": 0.95, "min_p": 0.02}, {"temperature": 6.0, "top_p": 0.9}, {"top_k": 60_000},
]  # fmt: skip


def test_logits_of_another_width_than_the_rooms_are_refused() -> None:
    room = ops_sampling.sampling_room(40, torch.device("cpu"))
    nothing = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="logits"):
        ops_sampling.sample(torch.zeros(1, 41), nothing, nothing, torch.zeros(1, 8, dtype=torch.int64), room, filtered=False)
    with pytest.raises(ValueError, match="rows"):
        ops_sampling.sample(torch.zeros(2, 40), nothing, nothing, torch.zeros(1, 8, dtype=torch.int64), room, filtered=False)


@pytest.mark.parametrize(("width", "words"), [(37, 2), (100, 3), (300, 12)])
def test_a_masks_twin_leaves_the_allowed_tokens_and_what_is_broken(width: int, words: int) -> None:
    check_token_mask(width, words, torch.float32, "cpu")


def test_masks_of_another_type_or_count_are_refused() -> None:
    logits, bits, index = torch.zeros(2, 40), torch.zeros(1, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="bits"):
        ops_sampling.mask_tokens(logits, bits.long(), index)
    with pytest.raises(ValueError, match="index"):
        ops_sampling.mask_tokens(logits, bits, index[:1])


# ── compiled ────────────────────────────────────────────────────────────────────────────────────────────────────────


def calls(width: int, dtype: torch.dtype, *, pdl: bool) -> dict[str, Call]:
    room = launch_sampling.Room(width, torch.device("cpu"))
    room.fit(2, filtered=True)
    logits, rows = torch.zeros(2, width, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    table = torch.zeros(4, 8, dtype=torch.int64)
    results = (rows.clone(), torch.zeros(2, dtype=torch.bool), table[:, 0].contiguous())
    return {
        "plain": launch_sampling.sample_call(logits, rows, rows, table, room, results, filtered=False, pdl=pdl),
        "scan": launch_sampling.sample_call(logits, rows, rows, table, room, results, filtered=True, pdl=pdl),
        "gather": launch_sampling.gather_call(logits, rows, table, room),
        "filter": launch_sampling.filter_call(logits, rows, rows, table, room, results),
    }


@some_of(1, device={device.name: device for device in (A100, L40S, H200, B200, PRO_6000)},
         vocabulary=[(128256, torch.bfloat16), (151936, torch.float32)])
def test_the_kernels_compile_for_every_kind_of_gpu_and_do_not_spill(
    monkeypatch: pytest.MonkeyPatch, device: Device, vocabulary: tuple[int, torch.dtype]
) -> None:
    width, dtype = vocabulary
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns until it is asked for by name
    pdl = device.capability >= 90
    for name, call in calls(width, dtype, pdl=pdl).items():
        with targeting(device.capability):
            compiled = call.kernel.warmup(*call.arguments, grid=call.grid, **call.options)
        assert resources(compiled).stack == 0, name
        assembly = compiled.asm["ptx"]
        assert ".v4.b32" in assembly, name  # logits are read 16 bytes at a time
        assert ("griddepcontrol.wait" in assembly) == (pdl and name in ("plain", "scan"))


@pytest.mark.parametrize("device", [A100, H200, PRO_6000], ids=lambda device: device.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_mask_kernel_compiles_and_reads_16_bytes_at_a_time(
    monkeypatch: pytest.MonkeyPatch, device: Device, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    index = torch.zeros(2, dtype=torch.int32)
    call = launch_sampling.mask_call(torch.zeros(2, 128256, dtype=dtype), torch.zeros(2, 4008, dtype=torch.int32), index)
    with targeting(device.capability):
        compiled = call.kernel.warmup(*call.arguments, grid=call.grid, **call.options)
    assert resources(compiled).stack == 0
    assert ".v4.b32" in compiled.asm["ptx"]


def test_a_single_row_is_spread_over_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_sampling, "_multiprocessors", lambda device: 132)
    assert calls(128256, torch.bfloat16, pdl=False)["plain"].grid == (126, 2)
    assert launch_sampling._shared(126, 1, 4224) == (126, 1)
    assert launch_sampling._shared(126, 512, 4224) == (8, 16)
    assert launch_sampling._shared(126, 100_000, 4224) == (1, 126)


# ── on a GPU ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 7, 128, 300])
@pytest.mark.parametrize("width", [128256, 151936])
def test_real_vocabularies_are_sampled_as_by_the_twin(width: int, rows: int, dtype: torch.dtype) -> None:
    """Where sums are rounded otherwise a draw near a boundary may fall to the neighbour, so single tokens may differ."""
    rules = [RULES[(row + rows) % len(RULES)] for row in range(rows)]
    state = state_of(rules, width, "cuda")
    logits = logits_of(rows, width, dtype, seed=rows).cuda()
    equal = 0
    for position in range(2):
        tokens, finite = kernels(state, logits, position)
        assert finite.all()
        check_draws(state, rules, logits, tokens, position)
        equal += int((tokens == twin(state, logits, position)[0]).sum())
    assert equal >= 2 * rows * 0.95 - 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masks_hold_on_a_gpu(dtype: torch.dtype) -> None:
    for width, words in ((37, 2), (2500, 79)):
        check_token_mask(width, words, dtype, "cuda")


@pytest.mark.gpu
def test_a_row_on_the_gpu_gives_the_same_token_alone_and_in_company() -> None:
    rules = [RULES[row % len(RULES)] for row in range(200)]
    state, logits = state_of(rules, 128256, "cuda"), logits_of(200, 128256, torch.bfloat16).cuda()
    tokens, _ = kernels(state, logits)
    for row in range(len(RULES) * 2):
        assert kernels(state, logits[row : row + 1], rows=[row])[0].item() == tokens[row]
    for _ in range(20):
        assert torch.equal(kernels(state, logits)[0], tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_broken_rows_on_the_gpu_are_reported(poison: float) -> None:
    state, logits = state_of(RULES, 151936, "cuda"), logits_of(len(RULES), 151936, torch.bfloat16).cuda()
    healthy, _ = kernels(state, logits)
    logits[1::2, slice(None) if poison == -torch.inf else 100_000] = poison
    tokens, finite = kernels(state, logits)
    assert finite.tolist() == [True, False] * (len(RULES) // 2)
    assert tokens[1::2].eq(0).all()
    assert torch.equal(tokens[::2], healthy[::2])


@pytest.mark.gpu
@pytest.mark.parametrize("rules", [RULES[:4], RULES], ids=["plain", "filtered"])
def test_a_captured_graph_samples_what_stands_in_its_inputs(rules: list[dict[str, Any]]) -> None:
    state = state_of(rules, 128256, "cuda")
    sampler, rows = Sampler(state), list(range(len(rules)))
    rows_t, positions = torch.arange(len(rows), device="cuda"), torch.zeros(len(rows), dtype=torch.int64, device="cuda")
    logits, last = logits_of(len(rows), 128256, torch.bfloat16).cuda(), torch.zeros(len(rows), dtype=torch.int64, device="cuda")
    arguments = (logits, rows, rows_t, positions, [0] * len(rows), last)
    sampler.sample(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = sampler.sample(*arguments)
    for step in range(3):
        positions.fill_(step)
        logits.copy_(logits_of(len(rows), 128256, torch.bfloat16, seed=step))
        graph.replay()
        expected, _ = kernels(state, logits, step)
        assert torch.equal(output.tokens, expected)
        assert torch.equal(last, expected)


@pytest.mark.gpu
def test_programmatic_launches_behind_a_product_sample_its_results() -> None:
    state = state_of(RULES, 4096, "cuda")
    room, rows = ops_sampling.sampling_room(4096, torch.device("cuda")), torch.arange(len(RULES), device="cuda")
    weight = torch.randn(4096, 256, dtype=torch.bfloat16, device="cuda")
    for position in range(20):
        x = torch.randn(len(RULES), 256, dtype=torch.bfloat16, device="cuda")
        logits = x @ weight.t()
        tokens, _ = ops_sampling.sample(logits, rows, rows * 0 + position, state.table, room, filtered=True)
        assert torch.equal(tokens, kernels(state, logits, position)[0])
