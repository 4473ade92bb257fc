"""Hashes of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from ortlm._utils import hashing


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9])
def test_hash_of_a_file(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_BLOCK_BYTES", 4)
    data = bytes(range(size))
    (tmp_path / "file").write_bytes(data)
    assert hashing.sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()
