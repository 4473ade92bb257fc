"""The official openai client against a live server."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import pytest

import ortlm
from tests.server.conftest import Running

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

HELLO = [{"role": "user", "content": "What does os.path.join do?"}]


@pytest.fixture(scope="module")
def client(live: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models(client: Any) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object) == ("tiny", "model")
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'; there is tiny"):
        client.chat.completions.create(model="other", messages=HELLO)


def test_chat_is_what_the_model_says(client: Any, lm: ortlm.LanguageModel) -> None:
    wanted = lm.generate(HELLO, max_new_tokens=12, reuse_cache=False)
    made = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12, temperature=0)
    (choice,) = made.choices
    assert (choice.message.role, choice.message.content) == ("assistant", wanted.text)
    assert choice.finish_reason == "length"
    assert made.usage.prompt_tokens == len(lm.encode(HELLO))
    assert made.usage.completion_tokens == 12
    assert made.usage.total_tokens == made.usage.prompt_tokens + 12
    parts = [{"role": "user", "content": [{"type": "text", "text": HELLO[0]["content"]}]}]
    same = client.chat.completions.create(
        model="tiny", messages=parts, max_completion_tokens=12, temperature=0
    )
    assert same.choices[0].message.content == wanted.text


def test_a_stream(client: Any, lm: ortlm.LanguageModel) -> None:
    wanted = lm.generate(HELLO, max_new_tokens=12, reuse_cache=False)
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=12, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == wanted.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


def test_stop_seed_and_n(client: Any) -> None:
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 16, "temperature": 1.0, "seed": 5}
    one = client.chat.completions.create(**asked, n=3)
    two = client.chat.completions.create(**asked, n=3)
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in two.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in one.choices] == [0, 1, 2]
    # A negative one is a seed of its own.
    negative = [client.chat.completions.create(**asked | {"seed": -5}).choices[0] for _ in range(2)]
    assert negative[0].message.content == negative[1].message.content not in texts
    crossing = client.chat.completions.create(**asked | {"seed": -2}, n=3).choices
    assert len({choice.message.content for choice in crossing}) == 3
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    stop = texts[0][4:6]
    stopped = client.chat.completions.create(**asked, stop=stop).choices[0]
    assert stopped.message.content == texts[0][: texts[0].index(stop)]
    assert stopped.finish_reason == "stop"


def test_logprobs_and_bias(client: Any, lm: ortlm.LanguageModel) -> None:
    made = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    content = made.choices[0].logprobs.content
    assert "".join(one.token for one in content).strip() == made.choices[0].message.content.strip()
    for one in content:
        assert one.logprob == one.top_logprobs[0].logprob
        assert bytes(one.bytes).decode() == one.token
    first = lm.generate(HELLO, max_new_tokens=1, reuse_cache=False).token_ids[0]
    barred = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=1, temperature=0, logit_bias={str(first): -100}
    )
    assert barred.choices[0].message.content != made.choices[0].message.content[: len(content[0].token)]
    pushed = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=2, temperature=0, logit_bias={"40": 100}
    )
    assert pushed.choices[0].message.content == lm.tokenizer.decode([40, 40])


def test_structured_output(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "count": {"type": "integer", "maximum": 99},
        },
        "required": ["name", "count"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    made = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=60, seed=1, response_format=form
    )
    text = made.choices[0].message.content
    found = json.loads(text)
    assert set(found) == {"name", "count"}
    assert text == json.dumps(found, separators=(",", ":"), ensure_ascii=False)
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "https://example.org/x"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, response_format=bad)
    assert caught.value.param == "response_format"


class Part(pydantic.BaseModel):
    """What a model may hold."""

    model_config = pydantic.ConfigDict(extra="forbid")

    new: bool


class Thing(pydantic.BaseModel):
    """What the client turns into a schema by itself."""

    model_config = pydantic.ConfigDict(extra="forbid")

    name: Literal["pen", "cup"]
    sizes: list[Annotated[int, pydantic.Field(ge=0, le=99)]] = pydantic.Field(max_length=2)
    other: Part | None


def test_answers_as_models_of_pydantic(client: Any) -> None:
    asked = {"model": "tiny", "max_tokens": 200, "seed": 3}
    made = client.chat.completions.parse(messages=HELLO, response_format=Thing, **asked)
    parsed = made.choices[0].message.parsed
    assert isinstance(parsed, Thing)
    assert parsed.name in ("pen", "cup")
    with client.chat.completions.stream(messages=HELLO, response_format=Thing, **asked) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed
    response = client.responses.parse(
        model="tiny", input="hi", text_format=Thing, max_output_tokens=200, temperature=0
    )
    assert isinstance(response.output_parsed, Thing)


def test_completions(client: Any, lm: ortlm.LanguageModel) -> None:
    """As lm-eval asks: token ids, echoed with their log-probabilities, and one more token."""
    ids = [lm.encode("def read_lines(path):\n"), lm.encode("import os")]
    made = client.completions.create(
        model="tiny", prompt=ids, max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234
    )
    for row, choice in zip(ids, made.choices, strict=True):
        wanted = lm.prompt_logprobs(row, top=1)
        found = choice.logprobs
        assert len(found.token_logprobs) == len(row) + 1
        assert found.token_logprobs[0] is None
        assert found.top_logprobs[0] is None
        for one, logprob, top in zip(
            wanted[1:], found.token_logprobs[1:-1], found.top_logprobs[1:-1], strict=True
        ):
            assert logprob == pytest.approx(one.logprob, abs=1e-4)
            assert max(top.values()) == pytest.approx(one.top[0][1], abs=1e-4)
        # The greedy token is told by equality.
        assert found.token_logprobs[-1] == max(found.top_logprobs[-1].values())
        # A stop token has a log-probability, and is no text.
        assert "".join(found.tokens).removesuffix("<|endoftext|>") == choice.text
        assert found.text_offset[1] == len(found.tokens[0])
    assert made.usage.prompt_tokens == sum(map(len, ids))
    only = client.completions.create(
        model="tiny", prompt="import os", max_tokens=0, echo=True, logprobs=0, temperature=0
    )
    assert only.choices[0].text == "import os"
    assert only.usage.completion_tokens == 0
    plain = client.completions.create(model="tiny", prompt=["import os"] * 2, max_tokens=6, temperature=0)
    wanted_text = lm.generate("import os", max_new_tokens=6, reuse_cache=False).text
    assert [choice.text for choice in plain.choices] == [wanted_text] * 2
    chunks = client.completions.create(
        model="tiny", prompt="import os", max_tokens=6, temperature=0, stream=True, echo=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == "import os" + wanted_text


def test_further_fields(client: Any, lm: ortlm.LanguageModel) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_tokens": 4}
    made = client.completions.create(
        model="tiny", prompt="import os", max_tokens=12, temperature=0.9, seed=3, extra_body=extra
    )
    wanted = lm.generate(
        "import os", max_new_tokens=12, temperature=0.9, seed=3, top_k=5, min_p=0.1, repetition_penalty=1.3,
        no_repeat_ngram_size=2, min_new_tokens=4, reuse_cache=False,
    )  # fmt: skip
    assert made.choices[0].text == wanted.text


def test_embeddings(client: Any, lm: ortlm.LanguageModel) -> None:
    made = client.embeddings.create(model="tiny", input=["import os", "def"], encoding_format="float")
    wanted = lm.embed(["import os", "def"])
    np.testing.assert_allclose([one.embedding for one in made.data], wanted, atol=1e-5)
    raw = client.embeddings.create(model="tiny", input=lm.encode("def"), encoding_format="base64").data[0]
    packed = raw.embedding if isinstance(raw.embedding, str) else None
    if packed is not None:
        data = base64.b64decode(packed)
        np.testing.assert_allclose(struct.unpack(f"<{len(data) // 4}f", data), wanted[1], atol=1e-5)


REFUSED = {
    "frequency_penalty": "x",
    "temperature": -1.0,
    "temperature ": True,
    "top_p": 3.0,
    "n": 0,
    "logit_bias": {"x": 1},
    "max_tokens": -1,
    "max_tokens ": 100_000,
    "top_logprobs": 2,
    "reasoning_effort": "high",
    "verbosity": "high",
    "web_search_options": {},
    "stop": 3,
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "response_format": {"type": "xml"},
    "seed": 1.5,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_honored_is_refused_by_name(client: Any, name: str) -> None:
    field, value = name.strip(), REFUSED[name]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body={field: value})
    assert (caught.value.param or "").startswith(field)
    assert caught.value.type == "invalid_request_error"


def test_what_changes_no_answer_is_taken(client: Any) -> None:
    extra = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "functions": []}
    made = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1, extra_body=extra)
    assert made.choices


def test_the_context_is_a_limit(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="the context holds 512") as caught:
        client.completions.create(model="tiny", prompt=[7] * 600)
    assert caught.value.code == "context_length_exceeded"
