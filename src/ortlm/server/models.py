"""The models that a server answers with: loaded when they are asked for, unloaded when they are idle.

One thread loads and unloads, so that it never happens twice at once. Requests hold a lease on a model while they
submit what they ask for; a model is unloaded only if nobody has a lease and its engine has nothing to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ortlm.artifact import Artifact
from ortlm.errors import BadOption, Error, nearest
from ortlm.runtime.engine.huge_pages import give_back_freed_memory
from ortlm.server.errors import ApiError
from ortlm.server.served import ServedModel
from ortlm.serving.engine import EngineStats

_log = logging.getLogger(__name__)

State = Literal["unloaded", "loading", "loaded", "unloading"]
# How often a model that is to be unloaded is looked at, and one that may become idle.
_DRAIN_POLL, _MOST_IDLE_POLL = 0.02, 1.0


@dataclass(frozen=True)
class Source:
    """What can be served as ``name`` once ``load`` is called.

    ``artifact`` is the folder as it was opened, ``context_tokens`` what a request may hold.
    """

    name: str
    load: Callable[[], ServedModel]
    artifact: Artifact
    context_tokens: int


@dataclass(eq=False)
class Slot:
    """A name that is served, whether its model is loaded or not; all but the name may change at any time.

    ``failed``: the last attempt to load it did. ``loads`` and ``failures`` count attempts.
    """

    name: str
    source: Source | None
    artifact: Artifact
    adapters: Sequence[str]
    context_tokens: int
    state: State = "unloaded"
    served: ServedModel | None = None
    failed: bool = False
    loads: int = 0
    failures: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    # --- of Models, under its lock
    leases: int = 0
    used: float = field(default_factory=time.monotonic)
    # Who waits for a load, the first of them since when, and who waits for the end of an unload.
    waiting: list[Future[ServedModel]] = field(default_factory=list)
    asked: float = 0.0
    leaving: list[Future[None]] = field(default_factory=list)
    # What the engines of earlier loads have counted.
    past: EngineStats = field(default_factory=EngineStats)

    @property
    def names(self) -> list[str]:
        """What requests may call it: its name, and with each of its adapters."""
        return [self.name, *(f"{self.name}:{adapter}" for adapter in self.adapters)]

    @property
    def quiet(self) -> bool:
        """Whether nobody uses it."""
        return not self.leases and (self.served is None or self.served.engine.idle)

    def stats(self) -> EngineStats:
        """Return what its engine does, and what it and those before it have done."""
        served = self.served
        return self.past if served is None else served.engine.stats().after(self.past)


class Models:
    """All that is served, by name; the first one is meant where there is only that.

    What is given as a ServedModel is loaded and stays so. ``idle_seconds``: a model is unloaded after so long
    without a request; None keeps it. ``most_loaded``: at most N are loaded at once; the least recently used one
    makes room for another, when what it runs has ended. Raises BadOption for two models of one name.
    """

    def __init__(
        self,
        models: Iterable[ServedModel | Source],
        *,
        idle_seconds: float | None = None,
        most_loaded: int | None = None,
    ) -> None:
        self._idle, self._most = idle_seconds, most_loaded
        self.all: Sequence[Slot] = [_slot(model) for model in models]
        pinned = sum(slot.source is None for slot in self.all)
        if most_loaded is not None and most_loaded <= pinned < len(self.all):
            raise BadOption(f"most_loaded is {most_loaded}, but {pinned} models are always loaded.")
        self._changed = threading.Condition()
        self._closing = False
        self._known = self._names()
        self._thread: threading.Thread | None = None
        if pinned < len(self.all):
            self._thread = threading.Thread(target=self._work, name="ortlm-models", daemon=True)
            self._thread.start()

    @property
    def names(self) -> list[str]:
        """All names that requests may use."""
        return list(self._known)

    def get(self, name: str | None) -> tuple[Slot, str | None]:
        """Return the model and the adapter that ``name`` means. Raises ApiError if there is none."""
        if name is None:
            if len(self.all) == 1:
                return self.all[0], None
            raise ApiError(400, f"model is missing; there is {', '.join(self.names)}.", param="model")
        if name not in self._known:
            said = f"there is no model {name[:200]!r}; there is {', '.join(self.names)}."
            raise ApiError(404, said + nearest(name, self.names), param="model", code="model_not_found")
        return self._known[name]

    @contextlib.asynccontextmanager
    async def use(self, slot: Slot) -> AsyncIterator[ServedModel]:
        """Yield the loaded model of ``slot``, which stays loaded meanwhile; what it is asked then runs to its end.

        Waits until it is loaded. Raises ApiError if that fails or the server is shut down.
        """
        served = await self._lease(slot)
        try:
            yield served
        finally:
            self._release(slot)

    async def load(self, slot: Slot) -> None:
        """Return when the model is loaded. Raises ApiError as ``use`` does."""
        async with self.use(slot):
            pass

    async def unload(self, slot: Slot) -> None:
        """Let what the model runs end, and return when it is unloaded; requests that come wait and load it again.

        Raises ApiError while it is being loaded.
        """
        with self._changed:
            self._check_open()
            if slot.source is None:
                raise ApiError(400, f"{slot.name} cannot be unloaded.", param="model")
            if slot.state == "loading" or (slot.state == "unloaded" and slot.waiting):
                raise ApiError(
                    409,
                    f"{slot.name} is being loaded. Unload it when that is done.",
                    param="model",
                    code="model_is_loading",
                )
            if slot.state == "unloaded":
                return
            future: Future[None] = Future()
            slot.state = "unloading"
            slot.leaving.append(future)
            self._changed.notify_all()
        await asyncio.wrap_future(future)

    def failed_engine(self) -> tuple[str, BaseException] | None:
        """Return the name of a model whose engine has failed, and with what; None if all work."""
        for slot in self.all:
            served = slot.served
            if served is not None and served.engine.error is not None:
                return slot.name, served.engine.error
        return None

    def begin(self) -> None:
        """Load as many models as may be loaded at once. Raises what the first that fails raises."""
        for slot in self.all[: self._most]:
            if slot.source is not None:
                self._take(slot, slot.source.load())

    def close(self, drain_seconds: float = 0.0) -> None:
        """End all engines; what runs in any of them has ``drain_seconds`` to end. What waits for a load fails."""
        until = time.monotonic() + drain_seconds
        with self._changed:
            self._closing = True
            for slot in self.all:
                ended: list[Future[Any]] = [*slot.waiting, *slot.leaving]
                for future in ended:
                    if future.set_running_or_notify_cancel():
                        future.set_exception(_shutting_down())
                slot.waiting, slot.leaving = [], []
            running = [slot.served for slot in self.all if slot.served is not None]
            self._changed.notify_all()
        for served in running:
            served.engine.stop_taking()
        for served in running:
            served.engine.close(drain_seconds=max(0.0, until - time.monotonic()))
        # A model that is being loaded is let go of right after.
        if self._thread is not None:
            self._thread.join()

    # --- leases -------------------------------------------------------------------------------------------

    async def _lease(self, slot: Slot) -> ServedModel:
        with self._changed:
            self._check_open()
            if slot.state == "loaded":
                assert slot.served is not None
                slot.leases += 1
                return slot.served
            future: Future[ServedModel] = Future()
            if not slot.waiting:
                slot.asked = time.monotonic()
            slot.waiting.append(future)
            self._changed.notify_all()
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not future.cancelled() and future.exception() is None:
                # It was given at the same moment.
                self._release(slot)
            raise

    def _release(self, slot: Slot) -> None:
        with self._changed:
            slot.leases -= 1
            slot.used = time.monotonic()
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closing:
            raise _shutting_down()

    # --- of the thread ------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._closing:
                    return
                slot = self._next()
                if slot is None:
                    self._changed.wait(self._pause())
                    continue
            if slot.state == "loading":
                self._load(slot)
            else:
                self._unload(slot)

    def _next(self) -> Slot | None:
        """Return a model that is to be loaded or unloaded now, in that state; None if there is nothing to do."""
        now = time.monotonic()
        for slot in self.all:
            if slot.state != "loaded" or slot.source is None:
                continue
            if not slot.quiet:
                slot.used = now
            elif self._idle is not None and now - slot.used >= self._idle:
                slot.state = "unloading"
        for slot in self.all:
            if slot.state == "unloading" and slot.quiet:
                return slot
        wanted = [slot for slot in self.all if slot.state == "unloaded" and slot.waiting]
        if not wanted:
            return None
        if self._most is not None:
            taken = [slot for slot in self.all if slot.state != "unloaded"]
            if len(taken) >= self._most:
                return self._room_maker(taken)
        # Whoever has waited longest.
        first = min(wanted, key=lambda slot: slot.asked)
        first.state = "loading"
        return first

    def _room_maker(self, taken: Sequence[Slot]) -> Slot | None:
        """Return the model that is to be unloaded now for another one; None if what it runs has to end first."""
        if any(slot.state == "unloading" for slot in taken):
            return None
        loaded = [slot for slot in taken if slot.state == "loaded" and slot.source is not None]
        # A busy one takes no new requests from here on, so that it never keeps others out.
        least = min(loaded, key=lambda slot: (not slot.quiet, slot.used))
        least.state = "unloading"
        return least if least.quiet else None

    def _pause(self) -> float | None:
        """Return how long nothing need be looked at; None: until something changes."""
        if any(slot.state == "unloading" for slot in self.all):
            return _DRAIN_POLL
        if self._idle is not None and any(slot.state == "loaded" for slot in self.all):
            return min(_MOST_IDLE_POLL, self._idle / 4)
        return None

    def _load(self, slot: Slot) -> None:
        """Load ``slot``; a failure is that of the requests that wait for it."""
        assert slot.source is not None
        began = time.monotonic()
        try:
            served = slot.source.load()
        except BaseException as error:
            # With a traceback if nobody foresaw it.
            _log.error(
                "the model %s could not be loaded: %s",
                slot.name,
                error,
                exc_info=None if isinstance(error, (Error, ApiError)) else error,
            )
            self._fail(slot, error if isinstance(error, ApiError) else _not_loaded(slot))
            return
        _log.info("the model %s was loaded in %.1f seconds", slot.name, time.monotonic() - began)
        self._take(slot, served)

    def _take(self, slot: Slot, served: ServedModel) -> None:
        """Let those who wait for ``slot`` have ``served``."""
        with self._changed:
            closing = self._closing
            if not closing:
                slot.served, slot.state, slot.failed = served, "loaded", False
                slot.loads += 1
                slot.used = time.monotonic()
                slot.context_tokens = served.engine.context_tokens
                # The folder may hold another model than at first.
                slot.artifact, slot.adapters = served.lm.artifact, served.lm.adapters
                self._known = self._names(strict=slot.loads == 1)
                waiting, slot.waiting = slot.waiting, []
                for future in waiting:
                    if future.set_running_or_notify_cancel():
                        slot.leases += 1
                        future.set_result(served)
        if closing:
            served.engine.close()

    def _fail(self, slot: Slot, error: ApiError) -> None:
        with self._changed:
            slot.state, slot.failed = "unloaded", True
            slot.failures += 1
            waiting, slot.waiting = slot.waiting, []
            for future in waiting:
                if future.set_running_or_notify_cancel():
                    # Each with a traceback of its own.
                    future.set_exception(replace(error))

    def _unload(self, slot: Slot) -> None:
        """Let go of the model of ``slot``, which nobody uses."""
        served = slot.served
        assert served is not None
        served.engine.close()
        with self._changed:
            slot.past = EngineStats().after(slot.stats())
            slot.served = None
        del served
        # A loaded model refers to itself in many places.
        gc.collect()
        give_back_freed_memory()
        _log.info("the model %s was unloaded", slot.name)
        with self._changed:
            slot.state = "unloaded"
            leaving, slot.leaving = slot.leaving, []
            for future in leaving:
                if future.set_running_or_notify_cancel():
                    future.set_result(None)

    def _names(self, *, strict: bool = True) -> dict[str, tuple[Slot, str | None]]:
        known: dict[str, tuple[Slot, str | None]] = {}
        for slot in self.all:
            for name in slot.names:
                if name in known and strict:
                    raise BadOption(f"two models are called {name!r}. Give one another name: NAME=FOLDER.")
                known.setdefault(
                    name, (slot, name.removeprefix(f"{slot.name}:") if name != slot.name else None)
                )
        return known


def named(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return the names and folders that ``words`` say: FOLDER, or NAME=FOLDER."""
    found = []
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or Path(word).exists():
            # A link is called as it is, not as what it leads to.
            name, folder = Path(word).name, word
            if name in ("", ".."):
                name = Path(word).resolve().name
        if not name or not folder:
            raise BadOption(f"a model is given as FOLDER or NAME=FOLDER; found {word!r}.")
        found.append((name, folder))
    return found


def _slot(model: ServedModel | Source) -> Slot:
    if isinstance(model, Source):
        adapters = tuple(model.artifact.manifest.adapters)
        return Slot(model.name, model, model.artifact, adapters, model.context_tokens)
    lm, context = model.lm, model.engine.context_tokens
    return Slot(model.name, None, lm.artifact, lm.adapters, context, state="loaded", served=model)


def _shutting_down() -> ApiError:
    return ApiError(
        503, "the server is shutting down.", "unavailable_error", code="shutting_down", retry_after=5
    )


def _not_loaded(slot: Slot) -> ApiError:
    return ApiError(
        503,
        f"the model {slot.name} could not be loaded; the server's log says why.",
        "unavailable_error",
        code="model_load_failed",
    )
