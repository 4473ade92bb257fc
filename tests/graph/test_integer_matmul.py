"""Prefill by integer matmul, next to packed weights for single tokens."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import ortlm
from ortlm._utils import cpu
from ortlm.artifact import Graph
from ortlm.bench.traffic import read_traffic
from ortlm.builder.options import BuildOptions
from ortlm.errors import BadArtifact, BadOption
from ortlm.quant.per_channel import round_columns, turned_columns
from tests.architectures import families, oracle
from tests.architectures.oracle import relative_error

FAST = BuildOptions(recipe="fast", fast_prompts=True)
PROMPT = list(range(20, 60))


def test_columns() -> None:
    weight = np.random.default_rng(0).standard_normal((5, 70)).astype(np.float32)
    weight[3] = 0
    codes, scales = round_columns(weight)
    assert (codes.dtype, scales.dtype, codes.shape, scales.shape) == (np.int8, np.float32, (5, 70), (5,))
    assert np.abs(codes * scales[:, None] - weight).max() <= scales.max() / 2 * 1.001
    assert codes[[0, 1, 2, 4]].min(axis=1).min() >= -127


def test_turned_columns() -> None:
    weight = np.random.default_rng(0).standard_normal((200, 70)).astype(np.float32)
    codes, scales = round_columns(weight)
    with ThreadPoolExecutor(2) as pool:
        turned, same = turned_columns(weight, pool)
    assert np.array_equal(turned, codes.T)
    assert np.array_equal(same, scales)


@pytest.mark.parametrize("name", ["phi3", "llama-bias", "gemma2", "qwen3"])
def test_prompts_are_nearly_those_of_the_float_model(build: Any, saved: Any, name: str) -> None:
    wanted = oracle.prompt_logits(saved(name).model, PROMPT)
    loop = build(name, "int4", FAST).loop()
    loop.start()
    found = loop.append([PROMPT], keep=8)[0]
    assert relative_error(found, wanted[-8:]) < 0.1
    packed = build(name, "int4", BuildOptions(recipe="fast")).loop()
    packed.start()
    assert relative_error(packed.append([PROMPT], keep=8)[0], wanted[-8:]) > 2 * relative_error(
        found, wanted[-8:]
    )


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_integer_matmul_only(build: Any, saved: Any, name: str) -> None:
    """Prefill and decode of several rows, tied heads or not; matrices are stored once. Calibration writes so."""
    options = BuildOptions(recipe="fast", integer_only=True)
    lm = build(name, "int4", options)
    model = saved(name).model
    loop = lm.loop()
    loop.start(2)
    loop.append([PROMPT[:-1]] * 2)
    wanted, found = oracle.prompt_logits(model, PROMPT)[-1], loop.step(PROMPT[-1:] * 2)
    # Random experts answer otherwise where another one is chosen, and states add up what was rounded.
    limit = 0.1 if name in ("phi3", "llama-bias", "gemma2", "qwen3") else 0.5
    assert relative_error(found[0], wanted) < limit
    np.testing.assert_array_equal(found[0], found[1])
    graph = onnx.load(lm.artifact.path / "model.onnx", load_external_data=False).graph
    packed = [node.name for node in graph.node if node.op_type == "MatMulNBits"]
    # Experts with GELU are computed one by one, and stay packed.
    assert not packed or (name == "gemma4-moe" and all("/moe/" in node for node in packed))


def test_single_tokens_are_those_of_the_packed_weights(build: Any) -> None:
    """Few tokens take the other branch, bit for bit."""
    logits = []
    for options in (FAST, BuildOptions(recipe="fast")):
        loop = build("phi3", "int4", options).loop()
        loop.start()
        logits += [loop.append([[token]])[0].copy() for token in PROMPT[:6]]
        logits.append(loop.append([PROMPT[6:21]])[0].copy())
    half = len(logits) // 2
    for ours, usual in zip(logits[:half], logits[half:], strict=True):
        np.testing.assert_array_equal(ours, usual)


def test_evaluation_is_of_what_answers_are_made_with(build: Any) -> None:
    """Or a copy in 8 bits would be praised, and 4 bits used."""
    fast, usual = build("phi3", "int4", FAST), build("phi3", "int4", BuildOptions(recipe="fast"))
    assert (fast.manifest.prompt_tokens, usual.manifest.prompt_tokens) == (16, None)
    found, wanted = fast.logits(PROMPT, as_answers=True), usual.logits(PROMPT)
    assert relative_error(found, wanted) < 0.03
    assert relative_error(fast.logits(PROMPT), wanted) > 2 * relative_error(found, wanted)


def test_batches_and_the_official_runtime(build: Any) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    lm = build("phi3", "int4", FAST)
    rows = [PROMPT, PROMPT[:25], PROMPT[5:40]]
    together = lm.generate_batch(rows, max_new_tokens=5)
    for row, made in zip(rows, together, strict=True):
        assert lm.generate(row, max_new_tokens=5, reuse_cache=False).token_ids == made.token_ids
    model = og.Model(str(lm.artifact.path))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=45, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array(PROMPT, np.int32))
    found = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert tuple(found) == together[0].token_ids[: len(found)]


def test_what_is_stored(build: Any, saved: Any, tmp_path: Path) -> None:
    """A byte more for each weight of the layers; a decoding step reads what it read before."""
    fast, usual = (build("phi3", "int4", o).artifact.path for o in (FAST, BuildOptions(recipe="fast")))
    layers = sum(
        p.numel() for n, p in saved("phi3").model.named_parameters() if "layers" in n and p.ndim == 2
    )
    sizes = [(folder / "model.onnx.data").stat().st_size for folder in (fast, usual)]
    assert layers <= sizes[0] - sizes[1] <= 1.2 * layers
    graph = Graph("model.onnx", {}, {"logits": "logits"}, ())
    reads = [read_traffic(folder / "model.onnx", graph).weight_bytes for folder in (fast, usual)]
    assert reads[0] == reads[1]
    onnx.checker.check_model(fast / "model.onnx", full_check=True)


def test_no_overflow_without_vnni(build: Any) -> None:
    """There ONNX Runtime stores codes in another way, if it is told to and finds them in the operator's graph."""
    folder = build("phi3", "int4", FAST).artifact.path
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    branches = [a.g for node in graph.node if node.op_type == "If" for a in node.attribute]
    products = 0
    for branch in branches:
        stored = {tensor.name for tensor in branch.initializer}
        for node in branch.node:
            if node.op_type == "MatMulIntegerToFloat":
                products += 1
                # Its codes, and their zero point.
                assert {node.input[1], node.input[5]} <= stored
    assert products
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["session.x64quantprecision"] == "1"


