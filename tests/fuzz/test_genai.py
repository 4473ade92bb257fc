"""``genai_config.json`` as others write it, and overlays of it: damaged ones are refused, or run."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from hypothesis import strategies as st

import ortlm
import ortlm.genai as og
from ortlm.errors import Error
from tests.conftest import ROOT
from tests.fuzz.harness import damaged_json, fuzz


@functools.cache
def config() -> dict[str, Any]:
    """Return a configuration of the model that ships with the project, with keys that others set."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        artifact = ortlm.build(
            ROOT / "models" / "tiny-phi3", f"{folder}/tiny", precision="fp32", target="cpu"
        )
        found = json.loads((artifact.path / "genai_config.json").read_text())
    found["model"] |= {
        "tokenizer_dir": "text",
        "sep_token_id": 5,
        "bot_token_id": 6,
        "draft": {"filename": "x"},
    }
    decoder = found["model"]["decoder"]
    decoder |= {
        "layer_types": ["full_attention"],
        "sliding_window": {"window_size": 400, "layers": [], "slide_key_value_cache": False},
        "run_options": {"a": "1"},
    }
    found["speculative"] = {"ngram_size": 2, "max_draft_tokens": 4, "cooldown": True}
    found["engine"] = {"static_batching": {"max_batch_size": 4}}
    return dict(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("fuzz") / "model"
    ortlm.build(ROOT / "models" / "tiny-phi3", out, precision="fp32", target="cpu")
    (out / "ortlm.json").unlink()
    (out / "text").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).rename(out / "text" / name)
    return out


def use(opened):
    model = og.Model(opened)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=min(8, int(params.get_search_options()["max_length"])))
    made = og.Generator(model, params)
    made.append_tokens([5, 6, 7])
    made.generate_next_token()
    og.Tokenizer(model).decode(made.get_sequence(0))


@fuzz(st.deferred(lambda: damaged_json(config())))
def test_configurations(folder, found):
    (folder / "genai_config.json").write_text(json.dumps(found))
    use(str(folder))
    ortlm.load(folder, threads=1)


@fuzz(st.deferred(lambda: damaged_json(config())), allowed=(Error, RuntimeError))
def test_overlays(folder, found):
    (folder / "genai_config.json").write_text(json.dumps(config()))
    opened = og.Config(str(folder))
    try:
        text = json.dumps(found)
    except ValueError:
        return
    opened.overlay(text)
    # Options of ONNX Runtime that a program sets are its own affair.
    opened._found["model"]["decoder"].pop("session_options", None)
    use(opened)
