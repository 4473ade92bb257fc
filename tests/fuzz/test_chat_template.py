# ruff: noqa: E501 - a template is easier to read in one line
"""Chat templates put together at random, over messages of any shape, end in a prompt or an error of ortlm."""

from __future__ import annotations

from hypothesis import strategies as st

from ortlm.artifact import named_templates
from ortlm.errors import BadArtifact
from ortlm.runtime.text.chat_template import ChatTemplate
from tests.fuzz.harness import HOSTILE, fuzz

_VALUES = st.sampled_from(
    ["messages", "m", "m.content", "ns.x", "ns", "'a'", "'%s'", "'{}'", "1", "10**9", "2.5", "[1, m]", "{'a': m}",
     "(ns.x, ns.x)", "none", "true", "range(99999)", "loop", "x", "cycler('a', m)", "namespace(a=ns)", "caller",
     "varargs", "strftime_now('%Y')", "lipsum(2)", "dict(a=ns.x)", "''.join", "m.items()", "'é' * 999"]
)  # fmt: skip
_FILTERS = st.sampled_from(
    ["list", "string", "tojson", "tojson(indent=9)", "join(',')", "join(m)", "indent(99)", "center(999)", "trim",
     "replace('a', 'b' * 999)", "batch(3, 0)", "slice(9)", "map('string')", "map(attribute='content')", "sort",
     "unique", "groupby('role')", "dictsort", "items", "first", "last", "length", "sum(start=[])", "round(9)",
     "pprint", "wordwrap(2)", "urlize", "striptags", "xmlattr", "urlencode", "title", "upper", "reverse", "max",
     "int", "float", "format(1, 2)", "default('x', true)", "random", "e", "attr('x')", "selectattr('role')",
     "truncate(3)", "filesizeformat"]
)  # fmt: skip
_METHODS = st.sampled_from(
    [".center(999)", ".replace('a', 'b')", ".join(range(999)|map('string'))", ".split('a')", ".encode()", "[::-1]",
     "[1:]", "[0]", "['a']", ".format(1, 2)", ".format_map({'a': 1})", ".items()", ".get('a')", ".x.y", "(1)",
     ".__class__", ".append(1)", ".copy()", ".translate({97: 'bb'})", ".expandtabs(99)", ".hex()", ".index(1)"]
)  # fmt: skip
_OPERATORS = st.sampled_from(
    ["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "not in", "and", "or", "is in"]
)
_EXPRESSIONS = st.recursive(
    _VALUES,
    lambda inner: st.one_of(
        st.tuples(inner, _FILTERS).map(lambda p: f"({p[0]})|{p[1]}"),
        st.tuples(inner, _METHODS).map(lambda p: f"({p[0]}){p[1]}"),
        st.tuples(inner, _OPERATORS, inner).map(lambda p: f"({p[0]}) {p[1]} ({p[2]})"),
    ),
    max_leaves=6,
)
_BLOCKS = st.sampled_from(
    ["{{%% for m in %s %%}}{}{{%% endfor %%}}", "{{%% set ns.x = %s %%}}{}", "{{{{ %s }}}}{}",
     "{{%% if %s %%}}{}{{%% endif %%}}", "{{%% macro k(a, b=1) %%}}{{{{ %s }}}}{}{{%% endmacro %%}}{{{{ k(m) }}}}",
     "{{%% set t %%}}{{{{ %s }}}}{}{{%% endset %%}}", "{{%% generation %%}}{{{{ %s }}}}{}{{%% endgeneration %%}}",
     "{{%% filter %s %%}}{}{{%% endfilter %%}}", "{{%% break %%}}%.0s{}", "{{%% for m in %s recursive %%}}{}{{%% endfor %%}}",
     "{{%% autoescape %s %%}}{}{{%% endautoescape %%}}"]
)  # fmt: skip


def _nested(pieces: list[tuple[str, str]]) -> str:
    text = "x"
    for block, expression in pieces:
        text = (block % expression.replace("{", "{{").replace("}", "}}")).format(text)
    return "{% set ns = namespace(x='a') %}{% for m in messages %}" + text + "{% endfor %}"


_TEMPLATES = st.one_of(
    st.lists(st.tuples(_BLOCKS, _EXPRESSIONS), min_size=1, max_size=6).map(_nested),
    st.text(alphabet="{}%-# \nabm.()[]|'\"+*~0", max_size=60),
)
_CONTENTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(HOSTILE),
    st.lists(
        st.one_of(
            st.text(max_size=3),
            st.fixed_dictionaries(
                {"type": st.sampled_from(["text", "thinking", "image", 1]), "text": st.sampled_from(HOSTILE)}
            ),
        ),
        max_size=3,
    ),
)
_MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "reasoning", "tool_calls", "x"]), _CONTENTS).map(
        lambda m: {"role": "user", "content": ""} | m
    ),
    max_size=3,
)


@fuzz(st.tuples(_TEMPLATES, _MESSAGES))
def test_chat_template(example):
    template, messages = example
    found = ChatTemplate({"default": template}, {"bos_token": "<s>"}, seconds=1)
    assert isinstance(found.render(messages), str)


_ANY = st.recursive(
    st.sampled_from(HOSTILE),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "template", "x"]), inner)
    ),
    max_leaves=8,
)


@fuzz(_ANY)
def test_named_templates(value):
    found = named_templates(value, "here", BadArtifact)
    assert all(isinstance(k, str) and isinstance(v, str) for k, v in found.items())
