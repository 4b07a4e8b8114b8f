"""Grammars: what they allow of every kind, what is refused and how the refusal names its place. No engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workstation.errors import InvalidRequestError
from workstation.grammar import check
from workstation.grammar.answer import Wanted, grammars
from workstation.grammar.library import Grammars, Vocabulary
from workstation.grammar.matcher import Matcher
from workstation.grammar.params import StructuredOutputsParams
from workstation.grammar.schema import check_schema
from workstation.parsers.detect import TOOL_FORMATS, Formats, find_formats
from workstation.parsers.frames import before, call_frame
from workstation.parsers.parts import CallArguments, CallStart
from workstation.parsers.values import ToolSchemas
from workstation.text.tokenizer import Tokenizer

FORMATS = [find_formats(None, tools=name) for name in ("hermes", "qwen3_coder", "glm45", "pythonic")]
DEMO = Path(__file__).parent.parent / "workstation" / "demo" / "model"
WIDTH = 4160
EOS = 2


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(DEMO, WIDTH)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


class Judge:
    """Says of a text whether a grammar allows it: "yes", "begun" (more must follow) or "no"."""

    def __init__(self, vocabulary: Vocabulary, tokenizer: Tokenizer, wanted: Wanted) -> None:
        self._tokenizer = tokenizer
        self.compiled = vocabulary.compile(grammars(wanted)[0])

    def __call__(self, text: str) -> str:
        matcher = self.compiled.fork([EOS])
        for token in self._tokenizer.encode(text, add_special_tokens=False):
            if not allowed(matcher)[token]:
                return "no"
            matcher.accept(token)
            assert matcher.fault is None, "what a mask allows is accepted"
        return "yes" if allowed(matcher)[EOS] else "begun"


def allowed(matcher: Matcher, **options: bool) -> Any:
    bits = np.empty(matcher.words, dtype=np.int32)
    matcher.fill(bits, **options)
    return np.unpackbits(bits.view(np.uint8), bitorder="little").astype(bool)


@pytest.mark.parametrize(("fields", "good", "begun", "bad"), [
    ({"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}, '{"a": 1, "b": []}', '{"a"',
     "{}"),
    ({"json": {"discriminator": {}, "oneOf": [{"type": "object", "properties": {"k": {"const": name}}, "required": ["k"],
                                               "deprecated": True} for name in "ab"]}}, '{"k": "b"}', '{"k": "', '{"k": "c"}'),
    ({"json": '{"enum": ["x", 5, null]}'}, "null", '"', '"y"'), ({"json": True}, '[1, {"a": "é"}]', "[", "]"),
    ({"json": {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}},
                                                      "additionalProperties": False}}}}, '{"n": {"n": {}}}', '{"n": {', '{"m"'),
    ({"json_object": True}, '{"a": {"b": null}}', "{", "[1]"),
    ({"json": {"type": "array"}, "disable_any_whitespace": True}, "[1,2]", "[1,", "[1, 2]"),
    ({"json": {"type": "array"}, "whitespace_pattern": "_"}, "[1,_2]", "[1,_", "[1, 2]"),
    ({"json": {"properties": {"a": {"type": "string"}}, "type": "object"}, "disable_additional_properties": True}, '{"a": ""}',
     "{", '{"b"'),
    ({"regex": "a/b\\/[cd]{2}\\d"}, "a/b/cd7", "a/b", "a-"), ({"regex": "^(yes|no)$"}, "yes", "ye", "yesno"),
    ({"choice": ["red", 'say "hi"\n']}, 'say "hi"\n', "re", "green"),
    ({"grammar": "start: A+\nA: /[ab]c/"}, "acbc", "a", "ca"), ({"grammar": 'root ::= "a" [0-9]+ "\\n"'}, "a12\n", "a1", "b"),
    ({"structural_tag": {"structures": [{"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"}], "triggers": ["<f"]}},
     "so <f>12</f> and <f>3</f>!", "<f>1", "<g <f>x"),
], ids=str)
def test_a_kind_allows_what_it_should(vocabulary: Vocabulary, tokenizer: Tokenizer, fields: dict[str, Any], good: str,
                                      begun: str, bad: str) -> None:
    judge = Judge(vocabulary, tokenizer, Wanted(StructuredOutputsParams(**fields)))
    assert [judge(text) for text in (good, begun, bad)] == ["yes", "begun", "no"]


def test_control_tokens_are_never_text(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    judge = Judge(vocabulary, tokenizer, Wanted(StructuredOutputsParams(regex="(.|\\n)*")))
    mask = allowed(judge.compiled.fork([EOS]))
    assert mask[EOS] and not any(mask[token] for token in tokenizer.control_ids.values() if token != EOS)
    assert not mask[tokenizer.vocab_size:].any()
    assert mask[:tokenizer.vocab_size].sum() > 3900


def test_the_end_is_held_back_only_where_something_else_may_follow(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    compiled = Judge(vocabulary, tokenizer, Wanted(StructuredOutputsParams(regex="a{1,2}"))).compiled
    one, two = (compiled.fork([EOS, 7], tokenizer.encode(text, add_special_tokens=False)) for text in ("a", "aa"))
    assert allowed(one)[[EOS, 7]].all() and not allowed(one, hold_end=True)[[EOS, 7]].any()
    assert allowed(two, hold_end=True)[[EOS, 7]].all() and two.complete


def test_a_thought_may_come_first_and_closes_by_its_own_mark(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    formats = find_formats("<think></think>")
    answers = {}
    for thinking in ("none", "may", "inside"):
        wanted = Wanted(StructuredOutputsParams(choice=["yes"]), formats=formats, thinking=thinking,  # type: ignore[arg-type]
                        controls=tokenizer.control_ids)
        judge = Judge(vocabulary, tokenizer, wanted)
        answers[thinking] = [judge(text) for text in ("yes", "<think>\nyes? {no}\n</think>\n\nyes", "I see.</think>yes")]
    assert answers == {"none": ["yes", "no", "no"], "may": ["yes", "yes", "no"], "inside": ["begun", "no", "yes"]}


def test_a_mark_that_is_no_token_closes_a_thought_too(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    formats = find_formats(None, think="granite")
    judge = Judge(vocabulary, tokenizer, Wanted(StructuredOutputsParams(choice=["yes"]), formats=formats, thinking="inside"))
    assert judge("so be it. Here is my response: yes") == "yes"
    assert judge("so be it. yes") == "begun"


# ── calls ───────────────────────────────────────────────────────────────────────────────────────────────────────────

PROPERTIES = {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["c", "f"]}}
SCHEMA = {"type": "object", "properties": PROPERTIES, "required": ["city"], "additionalProperties": False}


def tools(*, strict: bool = False) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA, "strict": strict}},
            {"type": "function", "function": {"name": "now", "strict": strict}}]


def written(formats: Formats, days: str) -> str:
    """A call of get_weather as the format writes it, up to its end."""
    frame = call_frame(formats)
    assert frame is not None
    line = "\n" if frame.framed else ""
    pairs = (("city", "K"), ("days", days), ("unit", "f"))
    head, middle, end = frame.parameter, frame.name_end + line, f"{line}{frame.value_end}\n"
    arguments = {
        "json": f' {{"city": "K", "days": {days}, "unit": "f"}}', "python": f'city="K", days={days}, unit="f"',
        "tags": "".join(f"{head}{key}{middle}{value}{end}" for key, value in pairs),
        "pairs": "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in pairs),
    }[frame.style]
    return formats.opening("get_weather") + arguments + frame.after


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_demanded_call_is_written_as_its_format_reads_it(vocabulary: Vocabulary, tokenizer: Tokenizer, name: str) -> None:
    formats = find_formats(None, tools=name)
    frame = call_frame(formats)
    assert frame is not None
    wanted = Wanted(tools=tools(), calls="must", formats=formats, controls=tokenizer.control_ids)
    judge = Judge(vocabulary, tokenizer, wanted)
    call = written(formats, "3")
    assert formats.opening("now").startswith(frame.first)
    two = call + frame.between + before(formats, frame, "now")
    assert [judge(text) for text in (call + frame.last, two, written(formats, '"x"'), "Hello")] == ["yes", "begun", "no", "no"]
    parser = formats.parser(calls=True, schemas=ToolSchemas(tools()))
    parts = parser.feed(call + frame.last) + parser.finish()
    assert [part.name for part in parts if isinstance(part, CallStart)] == ["get_weather"]
    arguments = "".join(part.text for part in parts if isinstance(part, CallArguments))
    assert json.loads(arguments) == {"city": "K", "days": 3, "unit": "f"}


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_strict_tools_leave_text_alone_and_hold_calls_to_their_schema(vocabulary: Vocabulary, tokenizer: Tokenizer,
                                                                      name: str) -> None:
    formats = find_formats(None, tools=name)
    frame = call_frame(formats)
    assert frame is not None
    wanted = Wanted(tools=tools(strict=True), calls="may", formats=formats, controls=tokenizer.control_ids)
    judge = Judge(vocabulary, tokenizer, wanted)
    before_call = "" if formats.tools is not None and formats.tools.bare else "Let me see. "
    assert judge("Hello there.") == "yes"
    assert judge(before_call + written(formats, "3") + frame.last) == "yes"
    assert judge(before_call + written(formats, '"x"')) == "no"


def test_harmony_names_the_channel_of_what_is_asked_for() -> None:
    """No tokenizer here has Harmony's tokens, so its marks are plain text."""
    formats, vocabulary, tokenizer = find_formats(None, tools="harmony"), Vocabulary(DEMO, WIDTH), Tokenizer.from_folder(DEMO)
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    call = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "K"}'
    answer = "<|channel|>final<|message|>yes"
    output = StructuredOutputsParams(choice=["yes"])
    text = Judge(vocabulary, tokenizer, Wanted(output, formats=formats))
    assert [text(item) for item in (answer, thought + answer, "yes", call)] == ["yes", "yes", "no", "no"]
    must = Judge(vocabulary, tokenizer, Wanted(tools=tools(), calls="must", formats=formats))
    assert [must(item) for item in (call, thought + call, answer)] == ["yes", "yes", "no"]
    either = Judge(vocabulary, tokenizer, Wanted(output, tools=tools(), calls="may", formats=formats))
    assert [either(item) for item in (call, thought + answer)] == ["yes", "yes"]


