"""Chat templates: the helpers they expect, the sandbox they run in, the limits they meet."""

from __future__ import annotations

import json

import pytest

from workstation.errors import InvalidRequestError, ModelFolderError
from workstation.text import chat_template
from workstation.text.chat_template import ChatTemplate

USER = [{"role": "user", "content": "hi"}]


def test_the_helpers_of_transformers_are_there() -> None:
    source = (
        "{{ {'a': '<ü>'} | tojson }} {{ strftime_now('%Y') | length }} "
        "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    )
    assert ChatTemplate(source).render(USER) == json.dumps({"a": "<ü>"}, ensure_ascii=False) + " 4 hi"


def test_tojson_indents_as_asked() -> None:
    assert ChatTemplate("{{ {'b': 1, 'a': [2]} | tojson(indent=2) }}").render(USER) == json.dumps({"b": 1, "a": [2]}, indent=2)


def test_blocks_leave_no_stray_lines() -> None:
    assert (
        ChatTemplate("{% for message in messages %}\n    {% if true %}\nx\n    {% endif %}\n{% endfor %}").render(USER) == "x\n"
    )


def test_loop_controls_work() -> None:
    assert ChatTemplate("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}").render(USER) == "012"


def test_formatting_works() -> None:
    assert (
        ChatTemplate("{{ '%s-%d' | format('a', 2) }} {{ '{:>3}'.format(1) }} {{ '%.1f' % 0.25 }}").render(USER) == "a-2   1 0.2"
    )


def test_namespace_and_macros_work() -> None:
    source = (
        "{% macro f(x) %}[{{ x }}]{% endmacro %}{% set ns = namespace(n=0) %}"
        "{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ f(ns.n) }}"
    )
    assert ChatTemplate(source).render(USER) == "[1]"


def test_raise_exception_is_a_400_with_the_templates_words() -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate") as caught:
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(USER)
    assert caught.value.param == "messages"


def test_the_variables_a_template_reads_are_known() -> None:
    source = "{% if enable_thinking %}{{ style }}{% endif %}{{ bos_token }}{% for m in messages %}{{ m }}{% endfor %}"
    assert ChatTemplate(source).names == {"enable_thinking", "style"}


def test_a_template_that_does_not_compile_is_a_fault_of_the_folder() -> None:
    with pytest.raises(ModelFolderError, match="does not compile"):
        ChatTemplate("{% for %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__ }}",
        "{{ (messages | attr('__class__')) }}{{ cycler.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ '{0.__class__}'.format_map({'0': 1}) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ namespace.__init__ }}",
    ],
)
def test_the_sandbox_gives_nothing_away(source: str) -> None:
    try:
        text = ChatTemplate(source).render(USER)
    except InvalidRequestError:
        return
    assert text == ""  # an undefined value: the sandbox hid the attribute


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**9 }}",
        "{{ 'a' * 1000000000 }}",
        "{{ [0] * 1000000000 }}",
        "{{ 'a' | center(1000000000) }}",
        "{{ 'a'.ljust(1000000000) }}",
        "{{ range(1000000000) | list }}",
        "{{ 2 ** 100000000 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '%*d' | format(1000000000, 1) }}",
        "{{ '{:1000000000}'.format_map({}) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_bomb_is_refused(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="cannot render"):
        ChatTemplate(source).render(USER)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
        "{% macro f() %}{% for b in range(99999) %}{% endfor %}{% endmacro %}"
        "{% for a in range(99999) %}{% set x = f() %}{% endfor %}",
    ],
    ids=["silent", "talking", "in a macro"],
)
def test_an_endless_loop_ends_at_the_time_limit(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_SECONDS", 0.2)
    with pytest.raises(InvalidRequestError, match="longer than"):
        ChatTemplate(source).render(USER)


def test_the_size_of_the_output_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_OUTPUT_CHARS", 1000)
    with pytest.raises(InvalidRequestError, match="longer than 1000 characters"):
        ChatTemplate("{% for i in range(2000) %}x{% endfor %}").render(USER)


def test_one_refusal_leaves_the_next_render_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(
        "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    )
    with pytest.raises(InvalidRequestError):
        template.render([{"role": "user", "content": "bad"}])
    assert template.render(USER) == "hi"
