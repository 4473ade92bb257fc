"""Layers that share keys and values: each graph of each target, against transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.errors import BadOption
from tests.architectures import oracle
from tests.graph.test_parity import PROMPT, TOLERANCE

ROWS = ["gemma4-e", "gemma3n"]


def nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes of a graph and of what it branches to."""
    found = list(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += nodes(attribute.g)
    return found


@pytest.mark.parametrize("name", ROWS)
def test_the_graph_without_lengths(name: str, saved: Any, build: Any) -> None:
    """The one that every ONNX Runtime loads: prompts, steps, batches, and several tokens after different pasts."""
    model, lm = saved(name).model, build(name, "fp32", BuildOptions(ragged_append=False))
    tokens = oracle.random_tokens(120)
    want = oracle.prompt_logits(model, tokens)
    assert oracle.relative_error(lm.logits(tokens), want) < TOLERANCE
    got = lm.logits_batch([tokens[:PROMPT], tokens[:7]], [tokens[PROMPT:60], tokens[7:43]])
    assert oracle.relative_error(got[0], want[PROMPT - 1 : 60]) < TOLERANCE
    assert oracle.relative_error(got[1], want[6:43]) < TOLERANCE
    loop = lm.loop()
    loop.start(2)
    loop.append([tokens[:9], tokens[:3]])
    found = loop.append([tokens[9:13], tokens[3:14]], keep=11)
    assert oracle.relative_error(found[0, -4:], want[9:13]) < TOLERANCE
    assert oracle.relative_error(found[1], want[3:14]) < TOLERANCE


@pytest.mark.parametrize("name", ROWS)
def test_the_cache_has_own_keys_and_values_only(name: str, saved: Any, build: Any) -> None:
    lm = build(name)
    spec = len(saved(name).model.model.layers)
    states = next(iter(lm.manifest.graphs.values())).states
    assert len(states) == 2 * (spec - saved(name).model.config.num_kv_shared_layers)
    graph = onnx.load(lm.artifact.path / "model_ragged.onnx", load_external_data=False).graph
    attention = [node for node in nodes(graph) if node.op_type == "GroupQueryAttention"]
    # Steps copy nothing: without new keys, the operator has no present to fill.
    assert sum(len(node.output) == 1 for node in attention) == saved(name).model.config.num_kv_shared_layers


@pytest.mark.parametrize(
    ("target", "precision", "most"),
    [("cuda", "fp16", 2e-2), ("dml", "fp16", 2e-2), ("webgpu", "fp16", 2e-2), ("mobile", "int8", 0.15)],
)
@pytest.mark.parametrize("name", ROWS)
def test_targets(name: str, target: str, precision: str, most: float, saved: Any, tmp_path: Any) -> None:
    """On the CPU, within the window, which DirectML ignores."""
    row = saved(name)
    built = ortlm.build(row.folder, tmp_path / "out", precision=precision, target=target)
    lm = ortlm.load(built.path, threads=1, device="cpu")
    tokens = oracle.random_tokens(8)
    want = oracle.prompt_logits(row.model, tokens)
    assert oracle.relative_error(lm.logits(tokens), want) < most
    assert oracle.relative_error(lm.logits_batch([tokens[:3]], [tokens[3:]])[0], want[2:]) < most


@pytest.mark.parametrize("name", ROWS)
def test_int8_of_what_is_shared(name: str, saved: Any, build: Any) -> None:
    lm, tokens = build(name, "fp32", BuildOptions(kv_cache="int8")), oracle.random_tokens(60)
    want = oracle.prompt_logits(saved(name).model, tokens)
    assert oracle.relative_error(lm.logits(tokens), want) < 0.1
    got = lm.logits_batch([tokens[:20], tokens[:5]], [tokens[20:], tokens[5:45]])
    assert oracle.relative_error(got[0], want[19:]) < 0.1
    assert oracle.relative_error(got[1], want[4:45]) < 0.1


@pytest.mark.parametrize("name", ROWS)
def test_append_step_and_rewind(name: str, saved: Any, build: Any) -> None:
    lm, random = build(name), np.random.default_rng(0)
    tokens = oracle.random_tokens(200)
    want = oracle.prompt_logits(saved(name).model, tokens)
    generator, at = lm.generator(), 0
    for _ in range(14):
        more = int(random.integers(1, 14))
        generator.append(tokens[at : at + more])
        at += more
        assert oracle.relative_error(generator.logits[0], want[at - 1]) < TOLERANCE
        if random.random() < 0.5:
            at = int(random.integers(1, at))
            generator.rewind(at)


@pytest.mark.parametrize("name", ROWS)
def test_drafts(name: str, build: Any) -> None:
    """Greedy answers with tokens that are verified several at a time are those without."""
    lm, prompt = build(name), [*oracle.random_tokens(12), *oracle.random_tokens(12)]
    plain = lm.generate(prompt, max_new_tokens=40, ignore_eos=True)
    drafted = lm.generate(prompt, max_new_tokens=40, ignore_eos=True, draft="lookup")
    assert drafted.token_ids == plain.token_ids


@pytest.mark.parametrize("name", ROWS)
def test_options_that_do_not_fit_are_refused(name: str, saved: Any, tmp_path: Any) -> None:
    for option, key in (
        (BuildOptions(window_cache=True), "windowed_kv_cache"),
        (BuildOptions(layers=2), "num_hid"),
    ):
        with pytest.raises(BadOption, match=key):
            ortlm.build(saved(name).folder, tmp_path / "out", precision="fp32", options=option)
