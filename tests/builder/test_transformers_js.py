"""The folder for transformers.js: its files, what its graphs compute, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import ortlm
from ortlm.builder import transformers_js
from ortlm.builder.options import BuildOptions
from ortlm.builder.planning import prepare
from ortlm.builder.request import BuildRequest
from ortlm.builder.transformers_js import DTYPES, LAYOUT
from ortlm.cli import main
from ortlm.errors import BadOption, UnsupportedModel
from tests.architectures import oracle

FAST = BuildOptions(recipe="fast", accuracy_level=1)
SHAPES = ("phi3", "phi4-mini", "phi-2", "qwen3", "olmo2", "gemma3", "granite", "llama")


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model in every dtype."""
    out = tmp_path_factory.mktemp("js") / "out"
    ortlm.build(tiny, out, layout=LAYOUT, precision=",".join(DTYPES), options=FAST)
    return out


def session_of(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(
    session: ort.InferenceSession, ids: Any, mask: Any, *, past: dict[str, Any] | None = None, keep: int = 0
) -> tuple[Any, dict[str, Any]]:
    """Return logits and cache, as transformers.js asks for them: rows have the same length, padding included."""
    feed = {
        "input_ids": np.array(ids),
        "attention_mask": np.array(mask),
        "num_logits_to_keep": np.array(keep),
        **(past or {}),
    }
    for value in session.get_inputs():
        if value.name.startswith("past") and past is None:
            kind = np.float16 if "16" in value.type else np.float32
            feed[value.name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), kind)
    names = [value.name for value in session.get_outputs()]
    found = dict(zip(names, session.run(names, feed), strict=True))
    logits = found.pop("logits").astype(np.float32)
    return logits, {name.replace("present", "past_key_values"): x for name, x in found.items()}


def test_files(folder: Path, tiny: Path) -> None:
    """What transformers.js asks for by name is there, and says what it has to say."""
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    graphs = {f"model{dtype.suffix}.onnx" for dtype in DTYPES.values()}
    assert names >= {f"onnx/{name}" for name in graphs} | {f"onnx/{name}_data" for name in graphs}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert "genai_config.json" not in names
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "phi3"
    assert config["transformers.js_config"] == {
        "dtype": "q4",
        "use_external_data_format": dict.fromkeys(graphs, 1),
    }
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == (tiny / "chat_template.jinja").read_text()
    generation = json.loads((folder / "generation_config.json").read_text())
    manifest = ortlm.artifact.open_artifact(folder).manifest
    assert generation["eos_token_id"] == list(manifest.stop_token_ids)
    for name in graphs:
        model = onnx.load(folder / "onnx" / name, load_external_data=False)
        places = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
        assert places == {f"{name}_data"}
        onnx.checker.check_model(folder / "onnx" / name, full_check=True)


def test_manifest_lists_every_dtype(folder: Path) -> None:
    manifest = ortlm.artifact.open_artifact(folder).manifest
    assert {name: graph.file for name, graph in manifest.graphs.items()} == {
        "decoder": "onnx/model_q4.onnx",
        "decoder_q4f16": "onnx/model_q4f16.onnx",
        "decoder_q8": "onnx/model_quantized.onnx",
        "decoder_fp16": "onnx/model_fp16.onnx",
        "decoder_fp32": "onnx/model.onnx",
    }
    dtypes: Any = manifest.info["dtypes"]
    assert list(dtypes) == list(DTYPES)
    assert dtypes["q4f16"]["activations"] == "fp16"
    assert dtypes["q8"]["bits_per_weight"] < 10


def test_special_tokens_are_announced(saved: Any, tmp_path: Path) -> None:
    """A pipeline adds no special tokens to plain text unless the settings say that the tokenizer does."""
    for name in ("phi3", "gemma3"):
        out = tmp_path / name
        ortlm.build(saved(name).folder, out, layout=LAYOUT, options=FAST)
        inner = ortlm.load(out).tokenizer
        settings = json.loads((out / "tokenizer_config.json").read_text())
        adds = inner.encode("a") != inner.encode("a", add_special_tokens=False)
        assert settings["add_bos_token"] is adds
        assert settings["add_eos_token"] is False


