"""Models on plugins of ONNX Runtime, against the CPU: the same logits and the same text.

Each plugin is skipped where it is not installed or finds no device. docs/testing.md says how to run them without a
GPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.errors import BadArtifact, BadOption, NoDevice
from ortlm.runtime.engine import session
from ortlm.runtime.engine.devices import choose_device
from tests.architectures import oracle

FAMILIES = [
    "phi3", "phi-2", "llama3", "mistral", "gemma", "gemma3", "qwen2-tied", "qwen3", "olmo2", "smollm3", "granite",
    "phi3-longrope",
]  # fmt: skip
# Of each plugin: the target of its models, and families that others cannot run.
PLUGINS = {"webgpu": ("webgpu", []), "openvino": ("cpu", ["gemma2"])}
TOLERANCE = 1e-4
IDS = oracle.random_tokens(48)

# Vulkan's drivers for processors count too; they are found by VK_ICD_FILENAMES.
os.environ.setdefault("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", "1")


def missing(plugin: str) -> str | None:
    """Return why a plugin cannot be tried here, None if it can."""
    try:
        choose_device(plugin)
    except NoDevice as error:
        return str(error)
    return None


def cases() -> list[Any]:
    return [
        pytest.param(
            (plugin, name),
            id=f"{plugin}-{name}",
            marks=pytest.mark.skipif(why is not None, reason=why or ""),
        )
        for plugin, (_, more) in PLUGINS.items()
        for why in [missing(plugin)]
        for name in [*FAMILIES, *more]
    ]


@pytest.fixture(scope="module", params=cases())
def pair(request: Any, saved: Any, tmp_path_factory: pytest.TempPathFactory) -> list[ortlm.LanguageModel]:
    """The same folder on a plugin's device and on the CPU."""
    plugin, name = request.param
    target = PLUGINS[plugin][0]
    out: Path = tmp_path_factory.mktemp(plugin) / name
    options = BuildOptions(fp32_activations=target == "webgpu")
    ortlm.build(saved(name).folder, out, precision="fp32", target=target, options=options)
    models = [ortlm.load(out, threads=1, device=device) for device in (plugin, "cpu")]
    assert [lm.device.kind for lm in models] == [plugin, "cpu"]
    return models


def both(pair: list[ortlm.LanguageModel], ask: Callable[[ortlm.LanguageModel], Any]) -> tuple[Any, Any]:
    return ask(pair[0]), ask(pair[1])


def length(lm: ortlm.LanguageModel) -> int:
    """Return how long a prompt may be that the device takes."""
    switch = lm.manifest.rope_switch_tokens
    return 48 if switch is None or lm.device.most_tokens is None else min(48, switch - 2)


def test_logits_of_a_prompt(pair: Any) -> None:
    got, want = both(pair, lambda lm: lm.logits(IDS[: length(pair[0])]))
    assert oracle.relative_error(got, want) < TOLERANCE


def test_append_step_and_rewind(pair: Any) -> None:
    def walk(lm: ortlm.LanguageModel) -> list[Any]:
        loop = lm.loop()
        loop.start()
        found = [loop.append([IDS[:14]]).copy(), loop.append([IDS[14:19]]).copy()]
        found.append(loop.step(np.array(IDS[19:20])).copy())
        loop.trim(9)
        found.append(loop.append([IDS[30:33]]).copy())
        return [*found, loop.step(np.array(IDS[40:41])).copy()]

    for got, want in zip(*both(pair, walk), strict=True):
        assert oracle.relative_error(got, want) < TOLERANCE


def test_greedy_text(pair: Any) -> None:
    options = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    got, want = both(pair, lambda lm: lm.generate(IDS[:10], **options).token_ids)
    assert got == want


def test_a_batch_of_rows_of_different_lengths(pair: Any) -> None:
    options = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    prompts = [IDS[:12], IDS[20:25], IDS[40:41]]
    got, want = both(pair, lambda lm: [made.token_ids for made in lm.generate_batch(prompts, **options)])
    assert got == want


def test_beams(pair: Any) -> None:
    options = {"max_new_tokens": 8, "num_beams": 3, "ignore_eos": True}
    got, want = both(pair, lambda lm: lm.generate(IDS[:10], **options).token_ids)
    assert got == want


def test_drafts(pair: Any) -> None:
    prompt = IDS[:6] * 3
    if pair[0].device.constant_defaults:
        # The input that asks for the logits of several tokens is a constant there.
        with pytest.raises(BadOption, match="cannot check drafts"):
            pair[0].generate(prompt, draft="lookup", max_new_tokens=2)
        return
    options = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True, "draft": "lookup"}
    got, want = both(pair, lambda lm: lm.generate(prompt, **options).token_ids)
    assert got == want


@pytest.mark.skipif(missing("webgpu") is not None, reason=missing("webgpu") or "")
@pytest.mark.parametrize("precision", ["fp16", "int4", "int8"])
@pytest.mark.parametrize("name", ["phi3", "gemma3", "qwen3", "phi3-longrope"])
def test_activations_in_fp16(name: str, precision: str, saved: Any, tmp_path: Path) -> None:
    """Where the adapter computes in fp16, as Mesa's does and SwiftShader does not."""
    # The CPU rounds activations of int4 and int8 to 8 bits in a way of its own.
    options = BuildOptions(recipe="fast" if precision != "fp16" else None, accuracy_level=0)
    ortlm.build(saved(name).folder, tmp_path / name, precision=precision, target="webgpu", options=options)
    found = []
    for device in ("webgpu", "cpu"):
        lm = ortlm.load(tmp_path / name, threads=1, device=device)
        loop = lm.loop()
        loop.start()
        try:
            logits = [loop.append([IDS[:24]]).copy(), loop.append([IDS[24:30]]).copy()]
        except BadArtifact as error:
            if "f16" in str(error) and device == "webgpu":
                pytest.skip("the adapter does not compute in fp16")
            raise
        loop.trim(11)
        logits += [loop.append([IDS[30:33]]).copy(), loop.step(np.array(IDS[40:41])).copy()]
        found.append(logits)
    for got, want in zip(*found, strict=True):
        assert oracle.relative_error(got, want) < 2e-2


@pytest.mark.skipif(missing("webgpu") is not None, reason=missing("webgpu") or "")
def test_a_step_waits_for_no_copy_from_the_device(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up go token ids, lengths and the place of the logits; all that is computed of lengths stays on the CPU."""
    inner = session._session_options

    def profiled(*given: Any) -> Any:
        settings = inner(*given)
        settings.enable_profiling = True
        settings.profile_file_prefix = str(tmp_path / "profile")
        return settings

    monkeypatch.setattr(session, "_session_options", profiled)
    options = BuildOptions(fp32_activations=True)
    ortlm.build(saved("llama3").folder, tmp_path / "out", precision="fp32", target="webgpu", options=options)
    lm = ortlm.load(tmp_path / "out", threads=1, device="webgpu")
    loop = lm.loop()
    loop.start()
    loop.append([IDS[:5]])
    loop.step([IDS[5]])
    events = json.loads(Path(lm.session._session.end_profiling()).read_text(encoding="utf-8"))
    began = max(event["ts"] for event in events if event["name"] == "model_run")
    kinds = [
        event["args"]["op_name"]
        for event in events
        if event["ts"] >= began and event["name"].endswith("_kernel_time")
    ]
    assert kinds.count("MemcpyFromHost") == 3
    assert "MemcpyToHost" not in kinds
