"""What may be asked of an answer, and what is refused."""

import json
from collections import OrderedDict
from types import MappingProxyType

import pytest

from ortlm.errors import BadOption
from ortlm.runtime.structured_output.guidance import Guidance

LENIENT = {"type": "string", "x-guidance": {"lenient": True}, "not": {"minLength": 3}}


def test_guidance_is_a_value():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert Guidance.regex("a+") == Guidance.regex("a+")
    assert Guidance.json_schema(schema) == Guidance.json_schema(json.dumps(schema))
    assert len({Guidance.json_schema(schema), Guidance.json_schema(schema), Guidance.json_object()}) == 2


def test_a_schema_may_be_any_mapping():
    schema = MappingProxyType({"type": "object", "properties": OrderedDict(b=MappingProxyType({}), a={})})
    assert json.loads(Guidance.json_schema(schema).text)["properties"] == {"b": {}, "a": {}}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ('{"type":', "no JSON"),
        ("[1]", "found list"),
        (3, "text or a mapping, found int"),
        ({"type": "objct"}, "Invalid type: objct"),
        ({"type": "string", "format": "nonsense"}, "Unknown format: nonsense"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"$ref": "http://example.org/schema"}, "example.org"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"enum": []}, "Unsatisfiable"),
        ({"default": float("nan")}, "JSON"),
        ({"default": {1, 2}}, "set is not JSON"),
        ('{"items":' * 100_000, "no JSON"),
        (False, "found bool"),
        ('"\ud800"', "half a character"),
    ],
)
def test_broken_schemas(schema, message):
    with pytest.raises(BadOption, match=message):
        Guidance.json_schema(schema)


def nested(depth):
    found = {"type": "string"}
    for _ in range(depth):
        found = {"type": "array", "items": found}
    return found


@pytest.mark.parametrize(
    "schema",
    [nested(5000), "[" * 100_000, '{"anyOf":[' * 5000 + "{}" + "]}" * 5000],
    ids=["dict", "open", "text"],
)
def test_deep_schemas(schema):
    with pytest.raises(BadOption, match="the JSON schema cannot be used") as found:
        Guidance.json_schema(schema)
    assert str(found.value).isprintable()


@pytest.mark.parametrize("pattern", ["(", "[z-a]", "a{2", r"(a)\1", "(?=a)", "a\\", "(" * 10_000])
def test_broken_regular_expressions(pattern):
    with pytest.raises(BadOption, match="the regular expression cannot be used") as found:
        Guidance.regex(pattern)
    assert len(str(found.value)) < 1200
    assert str(found.value).isprintable()


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("", "Empty grammar"),
        ('begin: "a"', "no start rule"),
        ("start: missing", "unknown name"),
        ('start: "a', "lexer error"),
        ('start: %json {"not": {}}', "Unimplemented"),
        ('{"grammars": []}', "begins with {"),
        ('start: text "x"\ntext[lazy, stop="x"]: /.*/', "stop="),
        ('start[capture="]", temperature=0.5]: "a"', "temperature="),
        (b"start", "must be text, found bytes"),
    ],
)
def test_broken_grammars(grammar, message):
    with pytest.raises(BadOption, match=message):
        Guidance.lark(grammar)


def test_grammars_may_speak_of_what_attributes_are_called():
    Guidance.lark('start: text "[stop=1]"\ntext[suffix="stop="]: /[a-z]*/ // temperature=1')


@pytest.mark.parametrize("options", ["abc", [], ["a", ""], ["a", 1], None])
def test_broken_choices(options):
    with pytest.raises(BadOption):
        Guidance.choices(options)


def test_what_a_schema_allows_to_ignore_is_told():
    assert Guidance.json_schema(LENIENT).ignored == ('Unimplemented keys: ["not"]',)
    assert Guidance.json_object().ignored == ()


@pytest.mark.parametrize("kind", ["schema", "grammar"])
def test_long_chains_of_rules_do_not_end_the_process(kind):
    count = 5000
    if kind == "grammar":
        rules = [f"r{i}: r{i + 1}" for i in range(count)]
        Guidance.lark("\n".join(["start: r0", *rules, f'r{count}: "x"']))
    else:
        links = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(count)}
        Guidance.json_schema({"$defs": {**links, f"d{count}": {}}, "$ref": "#/$defs/d0"})


def test_grammars_have_a_limit():
    with pytest.raises(BadOption, match="at most 500000"):
        Guidance.choices(["a" * 500_000])
