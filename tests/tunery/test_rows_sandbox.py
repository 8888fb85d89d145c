"""Templates are untrusted programs: what they must not do is refused, and quickly.

Each runs in the process that renders; what a budget refuses between two operations is tested in the dialect itself.
"""

from datetime import UTC, datetime
from typing import Any

import pytest
from jinja2.exceptions import SecurityError, TemplateError
from templates import tokenizer

from tunery.rows import dialect, sandbox
from tunery.rows.errors import CannotRender
from tunery.rows.messages import Message
from tunery.rows.template import ChatTemplate

NOW = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)


def render(source: str, **variables: Any) -> str:
    environment = sandbox.Environment()
    return environment.render(environment.from_string(source), variables, NOW)


def render_here(source: str) -> str:
    environment = dialect.Environment()
    return environment.render(environment.from_string(source), {}, NOW)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ strftime_now.__globals__.keys() }}",
        "{% set ns = namespace(_x=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    ],
)
def test_a_template_cannot_reach_python(source: str) -> None:
    with pytest.raises(SecurityError):
        render(source, messages=[])


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{{ 'x' * 10 ** 12 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ 'x'.ljust(10 ** 12) }}",
        "{{ 'x'.ljust(width=10 ** 12) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (10 ** 10, 1) }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, '9999999999') }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ 'x' | center(10 ** 10) }}",
        "{{ 'x\n' | indent(10 ** 10) }}",
        "{{ [1] | batch(10 ** 10, 0) | list }}",
        "{{ [1] | slice(10 ** 10) | list }}",
        "{{ [1] | tojson(indent=10 ** 10) }}",
        "{{ ('x' * 9999999).replace('x', 'y' * 9999999) }}",
        "{{ ('x' * 9999999) | replace('x', 'y' * 9999999) }}",
        "{{ ('x' * 9999999).join(range(90000)) }}",
        "{{ range(90000) | join('x' * 9999999) }}",
        "{% set x = 'x' * 9999 %}{% for i in range(90000) %}{{ x }}{% endfor %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_a_template_cannot_eat_the_host(source: str) -> None:
    # Any of these errors will do: none is raised because memory or time ran out.
    with pytest.raises((SecurityError, RecursionError, OverflowError)):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% set x = 3 %}" + "{% set x = x * x %}" * 60,
        "{% set x = 'x' * 9999999 %}{{ x + x }}",
        "{% set x = 'x' * 9999999 %}{{ 'a' + x + ([1] | first | string) + x }}",
        "{% set x = [1] * 9999999 %}{{ x + [2] + x }}",
        "{% set x = ('f' * 9999) | int(base=16) %}{{ x * x }}",
        "{{ ('a\n' * 10 ** 6) | indent(10 ** 4) }}",
        "{{ ('a\r' * 10 ** 6) | indent('b' * 10 ** 4) }}",
        "{{ [[1], [2]] | tojson(indent=10 ** 6) }}",
    ],
)
def test_numbers_and_indents_are_metered(source: str) -> None:
    # A budget refuses them, not the limits of the process.
    with pytest.raises(sandbox.LimitExceeded, match=r"larger than|bits|indents JSON"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ lipsum(n=10000) }}",
        "{% set c = cycler(1, 2) %}",
        "{% set j = joiner() %}",
        "{{ messages | pprint }}",
        "{{ 'http://a' | urlize }}",
        "{{ messages | xmlattr }}",
        "{{ '' | attr('__class__') }}",
        "{{ [1, 2] | random }}",
        "{{ [[1], [2]] | sum(start=[]) }}",
        "{{ [[[1]], [[2]]] | sum(attribute=0, start=[]) }}",
        "{{ 'lower' is filter }}",
    ],
)
def test_what_no_chat_template_needs_is_not_there(source: str) -> None:
    with pytest.raises((TemplateError, TypeError)):
        render(source, messages=[])


def test_time_is_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialect, "MAX_SECONDS", 0.0)

    with pytest.raises(SecurityError, match="runs too long"):
        render_here("{% for i in range(3) %}{% endfor %}")


def test_a_budget_is_for_one_render_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialect, "MAX_ROUNDS", 5)

    assert [render_here("{% for i in range(5) %}x{% endfor %}") for _ in range(3)] == ["xxxxx"] * 3


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("{{ {'a': '<é>', 'b': [1, none]} | tojson }}", '{"a": "<é>", "b": [1, null]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, indent=1) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{{ strftime_now('%d %b %Y') }}", "01 Mar 2026"),
        ("{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}"
         "{% endfor %}", "013"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        ("{{ 'a' ~ 1 ~ none }}", "a1None"),
        ("{{ 'a' + 'b' + ('c' + 'd') + 'e' }}{{ 1 + 2 + 3.5 }}{{ [1] + [2] + [3] }}", "abcde6.5[1, 2, 3]"),
        ("{{ 9 + 1 + 2 * 3 - 4 + 5 }}{{ ('<' | escape) + '<' + 'b' }}{{ '<' + ('b' | safe) + '>' }}",
         "17&lt;&lt;b&lt;b&gt;"),
        ("{{ {'items': 3}['items'] }}{{ {'_x': 4}._x }}{{ {'a': 1}.get('b', 5) }}{{ {}.nothing is defined }}",
         "345False"),
        ("{% for i in 'abc' %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.previtem }}{% endfor %}",
         "1TrueFalse2FalseFalsea3FalseTrueb"),
        ("{{ dict(a=1).a }}", "1"),
        ("{{ 'abca' | replace('a', '<>') }}{{ 'aa'.replace('a', 'b', 1) }}", "<>bc<>ba"),
        ("{{ [1, '<'] | join(', ') }}{{ '-'.join(['a', 'b']) }}", "1, <a-b"),
        ("{{ '%s is %05.2f' % ('x', 1) }}{{ '%s!' | format(2) }}", "x is 01.002!"),
        ("{{ '{{\"n\": {}}}'.format(12345) }}{{ '100000 %%' % () }}", '{"n": 12345}100000 %'),
        ("{{ '{} {a:>4}'.format(1, a=2) }}{{ 'x' | center(3) }}", "1    2 x "),
        ("{{ 'a\nb' | indent(2) }}{{ [1, 2, 3] | batch(2, 0) | list }}", "a\n  b[[1, 2], [3, 0]]"),
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
    ],
)  # fmt: skip
def test_the_dialect_is_that_of_chat_templates(source: str, wanted: str) -> None:
    assert render(source) == wanted


@pytest.mark.parametrize("source", ["{{ 'a' + 'b' + 1 }}", "{{ 'a' + none + 'b' }}", "{{ [] + ['a'] + 'b' }}"])
def test_a_sum_of_unlike_terms_is_an_error(source: str) -> None:
    with pytest.raises(TypeError):
        render(source)


def test_a_templates_own_exception_is_an_error_of_its_own() -> None:
    with pytest.raises(TemplateError, match="no system role"):
        render("{{ raise_exception('no system role') }}")


@pytest.mark.parametrize(
    "source", ["{{ 1 / 0 }}", "{{ messages[0].content.nothing.at_all }}", "{{ messages[9].role }}"]
)
def test_whatever_a_template_stumbles_into_is_one_error(source: str) -> None:
    template = ChatTemplate(tokenizer(), {"default": source}, {})

    with pytest.raises(CannotRender, match="rejects the messages"):
        template.render([Message(role="user", content="q")])
