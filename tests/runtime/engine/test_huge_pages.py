"""Huge pages: what is asked for, and that memory keeps its contents."""

import numpy as np
import pytest

from ortlm.runtime.engine import huge_pages as pages

MAPS = """\
7f0000000000-7f0001000000 rw-p 00000000 00:00 0
7f1000100000-7f1000700000 rw-p 00000000 00:00 0
7f2000000000-7f2000200000 rw-p 00000000 00:00 0
7f3000000000-7f3001000000 r--p 00000000 00:00 0
7f4000000000-7f4001000000 rw-p 00000000 08:01 12 /data/model.onnx.data
7f5000000000-7f5001000000 rw-p 00000000 00:00 0 [stack]
7f6000000000-7f6000800000 rw-p 00000000 00:00 0 [heap]
"""


def test_only_large_anonymous_regions(monkeypatch, tmp_path):
    (tmp_path / "maps").write_text(MAPS)
    monkeypatch.setattr(pages, "_MAPS", tmp_path / "maps")
    assert pages._large_regions() == {
        (0x7F0000000000, 0x7F0001000000),
        (0x7F1000200000, 0x7F1000600000),
        (0x7F6000000000, 0x7F6000800000),
    }


def test_memory_keeps_its_contents():
    before = np.arange(8 << 20, dtype=np.int32)
    with pages.huge_pages(threads=2):
        within = np.arange(8 << 20, dtype=np.int32)
    assert (before == np.arange(8 << 20, dtype=np.int32)).all()
    assert (within == before).all()


def test_an_error_within_comes_out():
    with pytest.raises(KeyError), pages.huge_pages(threads=1):
        raise KeyError


def test_systems_without_them(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "_large_regions", lambda: pytest.fail("memory was looked at"))
    monkeypatch.setattr(pages, "_SETTING", tmp_path / "missing")
    with pages.huge_pages(threads=2):
        pass
    (tmp_path / "enabled").write_text("[always] madvise never\n")
    monkeypatch.setattr(pages, "_SETTING", tmp_path / "enabled")
    with pages.huge_pages(threads=2):
        pass
