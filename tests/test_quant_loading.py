"""Quantising while loading, sizes known in advance, dummy weights, and the engine over FP8 weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from engines import drain, make_engine, run, submit
from quant_models import CPU, EVERY_FORMAT, LLAMA_8B, PROMPT, large, load, logits, refusal, rewrite
from quantised import FORMATS, SINGLE, SIZES, write_quantised
from safetensors.torch import load_file
from tiny import write_tiny

from workstation.architecture import read_shape
from workstation.engine.request import SamplingParams
from workstation.errors import ConfigError
from workstation.llm import LLM
from workstation.model.linear_forms import pieces
from workstation.model.linear_fp8 import Fp8ChannelLinear, Fp8Linear
from workstation.model.loader import checked_entries, load_model, read_forms
from workstation.model.quantised_folder import quantise_folder
from workstation.model.targets import Scratch
from workstation.model.tensor_names import targets
from workstation.model.transformer import Decoder
from workstation.quant.forms import Form, Part, WeightForms, weight_bytes
from workstation.quant.quantise import quantise_rows
from workstation.safetensors_header import checkpoint_bytes

Q = "model.layers.0.self_attn.q_proj"


# ── quantising while loading ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_plain_weights_become_fp8_with_a_scale_a_row(stored: torch.dtype, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "qwen2", dtype=stored, **SIZES)
    weights = load_file(folder / SINGLE)
    decoder = load(folder, quantization="fp8")
    qkv = decoder.layers[1].attention.qkv
    assert isinstance(qkv, Fp8ChannelLinear)
    plain = torch.cat([weights[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]).float()
    scale = (plain.abs().amax(1) / 448).bfloat16().float()
    assert torch.equal(qkv.scale, scale)
    codes = (plain / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(qkv.weight.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(decoder.embedding, weights["model.embed_tokens.weight"].float())
    assert not isinstance(decoder.head, Fp8Linear)


def test_an_fp8_checkpoint_stays_as_it_is_when_fp8_is_asked_for(tmp_path: Path) -> None:
    fp8, _ = write_quantised(tmp_path, "hf_block")
    assert read_forms(fp8, read_shape(fp8), quantization="fp8") == read_forms(fp8, read_shape(fp8))


def test_another_quantization_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    with pytest.raises(ConfigError, match="fp8, int8, int4, nf4, int4-g64, int4-g32 or absent, got 'int3'"):
        load(folder, quantization="int3")


def test_a_weight_that_is_not_finite_cannot_be_quantised(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, **SIZES)
    rewrite(folder, lambda w: w[f"{Q}.weight"][3].fill_(torch.inf))
    assert f"{Q}.weight" in refusal(folder, quantization="fp8")


def test_rows_are_quantised_alike_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 48, generator=torch.Generator().manual_seed(0))
    weight[5], weight[6] = 0.0, 1e-44
    results = []
    for chunk in (1, 100, 1 << 22):
        monkeypatch.setattr("workstation.quant.quantise.CHUNK_ELEMENTS", chunk)
        quantised, scale = torch.empty(37, 48, dtype=torch.float8_e4m3fn), torch.empty(37)
        quantise_rows(weight, quantised, scale)
        results.append((quantised.view(torch.uint8), scale))
        assert scale[5] == 1.0 and scale.isfinite().all() and (scale > 0).all()
        kept = torch.arange(37) > 6
        error = (quantised.float() * scale[:, None] - weight).abs()
        assert (error[kept] <= weight.abs().amax(1, keepdim=True)[kept] / 448 * 16 + 1e-9).all()
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))


def test_the_buffer_for_quantising_is_one_tensor(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, **SIZES)
    shape = read_shape(folder)
    forms = read_forms(folder, shape, quantization="fp8")
    entries = checked_entries(folder, shape, forms)
    decoder = load(folder, quantization="fp8")
    assert Scratch(targets(Decoder(shape, dtype=torch.float32, device=CPU, max_model_len=8, forms=forms)), entries,
                   CPU).take(1 << 30).nbytes == 192 * 320 * 4
    assert decoder.weight_bytes < checkpoint_bytes(folder)


# ── sizes and dummy weights ─────────────────────────────────────────────────────────────────────────────────────────


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_planned_bytes_are_those_of_the_loaded_weights(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    fp8, _ = write_quantised(tmp_path, name, "qwen2")
    decoder = load(fp8, dtype)
    assert decoder.weight_bytes - decoder.cos_sin.nbytes == weight_bytes(decoder.shape, dtype.itemsize, decoder.forms)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_without_forms_the_bytes_are_those_of_all_parameters(kind: str, tied: bool, tmp_path: Path) -> None:
    shape = read_shape(write_tiny(tmp_path, kind, tie_word_embeddings=tied))
    assert weight_bytes(shape, 2) == 2 * shape.num_parameters
    forms = read_forms(tmp_path, shape, quantization="fp8")
    decoder = Decoder(shape, dtype=torch.bfloat16, device=CPU, max_model_len=64, forms=forms)
    assert decoder.weight_bytes - decoder.cos_sin.nbytes == weight_bytes(shape, 2, forms) < weight_bytes(shape, 2)


@pytest.mark.parametrize("name", ["ct_channel", "hf_block", "modelopt"])
def test_the_plan_of_a_large_model_is_within_one_percent_of_its_file(name: str) -> None:
    """8B: every linear layer a byte a weight, embedding and head two, norms two; scales are all that may differ."""
    shape, forms = large(FORMATS[name][0])
    linear = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    stored = linear + 2 * (2 * 128256 * 4096 + 65 * 4096)
    assert stored <= weight_bytes(shape, 2, forms) < 1.01 * stored


def test_a_large_decoder_says_exactly_what_was_planned() -> None:
    """On the meta device: shapes without memory."""
    for name in ("ct_channel", "hf_block"):
        shape, forms = large(FORMATS[name][0], num_hidden_layers=3)
        decoder = Decoder(shape, dtype=torch.bfloat16, device=torch.device("meta"), max_model_len=16, forms=forms)
        assert decoder.weight_bytes - decoder.cos_sin.nbytes == weight_bytes(shape, 2, forms)


@pytest.mark.parametrize("name", ["ct_channel", "hf_block"])
def test_dummy_weights_are_finite_follow_the_seed_and_keep_activations_in_range(name: str, tmp_path: Path) -> None:
    fp8, _ = write_quantised(tmp_path, name)
    first, again, other = (load(fp8, torch.bfloat16, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    down = [decoder.layers[0].down for decoder in (first, again, other)]
    assert all(isinstance(linear, Fp8Linear) for linear in down)
    bits = [linear.weight.view(torch.uint8) for linear in down if isinstance(linear, Fp8Linear)]
    assert torch.equal(bits[0], bits[1]) and not torch.equal(bits[0], bits[2])
    wide = down[0](torch.eye(320).bfloat16()).float()  # the weights themselves, transposed
    assert wide.isfinite().all() and abs(wide.square().mean().sqrt() * 320**0.5 - 1) < 0.05
    assert logits(first, torch.bfloat16).isfinite().all()


def test_quantising_dummy_weights_needs_no_folder() -> None:
    shape = read_shape({**LLAMA_8B, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64,
                        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
    forms = read_forms("/nowhere", shape, load_format="dummy", quantization="fp8")
    decoder = load_model("/nowhere", shape, dtype=torch.bfloat16, device=CPU, max_model_len=64, load_format="dummy",
                         forms=forms)
    assert all(isinstance(linear, Fp8ChannelLinear) for linear in decoder.linears() if linear is not decoder.head)


def test_reading_forms_needs_no_torch(tmp_path: Path) -> None:
    fp8, _ = write_quantised(tmp_path, "ct_channel")
    code = ("import sys; from workstation.architecture import read_shape; from workstation.quant.detect import weight_forms; "
            "from workstation.quant.forms import weight_bytes; from workstation.safetensors_header import read_checkpoint; "
            f"s = read_shape({str(fp8)!r}); f = weight_forms(s, read_checkpoint({str(fp8)!r})); "
            "assert weight_bytes(s, 2, f) > 0; sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", [*FORMATS, "at_load"])
def test_weights_on_the_gpu_are_those_on_the_cpu(name: str, tmp_path: Path) -> None:
    if name == "at_load":
        folder, quantization = write_tiny(tmp_path, **SIZES), "fp8"
    else:
        folder, quantization = write_quantised(tmp_path, name)[0], None
    shape = read_shape(folder)
    forms = read_forms(folder, shape, quantization=quantization)
    made = [load_model(folder, shape, dtype=torch.bfloat16, device=torch.device(device), max_model_len=64, forms=forms)
            for device in ("cpu", "cuda")]
    for ours, theirs in zip(*(decoder.linears() for decoder in made), strict=True):
        for cpu, cuda in zip(pieces(ours), pieces(theirs), strict=True):
            if isinstance(cpu, Fp8Linear) and isinstance(cuda, Fp8Linear):
                torch.testing.assert_close(cuda.scale.cpu(), cpu.scale)
                torch.testing.assert_close(cuda.weight.cpu().float(), cpu.weight.float(), rtol=0.13, atol=2.0**-8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["ct_channel", "ct_weight_only", "fbgemm", "hf_block"])
def test_the_engine_on_a_gpu_scores_as_the_one_on_the_cpu(name: str, tmp_path: Path) -> None:
    """Log-probabilities of one prompt: where activations are quantised too, e4m3 takes a few percent of the logits."""
    fp8, _ = write_quantised(tmp_path, name)
    scored = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    values = []
    for device in ("cpu", "cuda"):
        engine = make_engine(fp8, device=device, dtype="float32" if device == "cpu" else "bfloat16")
        submit(engine, [PROMPT], [scored])
        rows = drain(engine)["0", 0].prompt_logprobs
        assert rows is not None
        values.append(torch.tensor([row.logprobs[0] for row in rows if row is not None]))
    assert (values[0] - values[1]).abs().mean() < (0.05 if name in ("hf_block", "ct_weight_only") else 0.3)


# ── the whole engine ────────────────────────────────────────────────────────────────────────────────────────────────

PROMPTS = [[5, 9, 77, 12], PROMPT[:33], PROMPT[3:20]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.mark.parametrize("name", ["ct_channel", "hf_block"])
def test_the_engine_writes_what_the_dequantised_twin_writes_in_transformers(name: str, tmp_path: Path) -> None:
    fp8, plain = write_quantised(tmp_path, name)
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    for prompt, tokens in zip(PROMPTS, run(fp8, PROMPTS, GREEDY, max_num_batched_tokens=16), strict=True):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False,
                                eos_token_id=None, pad_token_id=0)
        assert tokens == theirs[0, len(prompt):].tolist()


def test_the_engine_plans_for_fp8_and_quantises_while_loading(tmp_path: Path) -> None:
    plain, fp8 = write_tiny(tmp_path / "plain", **SIZES), tmp_path / "fp8"
    quantise_folder(plain, fp8, "fp8", device=CPU)
    whole, small = make_engine(plain), make_engine(plain, quantization="fp8")
    assert small.info.weight_bytes == make_engine(fp8).info.weight_bytes < whole.info.weight_bytes
    assert run(plain, PROMPTS, GREEDY, quantization="fp8") == run(fp8, PROMPTS, GREEDY)


@pytest.mark.parametrize("value", ["awq", "int2", "FP8"])
def test_llm_refuses_another_quantization_by_name(value: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"int4-g64, int4-g32 or absent, got '{value}'"):
        LLM(str(write_tiny(tmp_path)), quantization=value, skip_tokenizer_init=True, device="cpu")


@pytest.mark.parametrize(("form", "method", "name"), [
    (Form.DENSE, "", ""), (Form.FP8_CHANNEL, "fp8", "fp8"), (Form.FP8_CHANNEL, "fbgemm_fp8", "fbgemm_fp8"),
    (Form.INT4, "gptq", "int4 gptq"), (Form.INT4, "int4-g32", "int4-g32"), (Form.NF4, "bitsandbytes", "nf4 bitsandbytes"),
])  # fmt: skip
def test_weights_are_named_after_what_most_layers_are(form: Form, method: str, name: str) -> None:
    assert WeightForms({"a": Part(form), "b": Part(form), "lm_head": Part()}, method=method).name == name
