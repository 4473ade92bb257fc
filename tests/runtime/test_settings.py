import pytest

from ortlm.errors import BadOption
from ortlm.runtime.settings import Settings

BAD = [
    ({"max_new_tokens": -1}, "max_new_tokens must be a whole number, 0 or more, found -1"),
    ({"max_new_tokens": 1.5}, "whole number"),
    ({"temperature": -0.1}, r"temperature must be a number 0 or more, found -0.1 \(0 is greedy\)"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": "warm"}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"top_p": 0.0}, "top_p must be a number more than 0 and at most 1"),
    ({"top_p": 1.1}, "top_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": -3}, "seed"),
    ({"stop": ["a", ""]}, "stop must hold texts"),
    ({"do_sample": True, "temperature": 0}, "temperature 0 is greedy"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_values_are_refused(options, message):
    with pytest.raises(BadOption, match=message):
        Settings(**options)


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({}, False),
        ({"temperature": 0}, False),
        ({"temperature": 0, "top_k": 5}, False),
        ({"temperature": 0.5}, True),
        ({"top_p": 0.5}, True),
        ({"do_sample": True}, True),
        ({"do_sample": False, "temperature": 0.5}, False),
    ],
)
def test_sampling_is_on_when_asked_for(options, samples):
    assert Settings(**options).samples is samples


def test_published_values_fill_what_was_not_asked_for():
    published = {"temperature": 0.6, "top_k": 20, "top_p": 0.0, "repetition_penalty": 1.1, "do_sample": True}
    plain = Settings().with_defaults(published)
    assert (plain.samples, plain.temperature, plain.repetition_penalty) == (False, None, 1.1)
    sampled = Settings(top_k=0).with_defaults(published)
    assert (sampled.samples, sampled.temperature, sampled.top_k, sampled.top_p) == (True, 0.6, 0, None)


def test_over_keeps_zeros():
    base = Settings(temperature=0.5, top_k=7, stop="x")
    got = Settings(top_k=0, max_new_tokens=0).over(base)
    assert (got.temperature, got.top_k, got.max_new_tokens, got.stop) == (0.5, 0, 0, ("x",))
