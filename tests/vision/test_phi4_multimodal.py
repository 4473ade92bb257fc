"""Phi-4-multimodal: crops with padding that nothing attends to, and an adapter that is on for images alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import ortlm
from ortlm import architectures
from ortlm.builder.options import BuildOptions
from ortlm.errors import BadCheckpoint, BadImage, BadOption, Error
from ortlm.runtime.engine.token_ids import FIRST_IMAGE_TOKEN
from ortlm.runtime.multimodal.image_processor import even_crops, padded_crops
from tests import official
from tests.architectures.oracle import relative_error
from tests.vision import phi4_multimodal as phi4
from tests.vision.conftest import noise, question

HALF = (0.5, 0.5, 0.5)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """Return the checkpoint's folder and the torch model without and with the adapter."""
    folder = tmp_path_factory.mktemp("phi4") / "tiny"
    return folder, *phi4.save(folder)


@pytest.fixture(scope="module")
def lm(made: tuple[Path, Any, Any], tmp_path_factory: pytest.TempPathFactory) -> ortlm.LanguageModel:
    """Return it built in fp32."""
    out = tmp_path_factory.mktemp("built") / "fp32"
    ortlm.build(made[0], out, precision="fp32", adapters={"vision": made[0] / "vision-lora"})
    return ortlm.load(out, threads=1)


def seen(*images: Any, most: int = 4) -> list[Any]:
    """Return pixels, size and patches of images."""
    found = []
    for image in images:
        crops = even_crops(*image.size, side=phi4.SIDE, patch=phi4.PATCH, most=most)
        pixels = padded_crops(image, crops, side=phi4.SIDE, mean=HALF, std=HALF)
        found.append((pixels, crops.size, crops.patches))
    return found


def as_reference(ids: list[int]) -> list[int]:
    return [phi4.PLACE if token >= FIRST_IMAGE_TOKEN else token for token in ids]


# Width, height and crops at most; height and width of the crops, patches that are no padding: transformers' own.
CUTS = [
    (300, 200, 4, (448, 448), (22, 32)),
    (448, 448, 4, (448, 448), (32, 32)),
    (449, 448, 36, (448, 896), (32, 33)),
    (1000, 300, 4, (448, 1344), (29, 96)),
    (1920, 1080, 36, (1344, 2240), (90, 160)),
    (5000, 300, 4, (448, 1792), (8, 128)),
    (20, 900, 36, (1344, 448), (96, 3)),
    (2000, 2000, 4, (896, 896), (64, 64)),
    (3000, 1000, 4, (448, 1344), (32, 96)),
]


@pytest.mark.parametrize(("width", "height", "most", "size", "patches"), CUTS)
def test_cuts(width: int, height: int, most: int, size: tuple[int, int], patches: tuple[int, int]) -> None:
    found = even_crops(width, height, side=448, patch=14, most=most)
    assert (found.size, found.patches) == (size, patches)


@pytest.mark.parametrize(("width", "height"), [(447, 5), (1, 5000), (10**6, 30)])
def test_too_long(width: int, height: int) -> None:
    with pytest.raises(BadImage, match=r"too long.*num_crops"):
        even_crops(width, height, side=448, patch=14, most=36)