@pytest.mark.parametrize("name", SHAPES)
def test_families(name: str, saved: Any, tmp_path: Path) -> None:
    """Rows that are padded on the left give transformers' logits, in prefill and one token at a time."""
    out = tmp_path / "out"
    ortlm.build(saved(name).folder, out, layout=LAYOUT, precision="fp32")
    session = session_of(out / "onnx" / "model.onnx")
    rows = [oracle.random_tokens(n, seed=n) for n in (21, 13, 34)]
    wide = 30
    ids = [[0] * (wide - len(row[:-4])) + row[:-4] for row in rows]
    mask = [[0] * (wide - len(row[:-4])) + [1] * len(row[:-4]) for row in rows]
    logits, past = run(session, ids, mask)
    wanted = [oracle.prompt_logits(saved(name).model, row) for row in rows]
    for i, row in enumerate(rows):
        assert oracle.relative_error(logits[i, wide - len(row) + 4 :], wanted[i][:-4]) < 1e-4
    # Attention continues several rows by one token each, and says so; one row by any number.
    with pytest.raises(Exception, match="batch_size must be 1"):
        run(session, [row[-4:] for row in rows], [[*old, 1, 1, 1, 1] for old in mask], past=past)
    one = {name: x[:1] for name, x in past.items()}
    more, _ = run(session, [rows[0][-4:]], [[*mask[0], 1, 1, 1, 1]], past=one)
    assert oracle.relative_error(more[0], wanted[0][-4:]) < 1e-4
    for step in range(4):
        mask = [[*old, 1] for old in mask]
        logits, past = run(session, [[row[step - 4]] for row in rows], mask, past=past, keep=1)
        for i in range(len(rows)):
            assert oracle.relative_error(logits[i, 0], wanted[i][step - 4]) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_does_not_matter(dtype: str, folder: Path) -> None:
    """Alone, padded on the left or on the right: the same logits, of as many positions as asked for."""
    session = session_of(folder / "onnx" / f"model{DTYPES[dtype].suffix}.onnx")
    rows = [oracle.random_tokens(n, seed=n) for n in (5, 9, 1)]
    alone = [run(session, [row], [[1] * len(row)])[0][0] for row in rows]
    left, _ = run(
        session, [[0] * (9 - len(r)) + r for r in rows], [[0] * (9 - len(r)) + [1] * len(r) for r in rows]
    )
    right, _ = run(
        session, [r + [0] * (9 - len(r)) for r in rows], [[1] * len(r) + [0] * (9 - len(r)) for r in rows]
    )
    few, _ = run(
        session,
        [[0] * (9 - len(r)) + r for r in rows],
        [[0] * (9 - len(r)) + [1] * len(r) for r in rows],
        keep=1,
    )
    assert left.shape == right.shape == (3, 9, 2048)
    assert few.shape == (3, 1, 2048)
    for i, row in enumerate(rows):
        np.testing.assert_allclose(left[i, 9 - len(row) :], alone[i], rtol=1e-3, atol=2e-2)
        np.testing.assert_allclose(right[i, : len(row)], alone[i], rtol=1e-3, atol=2e-2)
        np.testing.assert_allclose(few[i, 0], alone[i][-1], rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"symmetric": False, "block_size": 16}])
