"""An int8 key/value cache: close to the float one, whatever is done with it, in both runtimes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.builder.planning import prepare
from ortlm.builder.request import BuildRequest
from ortlm.calibration import kv_cache_scales as calibration
from ortlm.cli import main
from ortlm.cli.inspect import describe
from ortlm.errors import BadArtifact, BadCheckpoint, BadOption
from ortlm.spec import Attention, Rope
from ortlm.target import TARGETS
from tests import lora, official
from tests.architectures import oracle
from tests.graph.test_parity import greedy

INT8 = BuildOptions(kv_cache="int8")
# Kinds of attention: plain, a window, two rotation tables, rotation of a part, rotation outside, softcap, heads
# normalised, shared keys, layers without rotation.
SHAPES = [
    "phi3",
    "phi3-window",
    "phi3-longrope",
    "phi4-mini",
    "phi-2",
    "gemma2",
    "gemma3",
    "gemma4-e",
    "gemma3n",
    "qwen3",
    "smollm3",
]
# Random weights pass errors on more strongly than trained ones; see docs/quantization.md for those.
TOLERANCE = 0.07


@pytest.fixture(scope="module")
def shipped(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the shipped model, fp32 weights, by the name of its cache scheme."""
    found = {}
    for scheme in ("none", "int8_per_channel", "int8_per_tensor"):
        out = tmp_path_factory.mktemp("shipped") / scheme
        ortlm.build(tiny, out, precision="fp32", options=BuildOptions(kv_cache=scheme))
        found[scheme] = ortlm.load(out, threads=1)
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_logits(name: str, build: Any) -> None:
    """A prompt at once and token by token, past every window and past the longrope switch."""
    want, got = build(name), build(name, options=INT8)
    tokens = oracle.random_tokens(120)
    assert oracle.relative_error(got.logits(tokens), want.logits(tokens)) < TOLERANCE
    rows = [[tokens[:24]], [tokens[24:]]]
    assert oracle.relative_error(got.logits_batch(*rows), want.logits_batch(*rows)) < TOLERANCE
    assert 4 * got.cache_bytes_per_token == want.cache_bytes_per_token


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_stored(name: str, saved: Any, build: Any) -> None:
    """The first layer's keys and values, which no rounding came before, are off by half a step at most."""
    tokens, states = oracle.random_tokens(50), []
    for lm in (build(name), build(name, options=INT8)):
        loop = lm.loop()
        loop.start()
        loop.append([tokens])
        states.append([state.copy() for state in loop.cache.read()[:2]])
    prepared = prepare(BuildRequest(saved(name).folder, precision="fp32"))
    scales = calibration.cache_scales(build(name).artifact, prepared.spec, per_channel=True)[0]
    for found, codes, scale in zip(*states, (scales.key, scales.value), strict=True):
        assert codes.dtype == np.int8
        inside = np.abs(found) <= 127 * scale
        assert inside.mean() > 0.995
        assert (np.abs(codes * scale - found) <= 0.501 * scale)[inside].all()


def test_shipped_model(shipped: Any) -> None:
    """A trained model: nearly the same logits, and the same greedy text for a while."""
    lm = shipped["none"]
    prompt = lm.encode("def read_lines(path):\n    with open(path) as file:\n        return")
    want = lm.logits(prompt)
    for scheme in ("int8_per_channel", "int8_per_tensor"):
        got = shipped[scheme]
        assert oracle.relative_error(got.logits(prompt), want) < 0.02
        assert greedy(got, prompt, steps=32) == greedy(lm, prompt, steps=32)


def test_pieces_and_rewinds(shipped: Any) -> None:
    """However a text is fed, codes in the cache are those of one run, up to a rounding of one."""
    lm = shipped["int8_per_channel"]
    tokens = oracle.random_tokens(90, vocab=2000)
    whole, loop = lm.logits(tokens), lm.loop()
    loop.start()
    for start, end in ((0, 40), (40, 41), (41, 70)):
        loop.append([tokens[start:end]])
    loop.trim(30)
    got = loop.append([tokens[30:]], keep=60)[0]
    assert oracle.relative_error(got, whole[30:]) < 0.01


def test_ragged_batch(shipped: Any) -> None:
    """Rows of different lengths, to which different numbers of tokens are added, as if each were alone."""
    lm = shipped["int8_per_channel"]
    first, then = (9, 30, 14), (4, 11, 1)
    rows = [oracle.random_tokens(a + b, seed=a, vocab=2000) for a, b in zip(first, then, strict=True)]
    loop = lm.loop()
    loop.start(3)
    loop.append([row[:a] for row, a in zip(rows, first, strict=True)])
    got = loop.append([row[a:] for row, a in zip(rows, first, strict=True)])
    for row, logits in zip(rows, got, strict=True):
        assert oracle.relative_error(logits, lm.logits(row)[-1]) < 0.01


def test_saved_prompt(shipped: Any, tmp_path: Path) -> None:
    lm = shipped["int8_per_channel"]
    tokens = oracle.random_tokens(40, vocab=2000)
    generators = [lm.generator(ignore_eos=True) for _ in range(2)]
    generators[0].append(tokens)
    generators[0].save(tmp_path / "cache")
    generators[1].restore(tmp_path / "cache")
    for _ in range(5):
        assert generators[0].step() == generators[1].step()
    with pytest.raises(BadArtifact, match="another model"):
        shipped["none"].generator().restore(tmp_path / "cache")


