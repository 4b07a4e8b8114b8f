"""The shipped demo model and its trainer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import workstation.demo
from workstation.demo import evaluate, template, train
from workstation.demo.export import export, load, named_tensors
from workstation.demo.muon import Muon, orthogonalised
from workstation.demo.network import Network, Size, packed_attention, rms_norm
from workstation.demo.packing import Packer
from workstation.demo.tasks import SKILLS

FOLDER = Path(workstation.demo.__file__).parent / "model"
SMALL = Size(hidden=64, ffn=128, layers=2, heads=2, kv_heads=1, head_dim=32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def shipped() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def batch(tokenizer: Any, size: int) -> train.Batch:
    return train.to_device(Packer(tokenizer, size, seed=1).pack(long=False), torch.device("cpu"))


def logits(network: Network, packed: train.Batch) -> torch.Tensor:
    x = network.hidden(packed.tokens, packed.positions, packed.starts, packed.longest, torch.float32)
    return rms_norm(x, network.norm, network.size.norm_eps) @ network.embedding.T


def test_the_shipped_model_is_small_enough(shipped: Any) -> None:
    assert shipped.num_parameters() <= 8_000_000
    assert (FOLDER / "model.safetensors").stat().st_size <= 16 * 2**20


def test_the_shipped_folder_agrees_with_itself(shipped: Any, tokenizer: Any) -> None:
    assert shipped.config.vocab_size == tokenizer.get_vocab_size()
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    assert json.loads((FOLDER / "generation_config.json").read_text())["eos_token_id"] == ends
    assert (FOLDER / "chat_template.jinja").read_text() == template.jinja_source()


def test_transformers_reads_the_tokenizer_and_its_template(tokenizer: Any) -> None:
    loaded = AutoTokenizer.from_pretrained(FOLDER)
    text = loaded.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids


@torch.inference_mode()
def test_the_shipped_model_answers_held_out_tasks(shipped: Any, tokenizer: Any) -> None:
    """Greedy decoding writes the answer exactly when every answer token is the likeliest after those before it."""
    right = []
    for task in [task for skill in SKILLS for task in evaluate.held_out(skill, 2, seed=11)]:
        prompt = tokenizer.encode(template.prompt_text(task)).ids
        ids = torch.tensor([tokenizer.encode(template.document(task)).ids])
        likeliest = shipped(input_ids=ids).logits[0, len(prompt) - 1 : -1].argmax(-1)
        right.append(bool((likeliest == ids[0, len(prompt) :]).all()))
    assert sum(right) / len(right) >= 0.9


def test_the_network_computes_what_transformers_computes(tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Network(SMALL)
    for parameter in network.parameters():  # bf16 values, so that saving loses nothing; no matrix stays zero
        parameter.data = (parameter.data + 0.05 * torch.randn_like(parameter)).bfloat16().float()
    export(network, tokenizer, FOLDER, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    packed = batch(tokenizer, 512)
    ours = logits(network, packed)
    for start, end in zip(packed.starts[:-1].tolist(), packed.starts[1:].tolist(), strict=True):
        theirs = reference(input_ids=packed.tokens[None, start:end]).logits[0]
        torch.testing.assert_close(ours[start:end], theirs, atol=1e-4, rtol=1e-4)


def test_exported_weights_load_again(tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, two = Network(SMALL), Network(SMALL)
    export(one, tokenizer, FOLDER, tmp_path)
    load(two, tmp_path)
    saved = named_tensors(one)
    assert all(torch.equal(value, saved[name].bfloat16().float()) for name, value in named_tensors(two).items())


def test_training_on_one_batch_lowers_its_loss(tokenizer: Any) -> None:
    trainer = train.Trainer(SMALL, torch.device("cpu"), seed=0)
    packed = batch(tokenizer, 512)
    losses = [float(trainer.step([packed], 1.0)) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_documents_of_a_pack_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(10, heads, 8) for heads in (4, 2, 2))
    starts = torch.tensor([0, 4, 10], dtype=torch.int32)
    before = packed_attention(q, k, v, starts, 6)
    k[:4], v[:4] = 0.0, 7.0
    after = packed_attention(q, k, v, starts, 6)
    assert torch.equal(before[4:], after[4:])
    assert not torch.equal(before[:4], after[:4])


def test_the_rate_follows_the_clock_down_to_zero() -> None:
    assert train.rate(0.0) == 0.0
    assert train.rate(train.WARMUP) == 1.0
    assert train.rate(train.DECAY_FROM) == 1.0
    assert train.rate((1 + train.DECAY_FROM) / 2) == pytest.approx(0.5)
    assert train.rate(1.1) == 0.0


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 32, 64), (3, 64, 32)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)).float())
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_muon_decays_weights_that_have_no_gradient_direction() -> None:
    weight = torch.nn.Parameter(torch.ones(1, 4, 4))
    optimizer = Muon([weight], lr=0.1, weight_decay=0.5)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.data, torch.full((1, 4, 4), 0.95))


@pytest.mark.long
def test_the_trainer_runs_end_to_end_on_the_cpu(tmp_path: Path) -> None:
    options = argparse.Namespace(
        out=tmp_path / "out", minutes=2.0, seed=0, resume=None, peak=1.0, device="cpu", workers=3, pack_tokens=512, steps=2,
        log_every=1, eval_items=0, tokenizer=FOLDER, safety=tmp_path / "safety",
    )  # fmt: skip
    train.train(options)
    assert json.loads((tmp_path / "out" / "training.json").read_text())["log"][-1]["step"] == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 8
