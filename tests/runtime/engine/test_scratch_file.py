"""Arrays in a file without a name: what was kept is there, also after it was taken out of memory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from ortlm.runtime.engine.scratch_file import ScratchFile

pytestmark = pytest.mark.skipif(not hasattr(os, "pwrite"), reason="Windows cannot write at a place")


def test_what_was_kept_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    file = ScratchFile()
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, shape, np.uint8) for shape in ((3, 5), (4096,), (7, 11, 13), (1,))]
    places = [file.keep(array) for array in arrays]
    assert not list(tmp_path.iterdir())
    for _ in range(2):
        for place, array in zip(places, arrays, strict=True):
            assert place is not None
            assert np.array_equal(file.read(place, array.shape, array.dtype), array)
        file.rest()
    with pytest.raises(ValueError, match="read-only"):
        file.read(0, (1,), np.dtype(np.uint8))[0] = 1


def test_arrays_outlive_the_file() -> None:
    file = ScratchFile()
    place = file.keep(np.arange(100, dtype=np.uint8))
    assert place is not None
    array = file.read(place, (100,), np.dtype(np.uint8))
    file.rest()
    del file
    assert array.tolist() == list(range(100))


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: (tmp_path / "missing" / "file").open("wb"))
    file = ScratchFile()
    assert file.keep(np.zeros(3, np.uint8)) is None
    file.rest()


def test_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    file = ScratchFile()
    assert file.keep(np.ones(3, np.uint8)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert file.keep(np.ones(3, np.uint8)) is None
    place = file.keep(np.full(3, 7, np.uint8))
    assert place is not None
    assert file.read(place, (3,), np.dtype(np.uint8)).tolist() == [7, 7, 7]
    assert file.read(0, (3,), np.dtype(np.uint8)).tolist() == [1, 1, 1]
