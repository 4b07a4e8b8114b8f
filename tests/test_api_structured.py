"""What an answer must look like, in every dialect: which grammar the engine gets, and what is refused by name."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, api_client, post, served_model, write_byte_level_folder

from workstation.errors import InvalidRequestError
from workstation.server.app import create_app
from workstation.server.constraint import Constraint
from workstation.server.grammar_check import GrammarCheck
from workstation.server.options import ServedModel

CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
HI = [{"role": "user", "content": "hello world"}]
BASE: dict[str, dict[str, Any]] = {CHAT: {"messages": HI}, TEXT: {"prompt": "hello"}, RESPONSES: {"input": "hello"},
                                   MESSAGES: {"messages": HI, "max_tokens": 9}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NAMED = {"name": "thing", "strict": True, "schema": SCHEMA}
TOOL = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served_model(write_byte_level_folder(tmp_path_factory.mktemp("structured")))


def ask(model: ServedModel, path: str, **body: Any) -> tuple[Any, str | None]:
    """The reply, and the Lark text of the grammar that reached the engine."""
    engine = FakeEngine()
    reply = post(path, engine, model, {**BASE[path], **body})
    grammar = engine.seen[0].grammar if engine.seen else None
    return reply, json.loads(grammar.source)["grammars"][0]["lark_grammar"] if grammar is not None else None


@pytest.mark.parametrize(("path", "body", "part"), [
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": NAMED}}, '"required": ["a"]'),
    (CHAT, {"response_format": {"type": "json_object"}}, '"type": "object"'),
    (CHAT, {"response_format": {"type": "json_object", "schema": SCHEMA}}, '"required": ["a"]'),
    (CHAT, {"response_format": {"type": "structural_tag", "triggers": ["<f"], "structures": [
        {"begin": "<f>", "schema": SCHEMA, "end": "</f>"}]}}, '"</f>"'),
    (CHAT, {"structured_outputs": {"choice": ["a", "b"]}}, '("a" | "b")'), (CHAT, {"guided_choice": ["a", "b"]}, '("a" | "b")'),
    (TEXT, {"response_format": {"type": "json_schema", "json_schema": NAMED}}, '"required": ["a"]'),
    (TEXT, {"structured_outputs": {"regex": "a/b"}}, "/a\\/b/"), (TEXT, {"guided_regex": "[0-9]"}, "/[0-9]/"),
    (TEXT, {"guided_json": SCHEMA, "guided_whitespace_pattern": "_", "guided_decoding_backend": "guidance"}, '"_"'),
    (TEXT, {"guided_grammar": "start: /a/"}, "@user"),
    (TEXT, {"prompt": [5, 6], "structured_outputs": {"json": SCHEMA}}, '"a"'),
    (RESPONSES, {"text": {"format": {"type": "json_schema", **NAMED}}}, '"required": ["a"]'),
    (RESPONSES, {"text": {"format": {"type": "json_object"}}}, '"type": "object"'),
    (MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, '"required": ["a"]'),
    (MESSAGES, {"output_format": {"type": "json_schema", "schema": SCHEMA}}, '"required": ["a"]'),
    (CHAT, {"tools": [TOOL], "tool_choice": "required"}, '\\"name\\": \\"add\\"'),
    (RESPONSES, {"tools": [{"type": "function", "name": "add", "parameters": SCHEMA, "strict": True}]}, '"required": ["a"]'),
    (MESSAGES, {"tools": [{"name": "add", "input_schema": SCHEMA, "strict": True}]}, '"required": ["a"]'),
    (MESSAGES, {"tools": [{"name": "add", "input_schema": SCHEMA}], "tool_choice": {"type": "any"}}, '"required": ["a"]'),
], ids=str)
def test_what_is_asked_for_reaches_the_engine_as_a_grammar(model: ServedModel, path: str, body: dict[str, Any],
                                                           part: str) -> None:
    reply, grammar = ask(model, path, **body)
    assert reply.status_code == 200
    assert grammar is not None and part in grammar


@pytest.mark.parametrize(("path", "body"), [
    (CHAT, {}), (CHAT, {"response_format": {"type": "text"}, "structured_outputs": None}), (CHAT, {"tools": [TOOL]}),
    (CHAT, {"tools": [{**TOOL, "function": {**TOOL["function"], "strict": False}}], "tool_choice": "auto"}),  # type: ignore[dict-item]
    (CHAT, {"tools": [TOOL], "tool_choice": "none"}), (TEXT, {}), (RESPONSES, {"text": {"format": {"type": "text"}}}),
    (RESPONSES, {"text": {}}), (MESSAGES, {"output_config": {"effort": "low"}}),
], ids=str)
def test_nothing_asked_for_is_no_grammar(model: ServedModel, path: str, body: dict[str, Any]) -> None:
    reply, grammar = ask(model, path, **body)
    assert (reply.status_code, grammar) == (200, None)


def test_tokens_that_the_prompt_begins_a_call_with_are_the_grammars_first(model: ServedModel) -> None:
    engine = FakeEngine()
    post(CHAT, engine, model, {"messages": HI, "tools": [TOOL], "tool_choice": "required"})
    request = engine.seen[0]
    assert request.grammar is not None
    last = request.prompt_token_ids[-request.grammar.matched:]
    assert model.tokenizer.decode(last) == '<tool_call>\n{"name": "'


def test_a_schema_beside_tools_leaves_both_ways_open(model: ServedModel) -> None:
    _, grammar = ask(model, CHAT, tools=[TOOL], response_format={"type": "json_schema", "json_schema": NAMED})
    assert grammar is not None and "<tool_call>" not in grammar  # its token, by number
    assert f"<[{model.tokenizer.token_id('<tool_call>')}]>" in grammar and "| %json" in grammar


def test_strict_is_no_part_of_the_prompt(model: ServedModel) -> None:
    prompts = []
    for strict in (True, False):
        engine = FakeEngine()
        post(CHAT, engine, model, {"messages": HI, "tools": [{**TOOL, "function": {**TOOL["function"], "strict": strict}}]})
        prompts.append(engine.seen[0].prompt_token_ids)
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(("path", "body", "param"), [
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT, {"response_format": {}}, "response_format.type"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {**NAMED, "extra": 1}}},
     "response_format.json_schema.extra"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {**NAMED, "strict": "yes"}}},
     "response_format.json_schema.strict"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": {"properties": {"x": {"type": "strin"}}}}}},
     "response_format.json_schema.schema.properties.x.type"),
    (CHAT, {"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    (CHAT, {"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp"),
    (CHAT, {"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    (CHAT, {"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json.not"),
    (CHAT, {"guided_choice": [""]}, "guided_choice"), (CHAT, {"guided_json": {"if": 1}}, "guided_json.if"),
    (CHAT, {"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
    (CHAT, {"guided_whitespace_pattern": "a"}, "guided_whitespace_pattern"),
    (CHAT, {"guided_regex": "a", "use_beam_search": True}, "guided_regex"),
    (CHAT, {"tools": [{**TOOL, "function": {"name": "f", "strict": 1}}]}, "tools[0].function.strict"),
    (CHAT, {"tools": [{**TOOL, "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]},
     "tools[0].function.parameters.not"),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "schema": {"items": 5}}}}, "text.format.schema.items"),
    (RESPONSES, {"tools": [{"type": "function", "name": "f", "strict": True, "parameters": {"not": {}}}]},
     "tools[0].parameters.not"),
    (MESSAGES, {"output_format": {"type": "json_schema", "schema": {"contains": {}}}}, "output_format.schema.contains"),
    (MESSAGES, {"output_format": {"type": "json_object"}, "output_config": {"format": {"type": "json_object"}}},
     "output_format"),
    (MESSAGES, {"tools": [{"name": "f", "strict": True, "input_schema": {"not": {}}}]}, "tools[0].input_schema.not"),
], ids=str)
def test_a_refusal_names_the_field_and_the_path_in_it(model: ServedModel, path: str, body: dict[str, Any], param: str) -> None:
    reply, _ = ask(model, path, **body)
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["message"].startswith(param)
    assert error.get("param", param) == param


# ── trying grammars ─────────────────────────────────────────────────────────────────────────────────────────────────

WIDTH = 4096
DEMO = Path(__file__).parent.parent / "workstation" / "demo" / "model"


def sources(text: str, *more: str) -> Constraint:
    found = [json.dumps({"grammars": [{"ebnf_grammar" if "::=" in item else "lark_grammar": item}]}) for item in (text, *more)]
    return Constraint(tuple(found), "structured_outputs.grammar")


def test_bombs_cost_a_process_and_neither_the_server_nor_the_grammars_after() -> None:
    """Endless work, a stack that overflows, and plain nonsense; a good one after each, and the loop is free meanwhile."""
    endless = "\n".join(f'r{count} ::= r{count + 1} "a"' for count in range(9000)) + '\nr9000 ::= "b"\nroot ::= r0'
    deep = "start: T0\n" + "\n".join(f'T{count}: "a" T{count + 1} "b"' for count in range(9000)) + '\nT9000: "c"'

    async def go() -> list[str]:
        checker, said = GrammarCheck(str(DEMO), seconds=1.5), []
        ticks, ticking = 0, True

        async def tick() -> None:
            nonlocal ticks
            while ticking:
                await asyncio.sleep(0.01)
                ticks += 1

        clock = asyncio.ensure_future(tick())
        for bomb in (endless, deep, "start: nope"):
            try:
                await checker.approve(sources(bomb), WIDTH)
            except InvalidRequestError as error:
                said.append(error.message)
                assert error.param == "structured_outputs.grammar"
            assert "good" in await checker.approve(sources('start: "good"'), WIDTH)
        ticking = False
        await clock
        await checker.close()
        assert ticks > 50
        return said

    said = asyncio.run(go())
    for message, part in zip(said, ("within 1.5 s", "too deeply", "unknown name"), strict=True):
        assert part in message


def test_the_second_source_is_taken_where_the_first_does_not_compile() -> None:
    async def go() -> str:
        checker = GrammarCheck(str(DEMO))
        try:
            return await checker.approve(sources('root ::= "a', 'root ::= "b"'), WIDTH)
        finally:
            await checker.close()

    assert 'start: \\"b\\"' in asyncio.run(go())  # and translated: the engine does no such work


def test_a_server_that_leaves_ends_the_process() -> None:
    model = replace(served_model(DEMO), folder=str(DEMO))

    async def go() -> int | None:
        app = create_app(FakeEngine(logits_width=WIDTH), model)
        async with api_client(app) as client:
            reply = await client.post(TEXT, json={"prompt": "a", "guided_regex": "a+"})
            assert reply.status_code == 200
        process = await app.state.api.grammars._process
        await app.state.api.close()
        return process.returncode  # type: ignore[no-any-return]

    assert asyncio.run(go()) == -9
