"""Loop and caches together, over every kind of cache: feeding in parts equals feeding at once."""

from dataclasses import replace

import numpy as np
import pytest

from ortlm.errors import BadArtifact, BadOption, CannotRewind, ContextFull
from ortlm.runtime.engine.decode_loop import Loop
from ortlm.runtime.engine.kv_cache import AppendCache, SharedCache, make_cache, state_shapes
from tests.runtime.fakes import HEADS, WIDTH, FakeBackend

IDS = [int(i) for i in np.random.default_rng(1).integers(0, 11, 700)]
KINDS = ("grow", "append")


def loop_of(backend, context=1024, **options):
    return Loop(backend, backend.graph, context_tokens=context, **options)


def truth(ids):
    """Logits [S, V], each from a fresh run over all tokens so far."""
    return loop_fed(FakeBackend(), ids, keep=len(ids))


def loop_fed(backend, ids, **options):
    loop = loop_of(backend, chunk_tokens=len(ids))
    loop.start()
    return loop.append([ids], **options)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optional", [True, False])
def test_append_equals_recompute(kind, optional):
    loop = loop_of(FakeBackend(kind, optional=optional))
    loop.start()
    expected = truth(IDS[:20])
    assert np.allclose(loop.append([IDS[:7]]), expected[6])
    assert np.allclose(loop.step(np.array([IDS[7]])), expected[7])
    assert np.allclose(loop.append([IDS[8:15]]), expected[14])
    assert loop.length == loop.cache.length == 15


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend_options", [{}, {"all_logits": True, "optional": False}])
def test_long_prompts_are_fed_in_chunks(kind, backend_options):
    backend = FakeBackend(kind, **backend_options)
    loop = loop_of(backend, chunk_tokens=64)
    loop.start()
    got = loop.append([IDS[:150]], keep=150)[0]
    assert np.allclose(got, truth(IDS[:150]), atol=1e-5)
    assert backend.runs == [(1, 64), (1, 64), (1, 22)]


@pytest.mark.parametrize("kind", KINDS)
def test_devices_that_take_the_cache_of_several_tokens_for_empty(kind):
    """A whole prompt at once, whatever its length; later tokens of a row one by one, drafts too."""
    backend = FakeBackend(kind)
    loop = loop_of(backend, chunk_tokens=4, appends_one=True)
    loop.start()
    assert np.allclose(loop.append([IDS[:9]])[0], truth(IDS[:9])[-1])
    got = loop.append([IDS[9:12]], keep=3)[0]
    assert np.allclose(got, truth(IDS[:12])[-3:])
    loop.trim(5)
    assert np.allclose(loop.append([IDS[5:7]])[0], truth(IDS[:7])[-1])
    assert backend.runs == [(1, 9), *[(1, 1)] * 5]


@pytest.mark.parametrize("kind", KINDS)
def test_devices_that_take_few_tokens_at_once(kind):
    backend = FakeBackend(kind, optional=False)
    loop = loop_of(backend, most_tokens=4)
    loop.start()
    assert np.allclose(loop.append([IDS[:9]])[0], truth(IDS[:9])[-1])
    assert backend.runs == [(1, 4), (1, 4), (1, 1)]
    backend.runs.clear()
    loop.start(2)
    for row, ids in zip(loop.append([IDS[:5], IDS[5:8]]), (IDS[:5], IDS[5:8]), strict=True):
        assert np.allclose(row, truth(ids)[-1])
    assert set(backend.runs) == {(2, 1)}
    loop = loop_of(FakeBackend(kind), switch_tokens=8, most_tokens=4)
    loop.start()
    with pytest.raises(
        BadOption, match="9 tokens of this prompt have to be fed at once, and the device takes 4"
    ):
        loop.append([IDS[:12]])


def test_a_graph_with_last_logits_only_is_asked_token_by_token():
    backend = FakeBackend(optional=False)
    backend.outputs["logits"] = type(backend.outputs["logits"])(
        "logits", backend.outputs["logits"].dtype, (None, 1, 11)
    )
    assert np.allclose(loop_fed(backend, IDS[:9], keep=9), truth(IDS[:9]))


@pytest.mark.parametrize("kind", KINDS)
def test_trim_goes_back(kind):
    loop = loop_of(FakeBackend(kind))
    loop.start()
    loop.append([IDS[:12]])
    loop.trim(5)
    assert loop.history == [IDS[:5]]
    other = [*IDS[:5], 3, 1, 4]
    assert np.allclose(loop.append([[3, 1, 4]])[0], truth(other)[-1])
    with pytest.raises(CannotRewind, match="8 positions"):
        loop.cache.trim([9])


