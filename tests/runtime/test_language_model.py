"""The generation loop on built models: any sequence of actions equals one recomputation of the whole."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ortlm import Guidance
from ortlm.builder.options import BuildOptions
from ortlm.errors import BadArtifact, BadOption
from tests.architectures import oracle

TOLERANCE = 1e-4
# Full attention, a sliding window of 8, and a rotation that changes at 64 tokens.
FAMILIES = ["llama", "phi3-window", "phi3-longrope", "gemma3", "gemma4-e"]
IDS = st.integers(10, 90)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_a_recomputation(name, build, data):
    lm, draw = build(name), data.draw
    rows = draw(st.integers(1, 3), label="rows")
    options = {"draft": "lookup"} if draw(st.booleans(), label="drafts") else {}
    generator = lm.generator(temperature=1.5, seed=0, ignore_eos=True, **options)
    # Long enough for the longrope switch to be crossed, one way and back.
    generator.append([draw(st.lists(IDS, min_size=1, max_size=60), label="prompt") for _ in range(rows)])
    for _ in range(draw(st.integers(1, 8), label="actions")):
        action = draw(st.sampled_from(["step", "steps", "append", "rewind", "change"]))
        if action.startswith("step"):
            for _ in range(6 if action == "steps" else 1):
                generator.step()
        elif action == "append":
            more = [draw(st.lists(IDS, max_size=12)) for _ in range(rows)]
            if any(more):
                generator.append(more)
        elif action == "rewind":
            generator.rewind([draw(st.integers(1, length)) for length in generator.lengths])
        else:
            generator.change(temperature=draw(st.floats(0.3, 2)), top_k=draw(st.integers(0, 20)))
        # The whole batch is rotated by one table, as in transformers.
        long = max(generator.lengths)
        switch = lm.manifest.rope_switch_tokens
        for row, logits in enumerate(generator.logits):
            tokens = generator.sequence(row)
            if switch is None or (len(tokens) > switch) == (long > switch):
                assert oracle.relative_error(logits, lm.logits(tokens)[-1]) < TOLERANCE


def test_a_conversation_equals_transformers(saved, build):
    """Prompt, answer, second message, rewind, another second message: each against one float32 run."""
    model, lm = saved("llama").model, build("llama")
    generator = lm.generator(ignore_eos=True)
    generator.append(oracle.random_tokens(20))
    for _ in range(9):
        generator.step()
    answered = generator.lengths[0]
    for second in (oracle.random_tokens(7, seed=1), oracle.random_tokens(11, seed=2)):
        generator.rewind(answered)
        generator.append(second)
        for _ in range(4):
            want = oracle.prompt_logits(model, generator.sequence())[-1]
            assert oracle.relative_error(generator.logits[0], want) < TOLERANCE
            generator.step()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_drafts_do_not_change_what_is_generated(name, build):
    """100 random prompts each, with lookup and with a draft model, against plain greedy decoding."""
    lm, draft = build(name), build(name, "int4")
    random, accepted = np.random.default_rng(0), {"lookup": 0, draft: 0}
    for number in range(100):
        # Half of the prompts repeat themselves, so that there is something to look up.
        some = random.integers(10, 90, int(random.integers(2, 20))).tolist()
        prompt = some * 2 if number % 2 else some
        plain = lm.generate(prompt, max_new_tokens=20, ignore_eos=True)
        for kind in accepted:
            drafted = lm.generate(
                prompt, max_new_tokens=20, ignore_eos=True, draft=kind, draft_tokens=4, reuse_cache=False
            )
            assert drafted.token_ids == plain.token_ids
            accepted[kind] += drafted.timings.accepted_tokens
    assert min(accepted.values()) > 20


def test_drafts_in_a_batch(build):
    lm = build("llama")
    prompts = [oracle.random_tokens(n, seed=n) * 2 for n in (5, 9, 13)]
    for made, prompt in zip(
        lm.generate_batch(prompts, max_new_tokens=24, ignore_eos=True, draft="lookup"), prompts, strict=True
    ):
        assert made.token_ids == lm.generate(prompt, max_new_tokens=24, ignore_eos=True).token_ids


def test_log_probabilities_equal_a_float64_softmax(saved, build):
    model, lm = saved("llama").model, build("llama")
    prompt = oracle.random_tokens(12)
    made = lm.generate(prompt, max_new_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    tokens = [*prompt, *made.token_ids]
    logits = torch.tensor(oracle.prompt_logits(model, tokens), dtype=torch.float64)
    want = torch.log_softmax(logits, dim=1).numpy()
    assert made.prompt_logprobs[0] is None
    found = [*made.prompt_logprobs[1:], *made.logprobs]
    assert [entry.token_id for entry in found] == tokens[1:]
    for at, entry in enumerate(found):
        assert entry.logprob == pytest.approx(want[at, entry.token_id], abs=1e-4)
        best = np.argsort(-want[at], kind="stable")[: len(entry.top)]
        assert [token for token, _ in entry.top] == best.tolist()
    assert lm.prompt_logprobs(prompt, top=2) == list(made.prompt_logprobs)


def test_a_second_prompt_that_begins_alike_is_not_read_again(build):
    lm = build("llama")
    first = oracle.random_tokens(40)
    lm.generate(first, max_new_tokens=5)
    again = lm.generate([*first, *oracle.random_tokens(6, seed=9)], max_new_tokens=5, ignore_eos=True)
    assert again.timings.cached_tokens == 40
    cold = lm.generate(
        [*first, *oracle.random_tokens(6, seed=9)], max_new_tokens=5, ignore_eos=True, reuse_cache=False
    )
    assert (cold.timings.cached_tokens, cold.token_ids) == (0, again.token_ids)


def test_saved_prompts(build, tmp_path):
    lm = build("llama")
    first = lm.generator(ignore_eos=True)
    first.append(oracle.random_tokens(30))
    for _ in range(3):
        first.step()
    first.save(tmp_path / "prompt")
    again = lm.generator(ignore_eos=True)
    again.restore(tmp_path / "prompt")
    assert again.sequence() == first.sequence()
    assert again.cached_tokens == 33
    for generator in (first, again):
        generator.append([11, 12, 13])
    assert np.array_equal(first.logits, again.logits)
    several = lm.generator(ignore_eos=True, temperature=1.0, seed=1, num_return_sequences=3)
    several.restore(tmp_path / "prompt")
    assert several.step().shape == (3,)
    with pytest.raises(BadArtifact, match="prompt"):
        build("qwen3").generator().restore(tmp_path / "prompt")
    with pytest.raises(BadOption, match="has tokens already"):
        again.restore(tmp_path / "prompt")


def test_vectors(saved, build):
    model, lm = saved("llama").model, build("llama", options=BuildOptions(hidden_states=True))
    rows = [oracle.random_tokens(n, seed=n) for n in (5, 40, 1)]
    with torch.no_grad():
        states = [model.model(torch.tensor([row])).last_hidden_state[0].numpy() for row in rows]
    assert oracle.relative_error(lm.hidden_states(rows[1]), states[1]) < TOLERANCE
    for pooling, of in (("mean", lambda s: s.mean(0)), ("last", lambda s: s[-1]), ("first", lambda s: s[0])):
        got = lm.embed(rows, pooling=pooling, normalize=False, batch=2)
        assert oracle.relative_error(got, np.stack([of(s) for s in states])) < TOLERANCE
    assert np.allclose(np.linalg.norm(lm.embed(rows), axis=1), 1)
    with pytest.raises(BadArtifact, match="include_hidden_states"):
        build("llama").embed(rows)
    with pytest.raises(BadOption, match="pooling must be one of"):
        lm.embed(rows, pooling="median")


def test_async(build):
    lm = build("llama")
    prompt = oracle.random_tokens(8)
    want = lm.generate(prompt, max_new_tokens=12, ignore_eos=True).token_ids

    async def tokens():
        return tuple([s.token_id async for s in lm.astream(prompt, max_new_tokens=12, ignore_eos=True)])

    async def both():
        return await asyncio.gather(
            tokens(), tokens(), lm.agenerate(prompt, max_new_tokens=12, ignore_eos=True)
        )

    one, two, whole = asyncio.run(both())
    assert one == two == whole.token_ids == want


def test_a_cancelled_task_stops_the_model(build):
    lm, steps = build("llama"), []

    def slowly(history, logits):
        steps.append(time.sleep(0.01))
        return logits

    async def run():
        task = asyncio.create_task(
            lm.agenerate(oracle.random_tokens(8), ignore_eos=True, max_new_tokens=100, processors=slowly)
        )
        while not steps:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert len(steps) < 50
    assert lm.generate(oracle.random_tokens(8), max_new_tokens=2, ignore_eos=True).finish_reason == "length"


def test_a_stream_that_is_cancelled_says_so(build):
    lm = build("llama")
    stream = lm.stream(oracle.random_tokens(8), ignore_eos=True)
    next(stream)
    stream.cancel()
    assert [step.finish_reason for step in stream] == ["cancelled"]


def test_cancelling_before_the_first_token(build):
    lm = build("llama")
    stream = lm.stream(oracle.random_tokens(8), ignore_eos=True, temperature=1.0, num_return_sequences=2)
    stream.cancel()
    made = stream.generations()[0]
    assert (made.finish_reason, made.alternatives[0].finish_reason) == ("cancelled", "cancelled")
    ended = lm.stream(oracle.random_tokens(8), max_new_tokens=2)
    list(ended)
    ended.cancel()
    assert len(lm.generate(oracle.random_tokens(8), max_new_tokens=2, ignore_eos=True).token_ids) == 2


def test_no_room_for_beams(build):
    made = build("llama").generate(oracle.random_tokens(8), num_beams=2, max_new_tokens=0)
    assert (made.text, made.token_ids, made.finish_reason) == ("", (), "length")


def test_a_form_that_ends_without_a_stop_token_keeps_its_text(build):
    made = build("llama").generate("a", guidance=Guidance.choices(["yes", "no"]), ignore_eos=True)
    assert (made.text in ("yes", "no"), made.finish_reason) == (True, "stop")


def test_every_turn_has_its_form(build):
    lm = build("llama")
    generator = lm.generator(guidance=Guidance.choices(["yes", "no"]))
    for turn in ("a", "b"):
        generator.append(lm.tokenizer.encode(turn))
        while not generator.done:
            generator.step()
        assert lm.tokenizer.decode(generator.answers()[0][0].token_ids) in ("yes", "no")


def test_drafts_leave_the_rotation_alone(build):
    """Near the switch of tables: a draft must not carry the text over it early."""
    lm = build("phi3-longrope")
    prompt = oracle.random_tokens(58)
    plain = lm.generate(prompt, max_new_tokens=12, ignore_eos=True, reuse_cache=False)
    drafted = lm.generate(prompt, max_new_tokens=12, ignore_eos=True, draft=lm, reuse_cache=False)
    assert drafted.token_ids == plain.token_ids


def test_log_probabilities_beyond_the_switch(saved, build):
    lm, tokens = build("phi3-longrope"), oracle.random_tokens(74)
    want = torch.log_softmax(torch.tensor(oracle.prompt_logits(saved("phi3-longrope").model, tokens)), dim=1)
    for at, entry in enumerate(lm.prompt_logprobs(tokens)[1:]):
        assert entry.logprob == pytest.approx(float(want[at, tokens[at + 1]]), abs=1e-3)


def test_a_row_that_is_given_more_room_goes_on_rightly(build):
    lm = build("llama")
    prompt = oracle.random_tokens(16)
    generator = lm.generator(max_length=19, ignore_eos=True)
    generator.append([prompt, prompt[:-5]])
    for _ in range(5):
        generator.step()
    generator.change(max_length=28)
    while not generator.done:
        generator.step()
    want = lm.generate(prompt, max_length=28, ignore_eos=True, reuse_cache=False).token_ids
    assert generator.sequence(0) == [*prompt, *want]


def test_settings_that_cannot_be_used_change_nothing(build):
    generator = build("llama").generator(temperature=1.0)
    generator.append(oracle.random_tokens(5))
    with pytest.raises(BadOption, match="no adapter 'nope'"):
        generator.change(temperature=0.5, adapter="nope")
    assert generator.settings.temperature == 1.0
    with pytest.raises(BadOption, match="guidance must be a Guidance"):
        generator.change(guidance="yes")
    fresh = build("llama").generator(seed=[1, 2], temperature=1.0)
    with pytest.raises(BadOption, match="2 numbers for 1 answers"):
        fresh.append([5, 6])
    assert fresh.rows == 0
