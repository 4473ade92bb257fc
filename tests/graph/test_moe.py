"""Mixtures of experts: routers against transformers, quantized experts against their own rounded weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers import Lfm2MoeConfig
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeTopKRouter
from transformers.models.phimoe.modeling_phimoe import sparsemixer

import ortlm
from ortlm.builder.extra_options import parse_extra_options
from ortlm.builder.options import BuildOptions
from ortlm.errors import BadOption, UnsupportedModel
from ortlm.graph import moe
from ortlm.graph.builder import Builder
from ortlm.quant.recipe import Rule, Uniform
from ortlm.quant.rtn import dequantize, rtn
from ortlm.quant.scheme import Scheme
from ortlm.spec import CHOSEN_SOFTMAX, SIGMOID, SOFTMAX, SPARSE_MIXER, Experts
from ortlm.target import HERE, TARGETS
from tests.architectures import families, oracle

Build = Callable[..., ortlm.LanguageModel]
MIXTURES = families.MIXTURES
# Convolutions, and what decides how fast linear attention forgets.
SMALL = ("conv1d.weight", "conv.conv.weight", "in_proj_a.weight", "in_proj_b.weight", "in_proj_ba.weight")


def test_all_mixtures_are_meant() -> None:
    assert len(MIXTURES) == 17


# --- routers ------------------------------------------------------------------------------------------------


def routed(
    spec: Experts, logits: np.ndarray, offset: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return weights [T, E] by what is emitted for a router, and by what QMoE makes of what it is given."""
    g = Builder(target=HERE, dtype="fp32", recipe=Uniform(None, None, None), layers=1)
    x = g.input("logits", "fp32", ("tokens", spec.experts))
    by = None if offset is None else g.constant(offset, "offset")
    chosen = moe._scattered(g, spec, *moe._chosen(g, spec, x, "/moe", by), 0.0, "/moe")
    given, factor = moe._for_operator(g, spec, x, "/moe", by)
    one = g.op("Identity", given, shape=("tokens", spec.experts), name="/given")
    g.output(chosen, "weights", ("tokens", spec.experts))
    g.output(one, "given", ("tokens", spec.experts))
    if factor is not None:
        g.output(factor, "factor", ("tokens", 1))
    session = onnxruntime.InferenceSession(ir.to_proto(g.model({}, "test")).SerializeToString())
    weights, passed, *factors = session.run(None, {"logits": logits})
    # What the operators do: the softmax over the k largest.
    best = np.argsort(-passed, axis=1, kind="stable")[:, : spec.top_k]
    values = np.take_along_axis(passed, best, axis=1).astype(np.float64)
    values = np.exp(values - values.max(axis=1, keepdims=True))
    values /= values.sum(axis=1, keepdims=True)
    result = np.zeros(passed.shape)
    np.put_along_axis(result, best, values, axis=1)
    return weights, result * (factors[0] if factors else 1.0)


def near_ties(experts: int) -> np.ndarray:
    """Return rows of router logits: random, nearly equal, around the sparse mixer's limit, negative, zero."""
    generator = np.random.default_rng(0)
    rows = [generator.standard_normal((200, experts))]
    rows.append(1.0 + 0.02 * generator.standard_normal((200, experts)))
    rows.append(-2.0 + 0.05 * generator.standard_normal((200, experts)))
    for gap in (0.0199, 0.01999, 0.02001, 0.0201, 1e-6):
        for size in (3.0, -3.0, 1e-3):
            row = np.full(experts, size - 4 * abs(size))
            row[[1, 2, 0]] = size, size - gap * abs(size), size - 2 * gap * abs(size)
            rows.append(row[None])
    rows.append(np.zeros((1, experts)))
    rows.append(1e4 * generator.standard_normal((20, experts)))
    return np.concatenate(rows).astype(np.float32)


def test_sparse_mixer_is_that_of_transformers() -> None:
    logits = near_ties(16)
    spec = Experts(16, 2, 32, routing=SPARSE_MIXER, mixer_eps=0.01)
    weights, operator = routed(spec, logits)
    values, which = sparsemixer(torch.from_numpy(logits), 0.01, training=False)
    want = np.zeros_like(logits)
    np.put_along_axis(want, which.numpy(), values.numpy(), axis=1)
    np.testing.assert_allclose(weights, want, atol=2e-6)
    np.testing.assert_allclose(operator, want, atol=2e-6)
    # They are two softmaxes, whose sum is anything between 2 / 16 and 2.
    assert want.sum(axis=1).min() < 0.5
    assert want.sum(axis=1).max() > 1.99


