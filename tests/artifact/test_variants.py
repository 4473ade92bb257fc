"""Which of a model's graphs an ONNX Runtime gets: what the manifest says decides, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import ortlm
from ortlm import genai
from ortlm.artifact import (
    Graph,
    Manifest,
    Variant,
    genai_artifact,
    open_artifact,
    portable,
    read_genai,
    runnable,
)
from ortlm.builder.options import BuildOptions
from ortlm.errors import BadArtifact
from tests.architectures import oracle

# Tests that load the graph with lengths per row.
knows_lengths = pytest.mark.skipif(
    tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 32),
    reason=f"ONNX Runtime {onnxruntime.__version__} knows no lengths per row",
)


def manifest(onnxruntime: str | None = "1.23") -> Manifest:
    variant = Variant("ragged.onnx", {"query_lengths": "lengths"}, "1.32", ("cpu", "cuda"))
    decoder = Graph("plain.onnx", {}, {}, (), {"logits_to_keep": "keep"}, onnxruntime, (variant,))
    return Manifest(graphs={"decoder": decoder}, context_tokens=8, vocab_size=8, stop_token_ids=())


@pytest.mark.parametrize(
    ("version", "provider", "file"),
    [
        ("1.23.0", "cpu", "plain.onnx"),
        ("1.31.1", "cpu", "plain.onnx"),
        ("1.32.0", "cpu", "ragged.onnx"),
        ("1.32.0.dev20261101+cu13", "cpu", "ragged.onnx"),
        ("1.100.0", "CPUExecutionProvider", "ragged.onnx"),
        ("2.0", "CUDAExecutionProvider", "ragged.onnx"),
        ("1.32.0", "WebGpuExecutionProvider", "plain.onnx"),
        ("1.32.0", "dml", "plain.onnx"),
    ],
)
def test_what_runs(version: str, provider: str, file: str) -> None:
    found = runnable(manifest(), onnxruntime=version, provider=provider).graphs["decoder"]
    assert (found.file, found.variants) == (file, ())
    more = {"query_lengths": "lengths"} if file == "ragged.onnx" else {}
    assert found.optional == {"logits_to_keep": "keep", **more}


def test_what_is_too_old() -> None:
    with pytest.raises(
        BadArtifact, match=r"plain\.onnx needs ONNX Runtime 1\.29 or later, found 1\.28\.2\. Update"
    ):
        runnable(manifest("1.29"), onnxruntime="1.28.2", provider="cpu")
    assert runnable(manifest(None), onnxruntime="1.2", provider="cpu").graphs["decoder"].file == "plain.onnx"


def test_portable() -> None:
    assert portable(manifest()).graphs["decoder"] == Graph(
        "plain.onnx", {}, {}, (), {"logits_to_keep": "keep"}, "1.23"
    )


@pytest.fixture(scope="module")
def built(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ortlm.build(tiny, tmp_path_factory.mktemp("variants") / "tiny").path


@pytest.fixture
def older(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ortlm.runtime.language_model.onnxruntime_version", lambda: "1.31.1")


def test_the_manifest_keeps_them(built: Path) -> None:
    """Reading what was written gives the same; entries of older builds, without these keys, are read as well."""
    made = open_artifact(built).manifest
    assert made.graphs["decoder"].onnxruntime == "1.23"
    [variant] = made.graphs["decoder"].variants
    assert variant == Variant(
        "model_ragged.onnx", {"query_lengths": "query_lengths"}, "1.32", ("cpu", "cuda")
    )
    assert json.loads(made.to_json()) == json.loads((built / "ortlm.json").read_text())


@knows_lengths
def test_an_older_artifact(built: Path, tmp_path: Path) -> None:
    """One graph that takes lengths, of which nothing more is told."""
    folder = Path(shutil.copytree(built, tmp_path / "old"))
    (folder / "model_ragged.onnx").replace(folder / "model.onnx")
    found = json.loads((folder / "ortlm.json").read_text())
    decoder = found["graphs"]["decoder"]
    del decoder["variants"], decoder["onnxruntime"]
    decoder["optional"]["query_lengths"] = "query_lengths"
    (folder / "ortlm.json").write_text(json.dumps(found))
    old, new = ortlm.load(folder, threads=1), ortlm.load(built, threads=1)
    assert old.manifest.graphs["decoder"].optional == new.manifest.graphs["decoder"].optional
    assert old.session.path.name == "model.onnx"
    assert (
        old.generate([5, 6, 7], max_new_tokens=8).token_ids
        == new.generate([5, 6, 7], max_new_tokens=8).token_ids
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("onnxruntime", "new"),
        ("onnxruntime", 1.32),
        ("onnxruntime", "1.32.0"),
        ("variants", [3]),
        ("variants", [{"file": "model_ragged.onnx"}]),
        ("variants", [{"file": "../model.onnx", "onnxruntime": "1.32"}]),
        ("variants", [{"file": "none.onnx", "onnxruntime": "1.32"}]),
        ("variants", [{"file": "model.onnx", "onnxruntime": "1.32", "providers": "cpu"}]),
    ],
)
def test_damaged_entries(key: str, value: Any, built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "damaged"))
    found = json.loads((folder / "ortlm.json").read_text())
    found["graphs"]["decoder"][key] = value
    (folder / "ortlm.json").write_text(json.dumps(found))
    with pytest.raises(BadArtifact):
        open_artifact(folder)


def ragged(lm: ortlm.LanguageModel) -> Any:
    """Append 4, 11 and 1 tokens to rows of 9, 3 and 14."""
    first, then = (9, 3, 14), (4, 11, 1)
    rows = [oracle.random_tokens(a + b, seed=a) for a, b in zip(first, then, strict=True)]
    loop = lm.loop()
    loop.start(len(rows))
    loop.append([row[:a] for row, a in zip(rows, first, strict=True)])
    return loop.append([row[a:] for row, a in zip(rows, first, strict=True)]).copy()


@knows_lengths
def test_one_graph_is_loaded(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that can do most, or the one that loads; both say the same, of ragged batches too."""
    new = ortlm.load(built, threads=1)
    monkeypatch.setattr("ortlm.runtime.language_model.onnxruntime_version", lambda: "1.31.1")
    old = ortlm.load(built, threads=1)
    assert (new.session.path.name, old.session.path.name) == ("model_ragged.onnx", "model.onnx")
    assert "query_lengths" in new.session.optional
    assert "query_lengths" not in old.session.optional
    assert oracle.relative_error(ragged(old), ragged(new)) < 1e-2
    prompt = new.encode("def read_lines(path):")
    texts = [lm.generate(prompt, max_new_tokens=24).token_ids for lm in (new, old)]
    assert texts[0] == texts[1]


