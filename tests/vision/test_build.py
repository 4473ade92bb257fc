"""What a build of a model with images writes, and which checkpoints it takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

import ortlm
from ortlm import architectures
from ortlm.builder.options import BuildOptions
from ortlm.cli import main
from ortlm.errors import BadCheckpoint, BadOption, UnsupportedModel
from ortlm.evaluation.evaluate import evaluate
from ortlm.target import TARGETS
from tests.architectures.oracle import relative_error
from tests.vision.conftest import Seen, noise, question

AT = "model.vision_embed_tokens"


def test_the_published_config() -> None:
    """As many parameters as the publisher's index counts, less a layer and a norm of CLIP that nothing uses."""
    config = json.loads((Path(__file__).parent / "phi-3.5-vision.json").read_text())
    arch = architectures.describe(config)
    unused = 12_596_224 + 2_048
    assert 2 * (sum(p.size for p in arch.parameters) + unused) == 8_293_242_880
    assert arch.vision is not None
    assert (arch.vision.encoder.layers, arch.vision.encoder.heads, arch.vision.crops) == (23, 16, 4)
    assert arch.decoder.layers[0].mixer.rope is not None
    assert arch.decoder.layers[0].mixer.rope.switch_tokens == 4096


@pytest.mark.parametrize(
    ("target", "precision"),
    [(target.name, precision) for target in TARGETS.values() for precision in target.precisions],
)
def test_every_target(seen: Seen, tmp_path: Path, target: str, precision: str) -> None:
    options = BuildOptions(recipe="fast") if precision == "int4" else None
    ortlm.build(seen.folder, tmp_path / "out", precision=precision, target=target, options=options)
    for name in ("model", "vision", "embedding"):
        onnx.checker.check_model(tmp_path / "out" / f"{name}.onnx", full_check=True)
    assert {f.name for f in (tmp_path / "out").glob("*.data")} == {"model.onnx.data"}


def test_the_folder(artifact: Callable[..., Path]) -> None:
    folder = artifact("int4")
    config = json.loads((folder / "genai_config.json").read_text())["model"]
    assert config["type"] == "phi3v"
    assert config["embedding"]["outputs"] == {"inputs_embeds": "inputs_embeds"}
    assert config["decoder"]["inputs"]["inputs_embeds"] == "inputs_embeds"
    processor = json.loads((folder / "processor_config.json").read_text())["processor"]
    assert [t["operation"]["type"] for t in processor["transforms"]][-1] == "Phi3ImageTransform"
    manifest = json.loads((folder / "ortlm.json").read_text())
    assert manifest["images"]["crops"] == 4
    graph = onnx.load(folder / "embedding.onnx", load_external_data=False).graph
    assert "GatherBlockQuantized" in {node.op_type for node in graph.node}


def test_it_can_be_calibrated(seen: Seen, tmp_path: Path) -> None:
    """The decoder by its recipe, on text; what sees images is rounded."""
    options = BuildOptions(recipe="balanced", calibration_tokens=512)
    ortlm.build(seen.folder, tmp_path / "a", options=options)
    lm = ortlm.load(tmp_path / "a", threads=1)
    assert lm.generate(question(noise(9, 9)), num_crops=1, max_new_tokens=3).token_ids


def test_vision_bits(seen: Seen, tmp_path: Path) -> None:
    def bits(folder: Path) -> set[int]:
        nodes = onnx.load(folder / "vision.onnx", load_external_data=False).graph.node
        return {a.i for n in nodes if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "bits"}

    recipe = tmp_path / "four.yaml"
    recipe.write_text("base: fast\nrules:\n  - roles: vision\n    bits: 4\n    algorithm: gptq\n")
    for name, options in (
        ("eight", BuildOptions(recipe="fast")),
        ("four", BuildOptions(recipe=str(recipe))),
        ("float", BuildOptions(recipe="fast", vision_bits=0)),
    ):
        ortlm.build(seen.folder, tmp_path / name, options=options)
    assert [bits(tmp_path / name) for name in ("eight", "four", "float")] == [{8}, {4}, set()]


