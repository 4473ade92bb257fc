"""Which matrix gets how many bits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ortlm.builder.extra_options import parse_extra_options
from ortlm.builder.options import BuildOptions, make_recipe
from ortlm.errors import BadOption
from ortlm.quant.recipe import MatrixLocation
from ortlm.target import TARGETS, find_target

CPU = find_target("cpu")


def bits(options: BuildOptions, place: MatrixLocation, precision: str = "int4", target: str = "cpu") -> int:
    scheme = make_recipe(precision, find_target(target), options)(place)
    return 0 if scheme is None else scheme.bits


def place(role: str, layer: int | None = None, node: str = "/n/MatMul") -> MatrixLocation:
    return MatrixLocation(role, node, layer, 32, inputs=2048)


def test_cpu_default() -> None:
    recipe = make_recipe("int4", CPU, BuildOptions(recipe="balanced"))
    large = 8_000_001
    body = recipe(MatrixLocation("qkv", "/n/MatMul", 5, 32, large, 2048))
    head = recipe(MatrixLocation("head", "/n/MatMul", None, 32, large, 2048))
    assert body is not None
    assert (body.bits, body.block, body.symmetric, body.accuracy_level, body.scales) == (
        4,
        128,
        False,
        4,
        "fp16",
    )
    assert head is not None
    assert (head.bits, head.block) == (8, 128)


def test_balanced_widens_what_loses_most() -> None:
    recipe = make_recipe("int4", CPU, BuildOptions(recipe="balanced"))

    def at(role: str, layer: int, weights: int) -> int:
        scheme = recipe(MatrixLocation(role, "/n/MatMul", layer, 32, weights))
        return scheme.bits if scheme else 0

    small, large = 8_000_000, 8_000_001
    assert [at(role, 10, small) for role in ("qkv", "out", "gate_up", "down")] == [6, 6, 6, 6]
    assert [at(role, 10, large) for role in ("qkv", "out", "gate_up", "down")] == [4, 4, 4, 4]
    assert {at("down", i, small) for i in range(32)} == {6}
    eight = [i for i in range(32) if at("down", i, large) == 8]
    assert eight == [i for i in range(32) if i < 4 or i >= 28 or (i - 4) % 3 == 2]
    asked = make_recipe("int4", CPU, BuildOptions(recipe="balanced", bits=4))
    down, qkv = (MatrixLocation(role, "/n/MatMul", 0, 32, small) for role in ("down", "qkv"))
    assert asked(down) == asked(qkv)
    elsewhere = make_recipe("int4", find_target("mobile"), BuildOptions(recipe="balanced"))(down)
    assert elsewhere is not None
    assert elsewhere.bits == 4


def test_small_models_have_6_bits_at_both_ends() -> None:
    def ends(options: BuildOptions, inputs: int, precision: str = "int4", target: str = "cpu") -> list[int]:
        recipe = make_recipe(precision, find_target(target), options)
        schemes = [recipe(MatrixLocation(role, "/n", None, 32, 10**8, inputs)) for role in ("embed", "head")]
        return [scheme.bits if scheme else 0 for scheme in schemes]

    balanced = BuildOptions(recipe="balanced")
    assert ends(balanced, 1024) == [6, 6]
    assert ends(balanced, 1025) == [8, 8]
    assert ends(replace(balanced, head_bits=4), 576) == [6, 4]
    assert ends(replace(balanced, embed_bits=4), 576) == [4, 6]
    assert ends(replace(balanced, bits=4), 576) == [8, 8]
    assert ends(BuildOptions(recipe="quality"), 576) == [8, 8]
    assert ends(BuildOptions(recipe="fast"), 576) == [8, 8]
    assert ends(balanced, 576, target="mobile") == [4, 4]
    # 8 bits everywhere is what int8 means, whatever the recipe.
    assert ends(balanced, 576, precision="int8") == [8, 8]
    assert bits(balanced, MatrixLocation("down", "/n", 0, 32, 10, 576), precision="int8") == 8


def test_mixed_rule() -> None:
    options = BuildOptions(mixed=True)
    eight = [i for i in range(32) if bits(options, place("down", i)) == 8]
    assert eight == [i for i in range(32) if i < 4 or i >= 28 or (i - 4) % 3 == 2]
    assert bits(options, place("gate_up", 0)) == 4


def test_float_precisions_quantize_nothing() -> None:
    assert bits(BuildOptions(), place("down", 1), precision="fp32") == 0
    with pytest.raises(BadOption, match=r"block_size shape quantized weights.*-p int4"):
        make_recipe("fp32", CPU, BuildOptions(block_size=32))


def test_target_without_kernel() -> None:
    with pytest.raises(BadOption, match="dml has no kernel for 8-bit"):
        make_recipe("int4", find_target("dml"), BuildOptions(head_bits=8))


@pytest.mark.parametrize("name", TARGETS)
def test_every_default_is_possible(name: str) -> None:
    for precision in TARGETS[name].precisions:
        make_recipe(precision, TARGETS[name], BuildOptions())


def test_extra_options() -> None:
    options = parse_extra_options(
        ["int4_block_size=64", "is_symmetric=1", "int4_algo_config=k_quant_mixed", "num_hidden_layers=2"],
        target=CPU,
    )
    assert options.block_size == 64
    assert options.symmetric is True
    assert (options.recipe, options.algorithm, options.mixed) == ("fast", "clip_search", True)
    assert options.bits8_roles == ("head",)
    assert options.layers == 2
    options = parse_extra_options(["matmul_mixed_precision=last_matmul:int4,mixed_layers:int8"], target=CPU)
    assert (options.head_bits, options.mixed) == (4, True)
    assert parse_extra_options(["op_types_to_quantize=MatMul"], target=CPU).embed_bits == 0
    assert parse_extra_options(["prune_lm_head=false", "fuse_qkv=true", "hf_remote=0"], target=CPU).all_logits


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("foo_bar=1", r"there is no extra option 'foo_bar'"),
        ("blocksize=1", r"Did you mean: block_size"),
        ("block_size", r"KEY=VALUE"),
        ("block_size=big", r"must be a whole number"),
        ("is_symmetric=maybe", r"must be true or false"),
        ("algo_config=hqq", r"there is no algo_config 'hqq'"),
        ("use_qdq=true", r"use_qdq=true does not apply"),
        ("hf_remote=true", r"never runs code"),
        ("shared_embeddings=false", r"always stored once"),
        ("op_types_to_quantize=Conv", r"MatMul or MatMul/Gather"),
        ("matmul_mixed_precision=head:int8", r"last_matmul:int4"),
    ],
)
def test_wrong_extra_options(pair: str, message: str) -> None:
    with pytest.raises(BadOption, match=message):
        parse_extra_options([pair], target=CPU)


def test_explicit_widths_win() -> None:
    options = parse_extra_options(["algo_config=k_quant_mixed", "head_bits=4"], target=CPU)
    assert bits(options, place("head")) == 4
    mixed = "matmul_mixed_precision=last_matmul:int4,mixed_layers:int4"
    options = parse_extra_options(["algo_config=k_quant_mixed", mixed], target=CPU)
    assert {bits(options, place("head")), bits(options, place("down", 0))} == {4}


def test_contradictions() -> None:
    for options in (BuildOptions(bits=4), BuildOptions(mixed=True)):
        with pytest.raises(BadOption, match="8 bits everywhere"):
            make_recipe("int8", CPU, options)
    with pytest.raises(BadOption, match="bits must be one of"):
        make_recipe("int4", CPU, BuildOptions(bits=0))
    with pytest.raises(BadOption, match="block_size must be one of"):
        make_recipe("int4", CPU, BuildOptions(block_size=0))
    with pytest.raises(BadOption, match="there are embed, head"):
        make_recipe("int4", CPU, BuildOptions(bits8_roles=("heads",)))
    with pytest.raises(BadOption, match="one of the two"):
        parse_extra_options(["algo_config=k_quant", "algorithm=rtn"], target=CPU)


def test_one_option_under_two_names() -> None:
    with pytest.raises(BadOption, match="twice"):
        parse_extra_options(["block_size=32", "int4_block_size=64"], target=CPU)
