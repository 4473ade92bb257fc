"""What the official clients make of failures: classes of errors, retries, time limits; and clients that await."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import ortlm
from ortlm.server.app import ServerOptions
from ortlm.serving.engine import EngineOptions
from tests.server.conftest import Running

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")
pytest.importorskip("fastapi")
HELLO = [{"role": "user", "content": "What does os.path.join do?"}]
GREEDY = {"temperature": 0}


def openai_client(live: Running, **how: Any) -> Any:
    return openai.OpenAI(base_url=f"{live.url}/v1", **{"api_key": "none", "max_retries": 0, **how})


def anthropic_client(live: Running, **how: Any) -> Any:
    return anthropic.Anthropic(base_url=live.url, **{"api_key": "none", "max_retries": 0, **how})


def ask_once(client: Any, **how: Any) -> str:
    """Ask as ``ask`` does, and close the client."""
    with client:
        return ask(client, **how)


def ask(client: Any, **how: Any) -> str:
    """Ask with either client, greedily, and return the text."""
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 9, "extra_body": GREEDY, **how}
    if isinstance(client, openai.OpenAI):
        return str(client.chat.completions.create(**asked).choices[0].message.content)
    return str(client.messages.create(**asked).content[0].text)


CLIENTS = pytest.mark.parametrize(
    ("make", "errors"), [(openai_client, openai), (anthropic_client, anthropic)], ids=["openai", "anthropic"]
)


@contextlib.contextmanager
def held(live: Running) -> Iterator[threading.Event]:
    """Let no request go on until the event is set."""
    go = threading.Event()
    future = live.models.all[0].served.engine.run(lambda: go.wait(60))
    try:
        yield go
    finally:
        go.set()
        future.result()


@CLIENTS
def test_classes_of_errors(
    serve: Callable[..., Any], make: Callable[..., Any], errors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ServerOptions(keys=["secret"], body_bytes=2000, origins=["https://a.example"])
    with serve(options=options) as live, make(live, api_key="secret") as client:
        assert ask(client)
        with pytest.raises(errors.AuthenticationError, match="API key") as caught:
            ask_once(make(live, api_key="wrong"))
        assert caught.value.status_code == 401
        assert caught.value.request_id
        with pytest.raises(errors.PermissionDeniedError, match="may not call"):
            ask(client, extra_headers={"Origin": "https://b.example"})
        with pytest.raises(errors.NotFoundError, match="there is no model 'other'"):
            ask(client, model="other")
        with pytest.raises(errors.BadRequestError, match="temperature"):
            ask(client, extra_body={"temperature": -1})
        with pytest.raises(errors.BadRequestError, match="context holds 512"):
            ask(client, max_tokens=5000)
        with pytest.raises(errors.APIStatusError, match="larger than 2,000 bytes") as caught:
            ask(client, messages=[{"role": "user", "content": "x" * 3000}])
        assert caught.value.status_code == 413

        def fails(*_: Any) -> Any:
            raise RuntimeError("no text of this reaches a client")

        with monkeypatch.context() as patch:
            patch.setattr("ortlm.server.chat.settings_of", lambda *_, **__: fails())
            with pytest.raises(errors.InternalServerError, match="its log says why"):
                ask(client)
        assert ask(client)


@CLIENTS
def test_clients_try_again_when_the_server_is_full(
    serve: Callable[..., Any], make: Callable[..., Any], errors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ortlm.server.served import ServedModel

    with serve(engine=EngineOptions(batch=1, queue=0)) as live, make(live) as client:
        wanted = ask(client)
        slow = threading.Thread(target=ask_once, args=(make(live),), kwargs={"max_tokens": 20})
        with held(live) as go:
            slow.start()
            while not live.stats.waiting:
                time.sleep(0.005)
            with pytest.raises(errors.RateLimitError) as caught:
                ask(client)
            assert int(caught.value.response.headers["retry-after"]) >= 1
            refused: list[float] = []

            def retry_after(_: ServedModel) -> int:
                refused.append(time.perf_counter())
                go.set()
                return 1

            monkeypatch.setattr(ServedModel, "retry_after", retry_after)
            # The client itself waits for as long as it was told.
            assert ask_once(make(live, max_retries=5)) == wanted
            assert time.perf_counter() - refused[0] >= 1
        slow.join()


@CLIENTS
def test_clients_that_wait_no_longer(live: Running, make: Callable[..., Any], errors: Any) -> None:
    with make(live, timeout=0.3) as client, held(live), pytest.raises(errors.APITimeoutError):
        ask(client)
    live.wait_until_idle()


@CLIENTS
def test_requests_that_take_too_long(
    serve: Callable[..., Any], make: Callable[..., Any], errors: Any
) -> None:
    with serve(engine=EngineOptions(seconds=0.2)) as live, make(live) as client:
        with held(live) as go:
            threading.Timer(0.4, go.set).start()
            with pytest.raises(errors.InternalServerError, match="seconds") as caught:
                ask(client)
        assert caught.value.status_code == 504
        assert ask(client)


@CLIENTS
def test_an_error_within_a_stream(
    live: Running, make: Callable[..., Any], errors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ortlm.serving.batch import Batch

    usual, count = Batch.step, []

    def step(self: Batch, *drafts: Any) -> Any:
        count.append(1)
        if len(count) > 3:
            raise MemoryError("never enough")
        return usual(self, *drafts)

    with make(live) as client:
        create = client.chat.completions.create if make is openai_client else client.messages.create
        with monkeypatch.context() as patch:
            patch.setattr(Batch, "step", step)
            stream = create(model="tiny", messages=HELLO, max_tokens=50, stream=True, extra_body=GREEDY)
            with pytest.raises(errors.APIError, match="its log says why"):
                list(stream)
        if make is openai_client:
            count.clear()
            with monkeypatch.context() as patch:
                patch.setattr(Batch, "step", step)
                events = list(
                    client.responses.create(model="tiny", input="hi", stream=True, max_output_tokens=50)
                )
            assert events[-1].type == "response.failed"
            assert events[-1].response.status == "failed"
            assert "its log says why" in events[-1].response.error.message


def test_a_stream_that_the_client_closes(live: Running) -> None:
    with openai_client(live) as client:
        before = live.stats.new_tokens
        body = {"ignore_eos": True}
        stream = client.completions.create(
            model="tiny", prompt="import os", max_tokens=480, stream=True, extra_body=body
        )
        for _, chunk in zip(range(3), stream, strict=False):
            assert chunk.choices[0].finish_reason is None
        stream.close()
    live.wait_until_idle()
    assert live.stats.new_tokens - before < 470


def test_clients_that_await(live: Running, lm: ortlm.LanguageModel) -> None:
    wanted = lm.generate(HELLO, max_new_tokens=9, reuse_cache=False).text
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 9, "extra_body": GREEDY}

    async def one(client: Any, stream: bool) -> str:
        made = await client.chat.completions.create(**asked, stream=stream)
        if not stream:
            return str(made.choices[0].message.content)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in made])

    async def other(client: Any) -> str:
        async with client.messages.stream(**asked) as stream:
            return "".join([text async for text in stream.text_stream])

    async def everything() -> list[str]:
        async with (
            openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as first,
            anthropic.AsyncAnthropic(base_url=live.url, api_key="none", max_retries=0) as second,
        ):
            works = [one(first, bool(number % 2)) for number in range(6)]
            return list(await asyncio.gather(*works, other(second), other(second)))

    assert asyncio.run(everything()) == [wanted] * 8
