"""What the three graphs compute, against torch and against onnxruntime-genai."""

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
import torch

import ortlm
from ortlm.artifact import MANIFEST_FILE
from ortlm.runtime.engine.token_ids import FIRST_IMAGE_TOKEN
from tests.architectures.oracle import relative_error
from tests.vision.checkpoint import SIDE, SWITCH
from tests.vision.conftest import Seen, as_reference, noise, question

og = pytest.importorskip("onnxruntime_genai")

PROMPT = "<|user|>\n<|image_1|>\n<|image_2|>\nWhat is this?<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize(
    "sizes",
    [
        [(336, 336)],
        [(336, 672), (672, 336)],
        [(336, 672), (672, 336), (1008, 672)],
        [(672, 672), (336, 336), (336, 1344), (1344, 336)],
    ],
    ids=len,
)
def test_features(seen: Seen, artifact: Callable[..., Path], sizes: list[tuple[int, int]]) -> None:
    """Several images of different sizes at once; what fills up the crops must not matter."""
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(1 + h * w // SIDE**2, 3, SIDE, SIDE, generator=generator) for h, w in sizes]
    wanted = seen.reference.features(views, sizes)
    pixels = np.full((len(views), max(map(len, views)) + 1, 3, SIDE, SIDE), 9.0, np.float32)
    for place, own in zip(pixels, views, strict=True):
        place[: len(own)] = own.numpy()
    session = onnxruntime.InferenceSession(artifact() / "vision.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"pixel_values": pixels, "image_sizes": np.array(sizes, np.int64)})[0]
    assert found.shape == wanted.shape
    assert relative_error(found, wanted.numpy()) < 1e-5


def test_padding_costs_nothing(artifact: Callable[..., Path]) -> None:
    """Crops that fill up are dropped before the vision encoder: no product sees them."""
    model = onnx.load(artifact() / "vision.onnx", load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.index("NonZero") < kinds.index("MatMul")


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_logits(seen: Seen, sighted: Callable[..., ortlm.LanguageModel], count: int) -> None:
    lm = sighted()
    images = [noise(100, 60, 1), noise(30, 200, 2), noise(50, 50, 3), noise(9, 9, 4)][:count]
    ids = lm.encode(question(*images), num_crops=2)
    features = seen.features(images, most=2)
    assert sum(token >= FIRST_IMAGE_TOKEN for token in ids) == len(features)
    wanted = seen.reference.logits(as_reference(ids), features)
    loop = lm.loop()
    loop.start()
    found = loop.append([ids], keep=len(ids))[0]
    assert relative_error(found, wanted.numpy()) < 1e-4


def test_rotated(seen: Seen, artifact: Callable[..., Path]) -> None:
    """Images are turned like the words that they stand among."""
    image = noise(100, 60)
    lm = ortlm.load(artifact("int8", rotate=True), threads=1)
    ids = lm.encode(question(image), num_crops=1)
    wanted = seen.reference.logits(as_reference(ids), seen.features([image], most=1))
    assert relative_error(lm.logits(ids), wanted.numpy()) < 0.1


def test_greedy(seen: Seen, sighted: Callable[..., ortlm.LanguageModel]) -> None:
    image = noise(100, 60)
    ids = sighted().encode(question(image), num_crops=1)
    wanted = seen.reference.greedy(as_reference(ids), seen.features([image], most=1), 12)
    made = sighted().generate(question(image), num_crops=1, max_new_tokens=12, stop_token_ids=())
    assert list(made.token_ids) == wanted[: len(made.token_ids)]
    assert len(made.token_ids) > 4


def test_tokens_of_a_prompt(sighted: Callable[..., ortlm.LanguageModel]) -> None:
    """As the publisher's processor: texts between images are encoded one by one, each begins with <s>."""
    lm = sighted()
    encode = lm.tokenizer.encode
    ids = lm.encode(PROMPT, images=[noise(9, 9), noise(40, 9)], num_crops=4)
    wanted = [
        *encode("<|user|>\n"), *[-1] * 757, *encode("\n"), *[-1] * 745,
        *encode("\nWhat is this?<|end|>\n<|assistant|>\n"),
    ]  # fmt: skip
    assert as_reference(ids) == wanted
    assert lm.encode(question(noise(9, 9), noise(40, 9))) == ids
    # Without images too.
    assert lm.encode([{"role": "user", "content": "x"}]) == encode("<|user|>\nx<|end|>\n<|assistant|>\n")


def test_the_rope_switch(seen: Seen, sighted: Callable[..., ortlm.LanguageModel]) -> None:
    """An image and an answer on the other side of where positions are rotated otherwise."""
    lm = sighted()
    image = noise(100, 60)
    text = "x" * (SWITCH - 4 - len(lm.encode(question(image, text=""), num_crops=4)))
    ids = lm.encode(question(image, text=text), num_crops=4)
    assert SWITCH - 8 < len(ids) <= SWITCH
    features = seen.features([image])
    wanted = seen.reference.logits(as_reference(ids), features)
    loop = lm.loop()
    loop.start()
    assert relative_error(loop.append([ids], keep=4)[0], wanted[-4:].numpy()) < 1e-4
    row = list(ids)
    for token in range(20, 32):
        row.append(token)
        found = loop.append([[token]])[0].copy()
    assert loop.recomputed == 1
    assert relative_error(found, seen.reference.logits(as_reference(row), features)[-1].numpy()) < 1e-4


# --- onnxruntime-genai --------------------------------------------------------------------------------------


def _official(folder: Path, inputs: Any, count: int) -> list[int]:
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=6000, do_sample=False)
    generator = og.Generator(model, params)
    named = inputs
    if isinstance(inputs, dict):
        named = og.NamedTensors()
        for name, value in inputs.items():
            named[name] = value
    generator.set_inputs(named)
    return _tokens(generator, count)


def _ours(folder: Path, inputs: dict[str, Any], count: int) -> list[int]:
    from ortlm import genai

    model = genai.Model(folder)
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=6000, do_sample=False)
    generator = genai.Generator(model, params)
    named = genai.NamedTensors()
    for name, value in inputs.items():
        named[name] = value
    generator.set_inputs(named)
    return _tokens(generator, count)


def _tokens(generator: Any, count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count and not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    return found


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_the_official_runtime(artifact: Callable[..., Path], precision: str, tmp_path: Path) -> None:
    """It loads our folder; fed the same pixels, both give the same tokens, whoever cut the images."""
    from ortlm import genai

    folder = artifact(precision)
    paths = []
    for i, image in enumerate((noise(100, 60, 1), noise(30, 200, 2))):
        image.save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    processor = genai.Model(folder).create_multimodal_processor()
    inputs = processor(PROMPT, images=genai.Images.open(*paths))
    ours = {name: inputs[name].as_numpy() for name in inputs.keys()}  # noqa: SIM118 - no mapping
    assert _ours(folder, ours, 6) == _official(folder, ours, 6)
    if precision == "fp32":
        model = og.Model(str(folder))
        theirs = model.create_multimodal_processor()(PROMPT, images=og.Images.open(*paths))
        names = ("input_ids", "pixel_values", "image_sizes", "num_image_tokens")
        given = {name: theirs[name].as_numpy() for name in names}
        assert given["pixel_values"].shape[1] == 17
        assert _ours(folder, given, 4) == _official(folder, theirs, 4)


def test_a_folder_in_the_official_layout(
    artifact: Callable[..., Path], sighted: Callable[..., ortlm.LanguageModel], tmp_path: Path
) -> None:
    """Without our manifest, by genai_config.json alone: 16 crops then, as the official runtime cuts."""
    shutil.copytree(artifact(), tmp_path / "official")
    (tmp_path / "official" / MANIFEST_FILE).unlink()
    lm = ortlm.load(tmp_path / "official", threads=1)
    image = noise(100, 60)
    assert len(lm.encode(question(image))) > 1900
    kept = {"num_crops": 2, "max_new_tokens": 6}
    assert (
        lm.generate(question(image), **kept).token_ids
        == sighted().generate(question(image), **kept).token_ids
    )
    config = json.loads((tmp_path / "official" / "genai_config.json").read_text())
    assert config["model"]["type"] == "phi3v"
    assert set(config["model"]["vision"]["inputs"]) == {"pixel_values", "image_sizes"}


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.02), ("int4", 0.02)])
def test_quantized_features(
    seen: Seen, sighted: Callable[..., ortlm.LanguageModel], precision: str, most: float
) -> None:
    image = noise(100, 60)
    lm = sighted(precision)
    assert lm.vision_encoder is not None
    found, wanted = lm.vision_encoder.read(image)[0].features, seen.features([image]).numpy()
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert error < most
