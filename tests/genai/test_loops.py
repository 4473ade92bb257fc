"""Programs as the official examples are written give the same tokens and texts in both modules."""

import json

import numpy as np
import pytest

import ortlm
import ortlm.genai as og
from ortlm.builder.options import BuildOptions
from tests.genai.conftest import finish, generator
from tests.runtime.conftest import build_official

QUESTION = "<|user|>\nTell me a story.<|end|>\n<|assistant|>\n"
PROMPTS = ["Once upon a time there was a", "Hello", "The cat sat on the mat and"]


def answer(og, model, prompt, **options):
    """One prompt, streamed."""
    tokenizer = og.Tokenizer(model)
    stream = tokenizer.create_stream()
    made = generator(og, model, **options)
    made.append_tokens(tokenizer.encode(prompt))
    text = []
    while not made.is_done():
        made.generate_next_token()
        text.append(stream.decode(made.get_next_tokens()[0]))
    return text, made.get_sequence(0), made.token_count()


@pytest.mark.parametrize("prompt", [QUESTION, *PROMPTS])
def test_one_prompt(both, prompt):
    text, sequence, count = both(lambda og, model: answer(og, model, prompt, max_length=80))
    assert "".join(text)
    assert count == len(sequence)


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.3}, {"do_sample": True, "top_k": 1}])
def test_options_that_leave_no_chance(both, options):
    both(lambda og, model: answer(og, model, QUESTION, max_length=60, **options))


@pytest.mark.parametrize("options", [{"min_length": 50}, {"no_repeat_ngram_size": 2}])
def test_options_of_length_and_repetition(both, options):
    both(lambda og, model: answer(og, model, QUESTION, max_length=60, **options))


def test_a_folder_of_the_official_builder(both, tmp_path_factory):
    pytest.importorskip("onnxruntime_genai")
    folder, _ = build_official(tmp_path_factory.getbasetemp())

    def program(og, model):
        made = generator(og, model, max_length=40, batch_size=2)
        made.append_tokens(og.Tokenizer(model).encode_batch(["hello", "the dog and the fox"]))
        return made.get_logits()[:, :, :330].round(2)

    both(program, at=folder)


def test_prompts_of_different_lengths(both):
    def program(og, model):
        tokenizer = og.Tokenizer(model)
        made = generator(og, model, batch_size=len(PROMPTS), max_length=40)
        made.append_tokens(tokenizer.encode_batch(PROMPTS))
        steps = finish(made)
        sequences = [made.get_sequence(row) for row in range(len(PROMPTS))]
        return steps, sequences, [tokenizer.decode(row) for row in sequences], made.token_count()

    both(program)


def test_padded_arrays_are_rows(both):
    def program(og, model):
        batch = og.Tokenizer(model).encode_batch(PROMPTS).as_numpy()
        out = []
        for given in (batch, batch.ravel()):
            made = generator(og, model, batch_size=len(PROMPTS), max_length=20)
            made.append_tokens(given)
            out.append(finish(made))
        return out

    padded, flat = both(program)
    assert padded == flat


def test_a_batch_begins_again(both):
    def program(og, model):
        made = generator(og, model, batch_size=2, max_length=20)
        first = og.Tokenizer(model).encode_batch(PROMPTS[:2])
        made.append_tokens(first)
        finish(made)
        made.rewind_to(0)
        made.append_tokens(np.array([[44, 552], [51, 683]], np.int32))
        return finish(made), made.get_sequence(1)

    both(program)


def test_a_conversation_that_goes_back_to_its_beginning(both):
    def program(og, model):
        tokenizer = og.Tokenizer(model)
        made = generator(og, model, max_length=100)
        system = tokenizer.encode("<|system|>\nBe kind.<|end|>\n")
        made.append_tokens(system)
        out = []
        for text in ("Hello", "Who are you?"):
            made.append_tokens(tokenizer.encode(f"<|user|>\n{text}<|end|>\n<|assistant|>\n"))
            out += [finish(made), made.get_sequence(0), made.token_count()]
            made.rewind_to(len(system))
            out.append(made.token_count())
        return out

    both(program)


def test_logits_are_read_and_set(both):
    def program(og, model):
        made = generator(og, model, max_length=12)
        made.append_tokens(np.array([5, 6, 7], np.int32))
        first = made.get_logits()
        chosen = np.full(first.shape, -5, np.float32)
        chosen[..., 777] = 9
        made.set_logits(chosen)
        made.generate_next_token()
        return first.shape, first.round(2), finish(made), made.get_sequence(0)

    shape, _, _, sequence = both(program)
    assert shape == [1, 1, 2048]
    assert sequence[3] == 777


