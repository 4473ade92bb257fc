"""Where ortlm.genai does more than the official runtime, or does it right."""

import threading

import numpy as np
import pytest

import ortlm.genai as og
from tests.genai.conftest import finish, generator

PROMPT = np.array([5, 6, 7], np.int32)
STOP = 4


def force(made, token):
    """Let ``token`` be the next one in every row."""
    logits = np.zeros(made.get_logits().shape, np.float32)
    logits[..., token] = 9
    made.set_logits(logits)
    made.generate_next_token()


@pytest.fixture
def made(model):
    return generator(og, model, max_length=30)


def test_a_conversation_goes_on_after_a_stop_token(model, made):
    made.append_tokens(PROMPT)
    force(made, STOP)
    assert made.is_done()
    assert made.token_count() == 3
    made.append_tokens([8, 9])
    assert made.get_sequence(0).tolist() == [5, 6, 7, STOP, 8, 9]
    other = generator(og, model, max_length=30)
    other.append_tokens([5, 6, 7, STOP, 8, 9])
    assert finish(made) == finish(other)


def test_a_conversation_goes_on_after_any_token(model, made):
    made.append_tokens(PROMPT)
    made.generate_next_token()
    made.append_tokens([8, 9])
    other = generator(og, model, max_length=30)
    other.append_tokens(made.get_sequence(0))
    assert finish(made) == finish(other)


@pytest.mark.parametrize("length", [0, 2, 3, 5])
def test_one_step_after_going_back_is_one_token(model, made, length):
    made.append_tokens(PROMPT)
    finish(made)
    whole = made.get_sequence(0)
    made.rewind_to(length)
    assert made.token_count() == length
    assert not made.is_done()
    if length < 3:
        made.append_tokens(PROMPT[length:])
        length = 3
    assert made.get_next_tokens().tolist() == [whole[length - 1]]
    made.generate_next_token()
    assert made.get_sequence(0).tolist() == whole[: length + 1].tolist()


def test_a_batch_goes_back_within_its_answers(model):
    batch = og.Tokenizer(model).encode_batch(["Once upon a time", "Hello"])
    made = generator(og, model, batch_size=2, max_length=20)
    made.append_tokens(batch)
    finish(made)
    rows = [made.get_sequence(row).tolist() for row in range(2)]
    width = batch.shape()[1] + 2
    made.rewind_to(width)
    assert made.get_sequence(1).tolist() == rows[1][:width]
    finish(made)
    assert [made.get_sequence(row).tolist() for row in range(2)] == rows


def test_a_prompt_may_end_with_the_padding_token(model):
    tokenizer = og.Tokenizer(model)
    texts = ["Once upon a time", "Hello<|endoftext|>"]
    alone = []
    for text in texts:
        one = generator(og, model, max_length=30)
        one.append_tokens(tokenizer.encode(text))
        alone.append(one.get_logits()[0])
    made = generator(og, model, batch_size=2, max_length=30)
    made.append_tokens(tokenizer.encode_batch(texts))
    np.testing.assert_allclose(made.get_logits(), alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("batch", "tokens", "message"),
    [
        (1, [], "empty"),
        (1, [[1, 2], [3, 4]], r"shape \[1, S\]"),
        (3, [[1, 2, 3]], r"shape \[3, S\]"),
        (2, [1, 2, 3], "2 rows of equal length"),
        (1, [1.5], "whole numbers"),
        (1, [99_999], "outside the vocabulary"),
        (1, list(range(31)), "exceeds max length"),
    ],
)
def test_tokens_that_are_refused(model, batch, tokens, message):
    made = generator(og, model, batch_size=batch, max_length=30)
    with pytest.raises(og.GenaiError, match=message):
        made.append_tokens(tokens)
    assert made.token_count() == 0
    made.append_tokens(np.tile(PROMPT, (batch, 1)))
    made.generate_next_token()


@pytest.mark.parametrize(
    "call",
    [
        lambda made: made.generate_next_token(),
        lambda made: made.get_next_tokens(),
        lambda made: made.get_logits(),
        lambda made: made.get_sequence(1),
        lambda made: made.get_sequence(-1),
        lambda made: made.rewind_to(1),
        lambda made: made.get_output("present.0.key"),
        lambda made: made.get_input("position_ids"),
        lambda made: made.set_inputs(og.NamedTensors()),
        lambda made: made.set_model_input("extra", PROMPT),
        lambda made: made.set_runtime_option("profile", "1"),
        lambda made: made.set_runtime_option("terminate_session", "yes"),
        lambda made: made.set_hidden_states(PROMPT),
    ],
)
def test_what_is_refused_before_the_first_token(made, call):
    with pytest.raises(RuntimeError):
        call(made)


def test_a_prompt_that_fills_everything_is_done(model):
    made = generator(og, model, max_length=3)
    made.append_tokens(PROMPT)
    assert made.is_done()
    assert made.get_logits().shape == (1, 1, 2048)
    with pytest.raises(og.GenaiError, match="max_length"):
        made.generate_next_token()


def test_logits_of_another_size(made):
    made.append_tokens(PROMPT)
    with pytest.raises(og.GenaiError, match="must have 2048"):
        made.set_logits(np.zeros(10))


def test_params_belong_to_a_model(folder, model):
    with pytest.raises(og.GenaiError, match="another model"):
        og.Generator(og.Model(str(folder)), og.GeneratorParams(model))


def test_nothing_runs_while_terminated(model, made):
    made.append_tokens(PROMPT)
    made.set_runtime_option("terminate_session", "1")
    with pytest.raises(og.GenaiError, match="terminated"):
        made.generate_next_token()
    made.set_runtime_option("terminate_session", "0")
    other = generator(og, model, max_length=30)
    other.append_tokens(PROMPT)
    assert finish(made) == finish(other)


def test_a_run_is_terminated_from_another_thread(model, made, monkeypatch):
    run = type(model._handle.lm.session).run

    def interrupted(self, binding, **options):
        monkeypatch.undo()
        thread = threading.Thread(target=made.set_runtime_option, args=("terminate_session", "1"))
        thread.start()
        thread.join()
        run(self, binding, **options)

    monkeypatch.setattr(type(model._handle.lm.session), "run", interrupted)
    with pytest.raises(og.GenaiError, match="terminated"):
        made.append_tokens(PROMPT)
    assert made.token_count() == 0
    made.set_runtime_option("terminate_session", "0")
    made.append_tokens(PROMPT)
    assert made.token_count() == 3
    made.generate_next_token()


def test_a_stop_that_came_too_late_does_no_harm(made):
    made.append_tokens(PROMPT)
    made.generate_next_token()
    made._inner.cancel()
    made.generate_next_token()
    assert made.token_count() == 5


def test_states_need_no_snapshot(made):
    made.snapshot_state()
    made.set_runtime_option("enable_profiling", "0")


@pytest.mark.parametrize(
    "call",
    [lambda made: made.rewind_to(0), lambda made: made.append_tokens([1]), lambda made: made.get_sequence(2)],
)
def test_what_beams_refuse(model, call):
    made = generator(og, model, num_beams=3, num_return_sequences=2, max_length=20)
    made.append_tokens(PROMPT)
    finish(made)
    assert made.get_sequence(1).tolist()[:3] == PROMPT.tolist()
    with pytest.raises(og.GenaiError):
        call(made)
