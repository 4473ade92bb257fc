"""The cache of windows under whatever may be asked of it, against rows that are computed from the start."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ortlm.builder.options import BuildOptions
from ortlm.errors import Cancelled, CannotRewind
from ortlm.runtime.engine import sliding_window_cache as window
from ortlm.runtime.engine.kv_cache import SplitCache
from ortlm.runtime.engine.prompt_cache import restore, save
from tests.architectures import oracle

WINDOW = 8


@pytest.fixture(scope="module", params=[(5, 3), (0, 64), (40, 20)], ids=str)
def lm(request, build):
    """Full attention in one layer of four, windows of 8 in the others, with different margins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window, "_SLACK", request.param[0])
        patch.setattr(window, "_KEPT", request.param[1])
        yield build("gemma3", "fp32", BuildOptions(window_cache=True))


def fresh(lm, rows):
    """Return the logits after each of ``rows``, computed alone and at once."""
    found = []
    for row in rows:
        loop = lm.loop()
        loop.start()
        found.append(loop.append([row])[0].copy())
    return np.array(found)


def loop_of(lm, rows, chunk=512):
    loop = lm.loop()
    loop._chunk = chunk
    loop.start(len(rows))
    loop.append(rows)
    return loop


def window_part(loop):
    assert isinstance(loop.cache, SplitCache)
    return loop.cache.parts[0]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_anything(lm, data):
    tokens = iter(oracle.random_tokens(4000, seed=data.draw(st.integers(0, 99))))

    def some(least, most):
        return [next(tokens) for _ in range(data.draw(st.integers(least, most)))]

    loop = loop_of(lm, [some(1, 30) for _ in range(2)], chunk=data.draw(st.sampled_from([3, 16, 512])))
    for _ in range(data.draw(st.integers(1, 6))):
        action = data.draw(
            st.sampled_from(["append", "step", "rewind", "rewind", "select", "adopt", "cancel"])
        )
        rows = loop.history
        if action == "step":
            for _ in range(data.draw(st.integers(1, 12))):
                loop.step([next(tokens) for _ in rows])
        elif action == "rewind":
            loop.trim([max(1, len(row) - data.draw(st.integers(0, 9) | st.integers(0, 60))) for row in rows])
        elif action == "select":
            loop.select(np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=3))))
        elif action == "adopt":
            history, states = [list(row) for row in rows], loop.filled()
            loop = loop_of(lm, [[5] * 20])
            loop.adopt(history, states)
        elif action == "cancel":
            loop.cancel()
            with pytest.raises(Cancelled):
                loop.append([[1] * 9 for _ in rows])
        got = loop.append([some(0, 20 if action == "append" else 2) for _ in loop.history])
        assert oracle.relative_error(got, fresh(lm, loop.history)) < 1e-4


def test_every_length_can_be_repeated(lm):
    """The last token of a row is fed once more wherever the other row is longer, also right after an eviction."""
    rows = [oracle.random_tokens(70, seed=1), oracle.random_tokens(70, seed=2)]
    loop = loop_of(lm, [row[:1] for row in rows])
    for i in range(1, 70):
        loop.append([[rows[0][i]], []])
        got = loop.append([[], [rows[1][i]]])
        assert oracle.relative_error(got, fresh(lm, [row[: i + 1] for row in rows])) < 1e-4
    assert loop.recomputed == 0


def test_rewinds_are_computed_again_only_where_needed(lm, caplog):
    caplog.set_level("INFO", logger="ortlm")
    ids = oracle.random_tokens(200)
    loop = loop_of(lm, [ids[:90]], chunk=4)
    cache = window_part(loop)
    for token in ids[90:160]:
        loop.step([token])
        kept = cache._kept
        if kept:
            loop.trim(loop.length - kept)
            loop.append([ids[loop.length : loop.length + kept]])
    assert loop.recomputed == 0
    for back in (100, 60):
        loop.trim(back)
        assert oracle.relative_error(loop.step([7]), fresh(lm, [[*ids[:back], 7]])) < 1e-4
    assert loop.recomputed >= 1
    assert caplog.text.count("went back beyond what the cache holds") == 1
    with pytest.raises(CannotRewind, match=rf"to 20: it holds a window of {WINDOW}"):
        cache.trim([20])


def test_prompt_caches_on_disk(lm, tmp_path):
    rows = [oracle.random_tokens(n, seed=n) for n in (5, 70, 31)]
    loop = loop_of(lm, rows)
    loop.trim([4, 69, 12])
    save(loop, tmp_path / "cache", model="m")
    again = loop_of(lm, [[1, 2]])
    restore(again, tmp_path / "cache", model="m")
    before = again.recomputed
    rows = [[*row, 9] for row in again.history]
    assert [len(row) for row in rows] == [5, 70, 13]
    assert oracle.relative_error(again.step([9, 9, 9]), fresh(lm, rows)) < 1e-4
    assert again.recomputed == before


def test_a_run_that_ends_half_way_is_computed_again(lm):
    """Layers before the place where it ended have evicted, those after it have not."""
    loop = loop_of(lm, [oracle.random_tokens(60)])
    cache = window_part(loop)
    ends = [61 + cache.capacity]
    cache.bind(loop._bound.binding, ends, ends[0])
    assert oracle.relative_error(loop.step([3]), fresh(lm, [[*oracle.random_tokens(60), 3]])) < 1e-4
    assert loop.recomputed == 1
