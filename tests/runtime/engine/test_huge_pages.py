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
    pages.use_huge_pages()
    assert (before == np.arange(8 << 20, dtype=np.int32)).all()


def test_memory_keeps_its_contents_while_it_is_used():
    before = np.arange(8 << 20, dtype=np.int32)
    pages.use_huge_pages_soon()
    for _ in range(8):
        before += 1
    pages.wait_for_huge_pages()
    assert (before == np.arange(8, (8 << 20) + 8, dtype=np.int32)).all()


def test_regions_that_are_gone(monkeypatch):
    monkeypatch.setattr(pages, "_large_regions", lambda: {(1 << 40, (1 << 40) + (8 << 20))})
    pages.use_huge_pages()


def test_freed_memory_is_given_back():
    kept = [np.zeros(100_000, np.uint8) for _ in range(2000)]
    del kept[::2], kept[:900]
    pages.give_back_freed_memory()


def test_other_c_libraries(monkeypatch):
    monkeypatch.setattr(pages, "_libc", lambda: object())
    pages.give_back_freed_memory()


def test_systems_without_them(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "_large_regions", lambda: pytest.fail("memory was looked at"))
    monkeypatch.setattr(pages, "_SETTING", tmp_path / "missing")
    pages.use_huge_pages()
    (tmp_path / "enabled").write_text("[always] madvise never\n")
    monkeypatch.setattr(pages, "_SETTING", tmp_path / "enabled")
    pages.use_huge_pages()
    pages.use_huge_pages_soon()
    pages.wait_for_huge_pages()
