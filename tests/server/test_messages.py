"""The official anthropic client against a live server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ortlm
from tests.server.conftest import Running, running

anthropic = pytest.importorskip("anthropic")
pytest.importorskip("fastapi")
HELLO = [{"role": "user", "content": "What does os.path.join do?"}]
# Newer clients have no argument for it.
GREEDY = {"temperature": 0}
HERMES = (
    "{% if tools %}<|system|>\n<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools> "
    "Answer with <tool_call>...</tool_call>.<|end|>\n{% endif %}{% for message in messages %}"
    "<|{{ message.role }}|>\n{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>"
    "{{ call.function.arguments | tojson }}</tool_call>{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(live: Running) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def calling(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Serve the small model with a chat template that takes tools."""
    folder = tmp_path_factory.mktemp("tools") / "tiny"
    shutil.copytree(trained, folder)
    (folder / "chat_template.jinja").write_text(HERMES, encoding="utf-8")
    with running(ortlm.load(folder, threads=1)) as found:
        yield found


def test_a_message(client: Any, lm: ortlm.LanguageModel) -> None:
    asked = [{"role": "system", "content": "Be brief."}, *HELLO]
    wanted = lm.generate(asked, max_new_tokens=9, reuse_cache=False)
    made = client.messages.create(
        model="tiny", system="Be brief.", messages=HELLO, max_tokens=9, extra_body=GREEDY
    )
    assert [block.text for block in made.content] == [wanted.text]
    assert (made.stop_reason, made.usage.output_tokens) == ("max_tokens", 9)
    with client.messages.stream(
        model="tiny", system="Be brief.", messages=HELLO, max_tokens=9, extra_body=GREEDY
    ) as stream:
        assert "".join(stream.text_stream) == wanted.text
        assert stream.get_final_message().stop_reason == "max_tokens"


def test_stop_sequences(client: Any, lm: ortlm.LanguageModel) -> None:
    text = lm.generate(HELLO, max_new_tokens=9, reuse_cache=False).text
    made = client.messages.create(
        model="tiny", messages=HELLO, max_tokens=9, extra_body=GREEDY, stop_sequences=[text[5:8]]
    )
    assert (made.stop_reason, made.stop_sequence) == ("stop_sequence", text[5:8])


def test_errors(client: Any) -> None:
    with pytest.raises(anthropic.NotFoundError, match="there is no model"):
        client.messages.create(model="other", messages=HELLO, max_tokens=1)
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(model="tiny", messages=HELLO, max_tokens=1, extra_body={"temperature": -1})
    tools = [{"name": "weather", "input_schema": WEATHER}]
    with pytest.raises(anthropic.BadRequestError, match="takes no tools"):
        client.messages.create(model="tiny", messages=HELLO, max_tokens=1, tools=tools)


def test_calls_of_tools(calling: Running) -> None:
    """A call that is asked for fits its schema, in both APIs, streamed or not; its result goes back."""
    openai = pytest.importorskip("openai")
    tools = [{"name": "weather", "description": "The weather.", "input_schema": WEATHER}]
    with anthropic.Anthropic(base_url=calling.url, api_key="none", max_retries=0) as client:
        asked = {"model": "tiny", "messages": HELLO, "max_tokens": 80, "tools": tools, "extra_body": GREEDY}
        made = client.messages.create(**asked, tool_choice={"type": "tool", "name": "weather"})
        (block,) = made.content
        assert (block.type, block.name, made.stop_reason) == ("tool_use", "weather", "tool_use")
        assert block.input["city"] in ("Paris", "Rome")
        assert 1 <= block.input["days"] <= 9
        with client.messages.stream(
            **asked, tool_choice={"type": "any", "disable_parallel_tool_use": True}
        ) as stream:
            (streamed,) = [one for one in stream.get_final_message().content if one.type == "tool_use"][:1]
        assert streamed.input == block.input
        back = [
            *HELLO,
            {"role": "assistant", "content": [block.model_dump(include={"type", "id", "name", "input"})]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "Sun"}]},
        ]
        again = client.messages.create(
            model="tiny", messages=back, max_tokens=4, tools=tools, extra_body=GREEDY
        )
        assert again.content[0].type == "text"
    functions = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}}]
    with openai.OpenAI(base_url=f"{calling.url}/v1", api_key="none", max_retries=0) as client:
        asked = {
            "model": "tiny", "messages": HELLO, "max_tokens": 80, "tools": functions, "temperature": 0,
            "tool_choice": {"type": "function", "function": {"name": "weather"}},
        }  # fmt: skip
        choice = client.chat.completions.create(**asked).choices[0]
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        assert json.loads(call.function.arguments) == block.input
        assert choice.message.content is None
        chunks = list(client.chat.completions.create(**asked, stream=True))
        arguments = "".join(
            part.function.arguments
            for chunk in chunks
            for delta in [chunk.choices[0].delta]
            for part in delta.tool_calls or ()
        )
        assert json.loads(arguments) == block.input
        assert not any(chunk.choices[0].delta.content for chunk in chunks)
        with pytest.raises(openai.BadRequestError, match="strict tools need a call"):
            client.chat.completions.create(**{**asked, "tool_choice": "auto"})
