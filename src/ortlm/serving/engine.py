"""Continuous batching: one thread owns the model and answers many requests at once.

    with Engine(lm) as engine:
        requests = [engine.submit(lm.encode(text), max_new_tokens=64) for text in texts]
        answers = [request.result() for request in requests]

Between two steps of the batch, requests join and leave it. A prompt is fed in chunks, one between two steps, in a
row of its own, and that row then joins the batch. So during a prefill, others wait for one chunk per token.
A request's answer is what it would be alone: each row has its own Generator, which chooses by the row's logits
with its own settings, seed, grammar and stop texts.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from numpy.typing import NDArray

from ortlm._utils.cpu import memory_bytes
from ortlm.dtypes import Array
from ortlm.errors import BadOption, ContextFull, Error, Overloaded, ShutDown, TimedOut, is_panic
from ortlm.runtime.engine.decode_loop import CHUNK_TOKENS, Loop
from ortlm.runtime.engine.token_ids import common_prefix_length
from ortlm.runtime.generation.finish import FinishReason
from ortlm.runtime.generation.speculative import Lookup
from ortlm.runtime.generation.stream import Step
from ortlm.runtime.language_model import LanguageModel
from ortlm.runtime.sampling.settings import Options, Settings
from ortlm.runtime.structured_output.guidance import Guidance
from ortlm.serving.batch import Batch
from ortlm.serving.prefill import Prefill
from ortlm.serving.prefixes import LEAST_TOKENS, Prefix, Prefixes, Snapshot
from ortlm.serving.request import Request
from ortlm.serving.row import RowLoop

if TYPE_CHECKING:
    from typing import Unpack

    import numpy as np

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# A chunk below this reads all weights for too few tokens.
_LEAST_CHUNK = 32
# What of the main memory rows and prefixes may take, where nothing is asked for.
_ROWS_SHARE, _PREFIX_SHARE = 4, 8
# A batch that failed is computed again row by row; what fails so often is at fault itself.
_MOST_FAILURES = 2
# A step of so many tokens, drafts included, still costs little more than one without them.
_MOST_TOGETHER = 16
# Of EngineStats: what only grows.
_TOTALS = (
    "prompt_tokens", "cached_tokens", "new_tokens", "steps", "preempted", "batch_failures",
    "drafted_tokens", "accepted_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an Engine runs.

    ``batch``: at most this many requests run at once; ``queue``: at most this many more wait, others are refused.
    ``stall_seconds``: about how long a chunk of a prompt may keep running answers waiting; ``chunk_tokens``: the
    size of a chunk, by default measured to take that long, between 32 and 256 tokens. ``cache_tokens``: at most
    this many tokens in the cache of all running requests, by default what fits into a quarter of the main memory;
    ``prefix_bytes``: memory for the prefixes of earlier requests, by default an eighth of it, 0 for none.
    ``reuse_answers``: prefixes hold answers too, so that the next turn of a chat reads only what is new; their
    tokens were computed one by one, which rounds in another way than a prompt of the same text.
    ``lookup``: what followed the same words before is drafted, and a step checks it, as far as there is room;
    answers stay the same within rounding.
    ``seconds``: a request that takes longer, its waiting included, ends with TimedOut; None is no limit.

    Raises BadOption for values out of range.
    """

    batch: int = 8
    queue: int = 64
    stall_seconds: float = 0.25
    chunk_tokens: int | None = None
    cache_tokens: int | None = None
    prefix_bytes: int | None = None
    reuse_answers: bool = True
    seconds: float | None = None
    lookup: bool = False

    def __post_init__(self) -> None:
        least = {"batch": 1, "queue": 0, "chunk_tokens": 1, "cache_tokens": 2, "prefix_bytes": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and (
                not isinstance(value, int) or isinstance(value, bool) or value < lowest
            ):
                raise BadOption(f"{name} must be a whole number, {lowest} or more, found {value!r}.")
        for name in ("stall_seconds", "seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise BadOption(f"{name} must be a number above 0, found {value!r}.")


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine does now (``running``, ``prefilling``, ``waiting`` requests), and has done since its start.

    ``cache_tokens`` are in the rows of at most ``most_cache_tokens``; ``prefix_bytes`` are kept. ``preempted``
    requests lost their row to others and were computed again; ``batch_failures`` are runs of a batch that failed.
    ``accepted_tokens`` are those of the ``drafted_tokens`` that the model chose too.
    """

    running: int = 0
    prefilling: int = 0
    waiting: int = 0
    cache_tokens: int = 0
    most_cache_tokens: int = 0
    prefix_bytes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    preempted: int = 0
    batch_failures: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def after(self, earlier: EngineStats) -> EngineStats:
        """Return these figures, with what an ``earlier`` engine has done added to the totals."""
        return replace(self, **{name: getattr(self, name) + getattr(earlier, name) for name in _TOTALS})


class Observer(Protocol):
    """Whoever counts what an engine does. Called on its thread, so it must be quick and never raise."""

    def token(self, request: Request, seconds: float | None) -> None:
        """Take note of a token, ``seconds`` after the one before it; None for the first."""

    def ended(self, request: Request) -> None:
        """Take note that ``request`` has ended, in whatever way."""


class Engine:
    """Answers requests on ``lm`` until it is closed; see EngineOptions for ``options``.

    ``submit`` may be called from any thread. ``error`` is what ended its thread, None as long as it works.
    """

    def __init__(
        self, lm: LanguageModel, options: EngineOptions | None = None, *, observer: Observer | None = None
    ) -> None:
        self.lm = lm
        self.options = options or EngineOptions()
        self.error: BaseException | None = None
        self._observer = observer
        context = lm.manifest.context_tokens
        memory, per_token = memory_bytes() or 1 << 32, max(1, lm.cache_bytes_per_token)
        asked = self.options.cache_tokens
        self._most_tokens = max(context, memory // _ROWS_SHARE // per_token) if asked is None else asked
        # What a single request may hold.
        self.context_tokens = min(context, self._most_tokens)
        kept = self.options.prefix_bytes
        self._prefixes = Prefixes(memory // _PREFIX_SHARE if kept is None else kept)
        self._fixed = lm.fixed_states
        self._chunk = self.options.chunk_tokens
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        # Of callers, under the lock: what the thread has not looked at yet.
        self._arrived: list[Request] = []
        self._jobs: deque[Callable[[], None]] = deque()
        self._waiting_count = 0
        self._unfinished = 0
        self._closing = False
        self._abandon = False
        # Of the thread alone.
        self._waiting: list[Request] = []
        self._prefilling: deque[Request] = deque()
        self._batches: dict[tuple[str, bool], Batch] = {}
        self._totals = dict.fromkeys(_TOTALS, 0)
        self._thread = threading.Thread(target=self._run, name="ortlm-engine", daemon=True)
        self._thread.start()

    # --- of callers ---------------------------------------------------------------------------------------

    def submit(
        self,
        ids: Sequence[int],
        settings: Settings | None = None,
        *,
        priority: int = 0,
        **options: Unpack[Options],
    ) -> Request:
        """Ask for the continuation of the token ids ``ids``, as ``lm.encode`` returns them.

        ``options`` are the fields of Settings and win over ``settings``. Requests of a lower ``priority`` are
        admitted first, those of one in the order in which they came.
        Raises BadOption for what cannot be used, ContextFull for a prompt that is too long, Overloaded if too many
        wait already, ShutDown after ``close``.
        """
        wanted = Settings.of(settings, options)
        ids = self._checked(ids, wanted)
        if wanted.adapter != (adapter := self.lm.adapter_for(ids, wanted.adapter)):
            wanted = replace(wanted, adapter=adapter)
        lm, most = self.lm, self.context_tokens
        if most < lm.manifest.context_tokens and (wanted.max_length is None or wanted.max_length > most):
            wanted = replace(wanted, max_length=most)
        row = RowLoop(
            ids,
            context_tokens=lm.manifest.context_tokens,
            switch_tokens=lm.manifest.rope_switch_tokens,
        )
        # A Generator asks a RowLoop for what it would ask a Loop for.
        stream = lm.stream_on(cast("Loop", row), [ids], wanted)
        self._check_guidance(ids, wanted, stream.generator.stop_ids)
        fingerprint = lm.rules.fingerprint
        assert fingerprint is not None
        request = Request(
            ids,
            number=next(self._numbers),
            stream=stream,
            row=row,
            adapter=fingerprint(wanted.adapter),
            adapter_name=wanted.adapter,
            priority=priority,
            seconds=self.options.seconds,
            wake=self._wake,
        )
        if self.options.lookup:
            request.lookup = Lookup()
        if lm.vision_encoder is not None:
            self._begin_prefill(request)
        with self._changed:
            if self.error is not None:
                raise Error(f"the engine has failed: {self.error}") from self.error
            if self._closing:
                raise ShutDown("the engine is shutting down and takes no more requests.")
            if self._waiting_count >= self.options.queue + self._free_rows():
                raise Overloaded(
                    f"{self._waiting_count} requests are waiting, and no more than {self.options.queue} may. "
                    "Try again later."
                )
            self._waiting_count += 1
            self._unfinished += 1
            self._arrived.append(request)
            self._changed.notify_all()
        return request

    def run(self, work: Callable[[], _T]) -> Future[_T]:
        """Let the thread that owns the model call ``work`` between two steps. Raises ShutDown after ``close``."""
        future: Future[_T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        with self._changed:
            if self._closing or self.error is not None:
                raise ShutDown("the engine is shut down.")
            self._jobs.append(job)
            self._changed.notify_all()
        return future

    def stats(self) -> EngineStats:
        """Return what the engine does now and has done."""
        rows = [len(batch.requests) for batch in list(self._batches.values())]
        with self._changed:
            waiting = self._waiting_count
        return EngineStats(
            running=sum(rows),
            prefilling=len(self._prefilling),
            waiting=waiting,
            cache_tokens=self._tokens(),
            most_cache_tokens=self._most_tokens,
            prefix_bytes=self._prefixes.nbytes,
            **self._totals,
        )

    @property
    def idle(self) -> bool:
        """Whether no request is there that has not ended."""
        with self._changed:
            return not self._unfinished

    def stop_taking(self) -> None:
        """Take no more requests; those that there are run on."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def close(self, *, drain_seconds: float = 0.0) -> bool:
        """Take no more requests, let those that there are run for ``drain_seconds``, and end the thread.

        Those that have not ended then fail with ShutDown. Returns whether all of them ended by themselves.
        """
        self.stop_taking()
        self._thread.join(drain_seconds)
        drained = not self._thread.is_alive()
        with self._changed:
            self._abandon = True
            self._changed.notify_all()
        self._thread.join()
        return drained

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(drain_seconds=0.0 if error is not None else 3600.0)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _checked(self, ids: Sequence[int], wanted: Settings) -> list[int]:
        for name, usual in (("num_beams", 1), ("num_return_sequences", 1), ("draft", None)):
            value = getattr(wanted, name)
            if value != usual:
                raise BadOption(
                    f"{name} is not available in an engine, where a request is one row; found {value!r}. "
                    "Submit a request for each answer, or use lm.generate."
                )
        if isinstance(wanted.seed, tuple) and len(wanted.seed) != 1:
            raise BadOption(f"seed has {len(wanted.seed)} numbers for one answer; give one.")
        checked = self.lm.encode(list(ids))
        if len(checked) > self.context_tokens:
            raise ContextFull(
                f"the prompt has {len(checked)} tokens, but the context holds {self.context_tokens}. Shorten it."
            )
        return checked

    def _check_guidance(self, ids: Sequence[int], wanted: Settings, stop_ids: frozenset[int]) -> None:
        """Refuse a form that cannot be used now, not when the request is admitted."""
        guidance = wanted.guidance
        if guidance is None:
            return
        if not isinstance(guidance, Guidance):
            raise BadOption("guidance of a request must be a single one, since a request is one row.")
        if self.lm.rules.guide is not None:
            self.lm.rules.guide(guidance, stop_ids, list(ids))

    def _free_rows(self) -> int:
        taken = len(self._prefilling) + sum(len(batch.requests) for batch in list(self._batches.values()))
        return max(0, self.options.batch - taken)

    # --- of the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self._chunk is None:
                self._chunk = self._measured_chunk()
            while self._listen():
                self._end_some()
                self._admit()
                self._prefill()
                self._step()
        except BaseException as error:
            # A fault of the engine itself: nobody may wait for ever.
            _log.exception("the engine has failed")
            with self._changed:
                self.error = error
        finally:
            self._end_all()

    def _measured_chunk(self) -> int:
        """Return how many tokens of a prompt take about the time that running answers may wait."""
        try:
            loop = self.lm.loop()
            ids = [token % max(1, self.lm.vocab_size) for token in range(64)][: self.context_tokens]
            loop.start()
            loop.append([ids[: len(ids) // 2]])
            loop.start()
            began = time.perf_counter()
            loop.append([ids])
            speed = len(ids) / max(1e-9, time.perf_counter() - began)
        except Error:
            # Graphs that cannot be fed like this say so with the first request.
            return CHUNK_TOKENS
        wanted = int(self.options.stall_seconds * speed) // 16 * 16
        return max(_LEAST_CHUNK, min(wanted, CHUNK_TOKENS))

    @property
    def _busy(self) -> bool:
        return bool(self._prefilling or any(batch.requests for batch in self._batches.values()))

    def _listen(self) -> bool:
        """Take what has arrived, waiting for it if there is nothing else to do; return whether to go on."""
        with self._changed:
            while not (self._arrived or self._jobs or self._busy or self._closing):
                if self._waiting:
                    break
                self._changed.wait()
            for request in self._arrived:
                heapq.heappush(self._waiting, request)
            self._arrived.clear()
            left = self._busy or self._waiting or self._jobs
            if self._abandon or (self._closing and not left):
                return False
            # One at a time, so that running answers wait for one only.
            job = self._jobs.popleft() if self._jobs else None
        if job is not None:
            job()
        return True

    def _all(self) -> list[Request]:
        running = [request for batch in self._batches.values() for request in batch.requests]
        return [*self._waiting, *self._prefilling, *running]

    def _end_some(self) -> None:
        """End the requests that were cancelled or have taken too long."""
        now = time.perf_counter()
        for request in self._all():
            if request.cancelled:
                request.put(Step("", None, "cancelled"))
                self._finish(request, "cancelled")
            elif request.deadline is not None and now > request.deadline:
                said = f"the request took longer than {self.options.seconds:g} seconds."
                self._finish(request, None, TimedOut(said))

    def _admit(self) -> None:
        """Let waiting requests begin as long as there are rows and memory for them."""
        while self._waiting and self._free_rows():
            first = self._waiting[0]
            wanted = len(first.row.tokens) + len(first.replayed) + 1
            if self._busy and self._tokens() + wanted > self._most_tokens:
                return
            heapq.heappop(self._waiting)
            self._count_waiting(-1)
            if first.admitted is None:
                first.admitted = time.perf_counter()
            self._prefilling.append(first)

    def _prefill(self) -> None:
        """Feed one chunk of one prompt; the prompts take turns."""
        for _ in range(len(self._prefilling)):
            request = self._prefilling[0]
            self._prefilling.rotate(-1)
            if request.prefill is not None and request.prefill.loop.history[0]:
                break
            try:
                if not self._resume(request):
                    continue
            except BaseException as error:
                self._fail(request, error)
                return
            break
        else:
            return
        prefill = request.prefill
        assert prefill is not None
        try:
            logits = prefill.step(self._chunk or CHUNK_TOKENS)
        except BaseException as error:
            self._fail(request, error)
            return
        if logits is not None:
            self._begin(request, prefill, logits)

    def _begin_prefill(self, request: Request) -> Prefill:
        """Make the row that computes the prompt, or all that was there of a request that lost its row."""
        row = request.row
        loop = self.lm.loop(adapter=request.adapter_name)
        loop.hold(row.tokens)
        first = request.first_token is None
        request.prefill = Prefill(
            loop,
            row.tokens,
            logprobs=request.stream.generator.settings.prompt_logprobs if first else None,
            many=self.lm.manifest.prompt_tokens,
        )
        return request.prefill

    def _resume(self, request: Request) -> bool:
        """Begin the prompt of ``request`` with what is cached; False if a prefill is about to add to that."""
        ids = request.row.tokens
        prefill = request.prefill or self._begin_prefill(request)
        if prefill.prompt_logprobs:
            # The logits of all of the prompt are wanted, which nobody keeps.
            return True
        long = self._is_long(len(ids))
        exact = not self.options.reuse_answers
        prefix, count, longest = self._prefixes.find(
            ids, request.adapter, long=long, exact=exact, usable=prefill.usable
        )
        switch = prefill.loop.switch_tokens
        if long and switch is not None and count <= switch:
            # As a text of its own, so short a beginning would have been rotated by the other table.
            prefix, count = None, 0
        for other in self._prefilling:
            if other is request or other.adapter != request.adapter or not other.prefill or long:
                continue
            # One that has begun is not waiting for anybody.
            if not other.prefill.loop.history[0] or other.prefill.prompt_logprobs:
                continue
            common = common_prefix_length(other.row.tokens, ids)
            if (
                self._prefixes.limit
                and common >= max(2 * LEAST_TOKENS, count + LEAST_TOKENS)
                and (not prefill.fixed or other.prefill.mark(common))
            ):
                return False
        if prefix is not None and count:
            prefill.resume_from(prefix, count)
        if longest >= count + LEAST_TOKENS and self._prefixes.limit:
            # What two texts share, a third one may.
            prefill.mark(longest)
        return True

    def _begin(self, request: Request, prefill: Prefill, logits: NDArray[np.float32]) -> None:
        """Let a request whose prompt has been read choose its first token and join the batch."""
        request.prefill = None
        if request.first_token is None:
            self._totals["prompt_tokens"] += len(request.ids)
            self._totals["cached_tokens"] += prefill.cached_tokens
            request.cached_tokens = prefill.cached_tokens
            request.prompt_logprobs = prefill.prompt_logprobs
        request.prompt_length = len(request.row.tokens)
        states = prefill.loop.row(0)
        long = self._is_long(len(request.row.tokens))
        request.exact_tokens = prefill.exact_tokens
        # The memory is the prompt's own, so keeping it costs no copy.
        self._keep(request, states, prefill.snapshots() if self._prefixes.limit else ())
        if self._next(request, logits):
            return
        self._prefilling.remove(request)
        key = (request.adapter, long)
        if key not in self._batches:
            name = request.adapter_name
            self._batches[key] = Batch(lambda: self.lm.loop(adapter=name), even=self.lm.device.is_cpu)
        try:
            self._batches[key].join(request, states)
        except BaseException as error:
            # Memory, most likely: the others' rows may be half moved.
            self._fail(request, error)
            self._recompute(key, error)

    def _step(self) -> None:
        """Give every running request its next token."""
        self._make_room()
        for key, batch in list(self._batches.items()):
            if not batch.requests:
                del self._batches[key]
                continue
            drafts = self._drafts(batch)
            try:
                logits = batch.step(drafts)
            except BaseException as error:
                _check_survivable(error)
                self._recompute(key, error)
                continue
            self._totals["steps"] += 1
            # From the last row on, so that whoever leaves is replaced by one that has had its turn.
            for row in range(len(batch.requests) - 1, -1, -1):
                request = batch.requests[row]
                if (
                    not self._take(request, drafts[row] if drafts else (), logits[row])
                    and self._is_long(len(request.row.tokens) + 1) != key[1]
                ):
                    # Everything so far is rotated by another table from here on, and so it is prompt.
                    batch.leave(request)
                    request.prompt_length = len(request.row.tokens) + 1
                    request.lose_row()
                    self._prefilling.append(request)
            if drafts:
                batch.settle()

    def _drafts(self, batch: Batch) -> list[list[int]]:
        """Return what may follow each request's next token, as long as a step has room for it; [] for nothing."""
        room = _MOST_TOGETHER - len(batch.requests)
        room = min(room, self._most_tokens - self._tokens() - len(batch.requests))
        if not self.options.lookup or room < 1 or not batch.takes_drafts:
            return []
        drafts: list[list[int]] = []
        for request in batch.requests:
            found = None
            if request.lookup is not None and not request.replayed and room > 0:
                found = request.stream.generator.draft(request.lookup)
            drafts.append([] if found is None else list(found.tokens[:room]))
            room -= len(drafts[-1])
        self._totals["drafted_tokens"] += sum(map(len, drafts))
        return drafts if any(drafts) else []

    def _take(self, request: Request, draft: Sequence[int], logits: NDArray[np.float32]) -> bool:
        """Let ``request`` choose tokens by the last rows of ``logits`` [K, V], as long as they are those drafted.

        Return whether that was its last.
        """
        for after, expected in zip(logits[len(logits) - 1 - len(draft) :], [*draft, None], strict=True):
            if self._next(request, after):
                return True
            if request.next_token != expected:
                break
            # The loop has seen it already.
            request.row.tokens.append(request.next_token)
            self._totals["accepted_tokens"] += 1
        return False

    def _next(self, request: Request, logits: NDArray[np.float32]) -> bool:
        """Let ``request`` choose its next token by ``logits`` [V]; return whether that was its last."""
        if request.replayed:
            request.next_token = request.replayed.popleft()
            return False
        request.row.give(logits)
        try:
            # Tokens without logits are reported together, such as an answer that may have none.
            step = next(request.stream, None)
        except BaseException as error:
            self._fail(request, error)
            return True
        if step is None:
            self._finish(request, "length")
            return True
        now = time.perf_counter()
        if step.token_id is not None:
            since = None if request.latest_token is None else now - request.latest_token
            request.first_token = request.first_token or now
            request.latest_token = now
            self._totals["new_tokens"] += 1
            if self._observer is not None:
                self._observer.token(request, since)
        if step.finish_reason is not None:
            # Before the reader hears of it, so that it finds everything complete.
            self._finish(request, step.finish_reason, step=step)
            return True
        request.put(step)
        assert step.token_id is not None
        request.next_token = step.token_id
        return False

    def _make_room(self) -> None:
        """Let the newest requests wait until all others can have one more token."""
        while True:
            running = [request for batch in self._batches.values() for request in batch.requests]
            others = len(self._prefilling)
            if len(running) + others < 2 or self._tokens() + len(running) <= self._most_tokens:
                return
            # What has been read least is lost first.
            if others:
                last = max(self._prefilling)
                self._prefilling.remove(last)
            elif len(running) > 1:
                last = max(running)
                batch = self._batch_of(last)
                assert batch is not None
                batch.leave(last)
                last.lose_row()
            else:
                return
            last.prefill = None
            self._totals["preempted"] += 1
            self._wait_again(last)

    def _wait_again(self, request: Request) -> None:
        heapq.heappush(self._waiting, request)
        self._count_waiting(1)

    def _recompute(self, key: tuple[str, bool], error: BaseException) -> None:
        """Compute again, each in a row of its own, what was in a batch that failed with ``error``."""
        requests = self._batches.pop(key).drop()
        self._totals["batch_failures"] += 1
        _log.warning("a batch of %s requests failed: %s", len(requests), error)
        for request in requests:
            request.failures += 1
            if request.failures >= _MOST_FAILURES:
                self._fail(request, error)
                continue
            request.lose_row()
            self._prefilling.append(request)

    def _fail(self, request: Request, error: BaseException) -> None:
        """End ``request`` with ``error``, unless that is none of its own."""
        _check_survivable(error)
        self._finish(request, None, error)

    def _finish(
        self,
        request: Request,
        reason: FinishReason | None,
        error: BaseException | None = None,
        *,
        step: Step | None = None,
    ) -> None:
        """End ``request``, and keep what was computed for it unless it failed."""
        if request.done:
            return
        batch = self._batch_of(request)
        if batch is not None:
            if error is None and self._prefixes.limit and self.options.reuse_answers:
                self._keep_row(request, batch)
            batch.leave(request)
        elif request in self._prefilling:
            self._prefilling.remove(request)
        elif request in self._waiting:
            self._waiting.remove(request)
            heapq.heapify(self._waiting)
            self._count_waiting(-1)
        request.prefill = None
        request.stream.close()
        now = time.perf_counter()
        timings, first = request.timings, request.first_token
        # The row's own view is that all of the prompt was there.
        timings.cached_tokens = request.cached_tokens
        timings.prompt_seconds = (first or now) - (request.admitted or now)
        timings.decode_seconds = now - first if first is not None else 0.0
        timings.decode_tokens = max(0, timings.new_tokens - 1)
        if step is not None:
            request.put(step)
        request.end(reason, error)
        with self._changed:
            self._unfinished -= 1
        if self._observer is not None:
            self._observer.ended(request)

    def _keep(self, request: Request, states: Sequence[Array], snapshots: Sequence[Snapshot] = ()) -> None:
        tokens = list(request.row.tokens)
        prefix = Prefix(
            request.adapter,
            self._is_long(len(tokens)),
            tokens,
            states,
            min(request.exact_tokens, len(tokens)),
            self._fixed,
        )
        self._prefixes.keep(prefix.with_snapshots(snapshots))

    def _keep_row(self, request: Request, batch: Batch) -> None:
        try:
            self._keep(request, batch.states(request))
        except (MemoryError, Error) as error:
            _log.warning("an answer is not kept for later requests: %s", error)

    def _end_all(self) -> None:
        with self._changed:
            self._closing = True
            for request in self._arrived:
                heapq.heappush(self._waiting, request)
            self._arrived.clear()
            jobs = list(self._jobs)
            self._jobs.clear()
        for request in self._all():
            ending = self.error or ShutDown("the engine was shut down before the answer ended.")
            try:
                self._finish(request, None, ending)
            except Exception:
                # What failed before may fail again; its reader must hear of it all the same.
                _log.exception("a request was not ended in order")
                request.end(None, ending)
        for job in jobs:
            job()

    def _batch_of(self, request: Request) -> Batch | None:
        return next((batch for batch in self._batches.values() if request in batch.requests), None)

    def _is_long(self, tokens: int) -> bool:
        switch = self.lm.manifest.rope_switch_tokens
        return switch is not None and tokens > switch

    def _tokens(self) -> int:
        """How many tokens the rows hold that run or are read."""
        reading = sum(len(request.row.tokens) for request in list(self._prefilling))
        return reading + sum(batch.tokens for batch in list(self._batches.values()))

    def _count_waiting(self, change: int) -> None:
        with self._changed:
            self._waiting_count += change


def _check_survivable(error: BaseException) -> None:
    """Raise ``error`` unless it may be that of a request: an exception, or a panic of a library."""
    if not isinstance(error, Exception) and not is_panic(error):
        raise error