def test_tools_that_are_not_strict_force_nothing_unless_a_call_is_demanded() -> None:
    formats = find_formats(None, tools="hermes")
    assert grammars(Wanted(tools=tools(), calls="may", formats=formats)) == ()
    assert len(grammars(Wanted(tools=tools(), calls="must", formats=formats))) == 2
    assert len(grammars(Wanted(tools=tools(strict=True), calls="must", formats=formats))) == 1


def test_a_schema_that_cannot_be_enforced_matters_to_strict_tools_alone(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    formats = find_formats(None, tools="hermes")
    function: dict[str, Any] = {"name": "f", "parameters": {"type": "object", "not": {}}, "where": "tools[0].x"}
    listed = [{"type": "function", "function": function}]
    judge = Judge(vocabulary, tokenizer, Wanted(tools=listed, calls="must", formats=formats, controls=tokenizer.control_ids))
    assert judge('<tool_call>\n{"name": "f", "arguments": {"any": [1]}}\n</tool_call>') == "yes"
    function["strict"] = True
    with pytest.raises(InvalidRequestError, match=r"^tools\[0\]\.x\.not: "):
        grammars(Wanted(tools=listed, calls="must", formats=formats))


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("schema", "path"), [
    ({"type": "strin"}, ".type"), ({"properties": {"x": {"type": 5}}}, ".properties.x.type"), ({"items": [5]}, ".items[0]"),
    ({"anyOf": [{"if": {}}]}, ".anyOf[0].if"), ({"allOf": []}, ".allOf"), ({"enum": "a"}, ".enum"),
    ({"required": [1]}, ".required"),
    ({"$ref": "http://x/y"}, ".$ref"), ({"$ref": "#/$defs/a"}, ".$ref"), ({"minLength": -1}, ".minLength"),
    ({"maximum": float("nan")}, ".maximum"), ({"multipleOf": 0}, ".multipleOf"), ({"format": "color"}, ".format"),
    ({"pattern": 5}, ".pattern"), ({"properties": []}, ".properties"), ({"additionalProperties": 5}, ".additionalProperties"),
    ({"$defs": {"a": {"uniqueItems": True}}}, ".$defs.a.uniqueItems"), ({"x-guidance": {}}, ".x-guidance"), ([], ""),
], ids=str)
def test_a_schema_that_cannot_be_enforced_is_refused_by_its_path(schema: Any, path: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_schema(schema, "text.format.schema")
    assert caught.value.param == "text.format.schema" + path
    assert caught.value.message.startswith(f"text.format.schema{path}: ")


KEYWORDS = ("type", "properties", "items", "prefixItems", "anyOf", "oneOf", "allOf", "enum", "const", "required",
            "minLength", "maxItems", "minimum", "exclusiveMaximum", "multipleOf", "pattern", "format", "$ref", "$defs",
            "additionalProperties", "patternProperties", "title", "not", "deprecated")
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 5), st.floats(), st.sampled_from([
    "string", "object", "array", "integer", "date", "uuid", "[a-c]+", "(", "#", "#/$defs/a", "#/items", ""]))
