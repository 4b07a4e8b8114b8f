"""Embeddings: the engine's hidden states against transformers', what a folder says about them, and the route."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import drain, make_engine, submit
from fakes import FakeEngine, api_client, post, served_model, write_byte_level_folder
from safetensors.torch import load_file, save_file
from test_engine import greedy, prompts_of
from tiny import edit_config, write_tiny
from transformers import AutoModel

from workstation.architecture import read_shape
from workstation.engine.engine import Engine
from workstation.engine.request import EngineRequest, Pooling, SamplingParams
from workstation.errors import ContextLengthError, InvalidRequestError, ModelFolderError
from workstation.hub import wanted_files
from workstation.pooling_config import PoolingConfig, read_pooling
from workstation.server.app import create_app
from workstation.server.options import ServedModel

PROMPTS = prompts_of(5, 40, 17, 90, 33, 1, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("embeddings") / "qwen3", "qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served_model(write_byte_level_folder(tmp_path_factory.mktemp("embeddings") / "text"))


def embedded(engine: Engine, prompts: list[list[int]], pooling: Pooling) -> list[np.ndarray[Any, Any]]:
    """The hidden states that requests with pooling end with, in order."""
    for number, prompt in enumerate(prompts):
        engine.submit(EngineRequest(f"e{number}", prompt, SamplingParams(max_tokens=1), pooling=pooling))
    found = {}
    while engine.has_work:
        for event in engine.step():
            if event.request_id.startswith("e"):
                assert event.finished and event.finish_reason == "stop" and not event.token_ids and event.embedding is not None
                found[event.request_id] = np.frombuffer(event.embedding, "<f4")
        engine.check()
    return [found[f"e{number}"] for number in range(len(prompts))]


@pytest.fixture(scope="module")
def states(folder: Path) -> list[torch.Tensor]:
    """transformers' last hidden states [T, H] of PROMPTS."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).last_hidden_state[0] for prompt in PROMPTS]


@pytest.mark.usefixtures("no_forecast")
@pytest.mark.parametrize("changes", [
    {}, {"max_num_batched_tokens": 12, "overlap": True}, {"num_blocks": 12, "max_model_len": 128, "overlap": True},
], ids=str)
def test_embeddings_equal_transformers_however_they_are_computed(
        folder: Path, states: list[torch.Tensor], changes: dict[str, Any]) -> None:
    engine = make_engine(folder, **changes)
    submit(engine, prompts_of(20, 9, seed=3), [greedy(20), greedy(20)])  # neighbours that generate, and preempt
    pooled = {"last": [state[-1] for state in states], "mean": [state.mean(0) for state in states]}
    for pooling, expected in pooled.items():
        for ours, theirs in zip(embedded(engine, PROMPTS, pooling), expected, strict=True):  # type: ignore[arg-type]
            np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)


def test_neighbours_of_embeddings_generate_what_they_would_alone(folder: Path) -> None:
    alone = make_engine(folder)
    submit(alone, PROMPTS[:3], [greedy()] * 3)
    expected = {key: answer.tokens for key, answer in drain(alone).items()}
    engine = make_engine(folder, max_num_batched_tokens=16)
    submit(engine, PROMPTS[:3], [greedy()] * 3)
    for number in range(4):
        engine.submit(EngineRequest(f"e{number}", PROMPTS[3], SamplingParams(max_tokens=1), pooling="last"))
    assert {key: answer.tokens for key, answer in drain(engine).items() if key[0][0] != "e"} == expected


def test_a_prefix_is_shared_with_the_last_token_but_not_with_a_mean(folder: Path) -> None:
    engine = make_engine(folder)
    embedded(engine, [PROMPTS[3]], "last")
    engine.submit(EngineRequest("again", PROMPTS[3], SamplingParams(max_tokens=1), pooling="last"))
    assert drain(engine)["again", 0].cached == 80
    engine.submit(EngineRequest("mean", PROMPTS[3], SamplingParams(max_tokens=1), pooling="mean"))
    assert drain(engine)["mean", 0].cached == 0


def test_a_prompt_may_fill_the_whole_window_and_not_more(folder: Path) -> None:
    engine = make_engine(folder, max_model_len=64)
    assert len(embedded(engine, prompts_of(64), "last")) == 1
    with pytest.raises(ContextLengthError, match="65 tokens"):
        engine.submit(EngineRequest("e", prompts_of(65)[0], SamplingParams(max_tokens=1), pooling="last"))
    with pytest.raises(InvalidRequestError, match="one sample"):
        engine.submit(EngineRequest("e", [5, 6], SamplingParams(max_tokens=1, n=2), pooling="last"))