def test_pixels_are_transformers() -> None:
    """Up to the roundings of two ways to resize bytes: one level of 255, two where an image is enlarged a lot."""
    pytest.importorskip("torchvision")
    from transformers.models.phi4_multimodal.image_processing_phi4_multimodal import (
        Phi4MultimodalImageProcessor,
    )

    for width, height, most, size, patches in CUTS:
        image = noise(width, height)
        want = Phi4MultimodalImageProcessor(dynamic_hd=most)(image, return_tensors="pt")
        [(pixels, *_)] = seen(image, most=most)
        assert np.abs(pixels - want["image_pixel_values"][0].numpy()).max() < 2.01 / 127.5
        assert want["image_sizes"][0].tolist() == list(size)
        rows, columns = (-(-count // 2) for count in patches)
        assert want["num_img_tokens"] == [rows * (columns + 1) + 1 + 16 * 17]


@pytest.mark.parametrize(
    "sizes", [[], [(300, 200)], [(700, 300)], [(500, 1000)], [(1500, 400), (200, 30), (1500, 400)]]
)
def test_logits(made: tuple[Path, Any, Any], lm: ortlm.LanguageModel, sizes: list[tuple[int, int]]) -> None:
    """With images the adapter is on, without it is off."""
    images = [noise(*size) for size in sizes]
    ids = lm.encode(question(*images))
    loop = lm.loop(adapter=lm.adapter_for(ids, None))
    loop.start()
    found = loop.append([ids], keep=len(ids))[0]
    model = made[2] if images else made[1]
    wanted = phi4.logits(model, as_reference(ids), seen(*images)).numpy()
    assert relative_error(found, wanted) < 1e-5


def test_tokens_of_an_image(lm: ortlm.LanguageModel) -> None:
    ids = lm.encode(question(noise(300, 200)))
    assert sum(token >= FIRST_IMAGE_TOKEN for token in ids) == 11 * 17 + 1 + 16 * 17
    assert lm.encode("<|image|>x", images=[noise(300, 200)])[-1] == lm.tokenizer.encode("x")[-1]
    with pytest.raises(BadOption, match="num_crops must be 1 to 256"):
        lm.encode(question(noise(9, 9)), num_crops=0)


def test_greedy(made: tuple[Path, Any, Any], lm: ortlm.LanguageModel) -> None:
    """Also a text before and after it, whose cache was computed without the adapter."""
    image = noise(300, 200)
    plain = lm.generate(HELLO, max_new_tokens=6)
    ids = lm.encode(question(image))
    made[2].generation_config.eos_token_id = None
    inputs = phi4.inputs(as_reference(ids), seen(image))
    with torch.no_grad():
        wanted = made[2].generate(**inputs, max_new_tokens=64, do_sample=False)[0, len(ids) :].tolist()
    found = lm.generate(question(image), max_new_tokens=64, ignore_eos=True)
    assert list(found.token_ids) == wanted
    assert lm.generate(HELLO, max_new_tokens=6).token_ids == plain.token_ids
    second = [*HELLO, {"role": "assistant", "content": plain.text}, *question(image)]
    kept = lm.generate(second, max_new_tokens=6)
    assert kept.token_ids == lm.generate(second, max_new_tokens=6, reuse_cache=False).token_ids


def test_prompts_with_and_without_images(lm: ortlm.LanguageModel) -> None:
    prompts = [
        HELLO,
        question(noise(300, 200)),
        [{"role": "user", "content": "What?"}],
        question(noise(60, 90)),
    ]
    together = lm.generate_batch(prompts, max_new_tokens=5)
    for prompt, found in zip(prompts, together, strict=True):
        assert found.token_ids == lm.generate(prompt, max_new_tokens=5, reuse_cache=False).token_ids


def test_many_at_once(lm: ortlm.LanguageModel) -> None:
    """The serving engine computes rows with images apart from others."""
    from ortlm.serving.engine import Engine, EngineOptions

    prompts = [HELLO, question(noise(300, 200)), [{"role": "user", "content": "What?"}]]
    rows = [lm.encode(prompt) for prompt in prompts]
    wanted = [lm.generate(ids, max_new_tokens=5, reuse_cache=False).token_ids for ids in rows]
    engine = Engine(lm, EngineOptions())
    try:
        requests = [engine.submit(ids, max_new_tokens=5) for ids in rows]
        found = [request.result().token_ids for request in requests]
    finally:
        engine.close()
    assert found == wanted


def test_no_other_adapter_with_images(made: tuple[Path, Any, Any], tmp_path: Path) -> None:
    adapters = {"vision": made[0] / "vision-lora", "other": made[0] / "vision-lora"}
    ortlm.build(made[0], tmp_path / "out", precision="fp32", adapters=adapters)
    lm = ortlm.load(tmp_path / "out", threads=1)
    image = question(noise(60, 90))
    with pytest.raises(BadOption, match=r"'other' is asked for, but .* its adapter 'vision'"):
        lm.generate(image, adapter="other", max_new_tokens=2)
    assert lm.generate(HELLO, adapter="other", max_new_tokens=2).token_ids
    generator = lm.generator(max_new_tokens=4)
    with pytest.raises(BadOption, match="Ask for adapter='vision'"):
        generator.append(lm.encode(image))
    generator = lm.generator(adapter="vision", max_new_tokens=4)
    generator.append(lm.encode(image))
    with pytest.raises(BadOption, match="Ask for adapter='vision'"):
        generator.change(adapter=None)
    assert len(lm.prompt_logprobs(image)) == len(lm.encode(image))
    wanted = lm.prompt_logprobs(image, adapter="vision")
    assert [x and x.logprob for x in lm.prompt_logprobs(image)] == [x and x.logprob for x in wanted]


def test_names_of_the_publisher(lm: ortlm.LanguageModel, tmp_path: Path) -> None:
    """Matrices next to adapters, numbered tags, and the encoder's sizes in the code."""
    folder = tmp_path / "hub"
    phi4.save(folder, published=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    arch = architectures.describe({k: v for k, v in config.items() if k != "vision_config"}).seeing
    assert arch is not None
    assert arch.vision is not None
    assert (arch.vision.encoder.hidden, arch.vision.encoder.layers, arch.vision.token) == (1152, 26, 200_010)
    ortlm.build(folder, tmp_path / "out", precision="fp32", adapters={"vision": folder / "vision-lora"})
    other = ortlm.load(tmp_path / "out", threads=1)
    image = noise(300, 200)
    assert other.encode(question(image)) == lm.encode(question(image))
    assert other.encode("<|image_1|>What?", images=[image]) == lm.encode("<|image|>What?", images=[image])
    wanted = lm.generate(question(image), max_new_tokens=6).token_ids
    assert other.generate(question(image), max_new_tokens=6).token_ids == wanted


def test_without_the_adapter(made: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """Words alone: the build says what images need, and images are refused."""
    ortlm.build(made[0], tmp_path / "out", precision="fp32")
    config = json.loads((made[0] / "config.json").read_text())
    assert any("--adapter vision=FOLDER" in note for note in architectures.describe(config).notes)
    lm = ortlm.load(tmp_path / "out", threads=1)
    with pytest.raises(BadOption, match="is a text model"):
        lm.generate(question(noise(9, 9)))
    ids = lm.encode(HELLO)
    assert relative_error(lm.logits(ids), phi4.logits(made[1], ids).numpy()) < 1e-5


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized(made: tuple[Path, Any, Any], tmp_path: Path, precision: str) -> None:
    options = BuildOptions(recipe="fast") if precision == "int4" else None
    adapters = {"vision": made[0] / "vision-lora"}
    ortlm.build(made[0], tmp_path / "out", precision=precision, options=options, adapters=adapters)
    lm = ortlm.load(tmp_path / "out", threads=1)
    image = noise(300, 200)
    ids = lm.encode(question(image))
    loop = lm.loop(adapter="vision")
    loop.start()
    wanted = phi4.logits(made[2], as_reference(ids), seen(image))[-1].numpy()
    assert relative_error(loop.append([ids])[0], wanted) < (0.1 if precision == "int8" else 0.9)


@pytest.mark.parametrize(
    ("key", "value"), [("dynamic_hd", 0), ("dynamic_hd", 1000), ("size", {"height": 224, "width": 224})]
)
def test_settings_that_cannot_be(
    made: tuple[Path, Any, Any], tmp_path: Path, key: str, value: object
) -> None:
    import shutil

    shutil.copytree(made[0], tmp_path / "tiny")
    (tmp_path / "tiny" / "preprocessor_config.json").write_text(json.dumps({key: value}))
    adapters = {"vision": made[0] / "vision-lora"}
    with pytest.raises(Error, match=key):
        ortlm.build(tmp_path / "tiny", tmp_path / "out", precision="fp32", adapters=adapters)


@pytest.mark.parametrize(
    ("key", "value"), [("crop_size", 224), ("image_size", 462), ("num_channels", 1), ("feature_layer", 9)]
)
def test_keys_that_cannot_be(made: tuple[Path, Any, Any], key: str, value: int) -> None:
    config = json.loads((made[0] / "config.json").read_text())
    config["vision_config"][key] = value
    with pytest.raises(BadCheckpoint, match=key):
        architectures.describe(config)


def test_the_official_runtime(lm: ortlm.LanguageModel) -> None:
    """Words give the same tokens there; without settings for it, it reads no images."""
    ids = lm.encode(HELLO)
    wanted = lm.generate(ids, max_new_tokens=8).token_ids
    assert tuple(official.greedy(lm.artifact.path, ids, steps=8))[: len(wanted)] == wanted
    assert not (lm.artifact.path / "processor_config.json").exists()


@pytest.mark.parametrize("target", ["cuda", "dml", "webgpu", "mobile"])
def test_targets(made: tuple[Path, Any, Any], tmp_path: Path, target: str) -> None:
    adapters = {"vision": made[0] / "vision-lora"}
    ortlm.build(
        made[0], tmp_path / "out", target=target, options=BuildOptions(recipe="fast"), adapters=adapters
    )
    for name in ("model", "vision", "embedding"):
        onnx.checker.check_model(tmp_path / "out" / f"{name}.onnx", full_check=True)
