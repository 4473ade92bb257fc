"""End to end on artifacts of the official builder, with transformers as the oracle."""

import threading

import numpy as np
import pytest
import torch

import ortlm
from ortlm.errors import BadArtifact, BadOption, ContextFull
from ortlm.runtime.language_model import Timings

PROMPT = "hello world, the quick"


@pytest.fixture(scope="module", params=["grow", "append"])
def lm(request, official, official_append):
    return ortlm.load(official[0] if request.param == "grow" else official_append, threads=1)


@pytest.fixture(scope="module")
def oracle(official, lm):
    """Return (prompt and 32 greedy tokens, logits [S, V]) of transformers."""
    model = official[1]
    ids = lm.encode(PROMPT)
    with torch.no_grad():
        made = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=None,
            suppress_tokens=list(range(lm.tokenizer.size, lm.vocab_size)),
        )[0].tolist()
        logits = model(torch.tensor([made])).logits[0].numpy()
    return made, logits


def test_greedy_tokens_equal_transformers(lm, oracle):
    made = lm.generate(PROMPT, max_new_tokens=32, ignore_eos=True)
    ids = lm.encode(PROMPT)
    assert [*ids, *made.token_ids] == oracle[0]
    assert made.finish_reason == "length"
    assert lm.tokenizer.decode(ids) + made.text == lm.tokenizer.decode(oracle[0])


def test_prompt_logits(lm, oracle):
    assert np.allclose(lm.logits(oracle[0]), oracle[1], atol=1e-4)


def test_ragged_batch_logits(lm, oracle):
    ids, logits = oracle
    cuts = (4, 9, 6)
    got = lm.logits_batch([ids[:cut] for cut in cuts], [ids[cut : cut + 5] for cut in cuts])
    for row, cut in zip(got, cuts, strict=True):
        assert np.allclose(row, logits[cut - 1 : cut + 5], atol=1e-4)


def test_long_prompt_in_chunks(official, oracle):
    loop = ortlm.load(official[0], threads=1).loop()
    loop._chunk = 7
    loop.start()
    assert np.allclose(loop.append([oracle[0]], keep=len(oracle[0]))[0], oracle[1], atol=1e-4)


def test_the_cache_stays_small(lm):
    loop = lm.loop()
    loop.start()
    loop.append([[5, 6]])
    assert loop.cache.nbytes <= 128 * lm.cache_bytes_per_token
    assert lm.cache_bytes_per_token == 3 * 2 * 2 * 16 * 4


def test_stream_equals_generate(lm):
    timings = Timings()
    steps = list(lm.stream(PROMPT, max_new_tokens=20, timings=timings))
    made = lm.generate(PROMPT, max_new_tokens=20)
    assert "".join(step.text for step in steps) == made.text == str(made)
    assert tuple(step.token_id for step in steps) == made.token_ids
    assert [step.finish_reason for step in steps[:-1]] == [None] * (len(steps) - 1)
    assert steps[-1].finish_reason == made.finish_reason
    assert timings.new_tokens == len(steps) == timings.decode_steps + 1
    assert timings.tokens_per_second > 0


def test_seed_makes_sampling_repeatable(lm):
    def draw(seed):
        return lm.generate(PROMPT, temperature=1.0, max_new_tokens=12, seed=seed, ignore_eos=True).token_ids

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert (
        lm.generate(PROMPT, temperature=0, max_new_tokens=8).token_ids
        == lm.generate(PROMPT, max_new_tokens=8).token_ids
    )


def test_ids_without_a_token_are_never_sampled(lm):
    made = lm.generate(PROMPT, temperature=3.0, max_new_tokens=60, seed=0, ignore_eos=True)
    assert max(made.token_ids) < lm.tokenizer.size < lm.vocab_size


def test_stop_text(lm):
    full = lm.generate(PROMPT, max_new_tokens=24, ignore_eos=True).text
    stop = full[4:7]
    made = lm.generate(PROMPT, max_new_tokens=24, ignore_eos=True, stop=stop)
    assert made.text == full[: full.index(stop)]
    assert made.finish_reason == "stop"


