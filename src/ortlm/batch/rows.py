"""What a batch is asked: the rows of a file, one after the other, never all of them in memory.

A row is a line of JSON, ``{"custom_id", "method", "url", "body"}``. Parquet files have these as columns, with
``body`` as a text of JSON or as a struct.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

from ortlm._utils.hashing import sha256_of
from ortlm.errors import BadOption, Error

# As the server takes of a body, and what goes around it.
MOST_LINE_BYTES = (32 << 20) + (64 << 10)
_COLUMNS = ("custom_id", "method", "url", "body")
_SKIPPED_BYTES = 1 << 20
_PARQUET_ROWS = 64
# Of a custom_id, so that 64 million rows need a gigabyte.
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the input: ``number`` counts rows from 0, ``line`` lines of the file from 1.

    ``text`` is its JSON, None of a line that is longer than MOST_LINE_BYTES. ``first_line`` is that of an earlier
    row with the same custom_id, None if there is none.
    """

    number: int
    line: int
    text: bytes | None
    first_line: int | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    """What one pass over the input found: ``rows`` in all, its ``sha256``, and which rows repeat a custom_id."""

    path: Path
    rows: int
    bytes: int
    sha256: str
    repeated: dict[int, int]


def survey(path: Path) -> Survey:
    """Go once through ``path``. Raises BadOption for a file that cannot be read or that has no row."""
    if not path.is_file():
        raise BadOption(
            f"-i {path} is no file. It takes a file, which is gone through twice: JSONL or Parquet."
            if path.exists()
            else f"-i {path} does not exist."
        )
    try:
        size = path.stat().st_size
        # Each custom_id as a hash; rows without one are left to whoever answers them.
        digests = bytearray()
        count = 0
        found = hashlib.sha256()
        rows = _parquet(path) if is_parquet(path) else _lines(path, found)
        for row in rows:
            name = _custom_id(row.text)
            if name is not None:
                digests += hashlib.blake2b(
                    name.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES
                ).digest()
                digests += row.number.to_bytes(8, "little") + row.line.to_bytes(8, "little")
            count = row.number + 1
        sha256 = sha256_of(path) if is_parquet(path) else found.hexdigest()
    except OSError as error:
        raise BadOption(f"-i {path} cannot be read: {error.strerror or error}.") from error
    if not count:
        raise BadOption(
            f"-i {path} holds no request. Write one on each line, as OpenAI's Batch API has them."
        )
    return Survey(path, count, size, sha256, _repeated(digests))


def read(found: Survey) -> Iterator[Row]:
    """Yield the rows of the file of ``found``. Raises Error if that has changed since."""
    path = found.path
    digest = hashlib.sha256()
    rows = _parquet(path) if is_parquet(path) else _lines(path, digest)
    for row in rows:
        first = found.repeated.get(row.number)
        yield row if first is None else Row(row.number, row.line, row.text, first)
    if path.stat().st_size != found.bytes or (not is_parquet(path) and digest.hexdigest() != found.sha256):
        raise Error(f"{path} was changed while its requests were answered. Start again with another -o.")


def is_parquet(path: Path) -> bool:
    """Whether ``path`` is a Parquet file, by its first bytes."""
    with path.open("rb") as stream:
        return stream.read(4) == b"PAR1"


def _lines(path: Path, digest: Any) -> Iterator[Row]:
    number = line = 0
    with path.open("rb") as stream:
        while text := stream.readline(MOST_LINE_BYTES + 1):
            line += 1
            digest.update(text)
            long = len(text) > MOST_LINE_BYTES
            if long and not text.endswith(b"\n"):
                _skip(stream, digest)
            if line == 1:
                text = text.removeprefix(b"\xef\xbb\xbf")
            if not text.strip():
                continue
            yield Row(number, line, None if long else text)
            number += 1


def _skip(stream: BinaryIO, digest: Any) -> None:
    """Read up to the end of the line."""
    while piece := stream.readline(_SKIPPED_BYTES):
        digest.update(piece)
        if piece.endswith(b"\n"):
            return


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise BadOption(
            f"-i {path} is a Parquet file, which needs pyarrow: pip install 'ortlm[batch]'. Or give the "
            f"requests as JSONL."
        ) from error
    try:
        file = ParquetFile(path)
        there = file.schema_arrow.names
        missing = [name for name in ("custom_id", "url", "body") if name not in there]
        if missing:
            raise BadOption(
                f"-i {path} has no column {', '.join(missing)}; it needs custom_id, url and body, and may have "
                f"method."
            )
        columns = [name for name in _COLUMNS if name in there]
        number = 0
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            for values in batch.to_pylist():
                yield Row(number, number + 1, _as_line(values))
                number += 1
    except ArrowException as error:
        raise BadOption(f"-i {path} cannot be read as Parquet: {error}.") from error


def _as_line(values: dict[str, Any]) -> bytes | None:
    values.setdefault("method", "POST")
    body = values.pop("body")
    try:
        # What is no text of JSON is told of where lines are parsed.
        text = body if isinstance(body, str) else json.dumps(body, allow_nan=False)
        line = f'{json.dumps(values)[:-1]}, "body": {text}}}'.encode("utf-8", "surrogatepass")
    except (TypeError, ValueError):
        return b"a body that is no JSON"
    return line if len(line) <= MOST_LINE_BYTES else None


def _custom_id(text: bytes | None) -> str | None:
    try:
        value = None if text is None else from_json(text, allow_inf_nan=False)
    except ValueError:
        return None
    name = value.get("custom_id") if isinstance(value, dict) else None
    return name if isinstance(name, str) and name else None


def _repeated(digests: bytearray) -> dict[int, int]:
    """Return for the number of each row whose custom_id an earlier row had the line of the first of these."""
    kind = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u8"), ("line", "<u8")])
    found: NDArray[Any] = np.frombuffer(digests, kind)
    order = np.argsort(found, order=("high", "low", "number"))
    same = np.zeros(len(order), bool)
    high, low = found["high"][order], found["low"][order]
    same[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    repeated = {}
    first = 0
    for at in np.flatnonzero(same).tolist():
        if not same[at - 1]:
            first = int(found["line"][order[at - 1]])
        repeated[int(found["number"][order[at]])] = first
    return repeated