@pytest.mark.parametrize("routing", [SOFTMAX, CHOSEN_SOFTMAX])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_softmax_routers(routing: str, top_k: int) -> None:
    logits = near_ties(8)
    weights, operator = routed(Experts(8, top_k, 32, routing=routing), logits)
    everything = torch.softmax(torch.from_numpy(logits), dim=-1)
    values, which = torch.topk(everything, top_k)
    if routing == CHOSEN_SOFTMAX:
        values = torch.softmax(torch.topk(torch.from_numpy(logits), top_k).values, dim=-1)
    # Rows of equal logits may choose any of them.
    np.testing.assert_allclose(np.sort(weights)[:, -top_k:][:, ::-1], values.numpy(), atol=1e-6)
    np.testing.assert_allclose(np.sort(operator)[:, -top_k:][:, ::-1], values.numpy(), atol=1e-6)
    ties = (np.diff(np.sort(logits)) == 0).any(axis=1)
    want = np.zeros_like(logits)
    np.put_along_axis(want, which.numpy(), values.numpy(), axis=1)
    np.testing.assert_allclose(operator[~ties], want[~ties], atol=1e-6)


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("moved", [True, False])
def test_sigmoid_router_is_that_of_transformers(summed: bool, moved: bool) -> None:
    """Also where all of those chosen have no weight."""
    config = Lfm2MoeConfig(
        hidden_size=16, num_experts=16, num_experts_per_tok=3, norm_topk_prob=summed, use_expert_bias=moved,
        routed_scaling_factor=1.5,
    )  # fmt: skip
    router = Lfm2MoeTopKRouter(config)
    router.weight.data = torch.eye(16)
    nothing = -200.0 - np.arange(16, dtype=np.float32)[None]
    logits = np.concatenate([near_ties(16)[:600], nothing])
    offset = 0.3 * np.random.default_rng(1).standard_normal(16).astype(np.float32) if moved else None
    _, values, which = router(torch.from_numpy(logits), None if offset is None else torch.from_numpy(offset))
    spec = Experts(16, 3, 32, routing=SIGMOID, offset=moved, summed=summed, factor=1.5)
    weights, operator = routed(spec, logits, offset)
    want = np.zeros_like(logits)
    np.put_along_axis(want, which.numpy(), values.detach().numpy(), axis=1)
    np.testing.assert_allclose(weights, want, atol=2e-6)
    np.testing.assert_allclose(operator, want, atol=2e-6)


# --- experts ------------------------------------------------------------------------------------------------


def rounded(model: Any, scheme: Scheme) -> Any:
    """Return ``model`` with every matrix rounded, but for routers and what is as small."""
    copy = type(model)(model.config).eval()
    state = {}
    for key, value in model.state_dict().items():
        weight = value.numpy()
        small = key.endswith(
            ("gate.weight", "router.weight", "router.layer.weight", "router.proj.weight", *SMALL)
        )
        if weight.ndim == 1 or key.endswith("bias") or small:
            state[key] = value
            continue
        # GPT-OSS has experts as [in, out].
        turned = isinstance(model.config, families.GptOssConfig) and weight.ndim == 3
        rows = weight.swapaxes(-1, -2) if turned else weight
        flat = np.ascontiguousarray(rows).reshape(-1, rows.shape[-1])
        near = dequantize(rtn(flat, scheme), scheme, flat.shape[-1]).reshape(rows.shape)
        state[key] = torch.from_numpy(np.ascontiguousarray(near.swapaxes(-1, -2) if turned else near))
    copy.load_state_dict(state)
    if hasattr(getattr(model.model, "rotary_emb", None), "frequencies"):
        copy.model.rotary_emb = model.model.rotary_emb
    return copy


@pytest.mark.parametrize(
    ("bits", "symmetric"), [(4, True), (4, False), (2, True), (5, True), (6, False), (8, False)]
)
@pytest.mark.parametrize("name", MIXTURES)
def test_quantized_experts_are_exact(name: str, bits: int, symmetric: bool, saved: Any, build: Build) -> None:
    """With float activations, the graph computes what its rounded weights say.

    Experts of 8 bits, and of 5 and 6, which become 8, round their activations too, and so do those of 2 bits.
    """
    # Rows of 32 with zeros are never a single block.
    block = 32 if symmetric else 16
    options = BuildOptions(
        bits=bits, head_bits=bits, embed_bits=bits, block_size=block, symmetric=symmetric, accuracy_level=1
    )
    lm = build(name, "int4", options)
    want = rounded(saved(name).model, Scheme(bits, block, symmetric, scales="fp16"))
    tokens = oracle.random_tokens(24)
    error = oracle.relative_error(lm.logits(tokens), oracle.prompt_logits(want, tokens))
    assert error < (1e-4 if bits == 4 else 0.15)


