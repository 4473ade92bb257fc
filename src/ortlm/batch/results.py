"""The folder of a batch's results: whose it is, which rows are done, and the files that grow.

``output-00001.jsonl`` … hold answers and ``errors-00001.jsonl`` … what could not be answered, a line for each
row in the order in which they ended; ``batch.json`` says what of. A line is the only note that its row is
done, so there is nothing that could disagree with it: a run that ends in whatever way resumes from what the
lines say.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from pydantic_core import from_json

from ortlm._utils.checked_json import read_object
from ortlm._utils.file_lock import lock
from ortlm._utils.whole_files import naming, write_whole
from ortlm.batch.answering import Result, as_line
from ortlm.errors import BadOption, Error

BATCH_FILE = "batch.json"
_FORMAT = 1
_LOCK_FILE = ".lock"
_KINDS = ("output", "errors")
SHARD_ROWS, SHARD_BYTES = 50_000, 256 << 20
_ID = re.compile(rb'\{"id":"batch_req_([0-9a-f]{12})_([0-9]+)"')
# What a crash of the machine may cost.
_SYNC_SECONDS = 1.0
_MOST_BATCH_FILE = 1 << 20


@dataclass(frozen=True, slots=True)
class Identity:
    """What results are of: ``input``, ``model`` and ``options``, each with all that changes them."""

    input: Mapping[str, Any]
    model: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def run(self) -> str:
        """A short name of it, which is in the id of each result."""
        import hashlib

        text = json.dumps([self.input["sha256"], self.model["sha256"], dict(self.options)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass
class Counts:
    """How many rows are done, how many of them failed, and what they took."""

    done: int = 0
    failed: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0


@dataclass
class _Shards:
    """The files of one kind, of which the last one grows."""

    folder: Path
    kind: str
    number: int = 0
    rows: int = 0
    size: int = 0
    handle: int | None = None
    dirty: bool = False

    def path(self, number: int) -> Path:
        return self.folder / f"{self.kind}-{number:05}.jsonl"

    def append(self, line: bytes) -> None:
        if not self.number or self.rows >= SHARD_ROWS or self.size >= SHARD_BYTES:
            self.close()
            self.number, self.rows, self.size = self.number + 1, 0, 0
        path = self.path(self.number)
        if self.handle is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
            with naming(path):
                self.handle = os.open(path, flags, 0o666)
                _sync_folder(self.folder)
        try:
            with naming(path):
                left = memoryview(line)
                while left:
                    left = left[os.write(self.handle, left) :]
        except OSError:
            # Half a line is none; if this fails too, the next run takes it away.
            with contextlib.suppress(OSError):
                os.ftruncate(self.handle, self.size)
            raise
        self.rows += 1
        self.size += len(line)
        self.dirty = True

    def sync(self) -> None:
        if self.handle is not None and self.dirty:
            with naming(self.path(self.number)):
                os.fsync(self.handle)
            self.dirty = False

    def close(self) -> None:
        if self.handle is not None:
            handle, self.handle = self.handle, None
            try:
                with naming(self.path(self.number)):
                    os.fsync(handle)
            finally:
                os.close(handle)


@dataclass
class Results:
    """The results in ``folder``, which belong to ``identity``; a context manager that holds the folder's lock.

    ``counts`` are of all runs, ``resumed`` rows were done by earlier ones.
    Raises BadOption for a folder that holds anything else, Error while another run writes there.
    """

    folder: Path
    identity: Identity
    rows: int
    counts: Counts = field(default_factory=Counts)
    resumed: int = 0

    def __post_init__(self) -> None:
        self._done = np.zeros(self.rows, bool)
        self._shards = {kind: _Shards(self.folder, kind) for kind in _KINDS}
        self._synced = time.monotonic()
        self._lock: int | None = None

    def __enter__(self) -> Results:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder)
        try:
            self._check_owner()
            for shards in self._shards.values():
                self._recover(shards)
        except BaseException:
            os.close(self._lock)
            raise
        self.resumed = self.counts.done
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            for shards in self._shards.values():
                shards.close()
            if error is None:
                self._write_batch_file()
        finally:
            assert self._lock is not None
            os.close(self._lock)

    def is_done(self, number: int) -> bool:
        """Whether row ``number`` has its result."""
        return bool(self._done[number])

    def is_left(self, rows: int) -> bool:
        """Whether one of the first ``rows`` rows has no result yet."""
        return not bool(self._done[:rows].all())

    def put(self, result: Result) -> None:
        """Write ``result``; once it has returned, an end of this process loses nothing."""
        if self._done[result.number]:
            raise Error(f"row {result.number} has two results, of which the second was not written.")
        self._shards["errors" if result.failed else "output"].append(as_line(result, self.identity.run))
        self._done[result.number] = True
        counts = self.counts
        counts.done += 1
        counts.failed += result.failed
        counts.retries += result.retries
        counts.prompt_tokens += result.prompt_tokens
        counts.new_tokens += result.new_tokens
        if time.monotonic() - self._synced >= _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Wait until the disk holds what has been put."""
        for shards in self._shards.values():
            shards.sync()
        self._synced = time.monotonic()

    # --- what is there ------------------------------------------------------------------------------------

    def _check_owner(self) -> None:
        path = self.folder / BATCH_FILE
        if not path.exists():
            if any(entry.name != _LOCK_FILE for entry in self.folder.iterdir()):
                raise BadOption(
                    f"-o {self.folder} holds other files and no {BATCH_FILE}. Give a new or an empty folder."
                )
            self._write_batch_file()
            return
        found = read_object(path, limit=_MOST_BATCH_FILE, error=BadOption)
        if found.get("format") != _FORMAT:
            raise BadOption(f"{path} is of another version of ortlm. Give another folder with -o.")
        for what, wanted, key in (
            ("input", self.identity.input, "sha256"),
            ("model", self.identity.model, "sha256"),
        ):
            there = found.get(what)
            there = there if isinstance(there, dict) else {}
            if there.get(key) != wanted[key] or (what == "model" and there.get("name") != wanted["name"]):
                raise BadOption(
                    f"-o {self.folder} holds results of another {what}: {there.get('name')} with SHA-256 "
                    f"{str(there.get(key))[:12]}; this one is {wanted['name']} with {wanted[key][:12]}. Give "
                    f"another folder with -o."
                )
        options = found.get("options")
        options = options if isinstance(options, dict) else {}
        for name, value in self.identity.options.items():
            if options.get(name) != value:
                raise BadOption(
                    f"-o {self.folder} holds results with {name} {options.get(name)}, and now it is {value}. "
                    f"Run with "
                    "the same, or give another folder with -o."
                )
        counts = found.get("counts")
        if isinstance(counts, dict) and isinstance(counts.get("retries"), int):
            self.counts.retries = counts["retries"]

    def _write_batch_file(self) -> None:
        counts = self.counts
        value = {
            "format": _FORMAT,
            "input": dict(self.identity.input),
            "model": dict(self.identity.model),
            "options": dict(self.identity.options),
            "counts": {
                "rows": self.rows,
                "done": counts.done,
                "failed": counts.failed,
                "retries": counts.retries,
                "prompt_tokens": counts.prompt_tokens,
                "new_tokens": counts.new_tokens,
            },
        }
        write_whole({self.folder / BATCH_FILE: json.dumps(value, indent=1).encode() + b"\n"})

    def _recover(self, shards: _Shards) -> None:
        """Take note of the rows that are done, and cut off what a killed run left unfinished."""
        found = sorted(self.folder.glob(f"{shards.kind}-*.jsonl"))
        for number, path in enumerate(found, 1):
            if path.name != shards.path(number).name:
                raise BadOption(
                    f"{shards.path(number)} is missing, so rows would be answered twice. Put it back."
                )
            shards.number, shards.rows, shards.size = number, 0, 0
            good = 0
            with path.open("rb") as stream:
                for line in stream:
                    if not self._note(line, shards.kind, path):
                        break
                    good += len(line)
                    shards.rows += 1
            if good != path.stat().st_size:
                if path is not found[-1]:
                    raise BadOption(
                        f"{path} is damaged at byte {good}, before its end. Put back what was there, or delete "
                        f"the folder."
                    )
                with naming(path):
                    os.truncate(path, good)
            shards.size = good

    def _note(self, line: bytes, kind: str, path: Path) -> bool:
        """Count a line of earlier runs; False if it is not whole."""
        matched = _ID.match(line)
        if matched is None or not line.endswith(b"}\n"):
            return False
        try:
            value = from_json(line)
        except ValueError:
            return False
        number = int(matched[2])
        if matched[1].decode() != self.identity.run:
            raise BadOption(
                f"{path} holds results of another batch, {matched[1].decode()}. Give another folder with -o."
            )
        if number >= self.rows:
            raise BadOption(f"{path} has a result of row {number}, and the input has {self.rows}.")
        if self._done[number]:
            raise BadOption(f"{path} has a second result of row {number}. Remove one of the two lines.")
        self._done[number] = True
        counts = self.counts
        counts.done += 1
        counts.failed += kind == "errors"
        body = (value.get("response") or {}).get("body") or {}
        usage = body.get("usage") or {}
        counts.prompt_tokens += usage.get("prompt_tokens", 0)
        counts.new_tokens += usage.get("completion_tokens", 0)
        return True


def shards_of(folder: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Yield the results of ``kind``, "output" or "errors", in ``folder``."""
    for path in sorted(folder.glob(f"{kind}-*.jsonl")):
        with path.open("rb") as stream:
            for line in stream:
                yield from_json(line)


def _sync_folder(folder: Path) -> None:
    # So that a new file's name is on the disk too; Windows has no such call.
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _locked(folder: Path) -> int:
    """Return a handle that locks ``folder`` until it is closed. Raises Error if another process holds it."""
    path = folder / _LOCK_FILE
    # A folder that may not be written to is no matter of locks.
    with naming(path):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
    try:
        return lock(path, wait=False)
    except (BlockingIOError, PermissionError) as error:
        raise Error(
            f"another run writes to {folder}. Wait for its end, or give another folder with -o."
        ) from error
    except OSError as error:
        raise Error(
            f"{folder} lies on a file system without locks ({error.strerror}), where two runs could write at "
            "once. Give a folder on another one with -o."
        ) from error
