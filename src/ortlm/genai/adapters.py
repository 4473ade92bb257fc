"""LoRA adapters by name."""

from __future__ import annotations

import itertools
import weakref
from pathlib import Path

from ortlm.errors import nearest
from ortlm.genai.errors import GenaiError, instance, official
from ortlm.genai.model import Model

_numbers = itertools.count()


class Adapters:
    """Adapters for one model; ``Generator.set_active_adapter`` switches one on."""

    @official
    def __init__(self, model: Model) -> None:
        self._loader = instance(model, Model, "the model")._handle.lm
        self._model = model
        # Names here are this object's own, while those within the model are shared.
        self._inner: dict[str, str] = {}
        self._users: dict[str, weakref.WeakSet[object]] = {}

    @official
    def load(self, path: str | Path, name: str) -> None:
        """Read the ``.onnx_adapter`` file ``path`` and call it ``name``.

        Raises GenaiError if the name is taken or the file is not for this model.
        """
        if name in self._inner:
            raise GenaiError(f"there is an adapter {name!r} already; unload it or choose another name.")
        inner = f"{name}#{next(_numbers)}"
        self._loader.load_adapter(inner, path)
        self._inner[name], self._users[name] = inner, weakref.WeakSet()

    @official
    def unload(self, name: str) -> None:
        """Forget an adapter. Raises GenaiError while a generator uses it."""
        inner = self._known(name)
        if self._users[name]:
            raise GenaiError(
                f"adapter {name!r} is in use by {len(self._users[name])} generators; delete them first."
            )
        self._loader.unload_adapter(inner)
        del self._inner[name], self._users[name]

    def _known(self, name: str) -> str:
        if name not in self._inner:
            there = f"there are {', '.join(self._inner)}" if self._inner else "none is loaded"
            raise GenaiError(f"there is no adapter {name!r}; {there}." + nearest(name, self._inner))
        return self._inner[name]

    def _use(self, name: str, model: Model, user: object) -> str:
        """Return the model's name for the adapter, which ``user`` holds from now on."""
        if model is not self._model:
            raise GenaiError(f"adapter {name!r} was loaded for another model.")
        inner = self._known(name)
        for users in self._users.values():
            users.discard(user)
        self._users[name].add(user)
        return inner
