"""Folders of graphs that others made: other element types, further inputs, other caches."""

import numpy as np
import onnxruntime
import pytest

import ortlm
import ortlm.genai as og
from ortlm.errors import BadArtifact
from tests.genai.conftest import MODULES, finish, generator
from tests.genai.graphs import (
    combined,
    remade,
    with_combined_cache,
    with_int32,
    with_kept_logits,
    with_logit_adapter,
)
from tests.runtime.conftest import build_official

ROWS = np.array([[5, 6, 7, 8], [9, 10, 2, 2]], np.int32)


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    """The folder of the official builder."""
    pytest.importorskip("onnxruntime_genai")
    return build_official(tmp_path_factory.getbasetemp())[0]


def forced(og, model, *, batch=1, rows=ROWS, options=None, before=lambda og, made: None):
    """Return the logits of a few steps whose tokens are given, without ids that have no token."""
    made = generator(og, model, max_length=20, batch_size=batch, **(options or {}))
    before(og, made)
    made.append_tokens(rows[:batch])
    out = []
    for token in (11, 12, 13):
        found = made.get_logits()
        out.append(found[..., :330].round(2) + 0)
        chosen = np.zeros_like(found)
        chosen[..., token] = 9
        made.set_logits(chosen)
        made.generate_next_token()
    return out


def adapter_file(path, token):
    """Write an adapter that raises the logit of ``token``, and return its path."""
    bias = np.zeros(352, np.float32)
    bias[token] = 100
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters({"bias": onnxruntime.OrtValue.ortvalue_from_numpy(bias)})
    file.export_adapter(str(path))
    return str(path)


