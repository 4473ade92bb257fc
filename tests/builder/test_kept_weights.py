"""Matrices of a GGUF file that are carried over, codes and scales as they were, where they stay what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.builder.planning import prepare
from ortlm.builder.request import BuildRequest
from ortlm.checkpoint.gguf import open_gguf
from ortlm.checkpoint.gguf_weights import WHOLE
from ortlm.checkpoint.quantized_weight import Grid
from ortlm.errors import BadOption
from ortlm.graph.weight_plan import Quantized
from ortlm.quant.algorithms import KEPT
from ortlm.quant.pack import pack
from ortlm.quant.rtn import Packed, dequantize
from ortlm.quant.scheme import Scheme
from tests.architectures import families, oracle
from tests.checkpoint import gguf_files

KEEP = BuildOptions(keep_quantization=True, recipe="fast")


def made(
    folder: Path, kind: Callable[[str], Kind], *, name: str = "model.gguf", family: str = "llama"
) -> Path:
    if not (folder / "config.json").exists():
        families.save(family, folder)
    gguf_files.write(folder, folder / name, kind=kind)
    return folder / name


@pytest.mark.parametrize("kind", WHOLE)
def test_codes_and_scales_are_the_files(kind: str, tmp_path: Path) -> None:
    """Dequantized as ONNX Runtime does, they are bit for bit what the gguf package makes of the blocks."""
    families.save("llama", tmp_path)
    raw = {
        name: gguf_files.random_blocks(Kind[kind], 32, 64, seed=at)
        for at, name in enumerate(("attn_v", "attn_q"))
    }

    def change(writer: gguf.GGUFWriter, tensors: gguf_files.Tensors) -> None:
        for name, blocks in raw.items():
            writer.add_tensor(f"blk.0.{name}.weight", blocks, raw_dtype=Kind[kind])
            del tensors[f"blk.0.{name}.weight"]

    gguf_files.write(tmp_path, tmp_path / "model.gguf", change=change)
    weights = open_gguf(tmp_path / "model.gguf").weights
    for part in "vq":
        weight: Any = weights[f"model.layers.0.self_attn.{part}_proj.weight"]
        for bits in {WHOLE[kind], 8}:
            codes, scales, _ = weight.codes(3, 29, Grid(bits, 32))
            scheme = Scheme(bits, 32, symmetric=True)
            found = dequantize(Packed(pack(codes, bits), scales, None), scheme, 64)
            np.testing.assert_array_equal(found, weight.rows(3, 29))
    blocks = raw["attn_v"].reshape(32, 2, -1)
    weight = weights["model.layers.0.self_attn.v_proj.weight"]
    scales = weight.codes(0, 32, Grid(8, 32)).scales
    halves = blocks[..., :2].copy().view(np.float16)[..., 0]
    powers = 2.0 ** (blocks[..., 0].astype(np.float64) - 128)
    np.testing.assert_array_equal(scales, powers if kind == "MXFP4" else halves)


@pytest.mark.parametrize("target", ["cpu", "webgpu"])
@pytest.mark.parametrize("kinds", [(Kind.Q4_0, Kind.Q4_0), (Kind.Q4_0, Kind.Q8_0), (Kind.Q8_0, Kind.Q5_0)])
def test_a_model_computes_what_its_file_says(kinds: tuple[Kind, Kind], target: str, tmp_path: Path) -> None:
    """Where all matrices are carried over the graph has the file's own numbers."""
    path = made(tmp_path, lambda name: kinds["attn_k" in name or "token_embd" in name or "output" in name])
    prepared = prepare(BuildRequest(path, target=target, options=KEEP))
    items = [item for item in prepared.plan.items if isinstance(item, Quantized)]
    assert items
    assert {item.scheme.algorithm for item in items} == {KEPT}
    assert "dequantized" not in prepared.outline.stored_before
    if target != "cpu":
        return
    options = replace(KEEP, accuracy_level=1)
    kept = ortlm.build(path, tmp_path / "kept", options=options)
    plain = ortlm.build(path, tmp_path / "plain", precision="fp32")
    tokens = oracle.random_tokens(24)
    ours, theirs = (np.asarray(ortlm.load(artifact.path).logits(tokens)) for artifact in (kept, plain))
    assert oracle.relative_error(ours, theirs) < 1e-5
    written = json.loads((tmp_path / "kept" / "ortlm.json").read_text())
    assert "carried over" in json.dumps(written)
    assert "carried over" in (tmp_path / "kept" / "README.md").read_text()


