"""What a device's attention would ignore is refused: in builds for it, and in folders built for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.errors import BadOption
from ortlm.runtime.engine.attention_check import check_attention
from ortlm.runtime.engine.device_kinds import KINDS
from ortlm.runtime.engine.devices import CPU, Device
from ortlm.target import TARGETS

DEVICES = {name: Device(name, name, KINDS[name].provider) for name in ("cuda", "webgpu", "dml")}
# Of the 512 tokens of these models' context.
WINDOW = 8


def folder(saved: Any, name: str, out: Path, **options: Any) -> Any:
    return ortlm.build(saved(name).folder, out, precision="fp32", options=BuildOptions(**options))


def test_targets_and_devices_say_the_same() -> None:
    for name, target in TARGETS.items():
        if name in KINDS:
            assert target.attention_ignores <= KINDS[name].attention_ignores


@pytest.mark.parametrize(
    ("name", "options", "device", "ignored"),
    [
        ("llama", {}, "cuda", None),
        ("llama", {}, "webgpu", None),
        ("llama", {}, "dml", "rotation"),
        ("gemma2", {}, "cuda", None),
        ("gemma2", {}, "webgpu", "softcap"),
        ("gemma2", {}, "dml", "rotation and softcap and window"),
        ("mistral", {}, "webgpu", None),
        ("mistral", {"window_cache": True}, "webgpu", "eviction"),
        ("phi3-longrope", {}, "cuda", None),
        ("phi3-longrope", {}, "webgpu", "positions"),
    ],
)
def test_folders_for_other_devices(
    name: str, options: dict[str, Any], device: str, ignored: str | None, saved: Any, tmp_path: Path
) -> None:
    built = folder(saved, name, tmp_path / "out", **options)
    path, context = built.graph_path(), built.manifest.context_tokens
    check_attention(path, CPU, context)
    if ignored is None:
        check_attention(path, DEVICES[device], context)
        return
    with pytest.raises(
        BadOption, match=f"asks attention for {ignored}, which .* ignores without a word.*-e {device}"
    ):
        check_attention(path, DEVICES[device], context)


def test_no_longer_than_the_window_is_right(saved: Any, tmp_path: Path) -> None:
    built = ortlm.build(saved("mistral").folder, tmp_path / "out", target="dml")
    path = built.graph_path()
    check_attention(path, DEVICES["dml"], WINDOW)
    with pytest.raises(BadOption, match="asks attention for window"):
        check_attention(path, DEVICES["dml"], WINDOW + 1)


@pytest.mark.parametrize("target", ["webgpu", "dml"])
def test_no_builds_with_capped_scores(target: str, saved: Any, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match=rf"caps attention scores .*attention on {target} ignores.*-e cpu"):
        ortlm.build(saved("gemma2").folder, tmp_path / "out", target=target)
    assert not (tmp_path / "out").exists()


def test_builds_with_two_rope_tables_rotate_outside_on_webgpu(saved: Any, tmp_path: Path) -> None:
    for name, operators in (("phi3-longrope", {"RotaryEmbedding"}), ("phi3", set())):
        built = ortlm.build(saved(name).folder, tmp_path / name, target="webgpu")
        model = onnx.load(built.graph_path(), load_external_data=False)
        assert {node.op_type for node in model.graph.node} & {"RotaryEmbedding"} == operators
        check_attention(built.graph_path(), DEVICES["webgpu"], built.manifest.context_tokens)


def test_builds_end_at_the_window_on_dml(saved: Any, tmp_path: Path) -> None:
    built = ortlm.build(saved("mistral").folder, tmp_path / "out", target="dml")
    assert built.manifest.context_tokens == WINDOW
    assert any(
        "attention on dml ignores the model's window of 8 tokens" in n for n in built.manifest.info["notes"]
    )
    assert ortlm.build(saved("llama").folder, tmp_path / "l", target="dml").manifest.context_tokens == 512
