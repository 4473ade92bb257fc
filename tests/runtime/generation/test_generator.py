"""The generation loop over a model in numpy: whatever is done between steps, logits equal a recomputation."""

from __future__ import annotations

import functools
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ortlm.errors import BadOption, Cancelled, CannotRewind, ContextFull
from ortlm.runtime.engine.decode_loop import Loop
from ortlm.runtime.generation.generator import Generator
from ortlm.runtime.generation.rules import Rules
from ortlm.runtime.generation.speculative import Draft, Lookup
from ortlm.runtime.sampling.settings import Settings
from tests.runtime.fakes import VOCAB, FakeBackend


def generator_of(backend=None, *, context=256, chunk=512, rules=None, **options):
    backend = backend or FakeBackend()
    loop = Loop(backend, backend.graph, context_tokens=context, chunk_tokens=chunk)
    return Generator(loop, Rules(context, VOCAB, **(rules or {})), Settings(**options))


def truth(tokens):
    """Logits [V] after ``tokens``, from one fresh run."""
    backend = FakeBackend()
    loop = Loop(backend, backend.graph, context_tokens=4096, chunk_tokens=4096)
    loop.start()
    return loop.append([tokens])[0]


@functools.cache
def known(*tokens):
    """``truth`` of tokens that are asked about many times."""
    return truth(list(tokens))


def close(got, want):
    return np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


