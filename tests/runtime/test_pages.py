"""Huge pages: what is asked for, and that memory keeps its contents."""

import numpy as np

from ortlm.runtime import pages

MAPS = """\
7f0000000000-7f0001000000 rw-p 00000000 00:00 0
7f1000100000-7f1000700000 rw-p 00000000 00:00 0
7f2000000000-7f2000200000 rw-p 00000000 00:00 0
7f3000000000-7f3001000000 r--p 00000000 00:00 0
7f4000000000-7f4001000000 rw-p 00000000 08:01 12 /data/model.onnx.data
7f5000000000-7f5001000000 rw-p 00000000 00:00 0 [stack]
7f6000000000-7f6000800000 rw-p 00000000 00:00 0 [heap]
"""


def test_only_large_anonymous_regions():
    assert pages._large_regions(MAPS) == [
        (0x7F0000000000, 0x7F0001000000),
        (0x7F1000200000, 0x7F1000600000),
        (0x7F6000000000, 0x7F6000800000),
    ]


def test_memory_keeps_its_contents():
    data = np.arange(8 << 20, dtype=np.int32)
    assert pages.use_huge_pages(threads=2) >= 0
    assert (data == np.arange(8 << 20, dtype=np.int32)).all()


def test_systems_without_them(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "_SETTING", tmp_path / "missing")
    assert pages.use_huge_pages(threads=2) == 0
    (tmp_path / "enabled").write_text("[always] madvise never\n")
    monkeypatch.setattr(pages, "_SETTING", tmp_path / "enabled")
    assert pages.use_huge_pages(threads=2) == 0
