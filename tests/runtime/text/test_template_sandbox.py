# ruff: noqa: E501 - a template is easier to read in one line
"""Whatever a chat template does, compiling and rendering it ends soon, in little memory, with an error of ortlm."""

from __future__ import annotations

import datetime
import sys
import time

import pytest

from ortlm.errors import BadArtifact, BadOption
from ortlm.runtime.text.chat_template import ChatTemplate

HI = [{"role": "user", "content": "hi"}]


def render(source: str, seconds: float = 5.0, messages=HI, **options) -> str:
    return ChatTemplate({"default": source}, {}, seconds=seconds).render(messages, **options)


LARGE = [
    "{% set ns=namespace(s='a') %}{% for i in range(100) %}{% set ns.s=ns.s+ns.s %}{% endfor %}",
    "{% set ns=namespace(s='a') %}{% for i in range(100) %}{% set ns.s=ns.s~ns.s %}{% endfor %}",
    "{% set ns=namespace(s=[1]) %}{% for i in range(100) %}{% set ns.s=[ns.s,ns.s] %}{% endfor %}{{ ns.s }}",
    "{% set ns=namespace(s=1) %}{% for i in range(99) %}{% set ns.s={'a':ns.s,'b':ns.s} %}{% endfor %}{{ ns.s|tojson }}",
    "{% set ns=namespace(s=1) %}{% for i in range(99) %}{% set ns.s=(ns.s,ns.s) %}{% endfor %}{{ {ns.s:1} }}",
    "{% set ns=namespace(s=()) %}{% for i in range(99999) %}{% set ns.s=(ns.s,) %}{% endfor %}{{ {ns.s:1} }}",
    "{% set ns=namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l=ns.l+[('a'*99999)[1:]] %}{% endfor %}",
    "{% for i in range(100000) %}" + "x" * 9999 + "{% endfor %}",
    "{% set t %}{% for i in range(100000) %}" + "x" * 9999 + "{% endfor %}{% endset %}",
    "{% macro m(n) %}{% if n %}{{ m(n-1,varargs,varargs) }}{% else %}{{ varargs }}{% endif %}{% endmacro %}{{ m(40,1) }}",
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * [1] }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%.1000000000f' % 1.5 }}",
    "{{ '%s'*100000 % (('a'*99999,)*100000) }}",
    "{{ ('%(a)s'*100000) % {'a': 'b'*99999} }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ '{0:{1}}'.format(1, 10**9) }}",
    "{{ ('{0}'*100000).format('a'*999999) }}",
    "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "{{ 'a'.center(10**9) }}{{ 'a'.ljust(10**9) }}",
    "{{ 'a'.rjust(10**9) }}",
    "{{ 'a'.zfill(10**9) }}",
    "{{ '\\t'.expandtabs(10**9) }}",
    "{{ ('a'*10**6).replace('a', 'b'*10**6) }}",
    "{{ ('a'*10**6)|replace('a', 'b'*10**6) }}",
    "{{ ('a'*10**6).join(range(100000)|map('string')) }}",
    "{{ range(100000)|join('a'*10**6) }}",
    "{{ ('a'*99999).translate({97: 'b'*99999}) }}",
    "{{ ('1 '*10**7).split() }}",
    "{{ (1).to_bytes(10**10, 'big') }}",
    "{{ 'a'|center(10**9) }}",
    "{{ ['a']|map('center', 10**9)|list }}",
    "{{ ('a\\n'*10**6)|indent(10**6) }}",
    "{% filter indent(10**9) %}a\nb{% endfilter %}",
    "{{ ('a '*99999)|wordwrap(1, wrapstring='b'*99999) }}",
    "{{ ('x'*10**6)|wordwrap(1) }}",
    "{{ [1]|tojson(indent=10**9) }}",
    "{{ [1]|slice(10**9)|list }}",
    "{{ [1]|batch(10**9, 0)|list }}",
    "{{ dict.fromkeys(range(99999), 'b'*99999)|string }}",
    "{{ lipsum(100000) }}",
    "{{ strftime_now('%Y' * 1000) }}",
    "{{ 1|round(10**9, 'ceil') }}",
    "{{ (10**10) ** (10**10) }}",
    "{{ 3 ** (10**9) }}",
]
# One limit of time for all, which the slow ones reach.
SLOW = [
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{{ a*b*c }}{% endfor %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for x in [0]*25 recursive %}{% if loop.depth<20 %}{{ loop([0]*25) }}{% endif %}{% endfor %}",
    "{% set ns=namespace(d={}) %}{% for i in range(99999) %}{% set ns.d=dict(ns.d, **{'a'~i:i}) %}{% endfor %}",
    "{% for i in range(99999) %}{% if 'z' in ['y'*99]*99999 %}{% endif %}{% endfor %}",
    "{% for i in range(99999) %}{{ ('<!--a-->'*9999)|striptags }}{% endfor %}",
    "{% for i in range(99999) %}{{ ('(a '*9999)|urlize }}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999)|list|sort|first }}{% endfor %}",
]