@pytest.mark.parametrize("scheme", ["int8_per_channel", "int8_per_tensor"])
def test_official_runtime(scheme: str, shipped: Any) -> None:
    lm = shipped[scheme]
    prompt = lm.encode("import os\n\n\ndef size(path):\n    ")
    wanted = greedy(lm, prompt, steps=24, banned=tuple(lm.manifest.stop_token_ids))
    assert official.greedy(lm.artifact.path, prompt, steps=24) == wanted


def test_what_is_told(tiny: Path, shipped: Any, tmp_path: Path) -> None:
    """Outline, manifest and inspection say what a token costs; the folder holds nothing of the calibration."""
    folder = shipped["int8_per_channel"].artifact.path
    plain = shipped["none"].artifact.path
    assert {p.name for p in folder.iterdir()} == {p.name for p in plain.iterdir()}
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    found, before = describe(str(folder)), describe(str(plain))
    assert 4 * found["cache_bytes_per_token"] == before["cache_bytes_per_token"]
    assert (found["info"]["kv_cache"], before["info"]["kv_cache"]) == ("int8_per_channel", "fp32")
    assert (folder / "model.onnx.data").read_bytes() == (plain / "model.onnx.data").read_bytes()
    ortlm.build(tiny, tmp_path / "again", precision="fp32", options=INT8, threads=1)
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
    only = ortlm.build(tiny, tmp_path / "only", options=BuildOptions(kv_cache="int8", config_only=True))
    assert not (only.path / "model.onnx").exists()
    assert json.loads((only.path / "ortlm.json").read_text())["info"]["kv_cache"] == "int8_per_channel"


def test_adapters_are_calibrated_too(saved: Any, tmp_path: Path) -> None:
    """An adapter that makes keys ten times as large would be cut off at the base's scales."""
    base = saved("llama")
    lora.save(base.model, tmp_path / "lora", r=4, lora_alpha=40, target_modules=["k_proj", "v_proj"])
    lms = [
        ortlm.load(
            ortlm.build(
                base.folder,
                tmp_path / kind,
                precision="fp32",
                options=BuildOptions(kv_cache=kind),
                adapters={"x": tmp_path / "lora"},
            ).path,
            threads=1,
        )
        for kind in ("none", "int8")
    ]
    logits = []
    for lm in lms:
        generator = lm.generator(adapter="x")
        generator.append(oracle.random_tokens(60))
        logits.append(generator.logits[0].copy())
    assert oracle.relative_error(logits[1], logits[0]) < TOLERANCE


@pytest.mark.parametrize("target", [t.name for t in TARGETS.values() if t.name != "cpu"])
def test_targets_that_cannot(target: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match=rf"not built for {target}.*Nearest: -e cpu"):
        ortlm.build(tiny, tmp_path / "out", target=target, options=INT8)


def test_a_failure_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "key_absmax", lambda keys, mixer: np.full(keys.shape[1::2], np.inf))
    with pytest.raises(BadCheckpoint, match="keys of layer 0 become infinite"):
        ortlm.build(tiny, tmp_path / "out", options=INT8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("interleaved", [True, False])
def test_reach_holds_at_every_position(interleaved: bool) -> None:
    """Keys of one position, turned by any angle and by a table with another factor, stay within their reach."""
    rope = Rope((0.5, 0.001), 1.0, (0.1, 0.0001), 1.5, 8, interleaved=interleaved)
    mixer = Attention(2, 1, 6, rope, scale=1.0)
    keys = np.random.default_rng(0).standard_normal((1, 1, 9, 6)).astype(np.float32)
    reach = calibration.key_absmax(keys, mixer)[0]
    pairs = [(0, 1), (2, 3)] if interleaved else [(0, 2), (1, 3)]
    turns = np.exp(1j * np.linspace(0, 6.3, 200))
    for a, b in pairs:
        rotated = 1.5 * (keys[0, 0, :, a] + 1j * keys[0, 0, :, b])[:, None] * turns
        assert reach[a] == reach[b] == pytest.approx(abs(rotated.real).max(), rel=1e-3)
    assert np.allclose(reach[4:], np.abs(keys[0, 0, :, 4:]).max(axis=0))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--kv-cache", "int4"], r"'int4'.*Allowed: int8 \(which is int8_per_channel\), int8_per_channel"),
        (
            ["--extra_options", "kv_cache_quant_scheme=fp8_per_tensor"],
            r"'fp8_per_tensor'.*8-bit integers only",
        ),
        (["--extra_options", "kv_cache_quant_scheme=int8_per_token"], r"measured once"),
        (["--extra_options", "kv_cache_scale_file=x.json"], r"the build itself measures"),
        (["--kv-cache", "int8", "-e", "webgpu"], r"not built for webgpu"),
        (["--kv-cache", "int8", "--extra_options", "kv_cache_quant_scheme=none"], r"contradict"),
    ],
)
def test_wrong_use(
    args: list[str], message: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "-i", str(tiny), "-o", str(tmp_path / "out"), *args]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args", [["--kv-cache", "int8"], ["--extra_options", "kv_cache_quant_scheme=INT8_per_channel"]]
)
def test_dry_run(args: list[str], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "-i", str(tiny), "-o", str(tmp_path / "out"), "--dry-run", "--json", *args]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kv_cache"], found["cache_bytes_per_token"]) == ("int8_per_channel", 512)