@pytest.mark.parametrize("kind", KINDS)
def test_select_takes_rows(kind):
    loop = loop_of(FakeBackend(kind))
    loop.start(2)
    loop.append([IDS[:6], IDS[6:12]])
    loop.select(np.array([1, 0, 1]))
    got = loop.step(np.array([2, 2, 5]))
    for row, ids in zip(got, ([*IDS[6:12], 2], [*IDS[:6], 2], [*IDS[6:12], 5]), strict=True):
        assert np.allclose(row, truth(ids)[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_batch_equals_single_rows(kind):
    prompts = [IDS[:7], IDS[10:13], IDS[20:32]]
    loop = loop_of(FakeBackend(kind))
    loop.start(3)
    got = loop.append(prompts)
    for row, ids in zip(got, prompts, strict=True):
        assert np.allclose(row, truth(ids)[-1])
    for token in (4, 9):
        got = loop.step(np.array([token] * 3))
        prompts = [[*ids, token] for ids in prompts]
        for row, ids in zip(got, prompts, strict=True):
            assert np.allclose(row, truth(ids)[-1])


def test_ragged_append_uses_query_lengths():
    rows = [IDS[:7], IDS[10:13]]
    loop = loop_of(FakeBackend())
    loop.start(2)
    loop.append(rows)
    more = [[1], [2, 3, 4, 5]]
    got = loop.append(more)
    for row, old, new in zip(got, rows, more, strict=True):
        assert np.allclose(row, truth([*old, *new])[-1])
    loop = loop_of(FakeBackend(optional=False))
    loop.start(2)
    loop.append(rows)
    # Such a graph takes one token of each row at a time; a row that has none left repeats its last.
    for row, old, new in zip(loop.append(more), rows, more, strict=True):
        assert np.allclose(row, truth([*old, *new])[-1])
    assert loop.history == [[*old, *new] for old, new in zip(rows, more, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optional", [True, False])
def test_rows_are_taken_back_and_fed_each_on_its_own(kind, optional):
    loop = loop_of(FakeBackend(kind, optional=optional), chunk_tokens=3)
    loop.start(3)
    loop.append([IDS[:9], IDS[20:24], IDS[30:31]])
    loop.trim([2, 4, 0])
    got = loop.append([[1, 2, 3, 4, 5], [], [6]])
    for row, ids in zip(got, ([*IDS[:2], 1, 2, 3, 4, 5], IDS[20:24], [6]), strict=True):
        assert np.allclose(row, truth(ids)[-1])


def test_the_last_logits_of_rows_of_different_lengths():
    loop = loop_of(FakeBackend(), chunk_tokens=64)
    loop.start(2)
    loop.append([IDS[:5], IDS[5:6]])
    got = loop.append([IDS[10:50], IDS[50:53]], keep=2)
    assert np.allclose(got[0], truth([*IDS[:5], *IDS[10:50]])[-2:])
    assert np.allclose(got[1], truth([*IDS[5:6], *IDS[50:53]])[-2:])


def test_rope_switch_recomputes_once(caplog):
    caplog.set_level("INFO", logger="ortlm")
    backend = FakeBackend(switch=8)
    loop = loop_of(backend, switch_tokens=8, chunk_tokens=4)
    loop.start()
    loop.append([IDS[:7]])
    loop.step(np.array([IDS[7]]))
    assert loop.recomputed == 0
    backend.runs.clear()
    crossing = loop.step(np.array([IDS[8]])).copy()
    assert backend.runs == [(1, 9)]
    loop.step(np.array([IDS[9]]))
    assert loop.recomputed == 1
    assert caplog.text.count("computing 8 tokens again") == 1
    fresh = loop_of(FakeBackend(switch=8), switch_tokens=8)
    fresh.start()
    assert np.allclose(crossing, fresh.append([IDS[:9]]))
    # Back below the switch the other table holds again.
    loop.trim(5)
    assert np.allclose(loop.step(np.array([IDS[5]]))[0], truth(IDS[:6])[-1])
    assert loop.recomputed == 2


def test_first_chunk_of_a_long_prompt_crosses_the_switch():
    backend = FakeBackend(switch=8)
    loop = loop_of(backend, switch_tokens=8, chunk_tokens=4)
    loop.start()
    loop.append([IDS[:15]])
    assert backend.runs == [(1, 9), (1, 4), (1, 2)]


def test_a_step_binds_nothing_but_the_mask():
    loop = loop_of(FakeBackend())
    loop.start()
    loop.append([IDS[:3]])
    loop.step(np.array([1]))
    before = loop._bound.binding.bound
    # A device never sees the new token in the old memory.
    each = 1 if loop._backend.memory.is_host else 2
    loop.step(np.array([1]))
    assert loop._bound.binding.bound == before + each
    loop.step(np.array([2]))
    assert loop._bound.binding.bound == before + 2 * each


def test_the_fakes_are_a_device_every_second_time(request):
    on_device = "[device]" in request.node.name
    assert FakeBackend.device == on_device
    assert FakeBackend().memory.is_host != on_device


def test_a_step_of_a_batch_equals_appending_row_by_row():
    """Rows of different lengths, of which some get nothing: they give their last token's logits again."""
    rows = [IDS[:3], IDS[2:7], IDS[4:6]]
    batch, other = loop_of(FakeBackend()), loop_of(FakeBackend())
    for loop in (batch, other):
        loop.start(3)
        loop.append(rows)
        loop.append([[5], [6], [7]])
    for tokens in ([1, 2, 3], [4, -1, 5], [-1, -1, 6], [7, 8, 9], [-1, -1, -1]):
        found = batch.step(np.array(tokens)).copy()
        wanted = other.append([[token] if token >= 0 else [] for token in tokens])
        np.testing.assert_array_equal(found, wanted)
        assert batch.history == other.history


def test_what_is_written_behind_a_binding_is_noticed():
    """The fakes' devices fail if the runtime relies on memory that they have copied."""
    backend = FakeBackend()
    if backend.memory.is_host:
        return
    loop = loop_of(backend)
    loop._bound.inputs._in_place = True
    loop.start()
    loop.append([IDS[:3]])
    loop.step(np.array([1]))
    with pytest.raises(AssertionError, match="input_ids was written to after it was bound"):
        loop.step(np.array([2]))
    with pytest.raises(TypeError, match="lies on a device"):
        loop.cache._tensors[0].numpy()


def test_refusals():
    loop = loop_of(FakeBackend(), context=8)
    loop.start()
    with pytest.raises(ContextFull, match="holds 8 tokens; 0 are in it and 9 more"):
        loop.append([IDS[:9]])
    with pytest.raises(BadOption, match="row 0 has no token"):
        loop.append([[]])
    with pytest.raises(BadOption, match="1 rows, but tokens of 2"):
        loop.append([[1], [2]])
    loop.append([IDS[:8]])
    with pytest.raises(ContextFull):
        loop.step(np.array([1]))


def test_shared_cache_grows_and_keeps_its_contents():
    backend = FakeBackend()
    loop = loop_of(backend, context=100_000)
    loop.start()
    assert isinstance(loop.cache, SharedCache)
    capacities = []
    for token in IDS[:600]:
        last = loop.step(np.array([token]))
        capacities.append(loop.cache.capacity)
    assert sorted(set(capacities)) == [256, 512, 768]
    assert np.allclose(last[0], truth(IDS[:600])[-1], atol=1e-5)
    assert loop.cache.nbytes == 2 * HEADS * 768 * WIDTH * 4


def test_shared_cache_stays_within_the_context():
    loop = loop_of(FakeBackend(), context=300)
    loop.start()
    loop.append([IDS[:260]])
    assert loop.cache.capacity == 300


def test_make_cache_goes_by_kind():
    for kind, type_ in (("grow", SharedCache), ("append", AppendCache)):
        backend = FakeBackend(kind)
        assert type(make_cache(backend, backend.graph, context_tokens=8)) is type_
    backend = FakeBackend("window")
    with pytest.raises(BadArtifact, match="'window' without a window"):
        make_cache(backend, backend.graph, context_tokens=8)


def test_an_undeclared_head_size_is_taken_from_the_configuration():
    backend = FakeBackend("append", width=None)
    with pytest.raises(BadArtifact, match=r"neither input past.key nor genai_config.json.*head_size"):
        state_shapes(backend, backend.graph)
    states = tuple(replace(state, head_dim=24) for state in backend.graph.states)
    assert state_shapes(backend, replace(backend.graph, states=states)) == [(HEADS, 24)] * 2
