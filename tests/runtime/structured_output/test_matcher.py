"""Whatever is drawn among the allowed tokens follows the guidance, whatever way a search takes to it."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import models

from ortlm.errors import BadOption, Error
from ortlm.runtime.structured_output.guidance import Guidance
from ortlm.runtime.structured_output.matcher import Vocabulary, guided
from ortlm.runtime.text.tokenizer import Tokenizer
from tests.runtime import tiny

SHIPPED = Path(__file__).parents[3] / "models" / "tiny-phi3"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "\u00fc", "\U0001f600"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
COMPACT = {**PERSON, "x-guidance": {"whitespace_flexible": False}}
TEXTS = ["yes", "no", "yesterday", 'say "hi"\n', "\\", "\U0001f600!", " spaced", "caf\u00e9"]
PATTERN = r"( ?(the|a) [\u00e9\U0001f600a-c]{1,3}){1,3}[.!]"

STRING = re.compile(r'"(?:\\.|[^"\\])*"')


def is_person(text):
    found = json.loads(text)
    return {"name", "age"} <= found.keys() and 0 <= found["age"] <= 120 and len(found["name"]) <= 6


CASES = {
    "schema": (Guidance.json_schema(PERSON), is_person),
    "compact": (
        Guidance.json_schema(COMPACT),
        lambda text: is_person(text) and not re.search(r"\s", STRING.sub("", text)),
    ),
    "regex": (Guidance.regex(PATTERN), lambda text: re.fullmatch(PATTERN, text)),
    "choices": (Guidance.choices(TEXTS), lambda text: text in TEXTS),
    "lark": (
        Guidance.lark('start: "[" (item ",")* item "]"\nitem: /[a-z]{1,3}/ | start\n%ignore / {1,2}/'),
        lambda text: text.count("[") == text.count("]"),
    ),
}
KINDS = {"byte_level": tiny.byte_level, "llama_style": tiny.llama_style}


@pytest.fixture(params=[*KINDS, "shipped"], scope="module")
def made(request, tmp_path_factory):
    """Return a tokenizer and its vocabulary, which ends before the model's logits do."""
    folder = SHIPPED
    if request.param in KINDS:
        folder = tmp_path_factory.mktemp(request.param)
        tiny.save(folder, KINDS[request.param]())
    tokenizer = Tokenizer.open(folder)
    return tokenizer, Vocabulary(tokenizer, tokenizer.size + 30)


@pytest.fixture(scope="module")
def shipped():
    tokenizer = Tokenizer.open(SHIPPED)
    return tokenizer, Vocabulary(tokenizer, tokenizer.size)


def walk(guide, dice, *, most=200):
    """Draw allowed tokens until the guide is finished, none is, or there are ``most``."""
    tokens = []
    while len(tokens) < most and not guide.finished(tokens):
        tokens.append(int(dice.choice(np.flatnonzero(guide.allowed(tokens)))))
    return tokens


def texts(tokenizer, allowed):
    return {tokenizer.decode([int(token)]) for token in np.flatnonzero(allowed)}


@pytest.mark.parametrize("case", CASES)
def test_what_is_drawn_follows_the_guidance(made, case):
    tokenizer, vocabulary = made
    guidance, holds = CASES[case]
    stop = [tokenizer.token_id("<|end|>")]
    ended = 0
    for seed in range(12):
        guide = vocabulary.guide(guidance, stop_ids=stop)
        tokens = walk(guide, np.random.default_rng(seed))
        assert max(tokens) < tokenizer.size
        assert not set(stop) & set(tokens[:-1])
        if guide.finished(tokens):
            ended += 1
            text = tokenizer.decode(tokens)
            assert holds(text), text
    assert ended > 3


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_going_anywhere_equals_starting_again(made, case, data):
    tokenizer, vocabulary = made
    guidance = CASES[case][0]
    stop = [tokenizer.token_id("<|end|>")]
    paths = [
        walk(vocabulary.guide(guidance, stop_ids=stop), np.random.default_rng(seed), most=40)
        for seed in range(3)
    ]
    guide = vocabulary.guide(guidance, stop_ids=stop)
    for _ in range(6):
        path = data.draw(st.sampled_from(paths))
        tokens = path[: data.draw(st.integers(0, len(path)))]
        fresh = vocabulary.guide(guidance, stop_ids=stop)
        assert guide.forced(tokens) == fresh.forced(tokens)
        assert np.array_equal(
            guide.allowed(tokens), vocabulary.guide(guidance, stop_ids=stop).allowed(tokens)
        )


