"""Models that are quantized already: what is carried over, what not, and that they compute what they did."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.builder.planning import Prepared, prepare
from ortlm.builder.request import BuildRequest
from ortlm.checkpoint.reader import open_checkpoint
from ortlm.dtypes import Array, dtype
from ortlm.errors import BadOption
from ortlm.graph.weight_plan import Quantized
from ortlm.quant.algorithms import KEPT
from ortlm.quant.rtn import Packed, dequantize
from ortlm.weights.reader import Weights
from ortlm.weights.resolution import stored_architecture
from tests import lora
from tests.architectures import oracle
from tests.checkpoint import quantized_files

FAST = BuildOptions(recipe="fast")
LAYERS = ("q", "k", "v", "o", "gate", "up", "down")
EIGHT = ("gptq-8", "int-quantized")


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
@pytest.mark.parametrize("method", [name for name in quantized_files.METHODS if name != "mxfp4"])
def test_a_model_computes_what_its_numbers_stand_for(method: str, family: str, tmp_path: Path) -> None:
    """In fp32 as transformers, which reads the numbers as floats; with codes that are carried over, the same."""
    path = quantized_files.write(tmp_path / "model", method, family)
    tokens = oracle.random_tokens(24)
    model = AutoModelForCausalLM.from_pretrained(path / "float", dtype="float32")
    theirs = oracle.prompt_logits(model, tokens)
    plain = ortlm.build(path, tmp_path / "plain", precision="fp32")
    assert oracle.relative_error(np.asarray(ortlm.load(plain.path).logits(tokens)), theirs) < 1e-5
    if method in ("fp8", "gptq-act-order"):
        return
    precision = "int8" if method in EIGHT else "int4"
    # Embeddings and head, which are not quantized in the checkpoint, have 8 bits.
    kept = ortlm.build(path, tmp_path / "kept", precision=precision, options=replace(FAST, accuracy_level=1))
    assert oracle.relative_error(np.asarray(ortlm.load(kept.path).logits(tokens)), theirs) < 0.05
    written = json.loads((tmp_path / "kept" / "ortlm.json").read_text())
    assert "carried over" in json.dumps(written)
    assert "dequantized" not in json.dumps(written)
    assert "carried over" in (tmp_path / "kept" / "README.md").read_text()
    prepared = prepare(BuildRequest(path, precision=precision, options=replace(FAST, accuracy_level=1)))
    values = numbers(prepared, (tmp_path / "kept" / "model.onnx.data").read_bytes())
    floats = open_checkpoint(path / "float")
    held = Weights(floats, stored_architecture(floats))
    assert {name.split(".")[2] for names in values for name in names} == set(LAYERS)
    for names, found in values.items():
        np.testing.assert_array_equal(found, held.read(names))


def numbers(prepared: Prepared, data: bytes) -> dict[tuple[str, ...], Array]:
    """Return the numbers of all matrices that were carried over, as they lie in the artifact."""
    found = {}
    for item in prepared.plan.items:
        if not isinstance(item, Quantized) or item.scheme.algorithm != KEPT:
            continue
        parts = []
        for tensor in item.tensors:
            start = prepared.layout.offsets[tensor.name]
            raw = np.frombuffer(data[start : start + tensor.bytes], dtype(tensor.dtype).numpy)
            parts.append(raw.reshape(item.rows, -1))
        packed = Packed(parts[0], parts[1].astype(np.float32), parts[2] if item.zeros else None)
        found[item.parameters] = dequantize(packed, item.scheme, item.inputs)
    return found


@pytest.mark.parametrize(
    ("method", "scheme"),
    [
        ("gptq", (4, 32, True, "fp16")),
        ("gptq-zeros", (4, 32, False, "fp16")),
        ("gptq-v2", (4, 32, False, "fp16")),
        ("awq", (4, 32, False, "fp16")),
        ("pack-quantized", (4, 32, True, "fp16")),
    ],
)
def test_which_form_codes_have(method: str, scheme: tuple[int, int, bool, str], tmp_path: Path) -> None:
    path = quantized_files.write(tmp_path / "model", method)
    prepared = prepare(BuildRequest(path, options=FAST))
    kept = [i for i in prepared.plan.items if isinstance(i, Quantized) and i.scheme.algorithm == KEPT]
    assert {name.split(".")[2] for item in kept for name in item.parameters} == set(LAYERS)
    assert {(i.scheme.bits, i.scheme.block, i.scheme.symmetric, i.scheme.scales) for i in kept} == {scheme}


def kept(path: Path, precision: str = "int4", target: str = "cpu", **options: Any) -> set[str]:
    """Return the weights that a build carries over."""
    request = BuildRequest(path, precision=precision, target=target, options=replace(FAST, **options))
    return set(prepare(request).kept.schemes)


def test_what_is_carried_over_by_default(tmp_path: Path) -> None:
    """What was calibrated, if it takes no more bits than were asked for, and nobody says otherwise."""
    four = quantized_files.write(tmp_path / "four", "gptq")
    eight = quantized_files.write(tmp_path / "eight", "gptq-8")
    assert kept(four)
    assert kept(four, "int8")
    assert not kept(four, "fp32", recipe=None)
    assert not kept(four, keep_quantization=False)
    assert not kept(four, block_size=64)
    assert kept(four, target="webgpu")
    assert kept(eight, "int8")
    assert not kept(eight)
    assert kept(eight, keep_quantization=True)
    # Each is 8 bits of a wider scale than fp16 holds: fp32 activations only.
    rows = quantized_files.write(tmp_path / "rows", "int-quantized")
    assert kept(rows, "int8")
    assert not kept(rows, "int8", "cuda")
    assert not kept(eight, "int4", "dml")


def test_what_cannot_be_carried_over_says_why(tmp_path: Path) -> None:
    ordered = quantized_files.write(tmp_path / "ordered", "gptq-act-order")
    outline = prepare(BuildRequest(ordered, options=FAST)).outline
    assert outline.stored_before.startswith("GPTQ int4, act-order (")
    assert "dequantized" in outline.stored_before
    for path, precision, target, message in (
        (ordered, "int4", "cpu", "holds GPTQ int4, act-order, and whole numbers of up to 8 bits in groups"),
        (
            quantized_files.write(tmp_path / "8", "gptq-8"),
            "int4",
            "dml",
            "dml has no kernel for 8-bit weights",
        ),
        (
            quantized_files.write(tmp_path / "rows", "int-quantized"),
            "int8",
            "cuda",
            "scales in fp16 would not be",
        ),
        (quantized_files.write(tmp_path / "fp8", "fp8"), "int8", "cpu", "holds FP8, and whole numbers"),
    ):
        with pytest.raises(BadOption, match=message):
            kept(path, precision, target, keep_quantization=True)


def test_matrices_that_differ_get_what_holds_both(tmp_path: Path) -> None:
    """Queries, keys and values are one product: smaller blocks and zeros hold those of all three."""
    path = quantized_files.write(tmp_path / "model", "gptq-zeros")
    groups = np.zeros(64, np.int32)
    name = "model.layers.0.self_attn.q_proj"
    found = quantized_files.tensors_of(path)
    first = {"scales": found[f"{name}.scales"][:1], "qzeros": found[f"{name}.qzeros"][:1], "g_idx": groups}
    quantized_files.change(path, **{f"{name}.{part}": tensor for part, tensor in first.items()})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {"q_proj": {"group_size": 64}}
    (path / "config.json").write_text(json.dumps(config))
    prepared = prepare(BuildRequest(path, options=FAST))
    item = next(
        i for i in prepared.plan.items if isinstance(i, Quantized) and "layers.0.q" in i.parameters[0]
    )
    assert (item.scheme.bits, item.scheme.block, item.scheme.symmetric) == (4, 32, False)
    assert item.scheme.algorithm == KEPT


def test_adapters_and_calibration_go_with_it(tmp_path: Path) -> None:
    """The rest of the model is calibrated; what an adapter changes is quantized again."""
    path = quantized_files.write(tmp_path / "model", "awq")
    model = AutoModelForCausalLM.from_pretrained(path / "float", dtype="float32")
    adapter = tmp_path / "lora"
    lora.save(model, adapter, r=4, target_modules=["q_proj"])
    options = BuildOptions(calibration_tokens=64)
    names = prepare(BuildRequest(path, options=options, merge_adapter=adapter)).kept.schemes
    assert "layers.0.q.weight" not in names
    assert "layers.0.down.weight" in names
    artifact = ortlm.build(path, tmp_path / "out", options=options, merge_adapter=adapter)
    assert np.isfinite(np.asarray(ortlm.load(artifact.path).logits([1, 5, 9]))).all()


@pytest.mark.parametrize(
    ("family", "method", "precision"),
    [("mixtral", "awq", "int4"), ("mixtral", "gptq", "int4"), ("gpt-oss", "mxfp4", "int8")],
)
def test_experts(family: str, method: str, precision: str, tmp_path: Path) -> None:
    """Those of all experts are one tensor of the graph; GPT-OSS's are exact in 8 bits."""
    path = quantized_files.write(tmp_path / "model", method, family)
    tokens = oracle.random_tokens(24)
    model = AutoModelForCausalLM.from_pretrained(path / "float", dtype="float32")
    theirs = oracle.prompt_logits(model, tokens)
    plain = ortlm.build(path, tmp_path / "plain", precision="fp32")
    assert oracle.relative_error(np.asarray(ortlm.load(plain.path).logits(tokens)), theirs) < 1e-4
    options = BuildOptions(calibration_tokens=64) if precision == "int4" else FAST
    prepared = prepare(BuildRequest(path, precision=precision, options=options))
    ortlm.build(path, tmp_path / "kept", precision=precision, options=options)
    values = numbers(prepared, (tmp_path / "kept" / "model.onnx.data").read_bytes())
    assert any("expert" in name for names in values for name in names)
    floats = open_checkpoint(path / "float")
    held = Weights(floats, stored_architecture(floats))
    for item in prepared.plan.items:
        if isinstance(item, Quantized):
            found = values.get(item.parameters)
            if found is not None:
                rows = held.stack(item.parameters, interleaved=item.interleaved)
                np.testing.assert_array_equal(found, rows.rows(0, rows.count))


def test_for_browsers(tmp_path: Path) -> None:
    path = quantized_files.write(tmp_path / "model", "awq")
    ortlm.build(path, tmp_path / "page", layout="transformers.js", precision="q4,q4f16", options=FAST)
    assert "carried over" in (tmp_path / "page" / "README.md").read_text()
