"""The official program for images, word for word, and what goes beyond it or wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ortlm
import ortlm.genai as og
from tests.vision.conftest import noise

Build = Callable[..., Path]
PROMPT = "<|user|>\n<|image_1|>\nWhat is this?<|end|>\n<|assistant|>\n"


@pytest.fixture
def image(tmp_path: Path) -> str:
    noise(60, 40).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def answer(generator: Any, stream: Any, count: int) -> tuple[list[int], str]:
    tokens, text = [], ""
    while not generator.is_done() and len(tokens) < count:
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
        text += stream.decode(tokens[-1])
    return tokens, text


def generator_of(model: Any, **options: Any) -> Any:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=2000, **options)
    return og.Generator(model, params)


def test_the_official_program(
    artifact: Build, sighted: Callable[..., ortlm.LanguageModel], image: str
) -> None:
    model = og.Model(str(artifact()))
    processor = model.create_multimodal_processor()
    stream = processor.create_stream()
    inputs = processor(PROMPT, images=og.Images.open(image))
    generator = generator_of(model)
    generator.set_inputs(inputs)
    tokens, text = answer(generator, stream, 6)
    wanted = sighted().generate(PROMPT, images=[image], max_new_tokens=6)
    assert tuple(tokens) == wanted.token_ids
    assert processor.decode(np.array(tokens)).startswith(text[:1])
    sequence = generator.get_sequence(0)
    assert (sequence == -1).sum() == 757
    assert len(sequence) == inputs["input_ids"].shape()[1] + len(tokens)


def test_another_image_later(artifact: Build, image: str, tmp_path: Path) -> None:
    """The official runtime forgets how after the first prompt."""
    model = og.Model(str(artifact()))
    processor = model.create_multimodal_processor()
    noise(30, 90, 5).save(tmp_path / "b.png")
    generator = generator_of(model)
    generator.set_inputs(processor(PROMPT, images=og.Images.open(image)))
    tokens, _ = answer(generator, processor.create_stream(), 3)
    generator.set_inputs(processor(PROMPT, images=og.Images.open(str(tmp_path / "b.png"))))
    again, _ = answer(generator, processor.create_stream(), 3)
    lm = model._handle.lm
    ids = [
        *lm.encode(PROMPT, images=[image]), *tokens, *lm.encode(PROMPT, images=[tmp_path / "b.png"]),
    ]  # fmt: skip
    assert tuple(again) == lm.generate(ids, max_new_tokens=3, reuse_cache=False).token_ids
    generator.rewind_to(100)
    assert generator.token_count() == 100


def test_bytes_and_beams(artifact: Build, image: str) -> None:
    model = og.Model(str(artifact()))
    processor = model.create_multimodal_processor()
    inputs = processor(PROMPT, images=og.Images.open_bytes(Path(image).read_bytes()))
    generator = generator_of(model, num_beams=2, length_penalty=0.0)
    generator.set_inputs(inputs)
    for _ in range(3):
        generator.generate_next_token()
    assert len(generator.get_sequence(0)) > 757


def test_texts(artifact: Build) -> None:
    model = og.Model(str(artifact()))
    processor = model.create_multimodal_processor()
    inputs = processor(["Hello", "A longer text"])
    assert inputs["input_ids"].shape()[0] == 2
    assert "pixel_values" not in inputs
    generator = generator_of(model)
    generator.set_inputs(processor("Hello"))
    assert len(answer(generator, processor.create_stream(), 2)[0]) <= 2


def test_what_goes_wrong(artifact: Build, image: str, tiny: Path, tmp_path: Path) -> None:
    model = og.Model(str(artifact()))
    processor = model.create_multimodal_processor()
    images = og.Images.open(image)
    with pytest.raises(og.GenaiError, match="0 image tags, but 1 images"):
        processor("no tag", images=images)
    with pytest.raises(og.GenaiError, match="images go with one prompt"):
        processor([PROMPT, PROMPT], images=images)
    with pytest.raises(og.GenaiError, match="give a prompt"):
        processor(None, images=images)
    with pytest.raises(og.GenaiError, match="hears nothing"):
        processor(PROMPT, images=images, audios=og.Audios.open_bytes(b"x"))
    with pytest.raises(og.GenaiError, match="no image that can be read"):
        processor(PROMPT, images=og.Images.open_bytes(b"not an image"))
    inputs = processor(PROMPT, images=images)
    inputs["input_ids"] = inputs["input_ids"].as_numpy()[:, :-60]
    inputs["image_sizes"] = np.array([[336, 336]], np.int64)
    with pytest.raises(og.GenaiError, match="places for images, whose tokens are 313"):
        generator_of(model).set_inputs(inputs)
    inputs["image_sizes"] = np.array([[3360, 336]], np.int64)
    with pytest.raises(og.GenaiError, match="5 views cannot be an image of 336 x 3360"):
        generator_of(model).set_inputs(inputs)
