"""Calls and thoughts read out of a model's text: each family's way of writing, any cut of it, and damaged text."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from products import some_of

from workstation.errors import ConfigError
from workstation.parsers.detect import THINK_FORMATS, TOOL_FORMATS, Formats, find_formats
from workstation.parsers.parts import CallEnd, CallStart, Part, gathered, joined
from workstation.parsers.values import ToolSchemas, literal, python_arguments, typed_json

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "units": {"type": ["string", "null"]}}}}},
    {"type": "function", "function": {"name": "write_file", "parameters": {"type": "object", "properties": {
        "path": {"type": "string"}, "content": {"type": "string"}, "lines": {"type": "array"}}}}},
    {"type": "function", "function": {"name": "now"}},
]
SCHEMAS = ToolSchemas(TOOLS)
WEATHER = ("get_weather", {"city": "Köln", "days": 2})
NOW: tuple[str, dict[str, Any]] = ("now", {})
FILE = ("write_file", {"path": "a.py", "content": 'def f():\n    return "x\\n"\n'})
Calls = list[tuple[str, dict[str, Any]]]

# name → (tool format, think format, inside, text, expected text, expected thought, expected calls)
RECORDED: dict[str, tuple[str, str, bool, str, str, str, Calls]] = {
    "hermes": ("hermes", "think", False, "<think>\nLet me see.\n</think>\n\nI look.\n<tool_call>\n"
               '{"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>\n<tool_call>\n'
               '{"name": "now", "arguments": {}}\n</tool_call>', "I look.", "Let me see.", [WEATHER, NOW]),
    "hermes, arguments first": ("hermes", "none", False, '<tool_call>{"arguments": {"city": "Köln", "days": 2}, '
                                '"name": "get_weather"}</tool_call> done', "done", "", [WEATHER]),
    "hermes, arguments in a string": ("hermes", "none", False, '<tool_call>{"name": "get_weather", "arguments": '
                                      '"{\\"city\\": \\"Köln\\", \\"days\\": 2}"}</tool_call>', "", "", [WEATHER]),
    "hermes, no arguments": ("hermes", "none", False, '<tool_call>{"name": "now"}</tool_call>', "", "", [NOW]),
    "hermes, text that only looks like a call": ("hermes", "none", False, "A <tool_call> at it: <tool_call>{1}</tool_call>.",
                                                 "A <tool_call> at it: <tool_call>{1}</tool_call>.", "", []),
    "a thought the prompt opened": ("hermes", "think", True, "I think.\n</think>\n\n4", "4", "I think.", []),
    "a thought that mentions a call": ("hermes", "think", False, "<think>use <tool_call>{}</think>ok", "ok",
                                       "use <tool_call>{}", []),
    "qwen coder": ("qwen3_coder", "none", False, "I write.\n\n<tool_call>\n<function=write_file>\n<parameter=path>\na.py\n"
                   '</parameter>\n<parameter=content>\ndef f():\n    return "x\\n"\n\n</parameter>\n</function>\n</tool_call>\n'
                   "<tool_call>\n<function=get_weather>\n<parameter=city>\nKöln\n</parameter>\n<parameter=days>\n2\n</parameter>"
                   "\n</function>\n</tool_call>", "I write.", "", [FILE, WEATHER]),
    "glm": ("glm45", "think", False, "\n<think>Hm.</think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Köln"
            "</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>", "",
            "Hm.", [WEATHER, NOW]),
    "llama json": ("llama3_json", "none", False, '{"name": "get_weather", "parameters": {"city": "Köln", "days": 2}}; '
                   '{"name": "now", "parameters": {}}', "", "", [WEATHER, NOW]),
    "llama json behind its tag": ("llama3_json", "none", False, '<|python_tag|>{"type": "function", "name": "now", '
                                  '"parameters": {}}', "", "", [NOW]),
    "llama json that is an answer": ("llama3_json", "none", False, '{"name": "Ada", "parameters": {"age": 3}}',
                                     '{"name": "Ada", "parameters": {"age": 3}}', "", []),
    "pythonic": ("pythonic", "none", False, "[get_weather(city='Köln', days=2), now()]", "", "", [WEATHER, NOW]),
    "pythonic with brackets in strings": ("pythonic", "none", False, "[write_file(path=\"a.py\", content='def f():\\n    "
                                          "return \"x\\\\n\"\\n')]", "", "", [FILE]),
    "pythonic that is a list": ("pythonic", "none", False, "[1, 2, 3] are numbers", "[1, 2, 3] are numbers", "", []),
    "mistral": ("mistral", "mistral", False, '[THINK]Hm.[/THINK]Ok.[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": '
                '"Köln", "days": 2}}, {"name": "now", "arguments": {}}]', "Ok.", "Hm.", [WEATHER, NOW]),
    "mistral, named": ("mistral_named", "none", False, '[TOOL_CALLS]get_weather[ARGS]{"city": "Köln", "days": 2}[TOOL_CALLS]now'
                       "[CALL_ID]abc[ARGS]{}", "", "", [WEATHER, NOW]),
    "deepseek v3": ("deepseek_v3", "think", True, "Hm.</think>Ok.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function"
                    '<｜tool▁sep｜>get_weather\n```json\n{"city": "Köln", "days": 2}\n```<｜tool▁call▁end｜>\n'
                    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
                    "Ok.", "Hm.", [WEATHER, NOW]),
    "deepseek v3.1": ("deepseek_v31", "none", False, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
                      '{"city": "Köln", "days": 2}<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}'
                      "<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "", "", [WEATHER, NOW]),
    "granite": ("granite", "granite", False, "Here is my thought process: Hm. Here is my response: Ok. <|tool_call|>[{"
                '"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}]', "Ok.", "Hm.", [WEATHER]),
    "phi": ("phi4_mini_json", "none", False, '<|tool_call|>[{"name": "now", "arguments": {}}, {"name": "get_weather", '
            '"arguments": {"city": "Köln", "days": 2}}]<|/tool_call|>', "", "", [NOW, WEATHER]),
    "minimax": ("minimax_m2", "think", True, 'Hm.</think><minimax:tool_call>\n<invoke name="get_weather">\n<parameter '
                'name="city">Köln</parameter>\n<parameter name="days">2</parameter>\n</invoke>\n<invoke name="now">\n'
                "</invoke>\n</minimax:tool_call>", "", "Hm.", [WEATHER, NOW]),
    "harmony": ("harmony", "harmony", False, "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary"
                '<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json'
                '<|message|>{"city": "Köln", "days": 2}<|call|>', "I look.", "Hm.", [WEATHER]),
    "harmony, recipient first": ("harmony", "auto", False, "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant "
                                 'to=functions.now<|channel|>commentary json<|message|>{}', "", "Hm.", [NOW]),
    "harmony, an answer": ("harmony", "auto", False, "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>"
                           "final<|message|>4", "4", "Hm.", []),
}


def formats(tools: str, think: str) -> Formats:
    return find_formats(None, tools=tools, think=think)


def parsed(case: str, pieces: Iterable[str]) -> list[Part]:
    tools, think, inside, *_ = RECORDED[case]
    parser = formats(tools, think).parser(calls=True, schemas=SCHEMAS, inside=inside)
    parts = [part for piece in pieces for part in parser.feed(piece)]
    return joined([*parts, *parser.finish()])


@pytest.mark.parametrize("case", RECORDED)
def test_a_recorded_answer_is_taken_apart(case: str) -> None:
    _, _, _, text, shown, thought, calls = RECORDED[case]
    found = gathered(parsed(case, [text]))
    assert (found.text, found.reasoning) == (shown, thought)
    assert [(call.name, json.loads(call.arguments)) for call in found.calls] == calls


@pytest.mark.parametrize("case", RECORDED)
def test_one_character_at_a_time_says_the_same(case: str) -> None:
    text = RECORDED[case][3]
    assert parsed(case, text) == parsed(case, [text])


@given(data=st.data(), case=st.sampled_from(sorted(RECORDED)))
@settings(max_examples=400, deadline=None)
def test_any_split_of_any_beginning_says_the_same(data: st.DataObject, case: str) -> None:
    text = RECORDED[case][3]
    tails = ["", text, "}]", '"', "\\", "</think>", "{[("]
    text = text[:data.draw(st.integers(0, len(text)))] + data.draw(st.sampled_from(tails))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parsed(case, pieces) == parsed(case, [text])


@given(case=st.sampled_from(sorted(RECORDED)), text=st.text(alphabet='{}[]()"\'\\<>/|:,= \nabname_tool_call', max_size=60))
@settings(max_examples=400, deadline=None)
def test_damaged_text_neither_fails_nor_depends_on_its_cut(case: str, text: str) -> None:
    whole = RECORDED[case][3]
    text = whole[:len(whole) // 2] + text + whole[len(whole) // 2:]
    assert parsed(case, text) == parsed(case, [text])


@pytest.mark.parametrize("case", RECORDED)
def test_calls_begin_once_end_once_and_are_counted_from_zero(case: str) -> None:
    parts = parsed(case, RECORDED[case][3])
    count = len(RECORDED[case][6])
    assert [part.index for part in parts if isinstance(part, CallStart)] == list(range(count))
    assert [part.index for part in parts if isinstance(part, CallEnd)] == list(range(count))


@some_of(1, filler=["x", " ", '{"a": [', "<tool_call>", '\\"'],
         case=["hermes", "qwen coder", "glm", "pythonic", "mistral", "deepseek v3", "harmony", "llama json"])
def test_a_million_characters_take_linear_time(case: str, filler: str) -> None:
    half = len(RECORDED[case][3]) * 2 // 3

    def seconds(size: int) -> float:
        tools, think, inside, text, *_ = RECORDED[case]
        text = text[:half] + filler * (size // len(filler))
        parser = formats(tools, think).parser(calls=True, schemas=SCHEMAS, inside=inside)
        began = time.process_time()
        for at in range(0, len(text), 16):
            parser.feed(text[at:at + 16])
        parser.finish()
        return time.process_time() - began

    # Ten times the text: ten times the work, and a hundred times if a square is in it. Between the two no noise decides.
    assert seconds(1_000_000) < 40 * max(seconds(100_000), 0.02)


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_forced_opening_begins_a_call_of_its_format(name: str) -> None:
    """What the prompt ends with when a call is required, and what a model would write on from there."""
    rest = {"xml": "<parameter=city>\nK\n</parameter>\n</function>\n</tool_call>",
            "key_value": "<arg_key>city</arg_key><arg_value>K</arg_value></tool_call>",
            "invoke": '<{0}parameter name="city">K</{0}parameter></{0}invoke>'}
    kinds = {"qwen3_coder": rest["xml"], "glm45": rest["key_value"], "minimax_m2": rest["invoke"].format(""),
             "deepseek_v32": rest["invoke"].format("｜DSML｜"), "pythonic": "city='K')]"}
    found = formats(name, "none")
    parser = found.parser(calls=True, schemas=SCHEMAS)
    parts = parser.feed(found.opening("get_weather")) + parser.feed(kinds.get(name, ' {"city": "K"}}')) + parser.finish()
    call = gathered(parts).calls[0]
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "K"})
    assert found.opening("get_weather").startswith(found.opening(None))


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="hermes"):
        find_formats(None, tools="nope")
    with pytest.raises(ConfigError, match="think"):
        find_formats(None, think="nope")
    assert set(THINK_FORMATS) >= {"think", "mistral"}


@pytest.mark.parametrize(("template", "tools", "think"), [
    ("<|start|>{{x}}<|channel|>analysis<|message|>", "harmony", "harmony"),
    ("<tool_call>\n{{ call }} </think>", "hermes", "think"),
    ("<tool_call>\n<function={{ n }}>\n<parameter=", "qwen3_coder", "none"),
    ("<tool_call>{{ n }}<arg_key>{{ k }}</arg_key><think>", "glm45", "think"),
    ("[TOOL_CALLS]{{ x }}", "mistral", "none"), ("[TOOL_CALLS]{{ n }}[ARGS][THINK]", "mistral_named", "mistral"),
    ("<｜tool▁call▁begin｜>function ```json", "deepseek_v3", "none"),
    ("<｜tool▁call▁begin｜></think>", "deepseek_v31", "think"),
    ("<|tool_call|>{{ x }}", "granite", "none"), ("<|tool_call|>{{ x }}<|/tool_call|>", "phi4_mini_json", "none"),
    ("Environment: ipython {\"name\": f, \"parameters\": {}}", "llama3_json", "none"),
    ("{% if 'tools' in message %}<|tool|>{{ message['tools'] }}", "phi4_mini_json", "none"),
    ("[func_name1(params_name1=1)]", "pythonic", "none"), ("{{ messages }}", "none", "none"),
])
def test_formats_are_recognised_from_the_template(template: str, tools: str, think: str) -> None:
    found = find_formats(template)
    assert (found.tool_name, found.think_name) == (tools, think)


def _render(messages: list[dict[str, Any]]) -> str:
    """A template nobody has seen before."""
    out = ""
    for message in messages:
        out += f"<turn {message['role']}>\n{message['content']}"
        for call in message.get("tool_calls", []):
            function = call["function"]
            out += f'\n<<CALL>> {json.dumps({"fn": function["name"], "args": function["arguments"]})} <</CALL>>'
        out += "\n"
    return out


def test_a_format_nobody_knows_is_derived_from_the_template() -> None:
    found = find_formats("{{ unknown }}", _render)
    assert found.tool_name == "template"
    parser = found.parser(calls=True, schemas=SCHEMAS)
    text = 'So:\n<<CALL>> {"fn": "get_weather", "args": {"city": "Köln", "days": 2}} <</CALL>>'
    output = gathered([part for char in text for part in parser.feed(char)] + parser.finish())
    assert (output.text, [(call.name, json.loads(call.arguments)) for call in output.calls]) == ("So:", [WEATHER])


def test_a_template_that_joins_arguments_to_text_gets_them_as_text() -> None:
    def joins(messages: list[dict[str, Any]]) -> str:
        from workstation.errors import InvalidRequestError

        calls = [call["function"] for message in messages for call in message.get("tool_calls", [])]
        if not all(isinstance(call["arguments"], str) for call in calls):
            raise InvalidRequestError("cannot join")
        return "".join(f"[TOOL_CALLS]{call['name']}{call['arguments']}" for call in calls)

    assert find_formats("[TOOL_CALLS]", joins).text_arguments
    assert not find_formats("{{ unknown }}", _render).text_arguments


@pytest.mark.parametrize(("raw", "types", "expected"), [
    ("2", {"integer"}, 2), ("2", {"string"}, "2"), ("2", set(), 2), ("abc", set(), "abc"), ("true", {"boolean"}, True),
    ("True", {"boolean"}, True), ("null", {"string", "null"}, None), ("123", {"string", "null"}, "123"),
    ('["a"]', {"array"}, ["a"]), ("['a']", {"array"}, ["a"]), ('{"a": 1}', {"object"}, {"a": 1}), ("1.5", {"number"}, 1.5),
    ("1e999", {"number"}, "1e999"), ("[" * 100, {"array"}, "[" * 100), ("2", {"number"}, 2), ("Köln 5", {"integer"}, "Köln 5"),
])
def test_a_bare_value_is_read_as_the_schema_allows(raw: str, types: set[str], expected: Any) -> None:
    assert json.loads(typed_json(raw, frozenset(types))) == expected


def test_python_literals_are_read_and_nothing_is_evaluated() -> None:
    assert literal("{'a': [1, -2.5, None, (True,)], \"b\": 'x\\n\\u00e4\\ud83d\\ude42'}") == {
        "a": [1, -2.5, None, [True]], "b": "x\nä🙂"}
    assert python_arguments("1, b=2", ["a", "b"]) == {"a": 1, "b": 2}
    for bad in ("__import__('os')", "1 +", "[1", "{[1]: 2}", "'a", "1_0", "", "\\", "'\\ud800'", "-"):
        with pytest.raises(ValueError):
            literal(bad)