@pytest.mark.parametrize("overlap", [False, True])
def test_an_aborted_embedding_frees_its_blocks(folder: Path, overlap: bool) -> None:
    engine = make_engine(folder, max_num_batched_tokens=16, overlap=overlap)
    engine.submit(EngineRequest("e", PROMPTS[3], SamplingParams(max_tokens=1), pooling="mean"))
    engine.step()
    assert [event.finish_reason for event in engine.abort("e")] == ["abort"]
    while engine.has_work:
        assert engine.step() == []
    engine.check()
    assert engine.stats().blocks_held == 0


def test_hidden_states_that_are_not_finite_end_the_request_with_an_error(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "broken", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][7] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    engine = make_engine(folder)
    engine.submit(EngineRequest("e", [5, 7, 9], SamplingParams(max_tokens=1), pooling="last"))
    answer = drain(engine)["e", 0]
    assert answer.reason == "error" and "not finite" in (answer.error or "")


def test_a_model_saved_without_its_head_is_loaded_and_embeds(folder: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    edit_config(tmp_path, tie_word_embeddings=False)
    assert read_shape(tmp_path).headless
    ours, theirs = embedded(make_engine(tmp_path), PROMPTS[:2], "last"), embedded(make_engine(folder), PROMPTS[:2], "last")
    np.testing.assert_array_equal(ours, theirs)


# ── what a folder says ──────────────────────────────────────────────────────────────────────────────────────────────


def sentence_folder(folder: Path, pooling: dict[str, Any], *, parts: tuple[str, ...] = ("Transformer", "Pooling")) -> Path:
    """The files that sentence-transformers adds to a model folder."""
    modules = [{"idx": number, "name": str(number), "path": f"{number}_{part}" if number else "",
                "type": f"sentence_transformers.models.{part}"} for number, part in enumerate(parts)]
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize(("parts", "pooling", "expected"), [
    (("Transformer", "Pooling", "Normalize"), {"pooling_mode_cls_token": False, "pooling_mode_lasttoken": True},
     PoolingConfig("last", True)),
    (("Transformer", "Pooling"), {"pooling_mode_mean_tokens": True, "include_prompt": True}, PoolingConfig("mean", False)),
    (("Transformer", "Pooling"), {"pooling_mode": "lasttoken"}, PoolingConfig("last", False)),
])
def test_the_folder_decides_pooling_and_normalisation(
        tmp_path: Path, parts: tuple[str, ...], pooling: dict[str, Any], expected: PoolingConfig) -> None:
    assert read_pooling(sentence_folder(tmp_path, pooling, parts=parts)) == expected


def test_without_modules_the_last_token_is_normalised_and_a_flag_decides_over_the_folder(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) == PoolingConfig("last", True, ())
    folder = sentence_folder(tmp_path, {"pooling_mode_cls_token": True})
    assert read_pooling(folder, "mean") == PoolingConfig("mean", False)


@pytest.mark.parametrize(("parts", "pooling", "words"), [
    (("Transformer", "Pooling"), {"pooling_mode_cls_token": True}, ["1_Pooling", "cls_token", "--pooling"]),
    (("Transformer", "Pooling"), {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True},
     ["mean_tokens, lasttoken"]),
    (("Transformer", "Pooling", "Dense"), {"pooling_mode_mean_tokens": True}, ["modules.json", "Dense"]),
])
def test_a_pooling_that_is_not_served_is_refused_by_name(
        tmp_path: Path, parts: tuple[str, ...], pooling: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelFolderError) as caught:
        read_pooling(sentence_folder(tmp_path, pooling, parts=parts))
    assert all(word in str(caught.value) for word in words)


def test_a_pooling_folder_may_not_be_a_way_out(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "model", {"pooling_mode_lasttoken": True})
    text = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(text.replace("1_Pooling", "../other"))
    with pytest.raises(ModelFolderError, match="path parts"):
        read_pooling(folder)


def test_a_download_brings_what_says_how_to_pool() -> None:
    names = ["config.json", "model.safetensors", "modules.json", "1_Pooling/config.json", "onnx/config.json"]
    assert wanted_files(names) == ["config.json", "modules.json", "1_Pooling/config.json", "model.safetensors"]


# ── the route ───────────────────────────────────────────────────────────────────────────────────────────────────────


def embed(served: ServedModel, engine: FakeEngine | None = None, **body: Any) -> Any:
    answer = post("/v1/embeddings", engine or FakeEngine(), served, body)
    return answer.json() if answer.status_code == 200 else answer


@pytest.mark.parametrize("form", [
    lambda ids, texts: texts, lambda ids, texts: ids, lambda ids, texts: texts[0], lambda ids, texts: ids[0],
], ids=["texts", "lists of ids", "text", "ids"])
def test_texts_and_token_ids_in_any_shape_give_the_same_vectors_in_order(model: ServedModel, form: Any) -> None:
    texts = ["hello world", "the quick brown fox"]
    ids = [model.tokenizer.encode(text) for text in texts]
    given = form(ids, texts)
    count = 1 if given in (texts[0], ids[0]) else 2
    found = embed(model, input=given)
    assert [item["index"] for item in found["data"]] == list(range(count))
    for item, prompt in zip(found["data"], ids[:count], strict=True):
        raw = np.array([len(prompt), *([*prompt, *[0] * 7][:7])], dtype=np.float32)
        np.testing.assert_allclose(item["embedding"], raw / np.linalg.norm(raw), rtol=1e-6)
    total = sum(map(len, ids[:count]))
    assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] == total


