"""Many requests at once: each answer is what it would be alone, whatever happens to the others."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import ExitStack
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ortlm
from ortlm import Guidance
from ortlm.builder.options import BuildOptions
from ortlm.errors import BadOption, ContextFull, Error, Overloaded, ShutDown, TimedOut
from ortlm.serving.engine import Engine, EngineOptions
from tests.serving.alone import says_alone

TEXTS = [
    "def read_lines(path):\n    with open(path) as file:\n",
    "import os\nimport sys\n",
    "class Reader:\n    def __init__(self",
    "for line in",
]


def punish(history, logits):
    """Make what the answer has said less likely, in a way that no setting knows."""
    new = logits.copy()
    for row, tokens in enumerate(history):
        new[row, tokens[tokens >= 0]] -= 1.5
    return new


# What a request may ask for; each is its own whatever the others are.
ASKED = [
    {},
    {"max_new_tokens": 1},
    {"max_new_tokens": 0},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "top_k": 20, "seed": 11},
    {"temperature": 1.2, "top_p": 0.9, "seed": 3, "repetition_penalty": 1.2},
    {"stop": ["\n"]},
    {"logprobs": 2},
    {"prompt_logprobs": 1, "max_new_tokens": 3},
    {"processors": punish},
    {"min_new_tokens": 4, "logit_bias": {5: 2.0}},
    {"guidance": Guidance.regex("[a-z]{3,8}")},
    {"no_repeat_ngram_size": 2, "frequency_penalty": 0.5},
]


def prompt(lm, text, copies):
    return lm.encode(TEXTS[text] * copies)


@cache
def alone(lm, text, copies, asked):
    options = {"max_new_tokens": 10, **ASKED[asked]}
    return says_alone(lm, prompt(lm, text, copies), **options)


def same(found, wanted):
    assert found.token_ids == wanted.token_ids
    assert (found.text, found.finish_reason) == (wanted.text, wanted.finish_reason)
    assert [t.token_id for t in found.logprobs] == [t.token_id for t in wanted.logprobs]
    for left, right in zip(found.logprobs, wanted.logprobs, strict=True):
        assert left.logprob == pytest.approx(right.logprob, abs=1e-4)
    assert len(found.prompt_logprobs) == len(wanted.prompt_logprobs)
    for one, other in zip(found.prompt_logprobs, wanted.prompt_logprobs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or one.logprob == pytest.approx(other.logprob, abs=1e-4)


REQUEST = st.tuples(
    st.integers(0, len(TEXTS) - 1),
    st.integers(1, 4),
    st.integers(0, len(ASKED) - 1),
    # After how many of its steps it is cancelled, and how many steps of it are read before the next one comes.
    st.none() | st.integers(0, 6),
    st.integers(0, 4),
)


@settings(max_examples=25)
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=12),
    batch=st.integers(1, 5),
    chunk=st.sampled_from([1, 7, 32, 256]),
    room=st.sampled_from([None, 130]),
    prefixes=st.sampled_from([None, 0, 300_000]),
)
def test_an_answer_is_what_it_would_be_alone(lm, requests, batch, chunk, room, prefixes):
    """Whoever comes and goes: random arrivals, lengths, settings, cancellations, little memory."""
    options = EngineOptions(
        batch=batch, chunk_tokens=chunk, cache_tokens=room, prefix_bytes=prefixes, reuse_answers=False
    )
    with Engine(lm, options) as engine:
        submitted = []
        for text, copies, asked, cancel, wait in requests:
            ids = prompt(lm, text, copies)
            request = engine.submit(ids, **{"max_new_tokens": 10, **ASKED[asked]})
            steps = []
            submitted.append((request, steps, iter(request), (text, copies, asked), cancel))
            for _ in range(wait):
                step = next(submitted[-1][2], None)
                if step is None:
                    break
                steps.append(step)
            if cancel is not None and len(steps) >= cancel:
                request.cancel()
        for request, steps, rest, key, cancel in submitted:
            for step in rest:
                steps.append(step)
                if cancel is not None and len(steps) >= cancel:
                    request.cancel()
            made = request.generation(steps)
            wanted = alone(lm, *key)
            if made.finish_reason == "cancelled":
                assert cancel is not None
                assert made.token_ids == wanted.token_ids[: len(made.token_ids)]
                assert wanted.text.startswith(made.text)
            else:
                same(made, wanted)
        stats = engine.stats()
    assert (stats.running, stats.prefilling, stats.waiting, stats.cache_tokens) == (0, 0, 0, 0)


FAMILIES = [
    ("llama", BuildOptions()),
    ("gemma3", BuildOptions(window_cache=True)),
    ("phi3-longrope", BuildOptions()),
    ("phi3-window", BuildOptions()),
    ("lfm2", BuildOptions()),
    ("qwen3.5", BuildOptions()),
    ("gemma4-e", BuildOptions()),
    ("gemma3n", BuildOptions()),
]


@pytest.mark.parametrize(("name", "options"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_every_kind_of_state(build, name, options):
    """Windows that evict, positions that are encoded again beyond a length, ragged rows."""
    lm = build(name, options=options)
    random = np.random.default_rng(0)
    shared = random.integers(6, lm.vocab_size, 20).tolist()
    prompts = [random.integers(6, lm.vocab_size, n).tolist() for n in (5, 60, 21, 80, 33)]
    prompts += [[*shared, *row[:9]] for row in prompts[:3]] + [[*shared, *prompts[1]]]
    wanted = [lm.generate(row, max_new_tokens=12, ignore_eos=True, reuse_cache=False) for row in prompts]
    with Engine(lm, EngineOptions(batch=4, chunk_tokens=16)) as engine:
        requests = [engine.submit(row, max_new_tokens=12, ignore_eos=True) for row in prompts]
        for request, expected in zip(requests, wanted, strict=True):
            assert request.result().token_ids == expected.token_ids
        assert engine.stats().batch_failures == 0


@pytest.mark.parametrize(("name", "options"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_drafts_change_no_answer(build, name, options):
    """Texts that repeat themselves, next to others, greedy and drawn: as many steps, or fewer."""
    lm = build(name, options=options)
    random = np.random.default_rng(3)
    pieces = [random.integers(6, lm.vocab_size, n).tolist() for n in (4, 7, 11)]
    prompts = [piece * (44 // len(piece)) for piece in pieces] + [
        random.integers(6, lm.vocab_size, 20).tolist()
    ]
    asked = [
        {"ignore_eos": True, "max_new_tokens": 24},
        {"ignore_eos": True, "max_new_tokens": 24, "temperature": 0.7, "top_k": 4, "seed": 5, "logprobs": 1},
        {"ignore_eos": True, "max_new_tokens": 7, "repetition_penalty": 1.1},
    ]
    both = [(ids, one) for ids in prompts for one in asked]
    wanted = [lm.generate(ids, reuse_cache=False, **one) for ids, one in both]
    with Engine(lm, EngineOptions(batch=4, lookup=True)) as engine:
        requests = [engine.submit(ids, **one) for ids, one in both]
        for request, expected in zip(requests, wanted, strict=True):
            same(request.result(), expected)
        stats = engine.stats()
    assert stats.batch_failures == 0
    # States that cannot be rewound at no cost take no drafts.
    assert bool(stats.drafted_tokens) != bool(lm.fixed_states or options.window_cache)
    assert stats.accepted_tokens <= stats.drafted_tokens
    # Of tokens that nothing was trained to repeat, few models repeat any.
    assert name != "llama" or stats.accepted_tokens > 0


def test_drafts_within_a_form_and_after_processors(tiny, tmp_path):
    """What may not come is not taken because it was drafted."""
    # Several tokens at once round in another way, which small codes of activations show.
    ortlm.build(tiny, tmp_path / "out", precision="fp32")
    lm = ortlm.load(tmp_path / "out", threads=1)
    form = Guidance.regex("(import os\nimport sys\n){3}")
    ids = prompt(lm, 1, 5)

    def never(history, logits):
        logits = logits.copy()
        logits[:, history[:, -1]] = -np.inf
        return logits

    asked = [{"guidance": form}, {"processors": never}, {"stop": "sys"}, {"no_repeat_ngram_size": 3}]
    wanted = [lm.generate(ids, max_new_tokens=20, reuse_cache=False, **one) for one in asked]
    with Engine(lm, EngineOptions(lookup=True)) as engine:
        requests = [engine.submit(ids, max_new_tokens=20, **one) for one in asked]
        for request, expected in zip(requests, wanted, strict=True):
            same(request.result(), expected)
        assert engine.stats().accepted_tokens > 0


RECURRENT = ["lfm2", "qwen3.5", "granite4-h"]


@pytest.mark.parametrize("name", RECURRENT)
def test_states_that_cannot_be_rewound_are_kept_as_snapshots(build, name):
    """Texts that share a beginning resume from where it ends, or from before that, in a chat too."""
    lm = build(name)
    random = np.random.default_rng(1)

    def new(count):
        return random.integers(6, lm.vocab_size, count).tolist()

    asked = {"max_new_tokens": 8, "ignore_eos": True}
    system = new(90)
    with Engine(lm, EngineOptions(batch=3, chunk_tokens=32)) as engine:

        def ask(*prompts):
            # The engine hears of all of them at once, however busy the machine is.
            with engine._changed:
                requests = [engine.submit(ids, **asked) for ids in prompts]
            for ids, request in zip(prompts, requests, strict=True):
                wanted = lm.generate(ids, reuse_cache=False, **asked)
                assert request.result().token_ids == wanted.token_ids
            return [request.timings.cached_tokens for request in requests]

        assert ask([*system, *new(20)]) == [0]
        # The second resumes from the end of a chunk, and leaves a snapshot for the third where they part.
        assert ask([*system, *new(30)]) == [64]
        assert ask([*system, *new(25)]) == [90]
        # Together: the others wait for the first of them.
        other = new(60)
        assert sorted(ask(*([*other, *new(20)] for _ in range(3)))) == [0, 60, 60]
        # Turns of a chat, of which one is then answered in another way, and another one from its prompt on.
        turn = [*system, *new(9)]
        assert ask(turn) == [90]
        answer = list(lm.generate(turn, reuse_cache=False, **asked).token_ids)
        longer = [*turn, *answer, *new(11)]
        assert ask(longer) == [len(turn) + len(answer) - 1]
        assert ask([*turn, *answer, *new(12)]) == [len(turn) + len(answer) - 1]
        assert ask([*turn, *new(17)]) == [len(turn)]


@pytest.mark.parametrize("name", RECURRENT)
def test_snapshots_stay_within_the_memory_for_prefixes(build, name):
    lm = build(name)
    random = np.random.default_rng(2)
    loop = lm.loop()
    loop.start()
    loop.append([[7] * 40])
    most = 4 * sum(state.nbytes for state in loop.row(0))
    asked = {"max_new_tokens": 4, "ignore_eos": True}
    texts = [random.integers(6, lm.vocab_size, 50).tolist() for _ in range(3)]
    with Engine(lm, EngineOptions(chunk_tokens=16, prefix_bytes=most)) as engine:
        for _ in range(12):
            text = texts[random.integers(3)]
            ids = [*text[: random.integers(20, 50)], *random.integers(6, lm.vocab_size, 20).tolist()]
            wanted = lm.generate(ids, reuse_cache=False, **asked)
            assert engine.submit(ids, **asked).result().token_ids == wanted.token_ids
            assert 0 < engine.stats().prefix_bytes <= most


def test_a_prefix_is_computed_once(lm):
    """Even if those that share it come before the first has been read; a later turn resumes from the answer."""
    common = lm.encode(TEXTS[0] * 4)
    with Engine(lm, EngineOptions(batch=3, chunk_tokens=16)) as engine:
        three = [engine.submit([*common, token], max_new_tokens=4) for token in (50, 60, 70)]
        made = [request.result() for request in three]
        cached = sorted(one.timings.cached_tokens for one in made)
        # An even number, so that pairs of rows stay pairs.
        usable = (len(common) - 1) // 2 * 2
        assert cached == [0, usable, usable]
        turn = [*common, 50, *made[0].token_ids, 80]
        again = engine.submit(turn, max_new_tokens=2)
        again.result()
        # The last token of an answer was never fed.
        assert again.timings.cached_tokens == len(turn) - 2
        assert engine.stats().prefix_bytes > 0


def test_no_prefixes_are_kept_if_none_may_be(lm):
    with Engine(lm, EngineOptions(prefix_bytes=0)) as engine:
        for _ in range(2):
            request = engine.submit(lm.encode(TEXTS[0]), max_new_tokens=2)
            request.result()
            assert request.timings.cached_tokens == 0
        assert engine.stats().prefix_bytes == 0


def test_the_error_of_one_touches_no_other(lm):
    def broken(history, logits):
        if history.shape[1] > len(ids) + 2:
            raise RuntimeError("boom")
        return logits

    ids = lm.encode(TEXTS[0])
    wanted = lm.generate(ids, max_new_tokens=12, reuse_cache=False)
    with Engine(lm) as engine:
        good = [engine.submit(ids, max_new_tokens=12) for _ in range(2)]
        bad = engine.submit(ids, max_new_tokens=12, processors=broken)
        nothing = engine.submit(ids, logit_bias=dict.fromkeys(range(lm.vocab_size), -np.inf))
        good.append(engine.submit(ids, max_new_tokens=12))
        with pytest.raises(Error, match="boom"):
            bad.result()
        with pytest.raises(Error, match="no token can be chosen"):
            nothing.result()
        for request in good:
            same(request.result(), wanted)


def test_a_batch_that_fails_is_computed_again(lm, monkeypatch):
    from ortlm.serving.batch import Batch

    usual, failures = Batch.step, []

    def step(self, drafts=()):
        if len(self.requests) > 1 and not failures:
            failures.append(1)
            raise MemoryError("no memory for once")
        return usual(self, drafts)

    monkeypatch.setattr(Batch, "step", step)
    wanted = [lm.generate(text, max_new_tokens=8, reuse_cache=False) for text in TEXTS]
    with Engine(lm) as engine:
        requests = [engine.submit(lm.encode(text), max_new_tokens=8) for text in TEXTS]
        for request, expected in zip(requests, wanted, strict=True):
            same(request.result(), expected)
        assert engine.stats().batch_failures == 1


def test_a_batch_that_always_fails_ends_its_requests_only(lm, monkeypatch):
    from ortlm.serving.batch import Batch

    with monkeypatch.context() as patched, Engine(lm) as engine:
        patched.setattr(Batch, "step", lambda *_: (_ for _ in ()).throw(MemoryError("never enough")))
        with pytest.raises(Error, match="never enough"):
            engine.submit(lm.encode(TEXTS[0]), max_new_tokens=8).result()
        patched.undo()
        assert engine.submit(lm.encode(TEXTS[0]), max_new_tokens=8).result().token_ids


def test_what_cannot_be_asked_is_refused_at_once(lm):
    ids = lm.encode(TEXTS[0])
    with Engine(lm, EngineOptions(cache_tokens=40)) as engine:
        for name, value in {"num_beams": 2, "num_return_sequences": 2, "draft": "lookup"}.items():
            extra = {"temperature": 1.0} if name == "num_return_sequences" else {}
            with pytest.raises(BadOption, match=f"{name} is not available in an engine"):
                engine.submit(ids, **{name: value}, **extra)
        with pytest.raises(BadOption, match="outside the vocabulary"):
            engine.submit([1, lm.vocab_size])
        with pytest.raises(BadOption, match="the prompt is empty"):
            engine.submit([])
        with pytest.raises(BadOption, match="there is no adapter 'x'"):
            engine.submit(ids, adapter="x")
        with pytest.raises(BadOption, match="cannot be used"):
            engine.submit(ids, guidance=Guidance.lark("start: <|nowhere|>"))
        with pytest.raises(ContextFull, match="the prompt has 41 tokens, but the context holds 40"):
            engine.submit([5] * 41)
        # The memory for rows is a limit of a single answer too.
        made = engine.submit([5] * 30, ignore_eos=True).result()
        assert (len(made.token_ids), made.finish_reason) == (10, "length")
    with pytest.raises(ShutDown):
        engine.submit(ids)
    for wrong in ({"batch": 0}, {"queue": -1}, {"stall_seconds": 0}, {"seconds": float("inf")}):
        with pytest.raises(BadOption, match=next(iter(wrong))):
            EngineOptions(**wrong)


def test_a_queue_has_an_end_and_priorities(lm):
    held, release = threading.Event(), threading.Event()

    def slow(history, logits):
        held.set()
        release.wait()
        return logits

    ids, order = lm.encode(TEXTS[3]), []

    def note(name):
        def process(history, logits):
            order.append(name)
            return logits

        return process

    with Engine(lm, EngineOptions(batch=1, queue=2)) as engine, ExitStack() as stack:
        first = engine.submit(ids, max_new_tokens=1, processors=slow)
        held.wait()
        stack.callback(release.set)
        late = engine.submit(ids, max_new_tokens=1, processors=note("late"), priority=1)
        soon = engine.submit(ids, max_new_tokens=1, processors=note("soon"))
        with pytest.raises(Overloaded, match="2 requests are waiting, and no more than 2 may"):
            engine.submit(ids)
        assert (engine.stats().waiting, first.done) == (2, False)
        release.set()
        for request in (first, late, soon):
            request.result()
    assert order == ["soon", "late"]
    assert late.queue_seconds >= soon.queue_seconds > 0


def test_a_request_that_takes_too_long(lm):
    def slow(history, logits):
        time.sleep(0.03)
        return logits

    with (
        Engine(lm, EngineOptions(seconds=0.1)) as engine,
        pytest.raises(TimedOut, match=r"longer than 0\.1 seconds"),
    ):
        engine.submit(lm.encode(TEXTS[0]), processors=slow, ignore_eos=True).result()


def test_closing(lm):
    def slow(history, logits):
        time.sleep(0.01)
        return logits

    ids = lm.encode(TEXTS[0])
    engine = Engine(lm)
    request = engine.submit(ids, processors=slow, max_new_tokens=5)
    assert engine.close(drain_seconds=30)
    assert len(request.result().token_ids) == 5
    engine = Engine(lm, EngineOptions(batch=1))
    running = engine.submit(ids, processors=slow, ignore_eos=True)
    waiting = engine.submit(ids)
    next(iter(running))
    assert not engine.close(drain_seconds=0.05)
    for request in (running, waiting):
        with pytest.raises(ShutDown, match="before the answer ended"):
            request.result()
    with pytest.raises(ShutDown):
        engine.run(lambda: 1)


def test_an_engine_that_fails_says_so_to_everybody(lm, monkeypatch):
    engine = Engine(lm)
    monkeypatch.setattr(engine, "_make_room", lambda: 1 / 0)
    request = engine.submit(lm.encode(TEXTS[0]))
    with pytest.raises(Error, match="division by zero"):
        request.result()
    engine.close()
    with pytest.raises(Error, match="the engine has failed: division by zero"):
        engine.submit(lm.encode(TEXTS[0]))


def test_an_engine_that_fails_twice_leaves_nobody_waiting(lm, monkeypatch):
    """Rows that are broken cannot even be left."""
    engine = Engine(lm)
    requests = [engine.submit(lm.encode(text), max_new_tokens=400, ignore_eos=True) for text in TEXTS]
    for request in requests:
        next(iter(request))
    monkeypatch.setattr("ortlm.serving.batch.Batch.leave", lambda *_: 1 / 0)
    monkeypatch.setattr(engine, "_make_room", lambda: [][1])
    for request in requests:
        with pytest.raises(Error, match="out of range"):
            request.result()
    engine.close()


def test_answers_go_on_between_two_jobs(lm):
    order = []
    with Engine(lm) as engine:
        request = engine.submit(lm.encode(TEXTS[0]), max_new_tokens=30, ignore_eos=True)
        steps = iter(request)
        next(steps)

        def work(number):
            order.append((number, engine.stats().steps))

        jobs = [engine.run(lambda number=number: work(number)) for number in range(4)]
        for job in jobs:
            job.result()
        list(steps)
    assert [number for number, _ in order] == [0, 1, 2, 3]
    assert len({steps for _, steps in order}) == 4


def test_async(lm):
    """Steps come to an event loop, which goes on meanwhile; work runs between two steps."""
    wanted = lm.generate(TEXTS[1], max_new_tokens=8, reuse_cache=False)

    async def main():
        with Engine(lm) as engine:
            requests = [engine.submit(lm.encode(TEXTS[1]), max_new_tokens=8) for _ in range(3)]
            made = await asyncio.gather(*(request.aresult() for request in requests))
            request = engine.submit(lm.encode(TEXTS[1]), max_new_tokens=400, ignore_eos=True)
            seen = []
            async for step in request:
                seen.append(step)
                if len(seen) == 3:
                    request.cancel()
            number = await asyncio.wrap_future(engine.run(lambda: threading.current_thread().name))
            with pytest.raises(ZeroDivisionError):
                await asyncio.wrap_future(engine.run(lambda: 1 // 0))
            return made, seen, number

    made, seen, name = asyncio.run(main())
    for one in made:
        same(one, wanted)
    assert seen[-1].finish_reason == "cancelled"
    assert len(seen) < 300
    assert name == "ortlm-engine"


def test_an_observer_hears_of_every_token_and_every_end(lm):
    class Observer:
        gaps, ends = [], []

        def token(self, request, seconds):
            self.gaps.append(seconds)

        def ended(self, request):
            self.ends.append(request.finish_reason)

    observer = Observer()
    with Engine(lm, observer=observer) as engine:
        request = engine.submit(lm.encode(TEXTS[0]), max_new_tokens=4, ignore_eos=True)
        request.result()
    assert [gap is None for gap in observer.gaps] == [True, False, False, False]
    assert observer.ends == ["length"]
    timings = request.timings
    assert (timings.prompt_tokens, timings.new_tokens, timings.decode_tokens) == (len(request.ids), 4, 3)
    assert timings.prompt_seconds > 0
    assert timings.decode_seconds > 0


def test_adapters_run_side_by_side(saved, tmp_path):
    """Requests of one adapter share a batch, and none sees what another one computed."""
    peft = pytest.importorskip("peft")
    assert peft
    from tests import lora

    row, config = lora.ADAPTERS["some-parts"]
    checkpoint = saved(row)
    lora.save(checkpoint.model, tmp_path / "peft", **config)
    ortlm.build(checkpoint.folder, tmp_path / "out", precision="fp32", adapters={"one": tmp_path / "peft"})
    lm = ortlm.load(tmp_path / "out", threads=1)
    ids = np.random.default_rng(1).integers(6, lm.vocab_size, 40).tolist()
    asked = [{}, {"adapter": "one"}] * 3
    wanted = [
        lm.generate(ids, max_new_tokens=8, ignore_eos=True, reuse_cache=False, **one) for one in asked[:2]
    ]
    assert wanted[0].token_ids != wanted[1].token_ids
    with Engine(lm, EngineOptions(batch=4)) as engine:
        requests = [engine.submit(ids, max_new_tokens=8, ignore_eos=True, **one) for one in asked]
        for number, request in enumerate(requests):
            assert request.result().token_ids == wanted[number % 2].token_ids


@pytest.mark.parametrize("others", [1, 2, 3, 4])
def test_rows_of_wide_blocks_do_not_depend_on_the_number_of_rows(wide_blocks, others):
    """Kernels round an odd last row in another way where blocks have 64 or 128 weights."""
    lm = wide_blocks
    ids = lm.encode("import os, sys\ndef main(argv):\n    parser = ")

    def logprobs(company):
        with Engine(lm, EngineOptions(batch=8, prefix_bytes=0)) as engine:
            texts = [f"class Number{i}:\n" for i in range(company)]
            around = [
                engine.submit(lm.encode(text), max_new_tokens=5 + 3 * i) for i, text in enumerate(texts)
            ]
            made = engine.submit(ids, max_new_tokens=24, temperature=0, ignore_eos=True, logprobs=0).result()
            for request in around:
                request.result()
        return [(one.token_id, one.logprob) for one in made.logprobs]

    assert logprobs(others) == logprobs(0)


def test_a_prefix_of_wide_blocks_rounds_as_the_whole_prompt(wide_blocks):
    lm = wide_blocks
    ids = lm.encode("import os, sys\ndef main(argv):\n    parser = argparse.ArgumentParser()\n" * 2)

    def logprobs(engine, count):
        made = engine.submit(
            ids[:count], max_new_tokens=4, temperature=0, ignore_eos=True, logprobs=0
        ).result()
        return [(one.token_id, one.logprob) for one in made.logprobs]

    for first in (len(ids) // 2, len(ids) // 2 + 1):
        for count in (len(ids) - 3, len(ids) - 2):
            with Engine(lm, EngineOptions(prefix_bytes=0)) as engine:
                alone = logprobs(engine, count)
            with Engine(lm, EngineOptions(reuse_answers=False)) as engine:
                logprobs(engine, first)
                assert logprobs(engine, count) == alone