@pytest.mark.parametrize(
    "change",
    [with_int32, with_kept_logits, lambda graph: with_kept_logits(graph, ())],
    ids=["int32", "one", "scalar"],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_inputs_are_fed_as_the_graph_declares_them(plain_folder, load, tmp_path, change, batch):
    changed = remade(plain_folder, tmp_path / "changed", change)
    wanted = forced(*load("ortlm.genai", plain_folder), batch=batch)
    for name in MODULES:
        np.testing.assert_allclose(forced(*load(name, changed), batch=batch), wanted, atol=0.02)
    np.testing.assert_allclose(
        ortlm.load(changed).logits(list(range(5, 12))),
        ortlm.load(plain_folder).logits(list(range(5, 12))),
        atol=1e-4,
    )


def test_drafts_with_logits_that_are_kept_on_request(plain_folder, tmp_path):
    changed = ortlm.load(remade(plain_folder, tmp_path / "changed", with_kept_logits))
    prompt = [5, 6, 7, 8] * 6
    alone, drafted = (changed.generate(prompt, max_new_tokens=20, draft=draft) for draft in (None, "lookup"))
    assert alone.token_ids == drafted.token_ids


@pytest.mark.parametrize("batch", [1, 2])
def test_a_cache_of_keys_and_values_together(plain_folder, load, tmp_path, batch):
    changed = remade(plain_folder, tmp_path / "changed", with_combined_cache, config=combined)
    wanted = forced(*load("ortlm.genai", plain_folder), batch=batch)
    np.testing.assert_allclose(forced(*load("ortlm.genai", changed), batch=batch), wanted, atol=0.01)


def test_a_combined_cache_goes_back_branches_and_is_saved(plain_folder, tmp_path):
    changed = remade(plain_folder, tmp_path / "changed", with_combined_cache, config=combined)
    ours, plain = ortlm.load(changed), ortlm.load(plain_folder)
    prompt = [5, 6, 7, 8]
    wanted = plain.generate(prompt, num_beams=3, max_new_tokens=8)
    assert ours.generate(prompt, num_beams=3, max_new_tokens=8).token_ids == wanted.token_ids
    found = []
    for lm in (ours, plain):
        made = lm.generator(max_new_tokens=8)
        made.append(prompt)
        first = [int(made.step()[0]) for _ in range(6)]
        made.rewind(6)
        found.append([first, [int(made.step()[0]) for _ in range(4)]])
    assert found[0] == found[1]
    assert found[0][0][2:6] == found[0][1]
    made.save(tmp_path / "plain")
    made = ours.generator(max_new_tokens=8)
    made.append([prompt, prompt[:2]])
    made.step()
    made.save(tmp_path / "cache")
    again = ours.generator(max_new_tokens=8)
    again.restore(tmp_path / "cache")
    assert again.step().tolist() == made.step().tolist()


def test_an_adapter_of_one_dimension(plain_folder, load, tmp_path):
    changed = remade(plain_folder, tmp_path / "changed", with_logit_adapter)
    files = {token: adapter_file(tmp_path / f"{token}.onnx_adapter", token) for token in (77, 78)}

    def program(og, model):
        adapters = og.Adapters(model)
        out = [forced(og, model)[0].argmax()]
        for token, file in files.items():
            adapters.load(file, str(token))
            out.append(
                forced(
                    og, model, before=lambda _, made, name=str(token): made.set_active_adapter(adapters, name)
                )[0].argmax()
            )
        return [*map(int, out), int(forced(og, model)[0].argmax())]

    theirs, ours = (program(*load(name, changed)) for name in MODULES)
    assert ours == theirs
    assert ours[1:3] == [77, 78]


def test_what_an_adapter_replaced_comes_back(plain_folder, tmp_path):
    lm = ortlm.load(remade(plain_folder, tmp_path / "changed", with_logit_adapter))
    lm.load_adapter("a", adapter_file(tmp_path / "a.onnx_adapter", 77))
    made = lm.generator(max_new_tokens=8)
    made.append([5, 6, 7])
    plain = made.logits.copy()
    made.change(adapter="a")
    assert int(made.logits[0].argmax()) == 77
    made.change(adapter=None)
    np.testing.assert_allclose(made.logits, plain, atol=1e-5)


def test_an_input_that_must_be_given(plain_folder, load, tmp_path):
    changed = remade(
        plain_folder, tmp_path / "changed", lambda graph: with_logit_adapter(graph, optional=False)
    )
    with pytest.raises(BadArtifact, match="must be given the input bias"):
        ortlm.load(changed).generate([5, 6, 7], max_new_tokens=2)
    bias = np.zeros(352, np.float32)
    bias[99] = 100
    for name in MODULES:
        found = forced(*load(name, changed), before=lambda _, made: made.set_model_input("bias", bias))
        assert int(found[0].argmax()) == 99


def test_masks_of_floats_are_refused(plain_folder, tmp_path):
    def change(graph):
        with_int32(graph)
        for given in graph.input:
            if given.name == "attention_mask":
                given.type.tensor_type.elem_type = 1

    lm = ortlm.load(remade(plain_folder, tmp_path / "changed", change))
    with pytest.raises(
        BadArtifact, match="takes 'attention_mask' as fp32; attention_mask must be int32 or int64"
    ):
        lm.generate([5, 6, 7], max_new_tokens=2)


@pytest.mark.parametrize("role", ["input_ids", "attention_mask"])
def test_inputs_with_the_usual_names_need_not_be_listed(plain_folder, load, tmp_path, role):
    changed = remade(
        plain_folder, tmp_path / "changed", config=lambda found: found["model"]["decoder"]["inputs"].pop(role)
    )
    for name in MODULES:
        np.testing.assert_allclose(
            forced(*load(name, changed)), forced(*load("ortlm.genai", plain_folder)), atol=0.02
        )


def test_the_end_is_the_same(plain_folder, load, tmp_path):
    changed = remade(plain_folder, tmp_path / "changed", with_int32)
    steps = []
    for at in (plain_folder, changed):
        made = generator(og, load("ortlm.genai", at)[1], max_length=12)
        made.append_tokens([5, 6, 7])
        steps.append(finish(made))
    assert steps[0] == steps[1]