@pytest.mark.parametrize("source", LARGE, ids=lambda s: s[:40])
def test_nothing_grows_without_bound(source):
    began = time.monotonic()
    with pytest.raises(BadArtifact, match="the model's chat template was stopped: it "):
        render(source)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("source", SLOW, ids=lambda s: s[:40])
def test_rendering_has_a_deadline(source):
    began = time.monotonic()
    with pytest.raises(BadArtifact, match=r"was stopped: it (takes|makes)"):
        render(source, seconds=0.3)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "source",
    [
        "{% break %}",
        "".join(f"{{% for a{i} in x %}}" for i in range(25)) + "{% endfor %}" * 25,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "+".join("a" * 9999) + " }}",
        "{% if a %}" * 3000 + "{% endif %}" * 3000,
        "{{" + "1" * 9999 + "}}",
        "{{ a }}" * 100_000,
        "{{ x|no_such_filter }}",
        "{% for %}",
        "{% extends 'x' %}",
    ],
    ids=lambda s: s[:20],
)
def test_what_cannot_be_compiled_is_a_damaged_template(source):
    with pytest.raises((BadArtifact, BadOption), match="chat template"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ (10**5000)|string }}",
        "{{ 1/0 }}",
        "{{ 1.5**100000 }}",
        "{{ range(10**30) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ raise_exception('x' * 10**6) }}",
        "{{ raise_exception([1]) }}",
        "{{ messages + 1 }}",
        "{{ x.y.z }}",
        "{{ namespace(__class__=1) }}",
        "{{ messages.append(1) }}",
        "{% set x %}{{ ''.__class__.__mro__.x }}{% endset %}",
        "{{ {1: 2}|tojson(indent='a', separators=(1, 2)) }}",
    ],
)
def test_what_fails_is_told_in_a_short_line(source):
    with pytest.raises(BadOption, match="refused the messages") as told:
        render(source)
    assert len(str(told.value)) < 1000


def test_calls_are_not_deep_whatever_python_allows():
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1_000_000)
    try:
        with pytest.raises(BadArtifact, match="its calls go deeper than 200"):
            render("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")
        with pytest.raises(BadArtifact, match="its calls go deeper than 200"):
            render("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}")
    finally:
        sys.setrecursionlimit(before)


def test_nothing_is_computed_while_compiling():
    # Inside a branch that is never taken.
    began = time.monotonic()
    assert render("{% if false %}{{ 2 ** 10 ** 9 }}{{ 'a' * 10 ** 10 }}{% endif %}ok") == "ok"
    assert time.monotonic() - began < 5


def test_long_conversations_have_room():
    # A million characters in 200 turns, over a template that looks back at all of them.
    talk = [{"role": "user", "content": "word " * 1000}] * 200
    source = (
        "{% for m in messages %}{% set ns = namespace(n=0) %}{% for k in messages %}{% set ns.n = ns.n + 1 %}"
        "{% endfor %}{{ m.content | trim | replace('word', 'words') | indent(4) }}{{ ns.n }}{% endfor %}"
    )
    assert len(render(source, seconds=60, messages=talk)) == 200 * (1000 * 6 - 1 + 3)
    text = "Hä" * 4_000_000
    assert (
        render(
            "{{ messages[0].content ~ messages[0].content }}", messages=[{"role": "user", "content": text}]
        )
        == text * 2
    )


def test_templates_see_plain_values_only():
    class Own:
        secret = "x"

        def write(self):
            raise AssertionError

    seen = render(
        "{{ messages[0].thing }}{{ messages[0].thing.secret }}{{ v }}",
        messages=[{"role": "user", "content": "", "thing": Own()}],
        variables={"v": Own()},
    )
    assert seen == "<Own><Own>"


def test_deep_messages_and_tools_are_refused():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(BadArtifact, match="nested deeper"):
        render("{{ messages }}", messages=[{"role": "user", "content": "", "x": deep}])
    with pytest.raises(BadArtifact, match="nested deeper"):
        render("{{ tools }}", tools=[{"x": deep}])


def test_dates_are_local():
    assert render("{{ strftime_now('%d %b %Y|%z') }}").endswith(f"{datetime.datetime.now():%Y}|")
