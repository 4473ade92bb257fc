"""A request that an engine answers: what was asked for, and the answer as it comes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from ortlm.errors import Error
from ortlm.runtime.generation.finish import FinishReason
from ortlm.runtime.generation.speculative import Lookup
from ortlm.runtime.generation.stream import Generation, Step, Stream, Timings
from ortlm.runtime.sampling.logprobs import TokenLogprob
from ortlm.serving.prefill import Prefill
from ortlm.serving.row import RowLoop


class Request:
    """One answer of an Engine: iterate over its Steps, with ``for`` or ``async for``, or wait for the ``result``.

    What failed is raised there. ``cancel`` may be called from any thread. ``timings`` are complete when it has
    ended: ``prompt_seconds`` from its admission to its first token. ``queue_seconds`` is what it waited before
    that. ``prompt_logprobs`` are there before the first step if they were asked for.

    ``ids`` are the prompt's tokens, ``adapter`` the fingerprint of the model that computes it; ``priority``: lower
    ones are admitted first. The rest belongs to the engine.
    """

    def __init__(
        self,
        ids: Sequence[int],
        *,
        number: int,
        stream: Stream,
        row: RowLoop,
        adapter: str,
        adapter_name: str | None,
        priority: int,
        seconds: float | None,
        wake: Callable[[], None],
    ) -> None:
        self.ids = list(ids)
        self.number = number
        self.priority = priority
        self.adapter = adapter
        self.adapter_name = adapter_name
        self.timings: Timings = stream.timings
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.finish_reason: FinishReason | None = None
        self.error: BaseException | None = None
        # --- of the engine
        self.stream, self.row = stream, row
        self.prefill: Prefill | None = None
        self.next_token = -1
        # So many tokens of the row were fed as a prompt; so many of them any prompt would compute in the same way.
        self.prompt_length = self.exact_tokens = 0
        # What is to be fed again, one by one as at first, after the row was lost.
        self.replayed: deque[int] = deque()
        self.failures = self.cached_tokens = 0
        # Guesses what comes next, None if nobody wants that.
        self.lookup: Lookup | None = None
        self.submitted = time.perf_counter()
        self.deadline = None if seconds is None else self.submitted + seconds
        self.admitted: float | None = None
        self.first_token: float | None = None
        self.latest_token: float | None = None
        self.ended: float | None = None
        self.cancelled = False
        self._wake = wake
        self._lock = threading.Condition()
        self._steps: deque[Step] = deque()
        self._listeners: list[Callable[[], None]] = []

    def __lt__(self, other: Request) -> bool:
        return (self.priority, self.number) < (other.priority, other.number)

    @property
    def done(self) -> bool:
        """Whether the answer has ended."""
        return self.ended is not None

    @property
    def queue_seconds(self) -> float:
        """How long it waited to be admitted, or has waited so far."""
        until = self.admitted or self.ended or time.perf_counter()
        return until - self.submitted

    def cancel(self) -> None:
        """End the answer after the run of the model that is under way; its last step says "cancelled"."""
        self.cancelled = True
        self._wake()

    def __iter__(self) -> Iterator[Step]:
        while True:
            with self._lock:
                while not self._steps and not self.done:
                    self._lock.wait()
                if not self._steps:
                    break
                step = self._steps.popleft()
            yield step
        self._raise()

    async def __aiter__(self) -> AsyncIterator[Step]:
        import asyncio

        loop, there = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            # A loop that is closed has nobody left to tell.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(there.set)

        with self._lock:
            self._listeners.append(notify)
        try:
            while True:
                there.clear()
                with self._lock:
                    steps, done = list(self._steps), self.done
                    self._steps.clear()
                for step in steps:
                    yield step
                if done:
                    break
                if not steps:
                    await there.wait()
            self._raise()
        finally:
            with self._lock:
                self._listeners.remove(notify)

    def result(self) -> Generation:
        """Wait for the end and return the whole answer. Raises what it failed with."""
        return self.generation(list(self))

    async def aresult(self) -> Generation:
        """Do as ``result`` without blocking the event loop."""
        return self.generation([step async for step in self])

    def generation(self, steps: Sequence[Step]) -> Generation:
        """Return the answer that all of its ``steps`` make."""
        return Generation(
            text="".join(step.text for step in steps),
            token_ids=tuple(step.token_id for step in steps if step.token_id is not None),
            finish_reason=self.finish_reason or "cancelled",
            timings=self.timings,
            logprobs=tuple(step.logprob for step in steps if step.logprob is not None),
            prompt_logprobs=tuple(self.prompt_logprobs),
        )

    def _raise(self) -> None:
        if isinstance(self.error, Error):
            # The same error may be raised in several places, each with a traceback of its own.
            raise type(self.error)(*self.error.args) from self.error
        if self.error is not None:
            raise Error(f"the request failed: {self.error}") from self.error

    # --- of the engine ------------------------------------------------------------------------------------

    def put(self, step: Step) -> None:
        """Give the reader one more step."""
        with self._lock:
            self._steps.append(step)
            self._tell()

    def lose_row(self) -> None:
        """Begin again with the prompt, as at first; the tokens that were chosen since then follow one by one."""
        tokens = [*self.row.tokens, self.next_token, *self.replayed]
        at = self.prompt_length
        self.row.tokens, self.replayed, self.prefill = tokens[:at], deque(tokens[at:]), None

    def end(self, reason: FinishReason | None, error: BaseException | None = None) -> None:
        """Say that nothing more comes, and why."""
        with self._lock:
            self.finish_reason, self.error = reason, error
            self.ended = time.perf_counter()
            self._tell()

    def _tell(self) -> None:
        self._lock.notify_all()
        for listener in self._listeners:
            listener()
