"""LoRA adapters that are switched while a model runs: files to the tensors that a graph's inputs take."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from ortlm.artifact import Artifact
from ortlm.errors import BadArtifact, BadOption, nearest
from ortlm.runtime.engine.backend import DeviceTensor, TensorInfo
from ortlm.runtime.engine.session import Session, read_adapter

_FLOATS = ("fp32", "fp16", "bf16")


class Adapters:
    """The adapters that a loaded graph can switch to: those of the artifact, and files that are added.

    A file is read when it is first wanted, and kept. May be used by several threads.
    """

    def __init__(self, session: Session, artifact: Artifact) -> None:
        self._session = session
        self._files = {name: artifact.path / file for name, file in artifact.manifest.adapters.items()}
        self._read: dict[str, dict[str, DeviceTensor]] = {}
        self._lock = threading.Lock()
        graph = artifact.manifest.graphs["decoder"]
        taken = {*graph.optional.values(), *graph.inputs.values(), *(state.past for state in graph.states)}
        self._infos = {
            name: info
            for name, info in {**session.inputs, **session.optional}.items()
            if name not in taken and info.dtype.name in _FLOATS
        }

    @property
    def names(self) -> tuple[str, ...]:
        """What ``inputs`` knows."""
        return tuple(self._files)

    def load(self, path: str | Path, name: str) -> None:
        """Read the ``.onnx_adapter`` file ``path`` and call it ``name``.

        Raises BadOption if the name is taken, BadArtifact if the file is damaged or made for another model.
        """
        tensors = self._tensors(Path(path))
        with self._lock:
            if name in self._files:
                raise BadOption(
                    f"there is an adapter {name!r} already: {self._files[name]}. Unload it or choose another name."
                )
            self._files[name] = Path(path)
            self._read[name] = tensors

    def unload(self, name: str) -> None:
        """Forget the adapter ``name``; its memory is freed once nothing is bound to it. BadOption if unknown."""
        with self._lock:
            self._check(name)
            del self._files[name]
            self._read.pop(name, None)

    def inputs(self, name: str) -> Mapping[str, DeviceTensor]:
        """Return a tensor for each of the graph's adapter inputs, by the input's name: those of adapter ``name``.

        Inputs that it has nothing for get their defaults, since a binding may still hold another adapter's.
        Raises BadOption for an unknown name, BadArtifact as ``load`` does.
        """
        with self._lock:
            self._check(name)
            if name not in self._read:
                self._read[name] = self._tensors(self._files[name])
            return {**self._defaults, **self._read[name]}

    def file(self, name: str) -> Path:
        """Return the file of adapter ``name``. Raises BadOption for an unknown name."""
        with self._lock:
            self._check(name)
            return self._files[name]

    def defaults(self) -> Mapping[str, DeviceTensor]:
        """Return a tensor for each of the graph's adapter inputs that has a rank, which lets it be the base."""
        return self._defaults

    @cached_property
    def _defaults(self) -> dict[str, DeviceTensor]:
        # The rank is the dimension that varies: without directions, nothing is added. What has no such dimension
        # has a default in the graph, which nobody but the graph knows; what a graph must be given has none.
        return {
            name: self._session.tensor(np.zeros([n or 0 for n in info.shape], info.dtype.numpy))
            for name, info in self._infos.items()
            if name in self._session.optional and None in info.shape
        }

    def _check(self, name: str) -> None:
        if name not in self._files:
            there = f"there are {', '.join(self._files)}" if self._files else "none is loaded"
            raise BadOption(f"there is no adapter {name!r}; {there}." + nearest(name, self._files))

    def _tensors(self, path: Path) -> dict[str, DeviceTensor]:
        if not self._infos:
            raise BadArtifact(
                f"{self._session.path} has no inputs for adapters, so {path} cannot be used. Build the model with "
                "--adapter NAME=PATH."
            )
        tensors = read_adapter(path)
        for name, (info, _) in tensors.items():
            self._check_tensor(info, path)
            if name.endswith(".lora_A"):
                _check_pair(info, tensors.get(name.removesuffix("A") + "B"), path)
            elif name.endswith(".lora_B") and name.removesuffix("B") + "A" not in tensors:
                raise BadArtifact(f"{path} holds {name!r} without its lora_A. Make the adapter again.")
        # Where the graph computes: what lies elsewhere would be copied there for every generation.
        place = self._session.memory.place
        return {name: place(tensor) for name, (_, tensor) in tensors.items()}

    def _check_tensor(self, info: TensorInfo, path: Path) -> None:
        if info.name not in self._infos:
            raise BadArtifact(
                f"{path} holds {info.name!r}, which is no adapter input of {self._session.path}."
                + nearest(info.name, self._infos)
                + " Usual cause: an adapter for another model."
            )
        wanted = self._infos[info.name]
        fits = len(info.shape) == len(wanted.shape) and all(
            size in (None, found) for size, found in zip(wanted.shape, info.shape, strict=True)
        )
        if info.dtype != wanted.dtype or not fits:
            shape = ", ".join("rank" if n is None else str(n) for n in wanted.shape)
            raise BadArtifact(
                f"{path}: {info.name!r} is {info.dtype.name} {list(info.shape)}, but {self._session.path} takes "
                f"{wanted.dtype.name} [{shape}]. Usual cause: an adapter for another model or precision."
            )


def _check_pair(a: TensorInfo, b: tuple[TensorInfo, DeviceTensor] | None, path: Path) -> None:
    """Raise BadArtifact if the factors A [in, r] and B [r, out] have no rank in common."""
    if b is None or a.shape[-1:] != b[0].shape[:1]:
        shown = "is missing" if b is None else f"is {list(b[0].shape)}"
        raise BadArtifact(
            f"{path}: {a.name!r} is {list(a.shape)}, but its lora_B {shown}. Make the adapter again."
        )
