"""Both kinds of cache against a plain array."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ortlm.runtime.engine.kv_cache import make_cache
from tests.runtime.fakes import HEADS, WIDTH, FakeBackend, contents


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["grow", "append"])
def test_rows_that_change_places(kind, data):
    """Any sequence of growing, selecting and trimming leaves what a plain array would hold."""
    backend, random = FakeBackend(kind), np.random.default_rng(0)
    cache = make_cache(backend, backend.graph, context_tokens=2000)
    cache.start(2)
    model = np.zeros((2, HEADS, 0, WIDTH), np.float32)
    binding = backend.binding()
    for _ in range(data.draw(st.integers(1, 10))):
        action = data.draw(st.sampled_from(["grow", "select", "join", "leave", "trim", "refill"]))
        if action == "grow":
            new = random.normal(size=(len(model), HEADS, data.draw(st.integers(1, 300)), WIDTH)).astype(
                np.float32
            )
            ends = [cache.length + new.shape[2]] * len(model)
            cache.bind(binding, ends, ends[0])
            for state in backend.graph.states:
                if kind == "grow":
                    taken = contents(binding.taken[state.present])
                    taken[:, :, cache.length : cache.length + new.shape[2]] = new
                else:
                    past = contents(binding.given[state.past])
                    binding.returned(state.present, np.concatenate([past, new], axis=2))
            cache.advance(ends)
            model = np.concatenate([model, new], axis=2)
        elif action == "select":
            rows = np.array(data.draw(st.lists(st.integers(0, len(model) - 1), min_size=1, max_size=5)))
            cache.select(rows)
            model = model[rows]
        elif action == "join" and cache.length:
            # Shorter rows are filled up with what means nothing, and longer ones leave that behind in the others.
            length = data.draw(st.integers(1, cache.length + 300))
            row = random.normal(size=(1, HEADS, length, WIDTH)).astype(np.float32)
            cache.join([row.copy() for _ in backend.graph.states], length)
            longer = max(length, model.shape[2])
            lengths = [*([model.shape[2]] * len(model)), length]
            wide = np.zeros((len(model) + 1, HEADS, longer, WIDTH), np.float32)
            wide[:-1, :, : model.shape[2]], wide[-1:, :, :length] = model, row
            for array in cache.read():
                for number, filled in enumerate(lengths):
                    assert np.array_equal(array[number, :, :filled], wide[number, :, :filled])
            short = min(lengths)
            cache.trim([short] * len(wide))
            model = wide[:, :, :short]
        elif action == "leave" and len(model) > 1:
            row = data.draw(st.integers(0, len(model) - 1))
            cache.leave(row)
            model[row] = model[-1]
            model = model[:-1]
        elif action == "trim":
            length = data.draw(st.integers(0, cache.length))
            cache.trim([length] * len(model))
            model = model[:, :, :length]
        elif cache.length:
            cache.fill([array.copy() for array in cache.read()], [cache.length] * len(model))
        assert cache.length == model.shape[2]
        for array in cache.read():
            assert np.array_equal(array, model)


def test_beams_that_stay_cost_no_memory():
    backend = FakeBackend()
    cache = make_cache(backend, backend.graph, context_tokens=2000)
    cache.start(3)
    binding = backend.binding()
    cache.bind(binding, [100] * 3, 100)
    cache.advance([100] * 3)
    before = [contents(binding.given[state.past]) for state in backend.graph.states]
    cache.select(np.array([0, 0, 2] if backend.memory.is_host else [0, 1, 2]))
    cache.bind(binding, [101] * 3, 101)
    assert all(
        a is contents(binding.given[s.past]) for a, s in zip(before, backend.graph.states, strict=True)
    )
