"""Images in prompts: turns, batches, what is computed once, and what goes wrong."""

from __future__ import annotations

import base64
import gc
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ortlm
from ortlm.errors import BadArtifact, BadImage, BadOption
from ortlm.runtime.multimodal import vision_encoder as module
from tests.vision.conftest import noise, question

Load = Callable[..., ortlm.LanguageModel]


@pytest.fixture
def lm(artifact: Callable[..., Path]) -> ortlm.LanguageModel:
    """Return a model that has seen nothing yet."""
    return ortlm.load(artifact(), threads=1)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets an entry whenever the vision encoder runs."""
    found: list[int] = []
    inner = module.VisionEncoder._features

    def counted(self: Any, pixels: Any, **sizes: Any) -> Any:
        found.append(len(pixels))
        return inner(self, pixels, **sizes)

    monkeypatch.setattr(module.VisionEncoder, "_features", counted)
    return found


def test_sources(lm: ortlm.LanguageModel, tmp_path: Path, runs: list[int]) -> None:
    """The same image, wherever it comes from, is the same tokens, and is seen once."""
    image = noise(40, 30)
    image.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    wanted = lm.encode(question(image), num_crops=1)
    for source in (str(tmp_path / "a.png"), tmp_path / "a.png", content, url, np.asarray(image)):
        assert lm.encode(question(source), num_crops=1) == wanted
    for part in ({"type": "image_url", "image_url": {"url": url}}, {"type": "image", "url": url}):
        message = {"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}
        assert lm.encode([message], num_crops=1) == wanted
    assert len(runs) == 1
    assert lm.encode(question(image), num_crops=2) != wanted


def test_turns(lm: ortlm.LanguageModel, runs: list[int]) -> None:
    """A second turn with a new image finds the first in the cache, and gives what a fresh start gives."""
    first = question(noise(40, 30, 1))
    made = lm.generate(first, num_crops=1, max_new_tokens=5)
    second = [
        *first,
        {"role": "assistant", "content": made.text},
        *question(noise(30, 40, 2), text="And this?"),
    ]
    stream = lm.stream(second, num_crops=1, max_new_tokens=5)
    again = stream.generations()[0]
    assert stream.timings.cached_tokens > 313
    assert len(runs) == 2
    fresh = lm.generate(second, num_crops=1, max_new_tokens=5, reuse_cache=False)
    assert again.token_ids == fresh.token_ids
    other = [*question(noise(40, 30, 3)), *second[1:]]
    assert lm.encode(other, num_crops=1)[:300] != lm.encode(second, num_crops=1)[:300]


def test_batch(sighted: Load) -> None:
    """Prompts with two, one and no images."""
    lm = sighted()
    prompts = [
        question(noise(40, 30, 1), noise(9, 9, 2)),
        [{"role": "user", "content": "Hello"}],
        question(noise(20, 90, 3)),
    ]
    together = lm.generate_batch(prompts, num_crops=1, max_new_tokens=6)
    for prompt, made in zip(prompts, together, strict=True):
        alone = lm.generate(prompt, num_crops=1, max_new_tokens=6, reuse_cache=False)
        assert alone.token_ids == made.token_ids
    texts = ["<|image_1|>a", "b"]
    lists = lm.generate_batch(texts, images=[[noise(9, 9)], None], num_crops=1, max_new_tokens=2)
    assert len(lists) == 2
    with pytest.raises(BadOption, match="2 prompts, but images for 1"):
        lm.generate_batch(texts, images=[[noise(9, 9)]])


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "presence_penalty": 0.5},
        {"temperature": 0.8, "seed": 1, "top_k": 20, "top_p": 0.9},
        {"prompt_logprobs": 2, "logprobs": 1},
        {"bad_words": ["x"], "min_new_tokens": 3},
    ],
    ids=lambda o: next(iter(o)),
)
def test_settings(sighted: Load, options: dict[str, Any]) -> None:
    lm = sighted()
    prompt = question(noise(40, 30))
    one = lm.generate(prompt, num_crops=1, max_new_tokens=6, **options)
    assert one.token_ids == lm.generate(prompt, num_crops=1, max_new_tokens=6, **options).token_ids
    assert all(token < lm.vocab_size for token in one.token_ids)
    if "prompt_logprobs" in options:
        found = lm.prompt_logprobs(lm.encode(prompt, num_crops=1))
        assert sum(entry is None for entry in found) == 1 + 313


def test_lookup_and_guidance(sighted: Load) -> None:
    lm = sighted()
    prompt = question(noise(40, 30), text="ab ab ab ab")
    plain = lm.generate(prompt, num_crops=1, max_new_tokens=12)
    assert lm.generate(prompt, num_crops=1, max_new_tokens=12, draft="lookup").token_ids == plain.token_ids
    made = lm.generate(prompt, num_crops=1, guidance=ortlm.Guidance.choices(["yes", "no"]), max_new_tokens=8)
    assert made.text in ("yes", "no")
    with pytest.raises(BadOption, match="draft model cannot see"):
        lm.generate(prompt, num_crops=1, draft=lm)


def test_rewind(sighted: Load) -> None:
    """Into the image, and over it."""
    lm = sighted()
    ids = lm.encode(question(noise(40, 30)), num_crops=1)
    generator = lm.generator(max_new_tokens=4)
    generator.append(ids)
    first = [int(generator.step()[0]) for _ in range(3)]
    for back in (100, 2, len(ids)):
        generator.rewind(back)
        generator.append(ids[back:] or [ids[-1]])
        if back < len(ids):
            assert [int(generator.step()[0]) for _ in range(3)] == first


def test_saved_prompt(lm: ortlm.LanguageModel, artifact: Callable[..., Path], tmp_path: Path) -> None:
    """A file of what was computed serves another process, which sees the image itself."""
    prompt = question(noise(40, 30))
    made = lm.generate(prompt, num_crops=1, max_new_tokens=4)
    lm.save_cache(tmp_path / "kept")
    other = ortlm.load(artifact(), threads=1)
    other.load_cache(tmp_path / "kept")
    stream = other.stream(prompt, num_crops=1, max_new_tokens=4)
    assert stream.generations()[0].token_ids == made.token_ids
    assert stream.timings.cached_tokens > 300


def test_images_that_were_forgotten(lm: ortlm.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only few features are kept; those that a running generation needs are."""
    monkeypatch.setattr(module, "_KEPT_BYTES", 1)
    first = lm.encode(question(noise(40, 30, 1)), num_crops=1)
    generator = lm.generator(max_new_tokens=4)
    generator.append(first)
    lm.encode(question(noise(40, 30, 2)), num_crops=1)
    generator.rewind(2)
    generator.append(first[2:])
    with pytest.raises(BadOption, match="no longer knows"):
        lm.generate(first, max_new_tokens=1, reuse_cache=False)


