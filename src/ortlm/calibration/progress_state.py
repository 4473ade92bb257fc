"""What a calibration keeps on disk, so that one that was interrupted continues at the last finished layer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ortlm.dtypes import Floats

_STATE = "state.json"


@dataclass(slots=True)
class CalibrationProgress:
    """The folder of a calibration: the weights' file, the rows that are read, and what the last layer gave.

    ``done`` layers are finished; ``complete`` says that the head is, too. ``fingerprint`` stands for everything
    that the result depends on. ``experts``: see ``LayerQuantizer``.
    """

    folder: Path
    fingerprint: str
    done: int = 0
    resumed: bool = False
    complete: bool = False
    experts: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, fingerprint: str) -> CalibrationProgress:
        """Open ``folder``; what another calibration left there is removed."""
        state = cls(folder, fingerprint)
        record = _read(folder / _STATE)
        if record.get("fingerprint") == fingerprint and (folder / "weights.data").is_file():
            state.done, state.resumed = int(record["done"]), True
            state.complete = record.get("complete") is True
            state.experts = dict(record.get("experts", {}))
            if not state.complete:
                _own(state.data)
        else:
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return state

    @property
    def data(self) -> Path:
        """The file of the weights, of which the first ``done`` layers are final."""
        return self.folder / "weights.data"

    def rows(self) -> list[NDArray[np.int64]] | None:
        """Return the rows that were kept, or None."""
        path = self.folder / "rows.npy"
        return list(np.load(path)) if path.is_file() else None

    def keep_rows(self, rows: Sequence[NDArray[np.int64]]) -> None:
        """Keep ``rows``, all of one length."""
        with _replacing(self.folder / "rows.npy") as path:
            np.save(path, np.stack(rows))

    def begin(self) -> None:
        """Say that the file of the weights is complete but for the layers."""
        self._write(0)

    def streams(self) -> list[list[Floats]]:
        """Return what ``finish`` was given last."""
        with np.load(self.folder / f"layer-{self.done}.npz") as arrays:
            count = 1 + max(int(name.split(".")[0]) for name in arrays.files)
            return [
                [arrays[f"{i}.{j}"] for j in range(sum(n.startswith(f"{i}.") for n in arrays.files))]
                for i in range(count)
            ]

    def finish(self, done: int, streams: Sequence[Sequence[Floats]]) -> None:
        """Say that ``done`` layers are final, and keep what goes into the next one: ``streams`` of batches."""
        old = self.folder / f"layer-{self.done}.npz"
        with _replacing(self.folder / f"layer-{done}.npz") as path:
            arrays = {f"{i}.{j}": x for i, batches in enumerate(streams) for j, x in enumerate(batches)}
            np.savez(path, **arrays)  # type: ignore[arg-type]
        self._write(done)
        if self.done != done:
            old.unlink(missing_ok=True)
        self.done = done

    def finish_all(self) -> None:
        """Say that all of the file of the weights is final."""
        self.complete = True
        self._write(self.done)

    def give(self, path: Path) -> None:
        """Put the complete file of the weights at ``path``; it stays here, too, until it is no longer needed.

        Both are one file with two names. Where a disk knows no such links, it is moved and is here no longer.
        """
        try:
            os.link(self.data, path)
        except OSError:
            self.data.replace(path)

    def forget(self) -> None:
        """Say that nothing here is needed any longer."""
        (self.folder / _STATE).unlink()

    def _write(self, done: int) -> None:
        record = {
            "fingerprint": self.fingerprint,
            "done": done,
            "complete": self.complete,
            "experts": self.experts,
        }
        with _replacing(self.folder / _STATE) as path:
            path.write_text(json.dumps(record), encoding="utf-8")


def _own(path: Path) -> None:
    """Make ``path`` a file of its own if it has other names: what is written here must not change them."""
    if path.stat().st_nlink > 1:
        with _replacing(path) as new:
            shutil.copyfile(path, new)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a file next to ``path`` that takes its place when it is complete."""
    new = path.with_name(f"new-{path.name}")
    yield new
    # Bytes first, then the name: a file that is named is whole, also after the power has failed.
    with new.open("rb+") as stream:
        os.fsync(stream.fileno())
    new.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