def _changed(seen: Seen, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(seen.folder, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _extra(weights: dict[str, Any]) -> None:
    weights[f"{AT}.wte.weight"] = weights["model.embed_tokens.weight"].copy()
    ids = np.arange(577, dtype=np.int64)[None]
    weights[f"{AT}.img_processor.vision_model.embeddings.position_ids"] = ids


def _renamed(weights: dict[str, Any]) -> None:
    weights[f"{AT}.wte.weight"] = weights.pop("model.embed_tokens.weight")
    for name in list(weights):
        if ".img_processor.vision_model." in name:
            weights[name.replace(".vision_model.", ".")] = weights.pop(name)


@pytest.mark.parametrize("change", [_extra, _renamed])
def test_fine_tunes(seen: Seen, artifact: Callable[..., Path], tmp_path: Path, change: Any) -> None:
    """Extra and renamed tensors, as fine-tunes have them, make the same model."""
    folder = _changed(seen, tmp_path / "tuned", change)
    ortlm.build(folder, tmp_path / "out", precision="fp32")
    for name in ("vision", "embedding", "model"):
        ours, usual = (onnx.load(at / f"{name}.onnx") for at in (tmp_path / "out", artifact()))
        assert [t.raw_data for t in ours.graph.initializer] == [t.raw_data for t in usual.graph.initializer]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("img_processor", {"type_feature": "cls_patch"}, "type_feature"),
        ("img_processor", {"layer_idx": 9, "image_dim_out": 32, "num_hidden_layers": 3}, "layer_idx"),
        ("embd_layer", {"hd_transform_order": "glb_sub"}, "hd_transform_order"),
        ("embd_layer", {"use_hd_transform": False}, "use_hd_transform"),
    ],
)
def test_wrong_config(seen: Seen, tmp_path: Path, key: str, value: Any, message: str) -> None:
    folder = _changed(seen, tmp_path / "wrong", lambda weights: None)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(BadCheckpoint, match=message):
        ortlm.build(folder, tmp_path / "out", precision="fp32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_crops": "many"}, "num_crops"),
        ({"image_mean": [1, 2]}, "image_mean"),
        ({"image_std": [0, 1, 1]}, "image_std"),
    ],
)
def test_wrong_processor(seen: Seen, tmp_path: Path, change: Any, message: str) -> None:
    folder = _changed(seen, tmp_path / "wrong", lambda weights: None)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BadCheckpoint, match=message):
        ortlm.build(folder, tmp_path / "out", precision="fp32")


def test_file_names(seen: Seen, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match=r"vision\.onnx"):
        ortlm.build(
            seen.folder, tmp_path / "a", precision="fp32", options=BuildOptions(filename="vision.onnx")
        )
    options = BuildOptions(filename="text.onnx")
    ortlm.build(seen.folder, tmp_path / "b", precision="fp32", options=options)
    onnxruntime.InferenceSession(tmp_path / "b" / "embedding.onnx", providers=["CPUExecutionProvider"])


def test_the_command_line(seen: Seen, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The spelling of the official tutorial, a check at the end, and a question about an image."""
    out = str(tmp_path / "out")
    assert main(["build", "-i", str(seen.folder), "-o", out, "-p", "f32", "-e", "cpu"]) == 0
    noise(60, 40).save(tmp_path / "a.png")
    capsys.readouterr()
    shown = ["--image", str(tmp_path / "a.png")]
    assert main(["generate", out, "What?", *shown, *shown, "--num-crops", "1", "-n", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["usage"]["prompt_tokens"] > 626
    tagged = ["generate", out, "<|image_1|>What?", "--no-chat", *shown, "-n", "2"]
    assert main(tagged) == 0
    assert main(["generate", out, "What?", "--image", str(tmp_path / "none.png")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_chat(
    artifact: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import io

    noise(60, 40).save(tmp_path / "a.png")
    saved = tmp_path / "talk.json"
    lines = [
        f"/image {tmp_path / 'a.png'}",
        "What?",
        "/image none.png",
        "And now?",
        f"/save {saved}",
        "/regen",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert main(["chat", str(artifact()), "--num-crops", "1", "-n", "3"]) == 0
    err = capsys.readouterr().err
    assert "1 image attached to the next message" in err
    assert "none.png does not exist" in err
    messages = json.loads(saved.read_text())
    assert [type(m["content"]) for m in messages] == [list, str, str, str]


def test_adapters(seen: Seen, tmp_path: Path) -> None:
    """What a LoRA does to vision encoder and projector is merged, not switched; unread layers change nothing."""
    encoder = f"{AT}.img_processor.vision_model.encoder.layers"
    changed = [
        f"{encoder}.0.self_attn.q_proj", f"{encoder}.1.mlp.fc2", f"{AT}.img_projection.2",
        "model.layers.0.self_attn.qkv_proj",
    ]  # fmt: skip
    weights = load_file(seen.folder / "model.safetensors")
    merged = dict(weights)
    lora = {}
    random = np.random.default_rng(0)
    for module in [*changed, f"{encoder}.2.self_attn.v_proj"]:
        wide, narrow = weights[f"{module}.weight"].shape
        a = random.standard_normal((4, narrow), dtype=np.float32)
        b = random.standard_normal((wide, 4), dtype=np.float32) / 9
        lora |= {
            f"base_model.model.{module}.lora_A.weight": a,
            f"base_model.model.{module}.lora_B.weight": b,
        }
        merged[f"{module}.weight"] = weights[f"{module}.weight"] + 2 * b @ a
    adapter = tmp_path / "lora"
    adapter.mkdir()
    save_file(lora, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(seen.folder, tmp_path / "merged")
    save_file(merged, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    ortlm.build(tmp_path / "merged", tmp_path / "wanted", precision="fp32")
    ortlm.build(seen.folder, tmp_path / "found", precision="fp32", merge_adapter=adapter)
    logits = []
    for name in ("wanted", "found"):
        lm = ortlm.load(tmp_path / name, threads=1)
        logits.append(lm.logits(lm.encode(question(noise(40, 30)), num_crops=1)))
    assert relative_error(logits[1], logits[0]) < 1e-5
    report = evaluate(tmp_path / "found", tokens=512, chunk=128, speed=False, threads=1)
    assert report.statistics.kld.value < 1e-6
    with pytest.raises(UnsupportedModel, match=r"cannot be switched at run time\..*--merge-adapter"):
        ortlm.build(seen.folder, tmp_path / "out", adapters={"a": adapter})