def test_inputs_and_outputs_by_name(both):
    def program(og, model):
        made = generator(og, model, max_length=12)
        made.append_tokens(np.array([5, 6, 7], np.int32))
        out = []
        for _ in range(3):
            out += [made.get_input("input_ids"), made.get_input("attention_mask")]
            made.generate_next_token()
        return out, made.get_output("logits").shape

    both(program)


@pytest.fixture(scope="module")
def with_states(saved, tmp_path_factory):
    """The folder of a tiny model that gives its hidden states, too."""
    out = tmp_path_factory.mktemp("states") / "out"
    options = BuildOptions(hidden_states=True)
    ortlm.build(saved("phi3").folder, output=out, precision="fp32", target="cpu", options=options)
    return out


@pytest.mark.parametrize("prompts", [[[5, 6, 7]], [[5, 6, 7], [8, 9, 9]]])
def test_hidden_states(both, with_states, prompts):
    def program(og, model):
        made = generator(og, model, max_length=12, batch_size=len(prompts))
        made.append_tokens(np.array(prompts, np.int32))
        out = []
        for _ in range(3):
            made.generate_next_token()
            out.append(made.get_output("hidden_states").round(3) + 0)
        return out

    assert np.shape(both(program, at=with_states)[0]) == (len(prompts), 3, 64)


def test_a_stop_token_ends_the_answer_and_is_not_shown(both):
    def program(og, model):
        made = generator(og, model, max_length=30)
        made.append_tokens(np.array([5, 6, 7], np.int32))
        stop = np.zeros((1, 1, 2048), np.float32)
        stop[..., 4] = 9
        made.set_logits(stop)
        made.generate_next_token()
        ended = made.is_done(), made.get_next_tokens(), made.get_sequence(0), made.token_count()
        made.generate_next_token()
        return ended, made.get_next_tokens(), made.token_count()

    both(program)


@pytest.mark.parametrize(
    ("kind", "data", "allowed"),
    [("regex", "[0-9]{4}", str.isdigit), ("lark_grammar", 'start: "yes" | "no"', {"yes", "no"}.__contains__)],
)
@pytest.mark.parametrize("ff_tokens", [False, True])
def test_guidance(both, kind, data, allowed, ff_tokens):
    def program(og, model):
        tokenizer = og.Tokenizer(model)
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=40)
        params.set_guidance(kind, data, ff_tokens)
        made = og.Generator(model, params)
        prompt = tokenizer.encode(QUESTION)
        made.append_tokens(prompt)
        finish(made)
        return tokenizer.decode(made.get_sequence(0)[len(prompt) :])

    assert allowed(both(program))


def test_guidance_by_a_schema(model):
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    params = og.GeneratorParams(model)
    params.set_guidance("json_schema", json.dumps({**schema, "x-guidance": {"whitespace_flexible": False}}))
    made, tokenizer = og.Generator(model, params), og.Tokenizer(model)
    made.append_tokens(tokenizer.encode(QUESTION))
    finish(made)
    text = tokenizer.decode(made.get_sequence(0)).rpartition("\n")[2]
    assert isinstance(json.loads(text)["a"], bool)


def test_drafts_change_nothing(model):
    def program(**speculative):
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=100)
        params.set_speculative_options(**speculative)
        made = og.Generator(model, params)
        made.append_tokens([5, 6, 7, 8] * 8)
        finish(made)
        return made.get_sequence(0).tolist(), made.get_speculative_stats()

    alone, drafted = program(), program(ngram_size=2, max_draft_tokens=4)
    assert drafted[0] == alone[0]
    assert drafted[1]["draft_tokens_proposed"] > 0
    runs = drafted[1]["target_forward_passes"] + drafted[1]["standard_fallback_steps"]
    assert runs <= len(drafted[0]) - 32


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 2}, {"early_stopping": False}])
def test_beams(both, options):
    def program(og, model):
        made = generator(og, model, num_beams=3, length_penalty=0.0, batch_size=2, max_length=40, **options)
        made.append_tokens(og.Tokenizer(model).encode_batch(PROMPTS[:2]))
        while not made.is_done():
            made.generate_next_token()
        return [made.get_sequence(row) for row in range(2 * options.get("num_return_sequences", 1))]

    both(program)
