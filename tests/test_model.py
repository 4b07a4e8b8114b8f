"""The decoder against transformers, in float32 on tiny random models: prefill, chunked prefill, batched decode."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from paged import PagedModel
from tiny import write_tiny

from workstation.architecture import read_shape
from workstation.model.linear import DenseLinear, packed
from workstation.model.loader import load_model
from workstation.model.rope import cos_sin_table, inverse_frequencies
from workstation.model.transformer import Decoder

CPU = torch.device("cpu")
THETA = {"rope_theta": 10000.0}
LONG_FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.5 + 0.7 * i for i in range(8)]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, **THETA}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **THETA}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 40, "factor": 4.0, **LONG_FACTORS, **THETA}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, **THETA}
MIXED = {"use_sliding_window": True, "sliding_window": 20, "num_hidden_layers": 5, "max_window_layers": 2}
LENGTHS = (90, 33, 16)  # of the three sequences; block boundaries at 16


@dataclass(frozen=True)
class Variant:
    """A model to compare; `max_model_len` None means its whole window."""

    kind: str
    fields: dict[str, Any]
    max_model_len: int | None = None


VARIANTS = {
    "llama": Variant("llama", {}),
    "llama_tied": Variant("llama", {"tie_word_embeddings": True}),
    "llama_biases": Variant("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_one_kv_head": Variant("llama", {"num_key_value_heads": 1}),
    "llama_head_32": Variant("llama", {"head_dim": 32}),
    "llama_head_64_no_gqa": Variant("llama", {"head_dim": 64, "num_key_value_heads": 4}),
    "llama_theta": Variant("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama_linear": Variant("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **THETA}}),
    "llama_dynamic_within": Variant("llama", {"rope_parameters": DYNAMIC}, 512),
    "llama_dynamic_beyond": Variant("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}, 90),
    "llama3_rope": Variant("llama", {"rope_parameters": LLAMA3}),
    "llama_yarn": Variant("llama", {"rope_parameters": YARN, "max_position_embeddings": 256}),
    "llama_longrope_long": Variant("llama", {"rope_parameters": LONGROPE, "max_position_embeddings": 160}),
    "llama_longrope_short": Variant("llama", {
        "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 128}, "max_position_embeddings": 512}, 128),
    "mistral": Variant("mistral", {"head_dim": 32}),
    "mistral_window": Variant("mistral", {"sliding_window": 24}),
    "qwen2": Variant("qwen2", {}),
    "qwen2_mixed_window": Variant("qwen2", MIXED),
    "qwen2_yarn": Variant("qwen2", {"rope_parameters": YARN, "max_position_embeddings": 256}),
    "qwen3": Variant("qwen3", {}),
    "qwen3_tied_biases": Variant("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3_head_64": Variant("qwen3", {"head_dim": 64}),
    "qwen3_layer_types": Variant("qwen3", {
        "use_sliding_window": True, "sliding_window": 17, "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]}),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


@cache
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in LENGTHS]


@cache
def models(name: str) -> tuple[Decoder, list[torch.Tensor]]:
    """(our decoder, transformers' logits of each prompt in float32)."""
    variant = VARIANTS[name]
    with TemporaryDirectory() as folder:
        write_tiny(folder, variant.kind, **variant.fields)
        shape = read_shape(folder)
        decoder = load_model(folder, shape, dtype=torch.float32, device=CPU,
                             max_model_len=variant.max_model_len or shape.max_position)
        return decoder, reference_logits(folder, torch.float32)


def reference_logits(folder: str | Path, dtype: torch.dtype) -> list[torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    with torch.inference_mode():
        return [model.eval()(torch.tensor([prompt])).logits[0].float() for prompt in prompts()]


def assert_same_distribution(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    gap = (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max().item()
    assert gap < 1e-4
    best = theirs.topk(2).values
    clear = best[:, 0] - best[:, 1] > 1e-3
    assert clear.any()
    assert torch.equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])


def comparable(name: str, row: int) -> bool:
    """transformers picks dynamic and LongRoPE factors by a call's length; compare where that is our fixed choice."""
    return row == 0 or name not in ("llama_dynamic_beyond", "llama_longrope_long")


@every_variant
def test_prefill_equals_transformers_at_every_position(name: str) -> None:
    decoder, expected = models(name)
    ours = PagedModel(decoder, 3, 96).step(dict(enumerate(prompts())))
    for row, theirs in enumerate(expected):
        if comparable(name, row):
            assert_same_distribution(ours[row], theirs)


@every_variant
def test_prefill_in_chunks_beside_other_sequences_equals_transformers(name: str) -> None:
    decoder, expected = models(name)
    paged = PagedModel(decoder, 3, 96, seed=1)
    parts: dict[int, list[torch.Tensor]] = {row: [] for row in range(3)}
    sizes = {0: 23, 1: 7, 2: 16}
    while work := {row: prompt[paged.computed[row]:paged.computed[row] + sizes[row]]
                   for row, prompt in enumerate(prompts()) if paged.computed[row] < len(prompt)}:
        for row, logits in paged.step(work).items():
            parts[row].append(logits)
    for row, theirs in enumerate(expected):
        if comparable(name, row):
            assert_same_distribution(torch.cat(parts[row]), theirs)


@every_variant
def test_decode_in_a_batch_equals_transformers(name: str) -> None:
    decoder, expected = models(name)
    paged = PagedModel(decoder, 3, 96, seed=2)
    prompt_lens = {0: 60, 1: 15, 2: 1}
    parts = {row: [logits] for row, logits in
             paged.step({row: prompts()[row][:length] for row, length in prompt_lens.items()}).items()}
    while work := {row: [prompt[paged.computed[row]]]
                   for row, prompt in enumerate(prompts()) if paged.computed[row] < len(prompt)}:
        for row, logits in paged.step(work).items():
            parts[row].append(logits)
    for row, theirs in enumerate(expected):
        if comparable(name, row):
            assert_same_distribution(torch.cat(parts[row]), theirs)


@pytest.mark.parametrize("name", ["llama_longrope_long", "llama_dynamic_beyond"])
def test_a_short_prompt_has_the_same_logits_alone_and_as_the_start_of_a_long_one(name: str) -> None:
    decoder, _ = models(name)
    whole = PagedModel(decoder, 1, 96).step({0: prompts()[0]})[0]
    start = PagedModel(decoder, 1, 96).step({0: prompts()[0][:20]})[0]
    assert torch.allclose(whole[:20], start, atol=1e-4)


def test_bfloat16_is_as_close_to_float32_as_transformers_is(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "qwen3", num_hidden_layers=4, head_dim=32)
    exact = reference_logits(folder, torch.float32)[0].log_softmax(-1)
    theirs = reference_logits(folder, torch.bfloat16)[0].log_softmax(-1)
    decoder = load_model(folder, read_shape(folder), dtype=torch.bfloat16, device=CPU, max_model_len=128)
    ours = PagedModel(decoder, 1, 96, dtype=torch.bfloat16).step({0: prompts()[0]})[0].log_softmax(-1)
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_packed_layer_computes_what_the_plain_one_does(dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, bias, x = (torch.randn(size, generator=generator).to(dtype) for size in ((96, 64), (96,), (rows, 64)))
    exact = x.double() @ weight.double().T + bias.double()
    layer = packed(DenseLinear(weight, bias))
    assert (layer.in_features, layer.out_features, layer.nbytes) == (64, 96, weight.nbytes + bias.nbytes)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(layer(x).double(), exact, rtol=tolerance, atol=10 * tolerance)


def test_a_step_without_logits_gives_an_empty_tensor() -> None:
    decoder, _ = models("llama")
    assert decoder.logits(torch.empty(0, 64)).shape == (0, 128)


def test_a_new_pool_replaces_the_views_of_the_old_one() -> None:
    decoder, expected = models("qwen2_mixed_window")
    first, second = PagedModel(decoder, 1, 96), PagedModel(decoder, 1, 96, seed=5)
    first.step({0: prompts()[0][:40]})
    second.step({0: prompts()[0][:10]})
    logits = first.step({0: prompts()[0][40:]})[0]
    assert_same_distribution(logits, expected[0][40:])


@pytest.mark.parametrize(("fields", "length"), [
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, None),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.5, **THETA}}, None),
    ({"rope_parameters": DYNAMIC}, 1000),
    ({"rope_parameters": LLAMA3}, None),
    ({"rope_parameters": YARN}, None),
    ({"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1, "beta_fast": 16, "beta_slow": 2}}, None),
    ({"rope_parameters": {**YARN, "attention_factor": 0.8, "truncate": False}}, None),
    ({"rope_parameters": LONGROPE}, 41),
    ({"rope_parameters": LONGROPE}, 40),
    ({"rope_parameters": {**LONGROPE, "attention_factor": 1.3}}, 41),
], ids=["default", "linear", "dynamic", "llama3", "yarn", "yarn_mscale", "yarn_attention_factor", "longrope_long",
        "longrope_short", "longrope_attention_factor"])
def test_rotary_tables_equal_transformers(fields: dict[str, Any], length: int | None) -> None:
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=512, **fields)
    kind = config.rope_parameters["rope_type"]
    make = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS.get(
        kind, transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters)
    frequencies, factor = make(config, device=CPU, seq_len=length)
    shape = read_shape({**config.to_dict(), "dtype": "float32"})
    rows = length or 600
    torch.testing.assert_close(inverse_frequencies(shape.rope, rows), frequencies, rtol=1e-6, atol=0.0)
    angles = torch.arange(rows).float()[:, None] * frequencies
    table = cos_sin_table(shape.rope, rows, CPU)
    torch.testing.assert_close(table, torch.cat((angles.cos(), angles.sin()), -1) * factor, rtol=1e-4, atol=1e-4)


def test_a_long_step_runs_its_mlp_in_pieces_and_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, _ = models("llama")
    whole = PagedModel(decoder, 3, 96).step(dict(enumerate(prompts())))
    monkeypatch.setattr("workstation.model.layers.MLP_TOKENS", 7)
    pieces = PagedModel(decoder, 3, 96).step(dict(enumerate(prompts())))
    assert all(torch.allclose(whole[row], pieces[row], atol=1e-4) for row in whole)