def test_another_branch_with_the_same_shape_has_its_own_mask(shipped):
    """llguidance's own way back answers with the mask of the branch that was left."""
    tokenizer, vocabulary = shipped
    guide = vocabulary.guide(Guidance.lark('start: "x" WS "1" | "y" WS "2"\nWS: / {1,9}/'))
    for text, digit in (("x  ", "1"), ("y  ", "2"), ("x  ", "1")):
        found = texts(tokenizer, guide.allowed(tokenizer.encode(text)))
        assert {"1", "2"} & found == {digit}


def test_all_stop_tokens_end_a_complete_answer(made):
    tokenizer, vocabulary = made
    stops = [tokenizer.token_id("<|end|>"), tokenizer.token_id("<|user|>"), 10**6]
    guide = vocabulary.guide(Guidance.regex("(ab)+"), stop_ids=stops)
    a, b = tokenizer.token_id("a"), tokenizer.token_id("b")
    assert not guide.allowed([a])[stops[:2]].any()
    assert guide.allowed([a, b])[stops[:2]].all()
    assert not guide.finished([a, b])
    for after in ([a, b, stops[1]], [a, b, stops[0], stops[0]], [a, b, stops[0], 7]):
        assert np.flatnonzero(guide.allowed(after)).tolist() == sorted(stops[:2])
        assert guide.finished(after)
        assert guide.forced(after) == []
    with pytest.raises(BadOption, match="index 1 of the answer"):
        guide.allowed([a, stops[0]])


def test_without_stop_tokens_a_complete_answer_is_finished(shipped):
    tokenizer, vocabulary = shipped
    guide = vocabulary.guide(Guidance.choices(["yes", "yesterday"]))
    assert not guide.finished(tokenizer.encode("yes"))
    assert guide.allowed(tokenizer.encode("yes")).any()
    assert guide.finished(tokenizer.encode("yesterday"))
    assert not guide.allowed(tokenizer.encode("yesterday")).any()


def test_a_stop_token_that_is_text_is_none_within_the_answer(shipped):
    tokenizer, vocabulary = shipped
    comma = tokenizer.token_id(",")
    guide = vocabulary.guide(Guidance.regex("a[,;]b"), stop_ids=[comma])
    assert texts(tokenizer, guide.allowed(tokenizer.encode("a"))) == {";"}
    assert np.flatnonzero(guide.allowed(tokenizer.encode("a;b"))).tolist() == [comma]


def test_a_grammar_may_name_special_tokens(shipped):
    tokenizer, vocabulary = shipped
    end, user = tokenizer.token_id("<|end|>"), tokenizer.token_id("<|user|>")
    guide = vocabulary.guide(Guidance.lark('start: <|user|> "a" <|end|>'), stop_ids=[end])
    assert np.flatnonzero(guide.allowed([])).tolist() == [user]
    assert np.flatnonzero(guide.allowed([user, tokenizer.token_id("a")])).tolist() == [end]
    with pytest.raises(BadOption, match="nobody"):
        vocabulary.guide(Guidance.lark("start: <|nobody|>"))


@pytest.mark.parametrize("bad", [-1, 2048, 2**40])
def test_tokens_that_break_the_grammar_are_named(shipped, bad):
    tokenizer, vocabulary = shipped
    guide = vocabulary.guide(Guidance.regex("[0-9]{4}"))
    good = tokenizer.encode("12")
    for token in (bad, tokenizer.token_id("z"), tokenizer.token_id("<|end|>")):
        with pytest.raises(BadOption, match=f"token {token} .*index {len(good)} of the answer"):
            guide.allowed([*good, token])
    assert "3" in texts(tokenizer, guide.allowed(good))


@pytest.mark.parametrize(
    "guidance", [Guidance.regex(r"[^\s\S]"), Guidance.lark("start: start"), Guidance.lark('start: start "a"')]
)
def test_guidance_that_no_text_follows(shipped, guidance):
    with pytest.raises(BadOption, match="cannot be used: no token of the vocabulary"):
        shipped[1].guide(guidance)