def test_experts_have_one_width(saved: Any, build: Build) -> None:
    """A rule for experts holds for all three matrices of each; rules for dense layers pass them over."""
    rules = (Rule(roles=("experts",), layers=(0,), bits=8), Rule(roles=("gate_up", "down"), bits=2))
    lm = build("qwen2-moe", "int4", BuildOptions(rules=rules))
    nodes = ir.load(lm.artifact.path / "model.onnx").graph.all_nodes()
    bits = [n.attributes["expert_weight_bits"].as_int() for n in nodes if n.op_type == "QMoE"]
    assert bits == [8, 4]
    lm = build("mixtral", "int4", BuildOptions(bits8_roles=("experts",)))
    nodes = ir.load(lm.artifact.path / "model.onnx").graph.all_nodes()
    assert [n.attributes["expert_weight_bits"].as_int() for n in nodes if n.op_type == "QMoE"] == [8, 8]


def test_options_of_the_official_builder(saved: Any, build: Build) -> None:
    options = parse_extra_options(["moe_quant_type=int8", "qmoe_block_size=16"], target=TARGETS["cpu"])
    nodes = ir.load(build("olmoe", "int4", options).artifact.path / "model.onnx").graph.all_nodes()
    found = {
        (n.attributes["expert_weight_bits"].as_int(), n.attributes["block_size"].as_int())
        for n in nodes
        if n.op_type == "QMoE"
    }
    assert found == {(8, 16)}


def test_experts_may_stay_float(saved: Any, build: Build) -> None:
    options = BuildOptions(excluded_nodes=("/model/layers.1/moe/QMoE",), bits=8)
    lm = build("phimoe", "int4", options)
    kinds = [n.op_type for n in ir.load(lm.artifact.path / "model.onnx").graph.all_nodes()]
    assert (kinds.count("QMoE"), kinds.count("MoE")) == (1, 1)
    tokens = oracle.random_tokens(24)
    assert (
        oracle.relative_error(lm.logits(tokens), oracle.prompt_logits(saved("phimoe").model, tokens)) < 0.12
    )


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("cuda", "layout of its own"),
        ("dml", "no kernel"),
        ("webgpu", "from run to run"),
    ],
)
def test_other_targets_are_refused(target: str, words: str, saved: Any, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match=words) as caught:
        ortlm.build(saved("mixtral").folder, tmp_path / "out", target=target)
    assert target in str(caught.value)
    assert "-e cpu" in str(caught.value)


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_mobile(precision: str, saved: Any, tmp_path: Path) -> None:
    built = ortlm.build(saved("mixtral").folder, tmp_path / "out", precision=precision, target="mobile")
    tokens = oracle.random_tokens(24)
    got = ortlm.load(built.path, threads=1, device="cpu").logits(tokens)
    want = oracle.prompt_logits(saved("mixtral").model, tokens)
    assert oracle.relative_error(got, want) < (0.12 if precision == "int8" else 0.8)
    options = BuildOptions(rules=(Rule(roles=("experts",), bits=2),))
    with pytest.raises(BadOption, match=r"experts of 2 bits .* on mobile; allowed: 4, 8 bits"):
        ortlm.build(saved("mixtral").folder, tmp_path / "no", target="mobile", options=options)


def test_browsers_are_refused(saved: Any, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="mixture of experts"):
        ortlm.build(saved("mixtral").folder, tmp_path / "out", layout="transformers.js")


def test_rows_with_zeros_are_never_a_single_block(build: Build) -> None:
    """ONNX Runtime 1.24 passes over the zeros of such rows."""
    for symmetric, block in ((False, 16), (True, 32)):
        options = BuildOptions(recipe="fast", symmetric=symmetric, accuracy_level=1)
        path = build("qwen3-moe", "int4", options).artifact.path
        graph = ir.load(path / "model.onnx").graph
        [first, *_] = [node for node in graph if node.op_type == "QMoE"]
        assert first.attributes["block_size"].as_int() == block


def test_no_block_fits(tmp_path: Path) -> None:
    spec = Experts(4, 2, 40)
    with pytest.raises(UnsupportedModel, match="40 channels"):
        moe._for_kernel(Scheme(4, 128), spec, 64)
    assert moe._for_kernel(Scheme(4, 128), replace(spec, intermediate=2880), 2880).block == 64


def test_rotation_is_refused(saved: Any, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="mixture of experts"):
        ortlm.build(saved("mixtral").folder, tmp_path / "out", options=BuildOptions(rotate=True))