@pytest.mark.usefixtures("older")
def test_prompts_saved_by_one_are_read_by_the_other(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = ortlm.load(built, threads=1).generator(ignore_eos=True)
    saved.append([5, 6, 7, 8])
    saved.save(tmp_path / "cache")
    monkeypatch.undo()
    again = ortlm.load(built, threads=1).generator(ignore_eos=True)
    again.restore(tmp_path / "cache")
    assert [again.step() for _ in range(4)] == [saved.step() for _ in range(4)]


@knows_lengths
def test_what_needs_a_newer_one(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An int8 cache is in both graphs; an ONNX Runtime that does not know it is told by version."""
    built = ortlm.build(tiny, tmp_path / "int8", options=BuildOptions(kv_cache="int8"))
    decoder = built.manifest.graphs["decoder"]
    assert (decoder.onnxruntime, decoder.variants[0].onnxruntime) == ("1.28", "1.32")
    for version, kind in (("1.31.1", "model.onnx"), ("1.32.0", "model_ragged.onnx")):
        monkeypatch.setattr(
            "ortlm.runtime.language_model.onnxruntime_version", lambda version=version: version
        )
        lm = ortlm.load(built.path, threads=1)
        assert lm.session.path.name == kind
        assert {lm.session.inputs[state.past].dtype.name for state in decoder.states} == {"int8"}
    monkeypatch.setattr("ortlm.runtime.language_model.onnxruntime_version", lambda: "1.27.0")
    with pytest.raises(BadArtifact, match=r"model\.onnx needs ONNX Runtime 1\.28 or later, found 1\.27\.0"):
        ortlm.load(built.path)


@knows_lengths
def test_windows_need_a_newer_one(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime 1.23 loads them and attends to another window."""
    for name, since in (("llama", "1.23"), ("mistral", "1.24"), ("gemma2", "1.24"), ("phi3-window", "1.24")):
        built = ortlm.build(saved(name).folder, tmp_path / name, precision="fp32")
        assert built.manifest.graphs["decoder"].onnxruntime == since
        assert built.manifest.graphs["decoder"].variants[0].onnxruntime == "1.32"
    monkeypatch.setattr("ortlm.runtime.language_model.onnxruntime_version", lambda: "1.23.2")
    with pytest.raises(BadArtifact, match=r"model\.onnx needs ONNX Runtime 1\.24 or later, found 1\.23\.2"):
        ortlm.load(tmp_path / "mistral")
    ortlm.load(tmp_path / "llama")


@knows_lengths
def test_genai_config_decides(built: Path) -> None:
    """A configuration that names another graph gets that, and data from memory is what runs."""
    found = read_genai(built)
    assert genai_artifact(built, found).manifest.graphs["decoder"].variants
    found["model"]["decoder"]["filename"] = "model_ragged.onnx"
    assert not genai_artifact(built, found).manifest.graphs["decoder"].variants
    config = genai.Config(str(built))
    assert genai.Model(config)._handle.lm.session.path.name == "model_ragged.onnx"
    config.add_model_data("model.onnx", (built / "model.onnx").read_bytes())
    assert genai.Model(config)._handle.lm.session.path.name == "model.onnx"
