"""The functions of the official builder's module, under the same names with the same arguments."""

import inspect

import pytest

import ortlm
from ortlm.errors import BadOption
from ortlm.models import builder


@pytest.mark.parametrize("name", ["create_model", "parse_extra_options"])
def test_signatures_are_the_same(name):
    theirs = pytest.importorskip("onnxruntime_genai.models.builder")
    wanted, found = (inspect.signature(getattr(module, name)).parameters for module in (theirs, builder))
    assert [(p.name, p.kind, p.default) for p in found.values()] == [
        (p.name, p.kind, p.default) for p in wanted.values()
    ]


@pytest.mark.parametrize("parsed", [True, False])
def test_a_model_is_built_and_replaced(saved, tmp_path, parsed):
    place = ("", str(saved("phi3").folder), str(tmp_path / "out"), "fp32", "cpu", str(tmp_path / "cache"))
    for layers in (2, 1):
        options = {"num_hidden_layers": layers, "include_hidden_states": True}
        if parsed:
            options = builder.parse_extra_options(
                *place, [f"num_hidden_layers={layers}", "include_hidden_states=true"]
            )
            assert options == {"num_hidden_layers": str(layers), "include_hidden_states": "true"}
        artifact = builder.create_model(*place, **options)
    assert len(artifact.manifest.graphs["decoder"].states) == 2
    assert ortlm.load(tmp_path / "out").hidden_states([5, 6, 7]).shape == (3, 64)


@pytest.mark.parametrize(
    ("pairs", "more", "message"),
    [
        (["layer_count=2"], {}, "layer_count"),
        (["num_hidden_layers"], {}, "KEY=VALUE"),
        ([], {"search": {"top_k": 1}}, "search is not supported"),
        ([], {"builder_config_version": 2}, "builder_config_version is not supported"),
    ],
)
def test_what_is_refused(pairs, more, message, tmp_path):
    place = ("", "nowhere", str(tmp_path / "out"), "int4", "cpu", str(tmp_path))
    with pytest.raises(BadOption, match=message):
        builder.parse_extra_options(*place, pairs, **more)
    options = {key: value for key, _, value in (pair.partition("=") for pair in pairs)}
    with pytest.raises(BadOption):
        builder.create_model(*place, **options, **more)


def test_precisions_and_sources(tmp_path):
    with pytest.raises(BadOption, match="fp16 cannot run on cpu"):
        builder.parse_extra_options("", "nowhere", str(tmp_path), "fp16", "cpu", None, None)
    with pytest.raises(BadOption, match="model_name"):
        builder.create_model("", "", str(tmp_path / "out"), None, "cpu", "")
