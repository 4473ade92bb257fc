import dataclasses

import pytest

from ortlm.errors import BadOption
from ortlm.runtime.sampling.settings import Options, Settings

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
    ({"min_p": 1.5}, "min_p must be a number 0 or more and at most 1"),
    ({"typical_p": 0}, "typical_p"),
    ({"presence_penalty": float("nan")}, "presence_penalty must be a finite number"),
    ({"min_length": -1}, "min_length"),
    ({"num_beams": 0}, "num_beams must be a whole number, 1 or more"),
    ({"num_beams": 2, "num_return_sequences": 3}, "more than num_beams"),
    ({"num_beams": 4, "num_beam_groups": 3}, "multiple of num_beam_groups"),
    ({"num_beams": 4, "diversity_penalty": 1.0}, "num_beam_groups above 1"),
    ({"num_beams": 4, "num_beam_groups": 2, "do_sample": True}, "does not go with sampling"),
    ({"num_beams": 4, "early_stopping": "often"}, "early_stopping"),
    ({"num_beams": 4, "draft": "lookup"}, "draft does not go with beam search"),
    ({"do_sample": False, "num_return_sequences": 2}, "greedy decoding has one answer"),
    ({"logit_bias": [1]}, "logit_bias must map"),
    ({"logit_bias": {-1: 1.0}}, "a token id must be"),
    ({"logit_bias": {1: float("nan")}}, "logit_bias of token 1"),
    ({"bad_words": "damn"}, "bad_words must be a list"),
    ({"bad_words": [""]}, "none of them empty"),
    ({"processors": [3]}, "processors must hold functions"),
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


def test_options_win_over_a_base_even_when_they_take_something_back():
    base = Settings(temperature=0.5, top_k=7, stop="x", ignore_eos=True)
    got = Settings.of(base, {"top_k": 0, "max_new_tokens": 0, "stop": (), "ignore_eos": False})
    assert (got.temperature, got.top_k, got.max_new_tokens, got.stop) == (0.5, 0, 0, ())
    assert got.ignore_eos is False


def test_an_unknown_option_is_refused_with_the_nearest():
    with pytest.raises(BadOption, match=r"there is no option 'tempreature'.*temperature"):
        Settings.of(None, {"tempreature": 1.0})


def test_options_are_the_fields_of_settings():
    assert list(Options.__annotations__) == [field.name for field in dataclasses.fields(Settings)]


def test_none_is_nothing_asked_for():
    assert Settings(**dict.fromkeys(Options.__annotations__)) == Settings()


def test_each_answer_has_a_seed():
    assert Settings(seed=5).seeds(3) == [5, 6, 7]
    assert Settings(seed=(9, 2)).seeds(2) == [9, 2]
    assert Settings().seeds(2) == [None, None]
    with pytest.raises(BadOption, match="2 numbers for 3 answers"):
        Settings(seed=[1, 2]).seeds(3)
