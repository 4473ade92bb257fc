"""States of one size against computing everything again, whatever was appended, stepped, rewound or branched."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ortlm.artifact import Graph, State
from ortlm.dtypes import dtype
from ortlm.errors import BadOption, CannotRewind
from ortlm.runtime.engine import prompt_cache
from ortlm.runtime.engine.backend import TensorInfo
from ortlm.runtime.engine.decode_loop import Loop
from ortlm.runtime.engine.fixed_state_cache import FixedStateCache
from ortlm.runtime.engine.kv_cache import make_cache
from tests.architectures import oracle
from tests.runtime.fakes import FakeBackend, contents

ROWS = ["lfm2", "qwen3.5", "granite4-h"]
LONGEST = 90


@pytest.fixture(scope="module", params=ROWS)
def lm(request, build):
    """Return a model with such states, and what it says after a text, read at once."""
    lm = build(request.param)

    @functools.cache
    def after(tokens):
        return lm.logits(tokens)[-1]

    return lm, after


def loop_of(lm, *, chunk=8, lengths=True):
    loop = lm.loop()
    graph = lm.manifest.graphs["decoder"]
    optional = dict(loop._graph.optional)
    if not lengths:
        optional.pop("query_lengths")
    graph = Graph(graph.file, graph.inputs, graph.outputs, graph.states, optional)
    return Loop(loop._backend, graph, context_tokens=LONGEST * 2, chunk_tokens=chunk)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_sequence_gives_what_recomputing_gives(data, lm):
    lm, after = lm
    loop = loop_of(lm, chunk=data.draw(st.sampled_from([4, 32])), lengths=data.draw(st.booleans()))
    rows = data.draw(st.integers(1, 3))
    token = st.integers(0, 20)
    texts = [[1] for _ in range(rows)]
    loop.start(rows)
    loop.append(texts)
    for _ in range(data.draw(st.integers(1, 7))):
        action = data.draw(
            st.sampled_from(["append", "step", "step", "rewind", "rewind", "branch", "save", "join", "leave"])
        )
        if action == "append":
            new = [data.draw(st.lists(token, max_size=20)) for _ in texts]
            texts = [[*old, *more][:LONGEST] for old, more in zip(texts, new, strict=True)]
            got = loop.append([text[len(old) :] for text, old in zip(texts, loop.history, strict=True)])
        elif action == "step":
            new = [data.draw(st.integers(-1, 20)) for _ in texts]
            texts = [[*old, t] if t >= 0 else old for old, t in zip(texts, new, strict=True)]
            got = loop.step(new)
        elif action == "rewind":
            texts = [text[: data.draw(st.integers(1, len(text)))] for text in texts]
            loop.trim([len(text) for text in texts])
            continue
        elif action == "branch":
            rows = data.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=3))
            loop.select(np.array(rows))
            texts = [list(texts[row]) for row in rows]
            continue
        elif action == "join":
            other, at = loop_of(lm), data.draw(st.integers(0, len(texts) - 1))
            other.join(loop.history[at], [state.copy() for state in loop.row(at)])
            loop.join(other.history[0], other.row(0))
            texts.append(list(texts[at]))
            continue
        elif action == "leave":
            at = data.draw(st.integers(0, len(texts) - 1))
            if len(texts) > 1:
                loop.leave(at)
                texts[at] = texts[-1]
                texts.pop()
            continue
        else:
            states = [state.copy() for state in loop.filled()]
            other = loop_of(lm)
            other.start(len(texts))
            other.adopt(loop.history, states)
            loop = other
            continue
        assert loop.history == texts
        for logits, text in zip(got, texts, strict=True):
            assert oracle.relative_error(logits, after(tuple(text))) < 1e-4


def test_rewinding_feeds_only_what_follows_a_checkpoint(lm):
    lm, after = lm
    ids = oracle.random_tokens(80)
    loop = loop_of(lm, chunk=16)
    loop.start()
    loop.append([ids[:70]])
    fed = []
    forward = loop._forward
    loop._forward = lambda rows, **given: (fed.append(len(rows[0])), forward(rows, **given))[1]
    loop.trim(66)
    got = loop.append([ids[66:68]])
    # The chunks ended at 16, 32, 48 and 64.
    assert sum(fed) == 4
    assert oracle.relative_error(got[0], after(tuple(ids[:68]))) < 1e-4
    fed.clear()
    # Drafts of which none was right: back to before them.
    loop.append([ids[68:72]])
    loop.trim(69)
    got = loop.append([ids[69:70]])
    assert fed == [4, 2]
    assert oracle.relative_error(got[0], after(tuple(ids[:70]))) < 1e-4
    assert loop.recomputed == 0
    loop.trim(3)
    loop.append([ids[3:5]])
    assert loop.recomputed == 1


def test_a_row_leaves_others_that_were_rewound_to_where_no_state_is_kept(lm):
    lm, after = lm
    ids = oracle.random_tokens(10)
    loop = loop_of(lm)
    loop.start(2)
    loop.append([ids, ids[3:]])
    for token in (1, 2, 3):
        loop.step([token, token])
    loop.trim([7, 10])
    loop.leave(1)
    got = loop.append([[5]])
    assert loop.history == [[*ids[:7], 5]]
    assert oracle.relative_error(got[0], after((*ids[:7], 5))) < 1e-4


def test_a_row_without_new_tokens_is_computed_again_for_another_adapter(lm):
    lm, _ = lm
    loop = loop_of(lm)
    loop.start(2)
    loop.append([[1, 2, 3], [4, 5]])
    fed = []
    forward = loop._forward
    loop._forward = lambda rows, **given: (fed.append([len(row) for row in rows]), forward(rows, **given))[1]
    loop.append([[], []])
    assert not fed
    loop.use({})
    loop.append([[], []])
    assert fed


def test_a_row_without_new_tokens_does_not_make_the_text_too_long(lm):
    lm, after = lm
    loop = loop_of(lm)
    loop._switch = 9
    loop.start(2)
    loop.append([oracle.random_tokens(9), [4, 5]])
    got = loop.append([[], [6]])
    assert not loop._long
    assert loop.history == [oracle.random_tokens(9), [4, 5, 6]]
    for logits, text in zip(got, loop.history, strict=True):
        assert oracle.relative_error(logits, after(tuple(text))) < 1e-4


def test_steps_feed_no_token_twice(lm):
    lm, _ = lm
    loop = loop_of(lm)
    loop.start(2)
    loop.append([oracle.random_tokens(9), oracle.random_tokens(5)])
    fed = []
    forward = loop._forward
    loop._forward = lambda rows, **given: (fed.append([len(row) for row in rows]), forward(rows, **given))[1]
    for step in ([3, -1], [4, -1], [5, -1], [6, 7]):
        loop.step(step)
    assert fed == [[1, 1]] * 4
    assert loop.history[1][5:] == [7]


def test_drafts_and_beams_choose_what_recomputing_chooses(lm):
    lm, after = lm
    prompt = oracle.random_tokens(7) * 3
    plain = chosen(lm, prompt)
    drafted = chosen(lm, prompt, draft="lookup")
    assert drafted == plain
    generator = lm.generator(num_beams=3, max_new_tokens=8, ignore_eos=True)
    generator.append([prompt])
    while not generator.done:
        generator.step()
    answer = generator.sequence()
    want = plain_beams(after, prompt, size=3, steps=8)
    assert answer == want


def chosen(lm, prompt, **options):
    generator = lm.generator(max_new_tokens=40, ignore_eos=True, **options)
    generator.append([prompt])
    while not generator.done:
        generator.step()
    return generator.sequence()


def plain_beams(after, prompt, *, size, steps):
    """Return the best of ``size`` beams, all as long, by computing each from scratch."""
    beams = [(0.0, tuple(prompt))]
    for _ in range(steps):
        found = []
        for score, text in beams:
            logits = after(text).astype(np.float64)
            logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            found += [(score + logprobs[t], (*text, int(t))) for t in np.argsort(-logprobs)[: 2 * size]]
        beams = sorted(found, reverse=True)[:size]
    return list(beams[0][1])


def test_a_saved_prompt_is_resumed(lm, tmp_path):
    lm, after = lm
    ids = oracle.random_tokens(30)
    loop = loop_of(lm)
    loop.start()
    loop.append([ids])
    loop.trim(27)
    prompt_cache.save(loop, tmp_path / "saved", model="m")
    other = loop_of(lm)
    other.start()
    prompt_cache.restore(other, tmp_path / "saved", model="m")
    assert other.history == [ids[:27]]
    got = other.append([ids[27:]])
    assert oracle.relative_error(got[0], after(tuple(ids))) < 1e-4
    # Nothing is kept before the place where it was saved.
    other.trim(20)
    got = other.append([ids[20:]])
    assert other.recomputed == 1
    assert oracle.relative_error(got[0], after(tuple(ids))) < 1e-4


class Counting(FakeBackend):
    """A backend whose one state is how many tokens there were."""

    def __init__(self):
        super().__init__()
        self.inputs = {"past": TensorInfo("past", dtype("fp32"), (None, 1, 1))}
        self.outputs = {"present": TensorInfo("present", dtype("fp32"), (None, 1, 1))}
        self.graph = Graph("x.onnx", {}, {}, (State("past", "present", "recurrent"),))


def advance(cache, binding, ends):
    cache.bind(binding, ends, max(ends))
    contents(binding.taken["present"])[:, 0, 0] = ends
    cache.advance(ends)


def test_checkpoints_are_few_and_closer_together_towards_the_end():
    backend = Counting()
    if not backend.memory.is_host:
        with pytest.raises(BadOption, match="main memory"):
            make_cache(backend, backend.graph, context_tokens=100)
        return
    cache = make_cache(backend, backend.graph, context_tokens=10**6)
    assert isinstance(cache, FixedStateCache)
    cache.start(1)
    binding = backend.binding()
    for end in range(256, 30_001, 256):
        advance(cache, binding, [end])
    for end in range(29_953, 29_960):
        advance(cache, binding, [end])
    assert cache.nbytes <= 4 * 11
    reached = [cache.reachable([n])[0] for n in (29_958, 29_957, 29_000, 25_000, 16_000, 9_000, 100)]
    assert reached[0] == 29_958
    assert reached[1] <= 29_952
    assert reached[2] > 27_000
    assert reached[3] > 15_000
    assert reached[4] > 0
    assert reached[-1] == 0
    with pytest.raises(CannotRewind, match="29957"):
        cache.trim([29_957])
    cache.trim([reached[3]])
    assert cache.read()[0].item() == reached[3]
    assert cache.reachable([29_958]) == [reached[3]]
