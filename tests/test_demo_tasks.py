"""The demo model's tasks: right answers, a clean split, the template and the tokenizer."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

import workstation.demo
from workstation.demo import evaluate, mixture, template
from workstation.demo.packing import SHORT_LIMIT, Packer
from workstation.demo.tasks import SKILLS, Task, generate
from workstation.demo.tasks import lexicon as words
from workstation.demo.tasks.about_ws import FRAMES
from workstation.demo.tasks.base import Wordings, casual, held_out

FOLDER = Path(workstation.demo.__file__).parent / "model"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def many(skill: str, n: int = 300, split: Any = "train", seed: int = 7) -> list[Task]:
    rng = Random(f"{skill} {seed}")
    return [generate(skill, rng, split) for _ in range(n)]


def asked(task: Task) -> str:
    return str(task.messages[-1]["content"])


@cache
def chat_template() -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template.jinja_source())


def jinja(messages: list[dict[str, Any]], **variables: Any) -> str:
    return chat_template().render(messages=messages, **variables)


@pytest.mark.parametrize("skill", SKILLS)
def test_no_held_out_prompt_is_ever_trained_on(skill: str) -> None:
    count = 800 if skill == "recall" else 4000  # its prompts are whole texts
    trained = {template.prompt_text(task).lower() for task in many(skill, count)}
    assert not [task for task in evaluate.held_out(skill, 200) if template.prompt_text(task).lower() in trained]


@pytest.mark.parametrize("skill", SKILLS)
def test_a_task_accepts_its_answer_and_no_other(skill: str) -> None:
    for task in many(skill, 50, "held_out"):
        assert task.is_right(task.answer)
        assert task.is_right(f" {task.answer}\n")
        assert not task.is_right(task.answer + " indeed")
        assert not task.is_right("")


@pytest.mark.parametrize("skill", SKILLS)
def test_the_same_seed_gives_the_same_held_out_tasks(skill: str) -> None:
    assert evaluate.held_out(skill, 20, seed=3) == evaluate.held_out(skill, 20, seed=3)
    assert evaluate.held_out(skill, 20, seed=3) != evaluate.held_out(skill, 20, seed=4)


def test_sums_are_right_and_name_the_operands_of_the_question() -> None:
    for task in many("arithmetic"):
        found = re.fullmatch(r"(\d+) ([+-]) (\d+) = (-?\d+)\.", task.answer)
        assert found is not None
        a, sign, b, result = found.groups()
        assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert sorted(re.findall(r"\d+", asked(task))) == sorted([a, b])


def test_operand_pairs_of_the_two_sides_are_disjoint() -> None:
    sides = [{task.answer.split(" =")[0] for task in many("arithmetic", 2000, split)} for split in ("train", "held_out")]
    assert not sides[0] & sides[1]


def test_sorted_lists_are_sorted_and_hold_what_was_asked() -> None:
    for task in many("sorting"):
        items = task.answer.split(", ")
        numbers = [int(item) for item in items] if items[0].isdigit() else []
        assert (numbers or items) in (sorted(numbers or items), sorted(numbers or items, reverse=True))
        assert all(re.search(rf"\b{item}\b", asked(task)) for item in items)


def test_reversed_lists_stand_backwards_in_the_question() -> None:
    for task in many("reversing"):
        if ", " in task.answer:
            assert ", ".join(reversed(task.answer.split(", "))) in asked(task)
        else:
            assert task.answer.replace(" ", "")[::-1] in asked(task)


def test_spelled_letters_make_up_the_word_of_the_question() -> None:
    assert all(task.answer.replace(" ", "") in asked(task) for task in many("spelling"))


def test_letter_counts_are_right() -> None:
    for task in many("counting"):
        if found := re.fullmatch(r"([a-z ]+): the letter (.) appears (\d+) times?\.", task.answer):
            assert found[1].count(found[2]) == int(found[3])
        elif found := re.fullmatch(r"([a-z ]+): (\d+) letters\.", task.answer):
            assert len(found[1].split()) == int(found[2])
        elif found := re.fullmatch(r"There are (\d+) items\.", task.answer):
            assert asked(task).count(", ") - asked(task).count(", please") in (int(found[1]) - 1, int(found[1]))
        else:
            counted = [int(number) for number in task.answer.split(", ")]
            assert counted in (list(range(counted[0], counted[-1] + 1)), list(range(counted[0], counted[-1] - 1, -1)))


def test_copied_text_stands_in_the_question() -> None:
    assert all(task.answer in asked(task) for task in many("copying"))


def test_extracted_values_stand_in_the_sentence_and_keys_in_the_request() -> None:
    for task in many("extraction"):
        for key, value in json.loads(task.answer).items():
            assert key in asked(task)
            assert value is None or str(value) in asked(task)


def test_held_out_schemas_are_never_trained_on() -> None:
    sides = [{tuple(json.loads(task.answer)) for task in many("extraction", 1500, split)} for split in ("train", "held_out")]
    assert not sides[0] & sides[1]


def test_tool_calls_fit_a_tool_of_the_prompt() -> None:
    calls = [task for task in many("tools") if task.check == "tool_call"]
    assert len(calls) > 100
    for task in calls:
        call = json.loads(task.answer.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
        schema = {tool["function"]["name"]: tool["function"]["parameters"] for tool in task.tools}[call["name"]]
        kinds = {"string": str, "integer": int, "boolean": bool}
        for key, value in call["arguments"].items():
            described = schema["properties"][key]
            assert type(value) is kinds[described["type"]]
            assert value in described.get("enum", [value])


def test_names_of_offered_tools_differ() -> None:
    for task in many("tools"):
        names = [tool["function"]["name"] for tool in task.tools]
        assert len(names) == len(set(names))


def test_filled_in_code_is_python() -> None:
    for task in many("infilling"):
        front, back = task.raw.removeprefix("<|fim_prefix|>").removesuffix("<|fim_middle|>").split("<|fim_suffix|>")
        ast.parse(front + task.answer + back)


def test_a_recalled_fact_is_stated_in_the_text() -> None:
    for task in many("recall", 100):
        value = task.answer.rstrip(".").split()[-1] if "costs" not in task.answer else task.answer.split()[-2]
        assert value in "".join(message["content"] for message in task.messages)


def test_thinking_answers_start_with_a_thought_and_need_one() -> None:
    for task in many("thinking", 100):
        assert task.answer.startswith("<think>\n")
        bare = task.answer.split("</think>\n\n", 1)[1]
        assert not task.is_right(bare)
        assert not task.is_right(f"<think>\n\n</think>\n\n{bare}")
        assert task.is_right(f"<think>\nOther words.\n</think>\n\n{bare}")


def test_every_definition_of_ws_is_asked_in_words_of_both_sides() -> None:
    asked_for = {task.answer for task in many("about_ws", 4000, "held_out")}
    assert len(asked_for) > 100
    assert asked_for <= {task.answer for task in many("about_ws", 8000)}
    assert len(FRAMES) > 10


def test_wordings_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be split"):
        Wordings(("one",), ("wording",))


def test_lexicon_sides_are_disjoint() -> None:
    rng = Random(1)
    for make in (words.word, words.name, words.city, words.code):
        sides = [{make(rng, split) for _ in range(2000)} for split in ("train", "held_out")]
        assert not sides[0] & sides[1]


def test_a_lower_case_start_never_touches_a_word_of_the_answer() -> None:
    task = Task("greeting", [{"role": "user", "content": "Anna here"}], "Nice to meet you, Anna!")
    for seed in range(50):
        casual(Random(seed), task)
    assert asked(task) == "Anna here"


def test_the_split_keeps_about_a_tenth() -> None:
    assert 0.08 < sum(held_out(f"key {number}") for number in range(5000)) / 5000 < 0.12


def test_the_jinja_template_renders_what_training_renders() -> None:
    rng = Random(2)
    for _ in range(300):
        task = mixture.short_task(rng)
        if not task.raw:
            rendered = jinja(task.messages, tools=task.tools or None, enable_thinking=task.thinking, add_generation_prompt=True)
            assert rendered == template.prompt_text(task)


def test_the_jinja_template_writes_tool_calls_as_training_does() -> None:
    function = {"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}
    markup = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'
    as_text = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": markup}]
    for arguments in (function["arguments"], json.dumps(function["arguments"])):
        called = {"type": "function", "function": {**function, "arguments": arguments}}
        assert jinja([as_text[0], {"role": "assistant", "content": None, "tool_calls": [called]}]) == jinja(as_text)


def test_the_jinja_template_drops_earlier_thoughts_and_joins_content_parts() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"}
    expected = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    assert jinja([{"role": "user", "content": parts}, thought]) == expected


def test_consecutive_tool_results_share_a_turn() -> None:
    results = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    one, two = "<tool_response>\n1\n</tool_response>", "<tool_response>\n2\n</tool_response>"
    assert jinja(results) == f"<|im_start|>user\n{one}\n{two}<|im_end|>\n"


def test_the_tokenizer_has_at_most_4096_tokens_and_knows_the_markup(tokenizer: Any) -> None:
    assert tokenizer.get_vocab_size() <= 4096
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "<|fim_middle|>"):
        assert tokenizer.encode(token).tokens == [token]


def test_digits_are_single_tokens(tokenizer: Any) -> None:
    assert tokenizer.encode("4096-17").tokens == ["4", "0", "9", "6", "-", "1", "7"]


def test_a_word_breaks_the_same_way_with_and_without_a_space(tokenizer: Any) -> None:
    rng = Random(3)
    for _ in range(500):
        name = words.name(rng, "held_out")
        bare, spaced = tokenizer.encode(name).tokens, tokenizer.encode(f" {name}").tokens
        joined = [spaced[0].removeprefix("\u0120"), *spaced[1:]]
        assert [piece for piece in joined if piece] == bare


def test_any_text_survives_the_tokenizer(tokenizer: Any) -> None:
    for text in ("naïve café 東京 🙂", "a  b\n\n\tc ", '{"a": [1, 2]}', "    return x\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_no_held_out_word_is_a_token_of_its_own(tokenizer: Any) -> None:
    rng, vocab = Random(4), tokenizer.get_vocab()
    drawn = {words.word(rng, "held_out", invented=0.0) for _ in range(2000)}
    assert not [word for word in drawn if word in vocab or f"\u0120{word}" in vocab]


def trained_texts(tokenizer: Any, pack: Any) -> list[str]:
    """For each whole document of a pack, the text the loss covers."""
    covered = set((pack.inputs + 1).tolist())
    spans = list(zip(pack.starts[:-1].tolist(), pack.starts[1:].tolist(), strict=True))[:-1]
    ids = [[int(pack.tokens[at]) for at in range(start, end) if at in covered] for start, end in spans]
    return [tokenizer.decode(document, skip_special_tokens=False) for document in ids]


def test_loss_covers_all_assistant_turns_and_nothing_else(tokenizer: Any) -> None:
    pack = Packer(tokenizer, 16384, seed=5).pack(long=False)
    for text, (start, end) in zip(
        trained_texts(tokenizer, pack), zip(pack.starts[:-1], pack.starts[1:], strict=True), strict=False
    ):
        whole = tokenizer.decode(pack.tokens[start:end].tolist(), skip_special_tokens=False)
        turns = re.findall(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", whole, re.DOTALL)
        if "Think before you answer." in whole:
            turns = turns[-1:]
        elif "<|fim_middle|>" in whole:
            turns = [whole.split("<|fim_middle|>")[1]]
        if turns:
            assert text == "".join(turns)


def test_a_pack_is_full_and_its_positions_start_anew(tokenizer: Any) -> None:
    packer = Packer(tokenizer, 8192, seed=6)
    for long in (False, True):
        pack = packer.pack(long)
        assert len(pack.tokens) == len(pack.positions) == pack.starts[-1] == 8192
        assert (pack.positions[pack.starts[:-1]] == 0).all()
        assert (pack.tokens[pack.inputs + 1] == pack.targets).all()
        assert max(pack.starts[1:] - pack.starts[:-1]) <= pack.longest
    assert packer.pack(long=False).longest == SHORT_LIMIT


def test_scores_count_exact_answers_per_skill() -> None:
    tasks = evaluate.held_out("arithmetic", 4) + evaluate.held_out("spelling", 2)
    texts = [task.answer for task in tasks]
    texts[0] = "no"
    scores = evaluate.score(tasks, texts)
    assert (scores["arithmetic"].right, scores["spelling"].right) == (3, 2)
    assert scores["arithmetic"].misses[0].got == "no"
    assert evaluate.average(scores) == pytest.approx((0.75 + 1) / 2)


def test_every_skill_is_scored_through_the_callback(tokenizer: Any) -> None:
    answers = {tuple(tokenizer.encode(template.prompt_text(t)).ids): t.answer for s in SKILLS for t in evaluate.held_out(s, 2)}
    scores = evaluate.evaluate(
        lambda text: tokenizer.encode(text).ids, lambda prompts: [answers[tuple(p)] for p in prompts], n=2
    )
    assert set(scores) == set(SKILLS)
    assert evaluate.average(scores) == 1.0