SCHEMAS = st.recursive(SCALARS, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([*KEYWORDS, "a"]), inner, max_size=4)), max_leaves=12)


@settings(max_examples=150, deadline=None)
@given(schema=SCHEMAS)
def test_any_schema_is_compiled_or_refused(vocabulary: Vocabulary, schema: Any) -> None:
    try:
        sources = grammars(Wanted(StructuredOutputsParams(json=schema)))
        tool = {"function": {"name": "f", "parameters": {"properties": {"x": schema, "y": True}}, "strict": True}}
        sources += grammars(Wanted(tools=[tool], calls="must", formats=FORMATS[len(str(schema)) % len(FORMATS)]))
        for source in sources:
            vocabulary.compile(source)
    except InvalidRequestError as error:
        assert error.message and len(error.message) < 700


def test_depth_and_size_of_a_schema_are_limited() -> None:
    deep: dict[str, Any] = {}
    for _ in range(70):
        deep = {"items": deep}
    with pytest.raises(InvalidRequestError, match="64 levels"):
        check_schema(deep, "x")
    with pytest.raises(InvalidRequestError, match="20000 parts"):
        check_schema({"anyOf": [{}] * 20_001}, "x")
    with pytest.raises(InvalidRequestError, match="262144 bytes"):
        check_schema({"enum": ["x" * 300_000]}, "x")


