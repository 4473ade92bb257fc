"""Adapters that are switched while a model runs, in both modules."""

import numpy as np
import pytest

import ortlm
from tests.genai.conftest import generator

lora = pytest.importorskip("tests.lora")
PROMPT = np.arange(10, 30, dtype=np.int32)


@pytest.fixture(scope="module")
def adapted(saved, tmp_path_factory):
    """The folder of a tiny Llama with an adapter, which is not loaded yet."""
    folder = tmp_path_factory.mktemp("adapted")
    lora.save(saved("llama").model, folder / "lora", **lora.ADAPTERS["some-parts"][1])
    ortlm.build(saved("llama").folder, folder / "out", precision="fp32", adapters={"french": folder / "lora"})
    return folder / "out"


def test_adapters_are_switched(both, adapted):
    file = str(adapted / "adapters" / "french.onnx_adapter")

    def program(og, model):
        adapters = og.Adapters(model)
        adapters.load(file, "french")
        out = []
        for name in (None, "french"):
            made = generator(og, model, max_length=40)
            if name:
                made.set_active_adapter(adapters, name)
            made.append_tokens(PROMPT)
            out.append(made.get_logits().round(3))
        return out

    base, french = both(program, at=adapted)
    assert base != french


def test_a_file_that_is_no_adapter(load, folder, adapted):
    og, model = load("ortlm.genai", adapted)
    with pytest.raises(og.GenaiError):
        og.Adapters(model).load(str(folder / "model.onnx"), "french")