class Guesser:
    """Proposes random tokens, now and then what really comes."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)

    def adapt(self, settings):
        pass

    def propose(self, row, tokens, room, random):
        if self.random.random() < 0.3:
            return None
        known, found = tokens.tolist(), []
        for _ in range(int(self.random.integers(1, room + 1))):
            right = int(truth([*known, *found]).argmax())
            found.append(right if self.random.random() < 0.8 else int(self.random.integers(VOCAB)))
        return Draft(found)


token = st.integers(0, VOCAB - 1)
tokens = st.lists(token, max_size=5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
@pytest.mark.parametrize("kind", ["grow", "append"])
@pytest.mark.parametrize("optional", [True, False])
def test_logits_equal_a_recomputation_whatever_is_done(kind, optional, data):
    draw = data.draw
    rows = draw(st.integers(1, 3), label="rows")
    guesser = Guesser(0) if draw(st.booleans(), label="drafts") and (optional or rows == 1) else None
    generator = generator_of(
        FakeBackend(kind, optional=optional, all_logits=not optional),
        chunk=draw(st.integers(1, 9), label="chunk"),
        rules={"proposer": lambda settings: guesser},
        temperature=2.0,
        seed=1,
    )
    generator.append([draw(st.lists(token, min_size=1, max_size=9), label="prompt") for _ in range(rows)])
    for _ in range(draw(st.integers(1, 12), label="actions")):
        action = draw(st.sampled_from(["step", "step", "append", "rewind", "change", "finish"]))
        if action == "step" and not generator.done and all(generator.lengths):
            before = generator.lengths
            chosen = generator.step()
            assert [b + (t >= 0) for b, t in zip(before, chosen, strict=True)] == generator.lengths
        elif action == "append":
            more = [draw(tokens) for _ in range(rows)]
            if any(more) and all(new or length for new, length in zip(more, generator.lengths, strict=True)):
                generator.append(more)
        elif action == "rewind":
            generator.rewind([draw(st.integers(0, length)) for length in generator.lengths])
        elif action == "change":
            generator.change(
                **draw(st.sampled_from([{"temperature": 0.5}, {"do_sample": False}, {"top_k": 3}]))
            )
        elif action == "finish":
            generator.finish(draw(st.integers(0, rows - 1)), "stop")
        if all(generator.lengths):
            for row, logits in enumerate(generator.logits):
                if generator.finish_reasons[row] is None:
                    assert close(logits, truth(generator.sequence(row)))


def test_steps_and_the_reasons_for_their_end():
    generator = generator_of(max_new_tokens=3, stop_token_ids=[4])
    with pytest.raises(BadOption, match="append its tokens first"):
        generator.step()
    assert not generator.done
    generator.append([[1, 2], [3]])
    for chosen in ([4, 5], [4, 6], [4, 7]):
        generator.logits = np.eye(VOCAB)[chosen]
        tokens = generator.step()
        assert tokens.tolist() == ([4, 5] if chosen[1] == 5 else [-1, chosen[1]])
    assert generator.finish_reasons == ["stop", "length"]
    assert generator.done
    assert generator.sequence(0) == [1, 2, 4]
    assert [len(answers[0].token_ids) for answers in generator.answers()] == [1, 3]
    with pytest.raises(BadOption, match="every row has ended"):
        generator.step()
    # More room revives the row that had none, not the one that stopped.
    generator.change(max_new_tokens=4)
    assert generator.finish_reasons == ["stop", None]


def test_the_conversation_goes_on_after_a_stop_token():
    stop = int(truth([1, 2, 3]).argmax())
    generator = generator_of(stop_token_ids=[stop], max_new_tokens=2)
    generator.append([1, 2, 3])
    generator.step()
    assert generator.done
    generator.append([7, 8])
    assert not generator.done
    assert close(generator.logits[0], truth([1, 2, 3, stop, 7, 8]))
    assert generator.answers()[0][0].token_ids == ()


def test_logits_can_be_read_and_set_before_a_step():
    generator = generator_of()
    generator.append([[1], [2]])
    logits = np.full((2, VOCAB), -1.0)
    logits[0, 4] = logits[1, 9] = 1.0
    generator.logits = logits
    assert generator.step().tolist() == [4, 9]
    assert close(generator.logits[1], truth([2, 9]))
    with pytest.raises(BadOption, match=r"shape \[2, 11\], found \[11\]"):
        generator.logits = np.zeros(VOCAB)


def test_answers_to_one_prompt_are_prefilled_once_and_draw_for_themselves():
    backend = FakeBackend()
    generator = generator_of(backend, temperature=1.5, seed=7, num_return_sequences=3, max_new_tokens=8)
    generator.append([1, 2, 3, 4])
    while not generator.done:
        generator.step()
    assert backend.runs[0] == (1, 4)
    for row in range(3):
        alone = generator_of(temperature=1.5, seed=7 + row, max_new_tokens=8)
        alone.append([1, 2, 3, 4])
        while not alone.done:
            alone.step()
        assert generator.sequence(row) == alone.sequence()


def test_batch_neighbours_change_nothing():
    generator = generator_of(temperature=1.5, seed=3, max_new_tokens=6)
    generator.append([[1, 2], [3, 4, 5, 6]])
    while not generator.done:
        generator.step()
    for row, prompt in enumerate(([1, 2], [3, 4, 5, 6])):
        alone = generator_of(temperature=1.5, seed=3, max_new_tokens=6)
        alone.append(prompt)
        while not alone.done:
            alone.step()
        assert generator.sequence(row) == alone.sequence()


def test_a_callable_of_ones_own_scores():
    seen = []

    def only_five(history, logits):
        seen.append(history.tolist())
        logits[:] = -np.inf
        logits[:, 5] = 0
        return logits

    generator = generator_of(processors=only_five, max_new_tokens=2)
    generator.append([[1], [2, 3]])
    raw = generator.logits.copy()
    assert generator.step().tolist() == [5, 5]
    assert np.isfinite(raw).all()
    assert seen == [[[1, -1], [2, 3]]]


def test_a_full_context_ends_every_row_on_its_own():
    generator = generator_of(context=6)
    generator.append([[1, 2, 3, 4], [5]])
    generator.step()
    generator.step()
    generator.step()
    assert generator.finish_reasons == ["length", None]
    while not generator.done:
        generator.step()
    # The last token is generated, but never fed.
    assert generator.lengths == [7, 7]
    with pytest.raises(ContextFull, match="7 and 1 more are tokens"):
        generator.append([[1], []])
    generator.rewind([3, 2])
    assert close(generator.logits[0], truth([1, 2, 3]))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("text", "encode texts first"),
        ([], "nothing to append"),
        ([[1], []], "row 1 is empty"),
        ([1, VOCAB], "token id 11 at index 1 is outside the vocabulary 0 … 10"),
        ([1.5], "whole numbers; found 1.5"),
        ([[1], "x"], "found a mixture"),
        ([True], "found True"),
    ],
)
def test_what_cannot_be_appended(prompt, message):
    with pytest.raises(BadOption, match=message):
        generator_of().append(prompt)


def test_arrays_are_rows_of_tokens():
    generator = generator_of()
    generator.append(np.array([[1, 2], [3, 4]], dtype=np.int32))
    assert generator.sequence(1) == [3, 4]


def test_rewinding_refusals():
    generator = generator_of()
    generator.append([[1, 2], [3]])
    with pytest.raises(CannotRewind, match="row 1 has 1 tokens and cannot rewind to 2"):
        generator.rewind(2)
    with pytest.raises(BadOption, match="2 rows, but 1 lengths"):
        generator.rewind([1])
    generator.rewind(0)
    with pytest.raises(BadOption, match="row 1 is empty"):
        generator.append([[1], []])
    generator.append([[4], [5, 6]])
    assert close(generator.logits[1], truth([5, 6]))


def test_cancelling_leaves_a_generator_that_goes_on():
    generator = generator_of(chunk=2)
    generator.append([1, 2, 3])
    generator.cancel()
    with pytest.raises(Cancelled):
        generator.append([4, 5, 6, 7, 8])
    assert close(generator.logits[0], truth([1, 2, 3, 4, 5, 6, 7, 8]))


def test_a_first_prompt_that_was_cancelled_may_be_appended_again():
    generator = generator_of(chunk=2, temperature=1.0, seed=0, num_return_sequences=2)
    generator.cancel()
    with pytest.raises(Cancelled):
        generator.append([1, 2, 3])
    assert generator.rows == 0
    generator.append([1, 2, 3])
    assert generator.step().shape == (2,)


def test_drafts_change_nothing_but_the_number_of_runs():
    prompt = [1, 2, 3, 4, 5]
    plain = generator_of(max_new_tokens=40)
    guesser = Guesser(5)
    drafted = generator_of(rules={"proposer": lambda settings: guesser}, max_new_tokens=40)
    for generator in (plain, drafted):
        generator.append(prompt)
        while not generator.done:
            generator.step()
    assert drafted.sequence() == plain.sequence()
    assert drafted.runs < plain.runs
    assert 0 < drafted.accepted_tokens < drafted.proposed_tokens


class Drawing:
    """Proposes tokens drawn from probabilities of its own, or without any."""

    def __init__(self, *, drawn):
        self.drawn = drawn

    def adapt(self, settings):
        pass

    def propose(self, row, tokens, room, random):
        found, used = [], []
        for _ in range(min(room, 2)):
            # Likes other tokens than the model does, and some of them never.
            weights = np.exp(known(*tokens.tolist(), *found)[::-1].astype(np.float64))
            weights[weights < np.median(weights)] = 0
            used.append(weights / weights.sum())
            found.append(int(random.choice(VOCAB, p=used[-1])))
        return Draft(found, used if self.drawn else [])


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [True, False])
def test_drafts_keep_the_distribution(drawn):
    """The second and third token after a prompt, many times, against their exact probabilities."""
    prompt, draws = [1, 2, 3, 4], 3000
    generator = generator_of(
        rules={"proposer": lambda settings: Drawing(drawn=drawn)}, temperature=1.0, top_k=3, seed=0
    )
    generator.append(prompt)
    generator.logits = np.eye(VOCAB)[[5]] * 1e6
    generator.step()

    def likely(tokens):
        logits = truth(tokens).astype(np.float64)
        best = np.argsort(-logits)[:3]
        weights = np.exp(logits[best] - logits[best].max())
        return zip(best.tolist(), weights / weights.sum(), strict=True)

    exact = {(a, b): p * q for a, p in likely([*prompt, 5]) for b, q in likely([*prompt, 5, a])}
    counts = dict.fromkeys(exact, 0)
    for _ in range(draws):
        generator.rewind(len(prompt) + 1)
        counts[int(generator.step()[0]), int(generator.step()[0])] += 1
    assert generator.accepted_tokens > draws / 4
    assert generator.proposed_tokens > generator.accepted_tokens
    statistic = sum((counts[key] - draws * p) ** 2 / (draws * p) for key, p in exact.items())
    assert statistic < 26.1  # the 0.999 quantile of chi-square with 8 degrees of freedom


def test_lookup_finds_what_followed_before():
    text = np.array([1, 2, 3, 4, 5, 9, 1, 2, 3])
    random = np.random.default_rng(0)
    assert Lookup().propose(0, text, 3, random).tokens == [4, 5, 9]
    assert Lookup().propose(0, np.array([1, 2, 3, 4, 7, 2]), 3, random) is None
    # The latest place has too little after it.
    assert Lookup().propose(0, np.array([6, 6, 1, 2, 6, 6, 6]), 3, random).tokens == [1, 2, 6]


def test_lookup_pauses_where_it_is_always_wrong():
    lookup, random = Lookup(), np.random.default_rng(0)
    history, offered = [1, 2] * 8, 0
    for wrong in random.integers(100, size=200).tolist():
        draft = lookup.propose(0, np.array(history), 7, random)
        offered += len(draft.tokens) if draft else 0
        history += [3 + wrong, 1, 2]
    assert offered < 20


def test_two_threads_each_with_a_generator():
    found = {}

    def work(number):
        generator = generator_of(temperature=1.0, seed=number, max_new_tokens=50)
        generator.append([number])
        while not generator.done:
            generator.step()
        found[number] = generator.sequence()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(close(truth(found[n][:-1]), truth(found[n][:-1])) and len(found[n]) == 51 for n in range(4))


def test_settings_that_cannot_be_used_change_nothing():
    adapted, inputs = [], []

    class Noted(Guesser):
        def adapt(self, settings):
            adapted.append(settings)

    rules = {"proposer": lambda settings: Noted(0), "adapter": lambda name: inputs.append(name) or {}}
    generator = generator_of(max_new_tokens=8, do_sample=False, seed=1, rules=rules)
    generator.append([[1, 2], [3]])
    used = []
    generator.loop.use = used.append
    for wrong in (
        {"adapter": "other", "guidance": ["one", "two", "three"]},
        {"temperature": 2.0, "do_sample": True, "seed": (1, 2, 3)},
        {"max_new_tokens": 1, "bad_words": ["text"]},
        {"num_return_sequences": 2},
    ):
        before = dict(vars(generator))
        with pytest.raises(BadOption):
            generator.change(**wrong)
        assert vars(generator) == before
        assert not adapted
        assert not used
    generator.change(adapter="other", temperature=2.0)
    assert len(adapted) == len(used) == 1
    assert generator.mixed
