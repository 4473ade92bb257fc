"""Calls of tools in the form of each family, through the official client: asked for, made, and answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ortlm
from ortlm.server import tools
from tests.runtime.tiny import TEMPLATES as PUBLISHED
from tests.server.conftest import Running, running
from tests.server.scripted import prompts, says, with_template

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

ASKED = [{"role": "user", "content": "How is the weather?"}]
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "maximum": 9, "minimum": 1},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
NONE = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "A forecast.", "parameters": PARAMETERS},
    },
    {"type": "function", "function": {"name": "clock", "parameters": NONE}},
]
PARIS = '{"city": "Paris", "days": 2}'


@dataclass(frozen=True)
class Family:
    """A chat template in the way of a family; its ``tokens``, ``special`` or not; and answers of its models."""

    template: str
    one: str
    two: str | None = None
    before: str = ""
    tokens: tuple[str, ...] = ()
    special: bool = False


CHATML = """
{%- if tools %}<|system|>
{% for tool in tools %}{{ tool | tojson }}{% endfor %} Write <tool_call>{"name": "arguments": }</tool_call>.<|end|>
{% endif %}{% for message in messages %}
{%- if message.role == 'tool' %}<|user|>
<tool_response>{{ message.content }}</tool_response><|end|>
{% else %}<|{{ message.role }}|>
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
# Tools for the model's eyes only: earlier calls and results are what messages say.
PLAIN = """
{%- if tools %}<|system|>
<tools>{{ tools | tojson }}</tools> Write <tool_call>...</tool_call>.<|end|>
{% endif %}{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
MISTRAL = """
{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}[INST]{{ message.content }}[/INST]
{%- elif message.tool_calls is defined and message.tool_calls %}[TOOL_CALLS][
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids must have 9 letters or digits') }}{% endif %}
{{- call.function | tojson }}{{ ', ' if not loop.last }}{% endfor %}]{{ eos_token }}
{%- elif message.role == 'tool' %}[TOOL_RESULTS]{{ message.content }}[/TOOL_RESULTS]
{%- else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"""
LATER = (
    MISTRAL.replace("[TOOL_CALLS][", "")
    .replace(
        "{{- call.function | tojson }}{{ ', ' if not loop.last }}",
        ("[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}"),
    )
    .replace("{% endfor %}]{{ eos", "{% endfor %}{{ eos")
)
GRANITE = """
{%- if tools %}<|system|>
You may answer with <|tool_call|> and a list of calls as JSON.<|end|>
<|available_tools|>{% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}<|end|>
{% endif %}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
LLAMA = """
{%- for message in messages %}
{%- if message.role == 'tool' %}<|ipython|>{{ message.content | tojson }}<|end|>
{%- elif 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}
{%- set call = message.tool_calls[0].function %}<|assistant|>
{{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}}<|end|>
{%- else %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endif %}
{%- if loop.first and tools is not none %}<|system|>Write
{{- ' {"name": a function, "parameters": its arguments}.' }}{{ tools | tojson }}<|end|>{% endif %}
{%- endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""

HERMES = f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>'
CLOCK = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
CALL, OTHER = f'{{"name": "weather", "arguments": {PARIS}}}', '{"name": "clock", "arguments": {}}'
FAMILIES = {
    "Qwen, Hermes": Family(
        CHATML, f"Let me see.\n{HERMES}", f"{HERMES}\n{CLOCK}", "Let me see.", ("<tool_call>", "</tool_call>")
    ),
    "SmolLM": Family(PLAIN, HERMES, f"{HERMES}\n{CLOCK}"),
    "Mistral": Family(
        MISTRAL, f"[TOOL_CALLS][{CALL}]", f"[TOOL_CALLS][{CALL}, {OTHER}]",
        tokens=("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[INST]"), special=True,
    ),
    "Mistral, later": Family(
        LATER, f"Well.[TOOL_CALLS]weather[ARGS]{PARIS}",
        f"[TOOL_CALLS]weather[ARGS]{PARIS}[TOOL_CALLS]clock[ARGS]{{}}", "Well.", ("[TOOL_CALLS]", "[ARGS]"),
        special=True,
    ),
    "Phi-4-mini": Family(
        PUBLISHED["phi-4-mini"], f"<|tool_call|>[{CALL}]<|/tool_call|>",
        f"<|tool_call|>[{CALL}, {OTHER}]<|/tool_call|>",
        tokens=("<|tool_call|>", "<|/tool_call|>", "<|tool|>", "<|/tool|>"),
    ),
    "Granite": Family(
        GRANITE, f"<|tool_call|>[{CALL}]", f"<|tool_call|>[{CALL}, {OTHER}]",
        tokens=("<|tool_call|>",), special=True,
    ),
    "Llama 3": Family(LLAMA, f'{{"name": "weather", "parameters": {PARIS}}}'),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def calling(family: Family, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("family") / "tiny"
    with_template(trained, folder, family.template, family.tokens, special=family.special)
    with running(ortlm.load(folder, threads=1)) as found:
        yield found


@pytest.fixture(scope="module")
def client(calling: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{calling.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def streamed(client: Any, **asked: Any) -> tuple[str, list[Any], str]:
    """Return content, calls and finish reason of a stream, put together by the client itself."""
    with client.chat.completions.stream(model="tiny", **asked) as stream:
        choice = stream.get_final_completion().choices[0]
    return choice.message.content or "", choice.message.tool_calls or [], choice.finish_reason


def functions(calls: list[Any]) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


def test_a_call_and_its_result(calling: Running, client: Any, family: Family) -> None:
    served = calling.models.all[0].served
    asked = {"messages": ASKED, "tools": TOOLS, "max_tokens": 80}
    with says(served.lm, family.one), prompts(served.lm, served.engine) as seen:
        made = client.chat.completions.create(model="tiny", **asked).choices[0]
        assert streamed(client, **asked)[:1] == (family.before,)
        assert functions(streamed(client, **asked)[1]) == [("weather", json.loads(PARIS))]
    assert made.finish_reason == "tool_calls"
    assert made.message.content == (family.before or None)
    assert functions(made.message.tool_calls) == [("weather", json.loads(PARIS))]
    for shown in ("A forecast.", "Rome", "clock"):
        assert shown in seen[0]
    # What it called and what came of it stands in the next prompt.
    result = {"role": "tool", "tool_call_id": made.message.tool_calls[0].id, "content": "It will be sunny."}
    again = [*ASKED, made.message.model_dump(exclude_none=True), result]
    with says(served.lm, "Take a hat."), prompts(served.lm, served.engine) as seen:
        last = client.chat.completions.create(model="tiny", messages=again, tools=TOOLS, max_tokens=40)
    assert (last.choices[0].message.content, last.choices[0].finish_reason) == ("Take a hat.", "stop")
    order = [seen[0].rindex(text) for text in ("How is the weather?", '"days": 2', "It will be sunny.")]
    assert order == sorted(order)


def test_calls_in_parallel(calling: Running, client: Any, family: Family) -> None:
    if family.two is None:
        pytest.skip("one call at once in this form")
    served = calling.models.all[0].served
    asked = {"messages": ASKED, "tools": TOOLS, "max_tokens": 120}
    both = [("weather", json.loads(PARIS)), ("clock", {})]
    with says(served.lm, family.two):
        made = client.chat.completions.create(model="tiny", **asked).choices[0]
        assert functions(made.message.tool_calls) == both
        assert len({call.id for call in made.message.tool_calls}) == 2
        assert functions(streamed(client, **asked)[1]) == both
        assert functions(streamed(client, **asked, parallel_tool_calls=False)[1]) == both[:1]


@pytest.mark.parametrize("choice", ["required", "weather", "clock"])
def test_a_call_that_is_asked_for(client: Any, choice: str) -> None:
    """The model, which knows no tools, can write nothing else."""
    named = choice if choice == "required" else {"type": "function", "function": {"name": choice}}
    asked = {"messages": ASKED, "tools": TOOLS, "tool_choice": named, "parallel_tool_calls": False}
    made = client.chat.completions.create(model="tiny", **asked, max_tokens=120, temperature=0).choices[0]
    assert (made.finish_reason, made.message.content) == ("tool_calls", None)
    ((name, arguments),) = functions(made.message.tool_calls)
    assert name == choice or choice == "required"
    if name == "weather":
        assert arguments["city"] in ("Paris", "Rome")
        assert 1 <= arguments["days"] <= 9
    else:
        assert arguments == {}
    content, calls, reason = streamed(client, **asked, max_tokens=120, temperature=0)
    assert (content, functions(calls), reason) == ("", [(name, arguments)], "tool_calls")


def test_parameters_that_refer_to_their_own_parts(client: Any) -> None:
    """As pydantic writes them."""
    place = {"type": "object", "properties": {"name": {"enum": ["Rome"]}}, "required": ["name"]}
    parameters = {
        "type": "object",
        "properties": {"place": {"$ref": "#/$defs/Place"}},
        "required": ["place"],
        "$defs": {"Place": place},
    }
    tool = {"type": "function", "function": {"name": "go", "parameters": parameters}}
    asked = {"messages": ASKED, "tools": [TOOLS[1], tool], "max_tokens": 50, "temperature": 0}
    named = {"type": "function", "function": {"name": "go"}}
    made = client.chat.completions.create(model="tiny", **asked, tool_choice=named).choices[0].message
    assert functions(made.tool_calls) == [("go", {"place": {"name": "Rome"}})]


def test_several_calls_that_are_asked_for(client: Any) -> None:
    asked = {"messages": ASKED, "tools": TOOLS, "max_tokens": 90, "temperature": 0}
    made = client.chat.completions.create(model="tiny", **asked, tool_choice="required").choices[0]
    if made.finish_reason == "tool_calls":
        assert {name for name, _ in functions(made.message.tool_calls)} <= {"weather", "clock"}
    else:
        assert made.finish_reason == "length"


def test_arguments_that_nobody_named() -> None:
    """Schemas that programs make of functions seldom say that there are no others."""
    inner = {"type": "object", "properties": {"b": {"type": "string"}}}
    given = {
        "type": "object",
        "properties": {"a": {"anyOf": [inner, {"type": "null"}]}, "c": {"type": "array", "items": inner}},
        "$defs": {"open": {"type": "object", "properties": {"d": {}}, "additionalProperties": True}},
    }
    inner_closed = {**inner, "additionalProperties": False}
    assert tools._closed(given) == {
        "type": "object",
        "properties": {
            "a": {"anyOf": [inner_closed, {"type": "null"}]},
            "c": {"type": "array", "items": inner_closed},
        },
        "$defs": given["$defs"],
        "additionalProperties": False,
    }
    composed = {"allOf": [inner], "properties": {"e": {}}}
    assert tools._parameters({"parameters": composed}) == composed
    assert tools._closed({"type": "object"}) == {"type": "object"}


def test_no_call(calling: Running, client: Any) -> None:
    served = calling.models.all[0].served
    with says(served.lm, "I cannot know."), prompts(served.lm, served.engine) as seen:
        for choice in ("auto", "none"):
            asked = {"messages": ASKED, "tools": TOOLS, "tool_choice": choice, "max_tokens": 40}
            made = client.chat.completions.create(model="tiny", **asked).choices[0]
            assert (made.message.content, made.message.tool_calls) == ("I cannot know.", None)
            assert streamed(client, **asked)[0] == "I cannot know."
    # With "none" the model is not told of them.
    assert ["forecast" in prompt for prompt in seen] == [True, True, False, False]


@pytest.fixture(scope="module")
def thinking(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Serve the small model as one whose prompts leave it to the model to think first, marks being tokens."""
    template = CHATML.replace("message.content }}", "message.content.split('</think>')[-1] }}")
    folder = tmp_path_factory.mktemp("thinking") / "tiny"
    with_template(
        trained, folder, template, ("<think>", "</think>", "<tool_call>", "</tool_call>"), special=False
    )
    with running(ortlm.load(folder, threads=1)) as found:
        yield found


def test_reasoning_is_parted_from_the_answer(thinking: Running) -> None:
    """In all APIs, streamed or not, and with a call after it."""
    lm = thinking.models.all[0].served.lm
    asked = {"model": "tiny", "messages": ASKED, "max_tokens": 90}
    with openai.OpenAI(base_url=f"{thinking.url}/v1", api_key="none", max_retries=0) as client:
        with says(lm, "<think>\nRome or Paris?\n</think>\n\nParis."):
            made = client.chat.completions.create(**asked)
            message = made.choices[0].message
            assert (message.content, message.reasoning_content.strip()) == ("Paris.", "Rome or Paris?")
            assert 0 < made.usage.completion_tokens_details.reasoning_tokens < made.usage.completion_tokens
            deltas = [
                chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)
            ]
            assert "".join(delta.content or "" for delta in deltas) == "Paris."
            thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
            assert thought == message.reasoning_content
            response = client.responses.create(model="tiny", input="Where?", max_output_tokens=90)
            assert [item.type for item in response.output] == ["reasoning", "message"]
            assert response.output[0].content[0].text == thought
            assert response.output_text == "Paris."
        with says(lm, f"<think>A tool.</think>{HERMES}"):
            message = client.chat.completions.create(**asked, tools=TOOLS).choices[0].message
            assert (message.content, message.reasoning_content) == (None, "A tool.")
            assert functions(message.tool_calls) == [("weather", json.loads(PARIS))]
    anthropic = pytest.importorskip("anthropic")
    with (
        anthropic.Anthropic(base_url=thinking.url, api_key="none", max_retries=0) as client,
        says(lm, "<think>Rome or Paris?</think>Paris."),
    ):
        blocks = client.messages.create(**asked).content
        assert [(block.type, getattr(block, block.type)) for block in blocks] == [
            ("thinking", "Rome or Paris?"),
            ("text", "Paris."),
        ]
        with client.messages.stream(**asked) as stream:
            streamed_blocks = stream.get_final_message().content
        assert [block.type for block in streamed_blocks] == ["thinking", "text"]
        assert streamed_blocks[0].thinking == "Rome or Paris?"