@pytest.mark.parametrize("dtype", ["q4", "q8"])
def test_embeddings_without_their_operator(
    dtype: str, options: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    """What takes the place of GatherBlockQuantized, which WebAssembly has not, gives the same to the bit."""
    given = BuildOptions(recipe="fast", accuracy_level=1, **options)
    ortlm.build(tiny, tmp_path / "js", layout=LAYOUT, precision=dtype, options=given)
    usual = BuildOptions(recipe="fast", accuracy_level=1, fp32_activations=True, **options)
    precision = DTYPES[dtype].precision
    ortlm.build(tiny, tmp_path / "gpu", precision=precision, target="webgpu", options=usual)
    file = tmp_path / "js" / "onnx" / f"model{DTYPES[dtype].suffix}.onnx"
    kinds = {node.op_type for node in onnx.load(file, load_external_data=False).graph.node}
    assert "GatherBlockQuantized" not in kinds
    ids, mask = [oracle.random_tokens(40, vocab=2048)], [[1] * 40]
    ours, _ = run(session_of(file), ids, mask)
    theirs, _ = run(session_of(tmp_path / "gpu" / "model.onnx"), ids, mask)
    np.testing.assert_array_equal(ours, theirs)


def test_ortlm_runs_the_first(folder: Path) -> None:
    lm = ortlm.load(folder)
    texts = ["def read_lines(path):", "import os", "The first thing to know"]
    alone = [lm.generate(text, max_new_tokens=12, temperature=0).text for text in texts]
    assert [a.text for a in lm.generate_batch(texts, max_new_tokens=12, temperature=0)] == alone


def test_weights_in_several_files(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Browsers bound the length of a file; a tensor is in one file, calibrated or not."""
    ortlm.build(tiny, tmp_path / "one", layout=LAYOUT, options=FAST)
    monkeypatch.setattr(transformers_js, "MOST_FILE_BYTES", 700_000)
    ortlm.build(tiny, tmp_path / "many", layout=LAYOUT, options=FAST)
    files = sorted((tmp_path / "many" / "onnx").glob("*_data*"), key=lambda p: p.stat().st_mtime)
    assert len(files) > 3
    assert max(f.stat().st_size for f in files) <= 700_000
    config = json.loads((tmp_path / "many" / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {"model_q4.onnx": len(files)}
    ids, mask = [oracle.random_tokens(20, vocab=2048)], [[1] * 20]
    one, many = (
        run(session_of(tmp_path / n / "onnx" / "model_q4.onnx"), ids, mask)[0] for n in ("one", "many")
    )
    np.testing.assert_array_equal(one, many)
    monkeypatch.setattr(transformers_js, "MOST_FILE_BYTES", 10_000)
    with pytest.raises(BadOption, match="browsers hold at most"):
        ortlm.build(tiny, tmp_path / "none", layout=LAYOUT, options=FAST)
    assert not (tmp_path / "none").exists()


def test_longrope_ends_before_its_switch(saved: Any, tmp_path: Path) -> None:
    """transformers.js does not compute its cache again, so the context ends where it would have to."""
    switch = oracle.switch_tokens(saved("phi3-longrope").model.config)
    out = tmp_path / "out"
    artifact = ortlm.build(saved("phi3-longrope").folder, out, layout=LAYOUT, precision="fp32")
    assert artifact.manifest.context_tokens == switch
    assert artifact.manifest.rope_switch_tokens is None
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == switch
    session = session_of(out / "onnx" / "model.onnx")
    tokens = oracle.random_tokens(int(switch))
    logits, past = run(session, [tokens], [[1] * len(tokens)])
    assert oracle.relative_error(logits[0], oracle.prompt_logits(saved("phi3-longrope").model, tokens)) < 1e-4
    with pytest.raises(Exception, match="total_sequence_length"):
        run(session, [[1]], [[1] * (len(tokens) + 1)], past=past)


def test_replaced_with_force_only(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ortlm.build(tiny, out, layout=LAYOUT, options=FAST)
    with pytest.raises(BadOption, match="--force"):
        ortlm.build(tiny, out, layout=LAYOUT, options=FAST)
    ortlm.build(tiny, out, layout=LAYOUT, precision="q8", options=FAST, force=True)
    assert sorted(p.name for p in (out / "onnx").iterdir()) == [
        "model_quantized.onnx",
        "model_quantized.onnx_data",
    ]
    (out / "onnx" / "notes.txt").write_text("mine")
    with pytest.raises(BadOption, match=r"onnx/notes\.txt"):
        ortlm.build(tiny, out, layout=LAYOUT, options=FAST, force=True)


def test_quantization_shapes_quantized_dtypes(tiny: Path, tmp_path: Path) -> None:
    """An option that shapes quantized weights goes with fp16 if another dtype takes it, and else is refused."""
    ortlm.build(
        tiny,
        tmp_path / "out",
        layout=LAYOUT,
        precision="fp16,q4",
        options=BuildOptions(bits=8, recipe="fast"),
    )
    dtypes: Any = ortlm.artifact.open_artifact(tmp_path / "out").manifest.info["dtypes"]
    assert "int8" in dtypes["q4"]["recipe"]
    with pytest.raises(BadOption, match="recipe"):
        ortlm.build(
            tiny, tmp_path / "no", layout=LAYOUT, precision="fp16", options=BuildOptions(recipe="fast")
        )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("-e webgpu", "takes no -e webgpu"),
        ("-p int4", "Nearest: -p q4"),
        ("-p q4,bf16", "Nearest: -p fp16"),
        ("-p q4,q4", "twice"),
        ("-p q4 --kv-cache int8", "int8 key/value cache"),
        ("--fast-prompts", "fast_prompts does not apply"),
        ("--adapter a=b", "--merge-adapter"),
        ("--max-length 100", "onnxruntime-genai"),
        ("--target-kld 0.1", "--target-kld"),
        ("-p q4,q8 --max-kld 0.1", "look at one model"),
        ("--extra_options filename=a.onnx", "filename does not apply"),
        ("--extra_options prune_lm_head=false", "prune_lm_head=false does not apply"),
        ("--extra_options include_hidden_states=true", "include_hidden_states does not apply"),
        ("--extra_options config_only=true", "config_only does not apply"),
        ("--extra_options use_webgpu_fp32=true", "use_webgpu_fp32 does not apply"),
        ("--extra_options windowed_kv_cache=true", "windowed_kv_cache does not apply"),
        ("--extra_options bits=2", "no kernel for 2-bit weights"),
    ],
)
def test_refused_by_name(
    arguments: str, said: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["build", "-i", str(tiny), "-o", str(out), "--layout", LAYOUT, *arguments.split()]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_dtypes_belong_to_the_layout(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "-i", str(tiny), "-o", str(tmp_path / "out"), "-p", "q4f16"]) == 2
    assert "--layout transformers.js" in capsys.readouterr().err
    assert main(["build", "-i", str(tiny), "-o", str(tmp_path / "out"), "--layout", "transformersjs"]) == 2
    assert "Did you mean: transformers.js" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gemma2"])
def test_models_that_cannot_be(name: str, saved: Any) -> None:
    """WebGPU's attention ignores a cap on scores without a word."""
    with pytest.raises(BadOption, match="caps attention scores"):
        prepare(BuildRequest(saved(name).folder, dtype="q4"))


def test_images_are_refused(tmp_path: Path) -> None:
    from tests.vision import checkpoint

    checkpoint.save(tmp_path / "vision")
    with pytest.raises(UnsupportedModel, match="models of text"):
        prepare(BuildRequest(tmp_path / "vision", dtype="q4"))


@pytest.mark.slow
def test_dtypes_are_calibrated_apart(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that fails after the first of two calibrations keeps it, and the next one resumes from there."""
    from ortlm.builder import pipeline
    from ortlm.builder.output_dir import resumable_layers

    out = tmp_path / "out"
    options = BuildOptions(recipe="balanced", calibration_tokens=64)
    real = pipeline._save_graph

    def fails(emitted: Any, prepared: Any, folder: Path, filename: str) -> None:
        if filename == "onnx/model_q4f16.onnx":
            raise KeyboardInterrupt
        real(emitted, prepared, folder, filename)

    monkeypatch.setattr(pipeline, "_save_graph", fails)
    with pytest.raises(KeyboardInterrupt):
        ortlm.build(tiny, out, layout=LAYOUT, precision="q4,q4f16", options=options)
    assert not out.exists()
    kept = resumable_layers(out)
    assert kept is not None
    assert kept[1] == 4
    monkeypatch.setattr(pipeline, "_save_graph", real)
    ortlm.build(tiny, out, layout=LAYOUT, precision="q4,q4f16", options=options)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
