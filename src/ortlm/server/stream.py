"""Answers as they come: several requests as one sequence, and server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from ortlm.runtime.generation.stream import Step
from ortlm.server.errors import ApiError, as_api_error
from ortlm.serving.request import Request

# Proxies close a connection on which nothing comes for a minute.
PING_SECONDS = 15.0


async def merged(requests: Sequence[Request]) -> AsyncIterator[tuple[int, Step]]:
    """Yield the steps of all ``requests`` with their numbers; leaving it cancels them.

    Raises what the first of them failed with.
    """
    queue: asyncio.Queue[tuple[int, Step | None, BaseException | None]] = asyncio.Queue()

    async def pump(number: int, request: Request) -> None:
        try:
            async for step in request:
                queue.put_nowait((number, step, None))
        except Exception as error:
            queue.put_nowait((number, None, error))
        else:
            queue.put_nowait((number, None, None))

    tasks = [asyncio.create_task(pump(number, request)) for number, request in enumerate(requests)]
    try:
        left = len(tasks)
        while left:
            number, step, error = await queue.get()
            if error is not None:
                raise error
            if step is None:
                left -= 1
            else:
                yield number, step
    finally:
        for request in requests:
            if not request.done:
                request.cancel()
        for task in tasks:
            task.cancel()


def data(value: Any, event: str | None = None) -> bytes:
    """Return ``value`` as one server-sent event."""
    head = f"event: {event}\n" if event is not None else ""
    return f"{head}data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


DONE = b"data: [DONE]\n\n"


def failed(error: ApiError) -> bytes:
    """Return ``error`` as the last event of one of OpenAI's streams."""
    return data(error.body())


async def with_pings(
    events: AsyncIterator[bytes],
    *,
    seconds: float = PING_SECONDS,
    last: Callable[[ApiError], bytes] = failed,
) -> AsyncIterator[bytes]:
    """Yield ``events``, and a comment whenever none comes for ``seconds``; an error becomes the ``last`` event."""
    pending: asyncio.Task[bytes] | None = None
    try:
        while True:
            if pending is None:
                pending = asyncio.ensure_future(anext_of(events))
            done, _ = await asyncio.wait([pending], timeout=seconds)
            if not done:
                yield b": ping\n\n"
                continue
            task, pending = pending, None
            try:
                event = task.result()
            except StopAsyncIteration:
                return
            yield event
    except Exception as error:
        # The status has been sent; clients read this as an error.
        yield last(as_api_error(error))
    finally:
        if pending is not None:
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await pending
        close = getattr(events, "aclose", None)
        if close is not None:
            await close()


async def anext_of(events: AsyncIterator[bytes]) -> bytes:
    """Return the next one of ``events``: a coroutine, of which a task can be made."""
    return await events.__anext__()