def test_what_would_overflow_is_refused(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of before say nothing of it."""
    folder = shutil.copytree(build("phi3", "int4", FAST).artifact.path, tmp_path / "old")
    for name in ("ortlm.json", "genai_config.json"):
        text = (folder / name).read_text()
        assert "session.x64quantprecision" in text
        lines = [line for line in text.splitlines() if "session.x64quantprecision" not in line]
        (folder / name).write_text(re.sub(r",(\s*})", r"\1", "\n".join(lines)))
    monkeypatch.setattr(cpu, "instruction_sets", lambda: ["avx2", "avx512_vnni"])
    ortlm.load(folder)
    monkeypatch.setattr(cpu, "instruction_sets", lambda: ["avx2"])
    with pytest.raises(BadArtifact, match="no VNNI, prompts would be computed wrongly"):
        ortlm.load(folder)


def test_images(tmp_path: Path) -> None:
    """They are always many rows: nothing is stored twice."""
    from tests.vision import checkpoint
    from tests.vision.conftest import noise

    checkpoint.save(tmp_path / "c")
    for name, precision, options in (("a", "fp32", None), ("b", "int4", FAST)):
        ortlm.build(tmp_path / "c", tmp_path / name, precision=precision, options=options)
    graph = onnx.load(tmp_path / "b" / "vision.onnx", load_external_data=False).graph
    kinds = {node.op_type for node in graph.node}
    assert "MatMulIntegerToFloat" in kinds
    assert not {"MatMulNBits", "If"} & kinds
    features = []
    for name in "ab":
        lm = ortlm.load(tmp_path / name, threads=1)
        assert lm.vision_encoder is not None
        features += [image.features for image in lm.vision_encoder.read(noise(40, 30))]
    assert relative_error(features[1], features[0]) < 0.03


@pytest.mark.parametrize(
    ("precision", "target", "options", "message"),
    [
        ("int4", "cuda", {"fast_prompts": True}, "fast_prompts does not apply.* not faster on cuda"),
        ("fp32", "cpu", {"fast_prompts": True}, "fast_prompts shape quantized weights"),
        ("int4", "cpu", {"fast_prompts": True, "algorithm": "awq"}, "knows nothing"),
        (
            "int4",
            "cuda",
            {"recipe": "fast", "integer_only": True},
            "integer_only does not apply.* not faster",
        ),
        ("fp32", "cpu", {"integer_only": True}, "integer_only shape quantized weights"),
        (
            "int4",
            "cpu",
            {"recipe": "balanced", "integer_only": True},
            r"round-to-nearest \(RTN\), and gptq calibrates",
        ),
    ],
)
def test_what_does_not_go_together(
    saved: Any, tmp_path: Path, precision: str, target: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadOption, match=message):
        ortlm.build(
            saved("phi3").folder,
            tmp_path / "out",
            precision=precision,
            target=target,
            options=BuildOptions(**options),
        )


def test_calibrated_and_rotated(saved: Any, tmp_path: Path) -> None:
    options = BuildOptions(recipe="balanced", rotate=True, calibration_tokens=512, fast_prompts=True)
    ortlm.build(saved("phi3").folder, tmp_path / "out", options=options)
    loop = ortlm.load(tmp_path / "out", threads=1).loop()
    loop.start()
    wanted = oracle.prompt_logits(saved("phi3").model, PROMPT)
    assert relative_error(loop.append([PROMPT], keep=8)[0], wanted[-8:]) < 0.2