def test_base64_holds_the_same_numbers(model: ServedModel) -> None:
    numbers = embed(model, input="hello")["data"][0]["embedding"]
    text = embed(model, input="hello", encoding_format="base64")["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(text), "<f4"), np.array(numbers, dtype=np.float32))


def test_dimensions_cut_and_normalise_again_where_the_model_allows(model: ServedModel, tmp_path: Path) -> None:
    cuttable = served_model(write_byte_level_folder(tmp_path), pooling=PoolingConfig(sizes=None))
    whole = np.array(embed(cuttable, input="hello world")["data"][0]["embedding"])
    short = np.array(embed(cuttable, input="hello world", dimensions=3)["data"][0]["embedding"])
    np.testing.assert_allclose(short, whole[:3] / np.linalg.norm(whole[:3]), rtol=1e-5)
    assert len(embed(model, input="hello", dimensions=8)["data"][0]["embedding"]) == 8


@pytest.mark.parametrize(("body", "param", "words"), [
    ({"dimensions": 3}, "dimensions", "is_matryoshka"), ({"dimensions": 0}, "dimensions", "8"),
    ({"encoding_format": "hex"}, "encoding_format", "hex"),
    ({"input": []}, "input", "non-empty"), ({"input": ""}, "input", "empty"),
    ({"input": ["a", [1]]}, "input", "mixes"), ({"input": [[]]}, "input", "empty"), ({"input": None}, "input", "non-empty"),
    ({"input": [1, 640]}, "input", "639"), ({"input": ["a"] * 2049}, "input", "2048"), ({"input": [5] * 4097}, "input", "4096"),
    ({"model": "other"}, "model", "does not exist"),
    ({"stream": True}, "stream", "unknown"), ({"priority": 1}, "priority", "policy"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "between"),
], ids=lambda value: str(value)[:40])
def test_what_cannot_be_embedded_is_refused_by_name(model: ServedModel, body: dict[str, Any], param: str, words: str) -> None:
    answer = embed(model, **{"input": "hello", **body})
    error = answer.json()["error"]
    assert answer.status_code in (400, 404) and error["param"] == param and words in error["message"]


def test_an_input_may_be_cut_from_its_front_on_request(model: ServedModel) -> None:
    engine = FakeEngine(window=10)
    found = embed(model, engine, input=list(range(20)), truncate_prompt_tokens=-1)
    assert found["usage"]["prompt_tokens"] == 10 and engine.seen[0].prompt_token_ids == list(range(10, 20))


def test_a_long_list_enters_the_engine_a_part_at_a_time(model: ServedModel) -> None:
    engine = FakeEngine()
    most = 0
    generate = engine.generate

    async def counted(request: EngineRequest) -> Any:
        nonlocal most
        async for event in generate(request):
            yield event
        most = max(most, len(engine.active))

    engine.generate = counted  # type: ignore[method-assign]
    found = embed(model, engine, input=[[5, number] for number in range(500)])
    assert [item["index"] for item in found["data"]] == list(range(500)) and most <= 64


def test_a_dead_engine_answers_503_and_nothing_goes_on(model: ServedModel) -> None:
    engine = FakeEngine(fail_after=0, delay=0.01)
    assert embed(model, engine, input=["a"] * 100).status_code == 503
    assert not engine.active


def test_a_client_that_leaves_ends_its_embeddings(model: ServedModel) -> None:
    engine = FakeEngine(delay=30.0)

    async def go() -> None:
        app = create_app(engine, model)
        async with api_client(app) as client:
            task = asyncio.ensure_future(client.post("/v1/embeddings", json={"input": ["a", "b"]}))
            while len(engine.active) < 2:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            while engine.active:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(go(), 10))
    assert len(engine.aborted) == 2


def test_a_model_without_a_head_only_embeds(tmp_path: Path) -> None:
    headless = served_model(write_byte_level_folder(tmp_path), generates=False)
    assert len(embed(headless, input="hello")["data"]) == 1
    messages = [{"role": "user", "content": "a"}]
    for path, body in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": messages})):
        answer = post(f"/v1/{path}", FakeEngine(), headless, body)
        assert answer.status_code == 400 and "only" in answer.json()["error"]["message"]
