"""OpenAI's newer API, with the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import ortlm
from tests.server.conftest import Running
from tests.server.test_messages import HELLO, WEATHER, calling

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

__all__ = ["calling"]


@pytest.fixture(scope="module")
def client(live: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_a_response(client: Any, lm: ortlm.LanguageModel) -> None:
    asked = [{"role": "system", "content": "Be brief."}, *HELLO]
    wanted = lm.generate(asked, max_new_tokens=9, reuse_cache=False)
    how = {"model": "tiny", "instructions": "Be brief.", "max_output_tokens": 9, "temperature": 0}
    made = client.responses.create(input=HELLO[0]["content"], **how)
    assert (made.output_text, made.status) == (wanted.text, "incomplete")
    assert made.incomplete_details.reason == "max_output_tokens"
    assert made.usage.output_tokens == 9
    parts = [{"role": "user", "content": [{"type": "input_text", "text": HELLO[0]["content"]}]}]
    assert client.responses.create(input=parts, **how).output_text == wanted.text
    with client.responses.stream(input=HELLO[0]["content"], **how) as stream:
        kinds = [event.type for event in stream]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.incomplete"
    streamed = client.responses.create(input=HELLO[0]["content"], stream=True, **how)
    text = "".join(event.delta for event in streamed if event.type == "response.output_text.delta")
    assert text == wanted.text


def test_structured_output(client: Any) -> None:
    form = {"type": "json_schema", "name": "weather", "schema": WEATHER, "strict": True}
    made = client.responses.create(
        model="tiny", input="hi", max_output_tokens=60, temperature=0, text={"format": form}
    )
    assert json.loads(made.output_text)["city"] in ("Paris", "Rome")
    assert made.status == "completed"


def test_calls_of_tools(calling: Running) -> None:
    tools = [{"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}]
    with openai.OpenAI(base_url=f"{calling.url}/v1", api_key="none", max_retries=0) as client:
        asked = {"model": "tiny", "input": "hi", "tools": tools, "max_output_tokens": 80, "temperature": 0}
        made = client.responses.create(**asked, tool_choice={"type": "function", "name": "weather"})
        (call,) = made.output
        assert (call.type, call.name) == ("function_call", "weather")
        arguments = json.loads(call.arguments)
        assert arguments["city"] in ("Paris", "Rome")
        events = client.responses.create(
            **asked, tool_choice={"type": "function", "name": "weather"}, stream=True
        )
        done = [event for event in events if event.type == "response.function_call_arguments.done"]
        assert [json.loads(event.arguments) for event in done] == [arguments]
        back = [
            {"role": "user", "content": "hi"},
            call.model_dump(include={"type", "call_id", "name", "arguments"}),
            {"type": "function_call_output", "call_id": call.call_id, "output": "Sun"},
        ]
        again = client.responses.create(model="tiny", input=back, max_output_tokens=4, temperature=0)
        assert again.output[0].type == "message"


@pytest.mark.parametrize(
    ("name", "value"), [("previous_response_id", "resp_1"), ("background", True), ("truncation", "auto")]
)
def test_what_needs_a_store_is_refused(client: Any, name: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="tiny", input="hi", extra_body={name: value})
    assert caught.value.param == name
