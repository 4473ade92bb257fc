"""Prompt caches: a damaged one is refused, and one that is taken is what was saved."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from ortlm.errors import BadArtifact
from ortlm.runtime.engine.decode_loop import Loop
from ortlm.runtime.engine.prompt_cache import restore, save
from tests.fuzz.harness import HOSTILE, damaged_bytes, fuzz
from tests.runtime.fakes import FakeBackend

ROWS = [[1, 2, 3, 4, 5], [6, 7]]


def loop(rows=()):
    backend = FakeBackend("grow")
    made = Loop(backend, backend.graph, context_tokens=64, switch_tokens=None)
    if rows:
        made.start(len(rows))
        made.append(rows)
    return made


@functools.cache
def saved() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save(loop(ROWS), Path(folder) / "cache", model="m")
        return (Path(folder) / "cache").read_bytes()


@fuzz(st.deferred(lambda: damaged_bytes(saved())), allowed=(BadArtifact,))
def test_bytes(tmp_path, raw):
    (tmp_path / "cache").write_bytes(raw)
    made = loop()
    restore(made, tmp_path / "cache", model="m")
    assert made.history == ROWS
    for found, wanted in zip(made.filled(), loop(ROWS).filled(), strict=True):
        assert np.array_equal(found, wanted)


@fuzz(st.sampled_from([repr(value) for value in HOSTILE]) | st.text(max_size=50), allowed=(BadArtifact,))
def test_tokens(tmp_path, text):
    from tests.runtime.engine.test_prompt_cache import with_tokens

    try:
        with_tokens(tmp_path / "cache", text)
    except UnicodeEncodeError:
        return  # no such file can be written
    restore(loop(), tmp_path / "cache", model="m")