def test_stop_token(lm):
    free = lm.generate(PROMPT, max_new_tokens=8, ignore_eos=True)
    settings = ortlm.Settings(stop_token_ids=[free.token_ids[3]], ignore_eos=True)
    made = lm.generate(PROMPT, settings=settings, max_new_tokens=8)
    at = free.token_ids.index(free.token_ids[3])
    assert made.token_ids == free.token_ids[: at + 1]
    assert made.finish_reason == "stop"
    assert free.text.startswith(made.text)


def test_context_full(lm):
    made = lm.generate([5] * 120, ignore_eos=True)
    assert (len(made.token_ids), made.finish_reason) == (9, "length")
    assert len(lm.generate([5] * 128, ignore_eos=True).token_ids) == 1
    with pytest.raises(ContextFull, match="the prompt has 129 tokens, but the model's context holds 128"):
        lm.generate([5] * 129)


def test_refusals(lm):
    for prompt, message in (
        ("", "empty"),
        ([], "empty"),
        ([5, 352], "352 at index 1 is outside"),
        ([-1], "-1"),
    ):
        with pytest.raises(BadOption, match=message):
            lm.generate(prompt)
    with pytest.raises(BadOption, match="found 'b' in a list"):
        lm.generate(["b"])
    with pytest.raises(BadOption, match="max_new_tokens"):
        lm.stream(PROMPT, max_new_tokens=-1)
    with pytest.raises(BadOption, match="all of the same length"):
        lm.logits_batch([[1], [2]], [[1], []])
    assert lm.generate(PROMPT, max_new_tokens=0).finish_reason == "length"


def test_chat_and_cache_reuse(lm):
    talk = [{"role": "user", "content": "hello"}]
    assert lm.render(talk) == "<|user|>hello<|end|><|assistant|>"
    first = lm.generate(talk, max_new_tokens=6, reuse_cache=True)
    assert first.token_ids == lm.generate(lm.render(talk), max_new_tokens=6).token_ids
    talk += [{"role": "assistant", "content": "the dog"}, {"role": "user", "content": "the fox"}]
    second = lm.generate(talk, max_new_tokens=6, reuse_cache=True)
    assert second.timings.cached_tokens >= 3
    assert second.token_ids == lm.generate(talk, max_new_tokens=6).token_ids


def test_a_stream_may_be_left_early_and_streams_may_interleave(lm):
    expected = lm.generate(PROMPT, max_new_tokens=6).token_ids
    one, two = lm.stream(PROMPT, max_new_tokens=6), lm.stream(PROMPT, max_new_tokens=6)
    next(lm.stream(PROMPT, reuse_cache=True))
    both = [(a.token_id, b.token_id) for a, b in zip(one, two, strict=True)]
    assert both == list(zip(expected, expected, strict=True))


def test_threads_do_not_disturb_each_other(lm):
    expected = lm.generate(PROMPT, max_new_tokens=16).token_ids
    found = []
    runners = [
        threading.Thread(target=lambda: found.append(lm.generate(PROMPT, max_new_tokens=16).token_ids))
        for _ in range(3)
    ]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert found == [expected] * 3


def test_without_a_tokenizer_ids_still_work(official_append, tmp_path):
    for path in official_append.iterdir():
        if not path.name.startswith(("tokenizer", "chat")):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    bare = ortlm.load(tmp_path, threads=1)
    assert len(bare.generate([5, 6], max_new_tokens=3, ignore_eos=True).token_ids) == 3
    with pytest.raises(BadArtifact, match=r"tokenizer\.json is missing"):
        bare.generate("hello")


def test_a_damaged_graph_is_named(official, tmp_path):
    for path in official[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(BadArtifact, match=r"cannot load .*model\.onnx"):
        ortlm.load(tmp_path)


def test_options_of_the_machine_are_checked(official):
    with pytest.raises(BadOption, match="threads must be at least 1"):
        ortlm.load(official[0], threads=0)
    with pytest.raises(BadOption, match=r"no device 'coda'.*Did you mean: cuda"):
        ortlm.load(official[0], device="coda")
    assert ortlm.load(official[0]).session.threads >= 1
