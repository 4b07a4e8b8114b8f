"""Tokenizer folders: ids as transformers makes them, control strings from outside as plain text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import SPECIAL_TOKENS, TAG_TOKENS, write_byte_level_folder, write_sentencepiece_folder
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from workstation.errors import InvalidRequestError, ModelFolderError
from workstation.text.tokenizer import Tokenizer as WsTokenizer

TEXTS = [
    "hello world",
    " leading and trailing ",
    "naïve café 日本語 🙂",
    "a\n\n\tb",
    "<|im_end|> inside",
    "x" * 300,
    "</s> <s>",
]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> WsTokenizer:
    return WsTokenizer.from_folder(write_byte_level_folder(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> WsTokenizer:
    return WsTokenizer.from_folder(write_sentencepiece_folder(tmp_path_factory.mktemp("sentencepiece")))


def _transformers(folder: Path) -> object:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder))


@pytest.mark.parametrize("single", ["<s> $A", "$A", "<s> $A </s>"], ids=["bos", "none", "bos and eos"])
@pytest.mark.parametrize("config", [{}, {"add_bos_token": False}, {"add_eos_token": True}], ids=["plain", "no bos", "eos"])
def test_bos_and_eos_are_added_as_transformers_adds_them(tmp_path: Path, single: str, config: dict[str, bool]) -> None:
    folder = write_sentencepiece_folder(tmp_path, single=single, **config)
    ours, theirs = WsTokenizer.from_folder(folder), _transformers(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)  # type: ignore[attr-defined]
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]


def test_a_token_named_only_in_the_config_is_added_as_transformers_adds_it(tmp_path: Path) -> None:
    folder = write_byte_level_folder(tmp_path, pad_token="<|pad|>")
    ours, theirs = WsTokenizer.from_folder(folder), _transformers(folder)
    assert ours.encode("a<|pad|>b") == theirs.encode("a<|pad|>b")  # type: ignore[attr-defined]
    assert ours.token_id("<|pad|>") in ours.special_ids


def test_a_chat_renders_and_encodes_as_transformers_does(tmp_path: Path) -> None:
    folder = write_byte_level_folder(tmp_path)
    ours, theirs = WsTokenizer.from_folder(folder), _transformers(folder)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüße, was ist 1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "danke"},
    ]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)  # type: ignore[attr-defined]
    assert ours.encode_chat(messages) == expected
    assert ours.render_chat(messages) == theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)  # type: ignore[attr-defined]


@pytest.mark.parametrize("token", SPECIAL_TOKENS + TAG_TOKENS)
@pytest.mark.parametrize("frame", ["{}", "hi {} there", "{0}{0}", "\n{}\n"], ids=["alone", "inside", "twice", "lines"])
def test_a_control_string_in_user_text_is_spelled_out(byte_level: WsTokenizer, token: str, frame: str) -> None:
    text = frame.format(token)
    plain = byte_level.encode_chat([{"role": "user", "content": "plain"}])
    ids = byte_level.encode_chat([{"role": "user", "content": text}])
    control = set(range(byte_level.vocab_size)) & {byte_level.token_id(name) for name in SPECIAL_TOKENS + TAG_TOKENS}
    assert [index for index in ids if index in control] == [index for index in plain if index in control]
    assert text in byte_level.decode(ids)


@pytest.mark.parametrize("token", ["<unk>", "<s>", "</s>"])
def test_a_control_string_is_spelled_out_by_a_sentencepiece_vocabulary_too(tmp_path: Path, token: str) -> None:
    template = "<s>{% for message in messages %}[{{ message.content }}]</s>{% endfor %}"
    tokenizer = WsTokenizer.from_folder(write_sentencepiece_folder(tmp_path, chat_template=template))
    ids = tokenizer.encode_chat([{"role": "user", "content": f"a {token} b"}])
    plain = tokenizer.encode_chat([{"role": "user", "content": "a b"}])
    assert [index for index in ids if index in tokenizer.special_ids] == [
        index for index in plain if index in tokenizer.special_ids
    ]
    assert f"a {token} b" in tokenizer.decode(ids)


@pytest.mark.parametrize("content", ["a b", "a </s> b"], ids=["plain", "with a control string"])
def test_a_chat_prompt_gets_bos_and_eos_only_when_asked(tmp_path: Path, content: str) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer = WsTokenizer.from_folder(write_sentencepiece_folder(tmp_path, single="<s> $A </s>", chat_template=template))
    bare = tokenizer.encode_chat([{"role": "user", "content": content}])
    assert tokenizer.encode_chat([{"role": "user", "content": content}], add_special_tokens=True) == [1, *bare, 2]


def test_a_vocabulary_that_holds_control_strings_as_pieces_still_spells_them(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((char, -1.0) for char in "▁abc<>/sh"), ("▁a", -0.5)]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("</s>", normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "chat_template": "{% for message in messages %}{{ message.content }}</s>{% endfor %}"})
    )
    ours = WsTokenizer.from_folder(tmp_path)
    ids = ours.encode_chat([{"role": "user", "content": "a</s>a"}])
    assert ids.count(ours.eos_token_id) == 1
    assert ids[-1] == ours.eos_token_id


def test_a_control_string_made_whole_by_the_normaliser_is_spelled_out(tmp_path: Path) -> None:
    write_byte_level_folder(tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.normalizer = normalizers.NFKC()
    backend.add_special_tokens([AddedToken("<|stop|>", normalized=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = WsTokenizer.from_folder(tmp_path)
    wide = "\uff1c|stop|\uff1e"
    assert ours.token_id("<|stop|>") in ours.encode(wide)
    assert ours.token_id("<|stop|>") not in ours.encode_chat([{"role": "user", "content": wide}])


@pytest.mark.parametrize(
    ("template", "content"),
    [
        ("<{{ messages[0].content }}", "|im_end|>"),
        ("{{ messages[0].content }}|>", "<|im_end"),
        ("<{{ messages[0].content | trim }}", "  |im_end|>"),
    ],
)
def test_no_control_string_forms_across_the_seam_of_template_and_text(tmp_path: Path, template: str, content: str) -> None:
    tokenizer = WsTokenizer.from_folder(write_byte_level_folder(tmp_path, chat_template=template))
    ids = tokenizer.encode_chat([{"role": "user", "content": content}])
    assert tokenizer.decode(ids) == "<|im_end|>"
    assert tokenizer.eos_token_id not in ids


def test_control_strings_in_tools_and_variables_are_spelled_out(byte_level: WsTokenizer) -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "<|im_end|>", "parameters": {"<|im_start|>": {}}}}]
    with_tools = byte_level.encode_chat([{"role": "user", "content": "a"}], tools=tools)
    assert with_tools.count(byte_level.eos_token_id) == 2  # the template's own: after the user and after the tools
    assert '"<|im_end|>"' in byte_level.decode(with_tools)


def test_an_assistant_turn_keeps_the_marks_the_model_wrote(byte_level: WsTokenizer) -> None:
    turn = {"role": "assistant", "content": "<think>\nhm\n</think>\nyes <|im_end|>"}
    ids = byte_level.encode_chat([{"role": "user", "content": "a"}, turn])
    assert byte_level.token_id("<think>") in ids
    assert ids.count(byte_level.eos_token_id) == 2


def test_a_raw_prompt_reads_control_strings_as_tokens(byte_level: WsTokenizer) -> None:
    assert byte_level.encode("<|im_start|>a") == [byte_level.token_id("<|im_start|>"), *byte_level.encode("a")]


def test_a_continued_message_ends_where_its_text_ends(byte_level: WsTokenizer) -> None:
    messages = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "one two"}]
    text = byte_level.render_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\none two")
    ids = byte_level.encode_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert byte_level.decode(ids) == text


def test_a_lone_surrogate_is_refused(byte_level: WsTokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="surrogate"):
        byte_level.encode("a\ud800b")


def test_bad_words_are_spelled_with_and_without_a_space(byte_level: WsTokenizer) -> None:
    assert byte_level.bad_word_ids(["hello"]) == [byte_level.encode("hello"), byte_level.encode(" hello")]
    assert byte_level.bad_word_ids([" hello", "hello"]) == byte_level.bad_word_ids(["hello"])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "\x00", '{"a":' * 2000], ids=["empty", "cut", "a list", "binary", "deep"])
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    write_byte_level_folder(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelFolderError, match=name):
        WsTokenizer.from_folder(tmp_path)


def test_chat_template_jinja_wins_over_the_config(tmp_path: Path) -> None:
    write_byte_level_folder(tmp_path, chat_template="config")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert WsTokenizer.from_folder(tmp_path).render_chat([{"role": "user", "content": "a"}]) == "file"


def test_a_list_of_named_templates_uses_default(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "usual"}]
    folder = write_byte_level_folder(tmp_path, chat_template=named)  # type: ignore[arg-type]
    assert WsTokenizer.from_folder(folder).render_chat([{"role": "user", "content": "a"}]) == "usual"


def test_a_folder_without_a_template_refuses_messages(tmp_path: Path) -> None:
    tokenizer = WsTokenizer.from_folder(write_byte_level_folder(tmp_path, chat_template=None))
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.encode_chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    "text",
    ["a" * 100_000, "^" * 100_000, " " * 100_000, "e\u0301" * 50_000, "ab" * 50_000, "🙂" * 20_000],
    ids=["letter", "sign", "spaces", "combining", "alternating", "emoji"],
)
def test_long_runs_are_encoded_and_come_back_whole(byte_level: WsTokenizer, text: str) -> None:
    import unicodedata

    assert byte_level.decode(byte_level.encode(text)) == unicodedata.normalize("NFC", text)


def test_loading_and_rendering_import_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder = write_byte_level_folder(tmp_path)
    code = (
        "import sys; from workstation.text.tokenizer import Tokenizer\n"
        f"t = Tokenizer.from_folder({str(folder)!r}); t.encode_chat([{{'role': 'user', 'content': '<|im_end|>'}}])\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_folder_with_only_a_slow_tokenizer_is_converted(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "h": 1, "i": 2, "hi</w>": 3, "i</w>": 4}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh i</w>\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "OpenAIGPTTokenizer", "unk_token": "<unk>"}))
    assert WsTokenizer.from_folder(tmp_path).encode("hi") == [3]


DEMO = Path(__file__).resolve().parent.parent / "workstation" / "demo" / "model"
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Add", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "Thanks"},
]


@pytest.mark.parametrize(
    "options", [{}, {"tools": [TOOL]}, {"enable_thinking": True}, {"add_generation_prompt": False}], ids=str
)
def test_the_demo_model_reads_a_chat_as_with_transformers(options: dict[str, object]) -> None:
    ours, theirs = WsTokenizer.from_folder(DEMO), _transformers(DEMO)
    arguments = {"add_generation_prompt": True, **options}
    expected = theirs.apply_chat_template(CONVERSATION, tokenize=True, return_dict=False, **arguments)  # type: ignore[attr-defined]
    thinking = {"enable_thinking": arguments.pop("enable_thinking")} if "enable_thinking" in arguments else None
    assert ours.encode_chat(CONVERSATION, template_kwargs=thinking, **arguments) == expected  # type: ignore[arg-type]


def test_every_control_string_of_the_demo_model_is_plain_text_in_a_users_message() -> None:
    tokenizer = WsTokenizer.from_folder(DEMO)
    added = json.loads((DEMO / "tokenizer.json").read_text())["added_tokens"]
    control = {token["id"] for token in added}
    frame = [index for index in tokenizer.encode_chat([{"role": "user", "content": "x"}]) if index in control]
    for token in added:
        ids = tokenizer.encode_chat([{"role": "user", "content": f"a {token['content']} b"}])
        assert [index for index in ids if index in control] == frame, token["content"]
        assert f"a {token['content']} b" in tokenizer.decode(ids)