def test_what_has_no_form_is_dequantized_and_said(tmp_path: Path) -> None:
    path = made(tmp_path, lambda name: Kind.Q4_1 if "ffn" in name else Kind.Q8_0)
    outline = prepare(BuildRequest(path, options=KEEP)).outline
    assert "Q4_1" in outline.stored_before
    assert outline.stored_before.count("carried over") == 1
    assert outline.stored_before.count("dequantized") == 1
    assert (
        "carried over"
        not in prepare(BuildRequest(path, options=BuildOptions(recipe="fast"))).outline.stored_before
    )


def test_calibration_leaves_alone_what_is_carried_over(tmp_path: Path) -> None:
    path = made(tmp_path, lambda name: Kind.Q8_0 if "ffn_down" in name else Kind.Q4_1)
    options = BuildOptions(keep_quantization=True, recipe="balanced", calibration_tokens=64, head_bits=None)
    for algorithm in ("gptq", "awq"):
        out = tmp_path / algorithm
        artifact = ortlm.build(path, out, options=replace(options, algorithm=algorithm))
        assert np.isfinite(np.asarray(ortlm.load(artifact.path).logits([1, 5, 9]))).all()
    prepared = prepare(BuildRequest(path, options=options))
    item = next(i for i in prepared.plan.items if isinstance(i, Quantized) and "down" in i.parameters[0])
    assert item.scheme.algorithm == KEPT
    codes = (tmp_path / "gptq" / "model.onnx.data").read_bytes()[
        prepared.layout.offsets[item.views[0].name] :
    ]
    weight: Any = prepared.checkpoint.weights["model.layers.0.mlp.down_proj.weight"]
    want = weight.codes(0, item.rows, Grid(8, 32)).codes.tobytes()
    assert codes[: len(want)] == want


def test_models_that_were_trained_for_it(tmp_path: Path) -> None:
    trained = made(tmp_path, lambda name: Kind.Q4_0, name="tiny-qat-q4_0.gguf")
    other = made(tmp_path, lambda name: Kind.Q4_0, name="quatsch.gguf")
    fast = BuildOptions(recipe="fast")

    def kept(path: Path, options: BuildOptions, precision: str = "int4") -> bool:
        return bool(prepare(BuildRequest(path, precision=precision, options=options)).kept.schemes)

    assert kept(trained, fast)
    assert not kept(other, fast)
    assert not kept(trained, replace(fast, keep_quantization=False))
    assert not kept(trained, replace(fast, block_size=64))
    assert not kept(trained, BuildOptions(), "fp32")


@pytest.mark.parametrize(
    ("options", "precision", "target", "message"),
    [
        (replace(KEEP, bits=8), "int4", "cpu", "keep_quantization and bits contradict"),
        (replace(KEEP, rotate=True), "int4", "cpu", "keep_quantization and rotate contradict"),
        (replace(KEEP, excluded_nodes=("/lm_head/MatMul",)), "int4", "cpu", "excluded_nodes"),
        (BuildOptions(keep_quantization=True), "fp32", "cpu", "quantizes nothing"),
    ],
)
def test_what_contradicts_it(
    options: BuildOptions, precision: str, target: str, message: str, tmp_path: Path
) -> None:
    path = made(tmp_path, lambda name: Kind.Q8_0)
    with pytest.raises(BadOption, match=message):
        prepare(BuildRequest(path, precision=precision, target=target, options=options))


def test_where_nothing_can_be_kept(tmp_path: Path) -> None:
    path = made(tmp_path, lambda name: Kind.Q4_1)
    with pytest.raises(
        BadOption,
        match=r"holds Q4_1, and whole numbers .* and Q4_0, Q5_0, Q8_0, IQ4_NL, MXFP4 of GGUF, are what",
    ):
        prepare(BuildRequest(path, options=KEEP))
    with pytest.raises(BadOption, match="holds no quantized weights"):
        prepare(BuildRequest(tmp_path, options=KEEP))
