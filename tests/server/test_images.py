"""Images in messages, with the official clients and a tiny vision model."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ortlm
from tests.server.conftest import Running, running
from tests.vision.conftest import artifact, noise, question, seen, sighted

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

__all__ = ["artifact", "seen", "sighted"]
TEXT = "What is this?"
NEW = 6


@pytest.fixture(scope="module")
def seeing(artifact: Callable[..., Path]) -> Iterator[Running]:
    from ortlm.server.metrics import Metrics
    from ortlm.server.run import ServeOptions, load_models

    # As the command loads it.
    models = load_models([("tiny", str(artifact()))], ServeOptions(), Metrics(), threads=1)
    served = models.all[0].served
    assert served is not None
    models.close()
    with running(served.lm) as found:
        yield found


@pytest.fixture(scope="module")
def encoded() -> str:
    """An image as a PNG in base64."""
    data = io.BytesIO()
    noise(64, 48).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


@pytest.fixture(scope="module")
def wanted(sighted: Callable[..., ortlm.LanguageModel]) -> str:
    return sighted().generate(question(noise(64, 48)), max_new_tokens=NEW, reuse_cache=False).text


def test_openai(seeing: Running, encoded: str, wanted: str, sighted: Any) -> None:
    url = f"data:image/png;base64,{encoded}"
    with openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="none", max_retries=0) as client:
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": TEXT}]
        asked = {
            "model": "tiny", "messages": [{"role": "user", "content": parts}], "max_tokens": NEW, "temperature": 0
        }  # fmt: skip
        made = client.chat.completions.create(**asked)
        assert made.choices[0].message.content == wanted
        assert made.usage.prompt_tokens == len(sighted().encode(question(noise(64, 48))))
        chunks = client.chat.completions.create(**asked, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
        items = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": TEXT}]
        response = client.responses.create(
            model="tiny", input=[{"role": "user", "content": items}], max_output_tokens=NEW, temperature=0
        )
        assert response.output_text == wanted
        # Another image has another answer, or at least other numbers.
        plain = [{"role": "user", "content": TEXT}]
        other = client.chat.completions.create(model="tiny", messages=plain, max_tokens=NEW, temperature=0)
        assert other.usage.prompt_tokens < made.usage.prompt_tokens


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("data:image/png;base64,AAAA", "image"),
        ("data:image/png;base64,%%%", "base64"),
        ("https://example.org/a.png", "is not fetched: no images are"),
        ("/etc/passwd", "image"),
    ],
)
def test_what_is_no_image(seeing: Running, url: str, said: str) -> None:
    with openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="none", max_retries=0) as client:
        parts = [{"type": "image_url", "image_url": {"url": url}}]
        with pytest.raises(openai.BadRequestError, match=said) as caught:
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": parts}])
        assert caught.value.param == "messages"


def test_anthropic(seeing: Running, encoded: str, wanted: str) -> None:
    anthropic = pytest.importorskip("anthropic")
    source = {"type": "base64", "media_type": "image/png", "data": encoded}
    blocks = [{"type": "image", "source": source}, {"type": "text", "text": TEXT}]
    with anthropic.Anthropic(base_url=seeing.url, api_key="none", max_retries=0) as client:
        asked = {
            "model": "tiny", "messages": [{"role": "user", "content": blocks}], "max_tokens": NEW,
            "extra_body": {"temperature": 0},
        }  # fmt: skip
        assert client.messages.create(**asked).content[0].text == wanted
        with client.messages.stream(**asked) as stream:
            assert "".join(stream.text_stream) == wanted