# --- what goes wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("<|image_1|>", 0, "has 1 image tags, but 0 images"),
        ("no tag", 1, "has 0 image tags, but 1 images"),
        ("<|image_1|><|image_2|>", 1, "has 2 image tags, but 1 images"),
        ("<|image_2|><|image_1|>", 2, "numbers 2, 1; they must be 1 to 2, in this order"),
        ("<|image_1|><|image_1|>", 2, "numbers 1, 1"),
        ("<|image_0|>", 1, "numbers 0"),
    ],
)
def test_tags(sighted: Load, text: str, count: int, message: str) -> None:
    with pytest.raises(BadOption, match=message):
        sighted().encode(text, images=[noise(9, 9)] * count)


@pytest.mark.parametrize("crops", [0, -1, 257])
def test_number_of_crops(sighted: Load, crops: int) -> None:
    with pytest.raises(BadOption, match="num_crops must be 1 to 256"):
        sighted().encode(question(noise(9, 9)), num_crops=crops)


def test_broken_images(sighted: Load, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    noise(300, 300).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:2000])
    (tmp_path / "text.png").write_text("no image")
    for source in (
        tmp_path / "cut.png",
        tmp_path / "text.png",
        tmp_path / "none.png",
        tmp_path,
        b"",
        "file:///etc/x",
    ):
        with pytest.raises(BadImage):
            sighted().encode(question(source))
    with pytest.raises(BadOption, match=r'needs the image: {"type": "image"'):
        sighted().encode([{"role": "user", "content": [{"type": "image"}]}])


def test_too_large(sighted: Load, tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "large.png")
    with pytest.raises(BadImage, match=r"20000 x 20000 pixels, more than the 100 million"):
        sighted().encode(question(tmp_path / "large.png"))


def test_a_model_of_text(tiny: Path, build: Any) -> None:
    lm = build("phi3")
    for call in (
        lambda: lm.generate(question(noise(9, 9))),
        lambda: lm.generate("x", images=[noise(9, 9)]),
    ):
        with pytest.raises(BadOption, match="text model: it takes no images"):
            call()
    with pytest.raises(BadOption, match=r"num_crops does not apply.*text model"):
        lm.generate("x", num_crops=4)


def test_ids_of_images_mean_nothing_to_a_model_of_text(build: Any) -> None:
    with pytest.raises(BadOption, match="outside the vocabulary"):
        build("phi3").generate([1, 1 << 62])


def test_missing_graphs(artifact: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(artifact(), tmp_path / "copy")
    (tmp_path / "copy" / "vision.onnx").unlink()
    with pytest.raises(BadArtifact, match=r"vision\.onnx is missing"):
        ortlm.load(tmp_path / "copy")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files as Linux lists them")
def test_no_leaks(sighted: Load, tmp_path: Path) -> None:
    """300 different images: no file stays open, and memory does not grow."""
    lm = sighted("int4")
    path = tmp_path / "a.png"

    def see(number: int) -> None:
        noise(16, 16, number).save(path)
        lm.generate(question(path), num_crops=1, max_new_tokens=1)

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for number in range(40):
        see(number)
    files, before = len([*Path("/proc/self/fd").iterdir()]), resident()
    for number in range(40, 340):
        see(number)
    assert len([*Path("/proc/self/fd").iterdir()]) <= files
    # Features of 300 images, which may be kept, are 24 MB.
    assert resident() - before < 60e6
