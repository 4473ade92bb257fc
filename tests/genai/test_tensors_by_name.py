"""What the model was given and gave last, by name, as in the official runtime."""

import numpy as np
import pytest

import ortlm
import ortlm.genai as og
from ortlm.builder.options import BuildOptions
from tests.genai.conftest import MODULES, finish, generator
from tests.genai.graphs import combined, constant, helper, remade, with_combined_cache, with_int32
from tests.runtime.conftest import build_official

ROWS = np.array([[5, 6, 7, 8], [9, 10, 11, 12]], np.int32)
NAMES = (
    "logits", "hidden_states", "present.0.key", "present.2.value", "input_ids", "attention_mask", "position_ids",
    "past_key_values.0.key", "past_key_values.2.value", "nothing",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of the official builder."""
    pytest.importorskip("onnxruntime_genai")
    return build_official(tmp_path_factory.getbasetemp())[0]


def with_states(graph):
    """Give the hidden states, which the configuration does not name, and a number that has no positions."""
    head = next(node for node in graph.node if "logits" in node.output)
    graph.node.append(helper.make_node("Identity", [head.input[0]], ["hidden_states"]))
    graph.output.append(
        helper.make_tensor_value_info("hidden_states", 1, ["batch_size", "sequence_length", 64])
    )
    constant(graph, "sum_axes", np.array([1, 2], np.int64))
    graph.node.append(helper.make_node("ReduceSum", [head.input[0], "sum_axes"], ["sum"], keepdims=0))
    graph.output.append(helper.make_tensor_value_info("sum", 1, ["batch_size"]))


def with_positions(graph):
    """Take positions, which nothing reads."""
    graph.input.append(helper.make_tensor_value_info("position_ids", 7, ["batch_size", "sequence_length"]))


def apart(found):
    found["search"]["past_present_share_buffer"] = False


def positions(found):
    found["model"]["decoder"]["inputs"]["position_ids"] = "position_ids"


def seen(og, model, *, batch, steps):
    """Return every tensor by name, None for those that are an error, after some steps with given tokens."""
    out = []
    for name in (*NAMES, "sum"):
        for which in ("get_input", "get_output"):
            made = generator(og, model, max_length=20, batch_size=batch)
            made.append_tokens(ROWS[:batch])
            for step in range(steps):
                logits = np.zeros((batch, 1, 352), np.float32)
                logits[..., 9 + step] = 9
                made.get_logits()
                made.set_logits(logits)
                made.generate_next_token()
            try:
                found = getattr(made, which)(name)
            except RuntimeError:
                found = None
            # The official runtime's output shows what set_logits wrote.
            out.append(None if name == "logits" and steps else found)
    return out


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("change", "config"),
    [
        (with_states, lambda found: None),
        (lambda graph: None, apart),
        (with_positions, positions),
        (with_int32, lambda found: None),
    ],
    ids=["states", "apart", "positions", "int32"],
)
def test_every_tensor_is_the_same(base, load, tmp_path, change, config, batch, steps):
    folder = remade(base, tmp_path / "folder", change, config=config)
    theirs, ours = (seen(*load(name, folder), batch=batch, steps=steps) for name in MODULES)
    assert sum(found is not None for found in ours) >= 6
    for wanted, found in zip(theirs, ours, strict=True):
        assert (wanted is None) == (found is None)
        if wanted is not None:
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
            np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_nothing_changes_by_looking(base, tmp_path):
    model = og.Model(remade(base, tmp_path / "folder", with_states))
    runs = []
    for look in (False, True):
        made = generator(og, model, max_length=40)
        made.append_tokens([5, 6, 7, 8] * 4)
        steps = []
        while not made.is_done():
            if look:
                for name in ("logits", "hidden_states", "sum", "present.1.key"):
                    made.get_output(name)
            made.generate_next_token()
            steps.append(made.get_next_tokens().tolist())
        runs.append(steps)
    assert runs[0] == runs[1]


def test_looking_while_drafts_are_checked(base, tmp_path):
    model = og.Model(remade(base, tmp_path / "folder", with_states))
    runs = []
    for look in (False, True):
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=60)
        params.set_speculative_options(ngram_size=2 if look else 0)
        made = og.Generator(model, params)
        made.append_tokens([5, 6, 7, 8] * 4)
        found = []
        while not made.is_done():
            made.generate_next_token()
            found.append((made.get_next_tokens().tolist(), made.get_output("hidden_states").round(2) + 0))
        runs.append(found)
    for (token, states), (other, others) in zip(*runs, strict=True):
        assert token == other
        np.testing.assert_allclose(states, others, atol=0.02)


def test_a_long_prompt_is_given_whole(saved, tmp_path):
    options = BuildOptions(hidden_states=True)
    ortlm.build(saved("phi3").folder, tmp_path / "out", precision="fp32", target="cpu", options=options)
    lm = ortlm.load(tmp_path / "out")
    long = [5 + at % 50 for at in range(300)]
    states = lm.hidden_states(long)
    made = generator(og, og.Model(tmp_path / "out"), max_length=310)
    made.append_tokens(long)
    np.testing.assert_allclose(made.get_output("hidden_states")[0], states, atol=1e-4)
    finish(made)


def test_a_cache_of_keys_and_values_together(base, tmp_path):
    folder = remade(base, tmp_path / "folder", with_combined_cache, config=combined)
    made, plain = (generator(og, og.Model(at), max_length=20) for at in (folder, base))
    for one in (made, plain):
        one.append_tokens([5, 6, 7])
    found = made.get_output("present_1")
    assert found.shape == (2, 1, 2, 3, 16)
    for part, name in enumerate(("key", "value")):
        np.testing.assert_allclose(found[part], plain.get_output(f"present.1.{name}")[:, :, :3], atol=1e-5)


def test_statistics_have_every_name(base, load):
    def program(og, model, **options):
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=80)
        params.set_speculative_options(**options)
        made = og.Generator(model, params)
        made.append_tokens(np.array([5, 6, 7, 8] * 5, np.int32))
        finish(made)
        return made.get_speculative_stats(), made.token_count() - 20

    for options in (
        {},
        {"ngram_size": 2},
        {"ngram_size": 2, "ngram_chained_lookup": True, "max_draft_tokens": 6},
    ):
        (theirs, _), (ours, tokens) = (program(*load(name, base), **options) for name in MODULES)
        assert {name: type(value) for name, value in ours.items()} == {
            name: type(value) for name, value in theirs.items()
        }
        if not options:
            assert not any(value for name, value in ours.items() if name != "acceptance_length_histogram")
            continue
        assert ours["effective_k"] == theirs["effective_k"]
        assert ours["completed_rounds"] == sum(
            ours[f"{kind}_accept_rounds"] for kind in ("full", "partial", "zero")
        )
        assert ours["tokens_emitted"] + ours["standard_fallback_steps"] == tokens
        assert ours["draft_tokens_proposed"] == ours["draft_tokens_accepted"] + ours["tokens_discarded"]
        assert sum(ours["acceptance_length_histogram"]) == ours["completed_rounds"] > 0
        assert 0 < ours["acceptance_rate"] <= 1 < ours["mean_emitted_tokens_per_round"]
        assert (ours["ngram_chained_tokens_proposed"] > 0) == (len(options) > 1)
