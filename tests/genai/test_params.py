"""Search options: the same names, defaults and kinds."""

import numpy as np
import pytest

import ortlm.genai as og
from tests.genai.conftest import finish, generator


def test_defaults(both):
    both(lambda og, model: sorted(og.GeneratorParams(model).get_search_options().items()))
    both(lambda og, model: sorted(og.GeneratorParams(model).get_speculative_options().items()))


def test_what_was_set_is_shown(both):
    def program(og, model):
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=True, top_k=5, top_p=0.5, temperature=0.7, max_length=33)
        params.set_speculative_options(ngram_size=3, cooldown=True)
        shown = {**params.get_search_options(), **params.get_speculative_options()}
        return sorted((name, round(value, 5)) for name, value in shown.items())

    both(program)


@pytest.mark.parametrize(
    "options",
    [
        {"min_p": 0.1},
        {"max_length": "a"},
        {"max_length": 10.5},
        {"do_sample": 1},
        {"early_stopping": 1.0},
        {"top_k": None},
        {"max_length": 100_000},
        {"max_length": 0},
        {"batch_size": 0},
        {"num_beams": 0},
        {"num_return_sequences": 3},
    ],
)
def test_what_both_modules_refuse(load, options):
    for module, model in (load("onnxruntime_genai"), load("ortlm.genai")):
        with pytest.raises(RuntimeError):
            generator(module, model, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_lenght": 3}, "Did you mean: min_length"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number more than 0"),
        ({"do_sample": True, "temperature": -1.0}, "temperature must be"),
        ({"do_sample": True, "top_p": 2.0}, "top_p must be"),
        ({"do_sample": True, "top_k": -1}, "top_k must be"),
        ({"min_length": -1}, "min_length"),
        ({"diversity_penalty": 0.5}, "diversity_penalty has no effect"),
        ({"max_length": 513}, r"context_length \(512\)"),
    ],
)
def test_what_is_refused_here(model, options, message):
    with pytest.raises(og.GenaiError, match=message):
        generator(og, model, **options)


def test_an_error_leaves_options_alone(model):
    params = og.GeneratorParams(model)
    before = params.get_search_options()
    with pytest.raises(og.GenaiError):
        params.set_search_options(max_length=10, top_q=3)
    assert params.get_search_options() == before


def test_numbers_of_numpy(model):
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=np.int64(9), do_sample=np.bool_(True), temperature=np.float32(0.5))
    found = params.get_search_options()
    assert (found["max_length"], found["do_sample"], found["temperature"]) == (9.0, True, 0.5)


def test_seeds(model):
    def program(seed):
        made = generator(og, model, do_sample=True, temperature=2.0, random_seed=seed, max_length=40)
        made.append_tokens(np.array([5, 6, 7], np.int32))
        return finish(made)

    assert program(3) == program(3) != program(4)


def test_several_samples_of_one_prompt(model):
    made = generator(og, model, do_sample=True, temperature=2.0, num_return_sequences=3, max_length=20)
    made.append_tokens(np.array([5, 6, 7], np.int32))
    finish(made)
    rows = [made.get_sequence(row).tolist() for row in range(3)]
    assert len({tuple(row) for row in rows}) == 3
    assert {tuple(row[:3]) for row in rows} == {(5, 6, 7)}


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [("regexp", "a", "Did you mean: regex"), ("regex", "[", "unclosed"), ("json_schema", "{", "no JSON")],
)
def test_guidance_that_is_refused(model, kind, data, message):
    with pytest.raises(og.GenaiError, match=message):
        og.GeneratorParams(model).set_guidance(kind, data)


def test_speculative_options_that_are_refused(model):
    params = og.GeneratorParams(model)
    with pytest.raises(og.GenaiError, match="Did you mean: ngram_size"):
        params.set_speculative_options(ngram_sise=2)
    params.set_speculative_options(max_draft_tokens=100)
    with pytest.raises(og.GenaiError, match="between 1 and 16"):
        og.Generator(params._model, params)


def test_graph_capture_may_be_asked_for(model):
    og.GeneratorParams(model).try_graph_capture_with_max_batch_size(1)