@pytest.mark.parametrize(("schema", "path"), [
    ({"type": "object", "properties": {"x": {"type": "string", "pattern": "(?<=a)b"}}}, ".properties.x.pattern"),
    ({"anyOf": [{"type": "string"}, {"allOf": [{"type": "string"}, {"type": "integer"}]}]}, ".anyOf[1]"),
    ({"$defs": {"a": {"type": "string", "pattern": "["}}, "$ref": "#/$defs/a"}, ".$defs.a.pattern"),
], ids=str)
def test_what_only_the_compiler_finds_is_named_by_its_path_too(vocabulary: Vocabulary, schema: Any, path: str) -> None:
    source = grammars(Wanted(StructuredOutputsParams(json=schema)))[0]
    line = json.dumps({"source": source, "where": "text.format.schema", "schema": schema})
    found = check.verdict(vocabulary, line)
    if found["error"] is not None:  # a branch that cannot be met is dropped where another can
        assert found["param"].startswith("text.format.schema" + path)
    assert (found["error"] is None) == ("anyOf" in schema)


@pytest.mark.parametrize(("fields", "named"), [
    ({}, "exactly one"), ({"json": {}, "regex": "a"}, "json and regex"), ({"json": "{"}, "json must be JSON"),
    ({"json": 5}, "json"),
    ({"regex": ""}, "regex"), ({"choice": []}, "choice"), ({"choice": ["a"] * 1025}, "1025"), ({"choice": ["a", 5]}, "choice"),
    ({"grammar": "x" * 300_000}, "300000"), ({"json_object": "yes"}, "json_object"),
    ({"structural_tag": [1]}, "structural_tag"),
    ({"regex": "a", "disable_any_whitespace": 1}, "disable_any_whitespace"),
], ids=lambda value: str(value)[:40])
def test_parameters_are_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        StructuredOutputsParams(**fields)


def test_compiled_grammars_are_kept_by_bytes_the_least_used_forgotten_first(vocabulary: Vocabulary) -> None:
    kept = Grammars(vocabulary, limit=3 * 70_000)
    sources = [grammars(Wanted(StructuredOutputsParams(regex=f"a{{{count}}}")))[0] for count in range(1, 5)]
    first, second = kept.get(sources[0]), kept.get(sources[1])
    kept.get(sources[2])
    assert kept.get(sources[0]) is first
    kept.get(sources[3])
    assert kept.get(sources[0]) is first and kept.get(sources[1]) is not second


def test_neither_torch_nor_the_library_comes_with_the_modules() -> None:
    code = "import sys, workstation.grammar.check, workstation.server.grammar_check, workstation.engine.grammars"
    heavy = "{'torch', 'transformers', 'llguidance'}"
    subprocess.run([sys.executable, "-c", f"{code}\nassert not {heavy} & set(sys.modules)"], check=True)


def test_without_the_library_a_request_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InvalidRequestError, match="pip install llguidance"):
        Vocabulary(DEMO, WIDTH)