def test_a_vocabulary_without_the_letters_needed(tmp_path):
    inner = Inner(models.BPE(vocab={letter: i for i, letter in enumerate("abc")}, merges=[]))
    inner.decoder = tiny.byte_level().decoder
    tiny.save(tmp_path, inner)
    guide = Vocabulary(Tokenizer.open(tmp_path), 3).guide(Guidance.regex("ab[xy]|ac"))
    assert guide.allowed([0]).tolist() == [False, True, True]
    with pytest.raises(Error, match="no token of the vocabulary continues an answer of 2 tokens"):
        guide.allowed([0, 1])
    assert guide.finished([0, 2])


def test_holes_in_the_vocabulary(tmp_path):
    inner = Inner(models.BPE(vocab={"a": 0, "b": 1, "c": 3}, merges=[]))
    inner.decoder = tiny.byte_level().decoder
    tiny.save(tmp_path, inner, bos_token=None, eos_token=None)
    guide = Vocabulary(Tokenizer.open(tmp_path), 6).guide(Guidance.regex("a?[bc]?"))
    assert np.flatnonzero(guide.allowed([])).tolist() == [0, 1]
    assert np.flatnonzero(guide.allowed([0])).tolist() == [1]
    assert guide.finished([1])


def test_tokenizers_whose_bytes_are_not_known(tmp_path):
    tiny.save(tmp_path, Inner(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    with pytest.raises(BadOption, match="byte-level"):
        Vocabulary(Tokenizer.open(tmp_path), 2)


def test_the_space_that_sentencepiece_puts_in_front_is_no_text(tmp_path):
    tiny.save(tmp_path, tiny.llama_style())
    tokenizer = Tokenizer.open(tmp_path)
    vocabulary = Vocabulary(tokenizer, tokenizer.size)
    begun = [tokenizer.token_id("<|assistant|>")]
    first = [tokenizer.token_id(token) for token in ("\u2581t", "t", "\u2581")]
    for pattern, prompt, expected in (
        ("t[a-z]*", begun, [True, True, True]),
        ("t[a-z]*", tokenizer.encode("a"), [False, True, False]),
        (" t[a-z]*", begun, [False, False, True]),
        (" t[a-z]*", tokenizer.encode("a"), [True, False, True]),
    ):
        guide = vocabulary.guide(Guidance.regex(pattern), prompt=prompt)
        assert guide.allowed([])[first].tolist() == expected, (pattern, prompt)


def test_forced_tokens_are_allowed_one_after_the_other(shipped):
    tokenizer, vocabulary = shipped
    guide = vocabulary.guide(Guidance.json_schema(COMPACT))
    tokens = guide.forced([])
    assert '{"name":"'.startswith(tokenizer.decode(tokens))
    assert len(tokens) > 1
    for count, token in enumerate(tokens):
        assert guide.allowed(tokens[:count])[token]


def test_whitespace_in_json_ends(shipped):
    tokenizer, vocabulary = shipped
    guide = vocabulary.guide(Guidance.json_object())
    space = tokenizer.token_id("\u0120")
    brace = tokenizer.token_id("{")
    assert guide.allowed([brace] + [space] * 19)[space]
    assert not guide.allowed([brace] + [space] * 20)[space]


def test_processor_leaves_allowed_logits_only(shipped):
    tokenizer, vocabulary = shipped
    end = tokenizer.token_id("<|end|>")
    guides = [vocabulary.guide(Guidance.regex("[0-9]{2}"), stop_ids=[end]), None]
    guides += [vocabulary.guide(Guidance.choices(["ab"])), vocabulary.guide(Guidance.choices(["ab"]))]
    five, ab = tokenizer.token_id("5"), [tokenizer.token_id("ab")]
    history = np.array([[9, five, -1], [9, 8, 7], [9, 9, 9], [9, *ab, -1]])
    logits = np.random.default_rng(0).normal(size=(4, 2048)).astype(np.float32)
    before = logits.copy()
    got = guided(guides, [1, 0, 3, 1])(history, logits)
    assert got.dtype == np.float32
    assert np.array_equal(logits, before)
    assert texts(tokenizer, np.isfinite(got[0])) == set("0123456789")
    assert np.array_equal(got[1], logits[1])
    assert texts(tokenizer, np.isfinite(got[2])) == {"ab"}
    # Finished and without a stop token: what is drawn for it no longer counts.
    assert np.array_equal(got[3], logits[3])


def test_guides_in_several_threads(shipped):
    _, vocabulary = shipped

    def run(seed):
        guide = vocabulary.guide(CASES["schema"][0], stop_ids=[4])
        return walk(guide, np.random.default_rng(seed))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(8))) == [run(seed) for seed in range(8)]
