"""Qwen2.5-VL: images of any size, layers that attend within windows, and tokens with three positions."""

from __future__ import annotations

import base64
import io
import json
import shutil
import threading
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ortlm
from ortlm import architectures
from ortlm.builder.options import BuildOptions
from ortlm.errors import BadCheckpoint, BadImage, BadOption, ContextFull, UnsupportedModel
from ortlm.runtime.engine.decode_loop import Loop
from ortlm.runtime.engine.token_ids import FIRST_IMAGE_TOKEN, grid_positions
from ortlm.runtime.multimodal.image_processor import patch_pixels
from tests.architectures.oracle import relative_error
from tests.vision import qwen2_5_vl
from tests.vision.conftest import noise, question

# Square, tall, wide, odd, tiny, as thin as can be, larger than what is allowed, and a whole number of windows.
SIZES = [
    (40, 30), (28, 28), (300, 200), (57, 141), (1, 1), (13, 29), (5, 900), (901, 7), (200, 1), (1, 200),
    (1000, 777), (112, 112), (224, 112), (29, 27),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return the checkpoint's folder and the torch model."""
    folder = tmp_path_factory.mktemp("qwen2_5_vl") / "tiny"
    return folder, qwen2_5_vl.save(folder)


@pytest.fixture(scope="module")
def lm(made: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> ortlm.LanguageModel:
    """Return it built in fp32."""
    out = tmp_path_factory.mktemp("built") / "fp32"
    ortlm.build(made[0], out, precision="fp32")
    return ortlm.load(out, threads=1)


def as_reference(ids: list[int]) -> list[int]:
    return [qwen2_5_vl.IMAGE if token >= FIRST_IMAGE_TOKEN else token for token in ids]


def interleaved(*images: Any) -> list[dict[str, Any]]:
    """Return a user's message with a text before and after each image."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": "Look:"}]
    for number, image in enumerate(images):
        parts += [{"type": "image", "image": image}, {"type": "text", "text": f" number {number}."}]
    return [{"role": "user", "content": parts}]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_pixels_and_features(made: tuple[Path, Any], lm: ortlm.LanguageModel, size: tuple[int, int]) -> None:
    image = noise(*size)
    assert lm.vision_encoder is not None
    images = lm.vision_encoder.images
    assert images.patches is not None
    wanted = qwen2_5_vl.processor()(images=[image], return_tensors="pt")
    pixels, grid = patch_pixels(image, images.patches, mean=images.mean, std=images.std)
    np.testing.assert_array_equal(pixels, wanted["pixel_values"].numpy())
    assert [1, *grid] == wanted["image_grid_thw"][0].tolist()
    with torch.no_grad():
        features = made[1].model.get_image_features(**wanted).pooler_output[0]
    assert relative_error(lm.vision_encoder.read(image)[0].features, features.numpy()) < 1e-5


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_logits(made: tuple[Path, Any], lm: ortlm.LanguageModel, count: int) -> None:
    """Also of words before and after an image, and of the same image twice."""
    images = [noise(140, 60, 1), noise(20, 150, 2), noise(140, 60, 1)][:count]
    ids = lm.encode(interleaved(*images))
    loop = lm.loop()
    loop.start()
    found = loop.append([ids], keep=len(ids))[0]
    wanted = qwen2_5_vl.logits(made[1], as_reference(ids), images)
    assert relative_error(found, wanted.numpy()) < 1e-5


def test_it_matters(made: tuple[Path, Any], lm: ortlm.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one position for each token it would be another model: the test above sees it."""
    from ortlm.runtime.engine import decode_loop as module

    image = noise(140, 60)
    ids = lm.encode(question(image))
    one = lambda ids: (np.broadcast_to(np.arange(len(ids)), (3, len(ids))), len(ids))  # noqa: E731
    monkeypatch.setattr(module, "grid_positions", one)
    loop = lm.loop()
    loop.start()
    found = loop.append([ids], keep=len(ids))[0]
    assert relative_error(found, qwen2_5_vl.logits(made[1], as_reference(ids), [image]).numpy()) > 0.01


@pytest.mark.parametrize("chunk", [1, 5, 20])
def test_chunks_and_steps(made: tuple[Path, Any], lm: ortlm.LanguageModel, chunk: int) -> None:
    """A chunk may end within an image; words then come one by one."""
    images = [noise(140, 60, 1), noise(20, 150, 2)]
    ids = lm.encode(question(*images))
    loop = Loop(
        lm.session,
        lm.manifest.graphs["decoder"],
        context_tokens=512,
        chunk_tokens=chunk,
        embedder=lm.loop()._embedder,
        by_grid=True,
    )
    loop.start()
    loop.append([ids[:-4]])
    for token in ids[-4:]:
        found = loop.step([token])[0].copy()
    wanted = qwen2_5_vl.logits(made[1], as_reference(ids), images)[-1]
    assert relative_error(found, wanted.numpy()) < 1e-5


def test_steps_through_an_image(made: tuple[Path, Any], lm: ortlm.LanguageModel) -> None:
    image = noise(140, 60)
    ids = lm.encode(question(image))
    loop = lm.loop()
    loop.start()
    loop.append([ids[:1]])
    for token in ids[1:]:
        found = loop.step([token])[0].copy()
    wanted = qwen2_5_vl.logits(made[1], as_reference(ids), [image])[-1]
    assert relative_error(found, wanted.numpy()) < 1e-5


@pytest.mark.parametrize("count", [0, 1, 2])
def test_greedy(made: tuple[Path, Any], lm: ortlm.LanguageModel, count: int) -> None:
    images = [noise(140, 60, 1), noise(20, 150, 2)][:count]
    ids = lm.encode(question(*images))
    wanted = qwen2_5_vl.greedy(made[1], as_reference(ids), images, 64)
    loop = lm.loop()
    loop.start()
    logits, found = loop.append([ids]), []
    for _ in range(64):
        found.append(int(logits[0].argmax()))
        logits = loop.step(found[-1:])
    assert found == wanted


def test_batch(lm: ortlm.LanguageModel) -> None:
    prompts = [
        question(noise(140, 60)),
        [{"role": "user", "content": "Hello"}],
        interleaved(noise(9, 9), noise(20, 150)),
    ]
    together = lm.generate_batch(prompts, max_new_tokens=12)
    for prompt, found in zip(prompts, together, strict=True):
        assert found.token_ids == lm.generate(prompt, max_new_tokens=12, reuse_cache=False).token_ids


def test_rewinding_and_several_turns(made: tuple[Path, Any], lm: ortlm.LanguageModel) -> None:
    """Before, within and after an image, and on to another one."""
    first, second = noise(140, 60), noise(20, 150, 2)
    ids = lm.encode(question(first))
    more = lm.encode(question(second))
    loop = lm.loop()
    loop.start()
    loop.append([ids])
    begin = next(i for i, token in enumerate(ids) if token >= FIRST_IMAGE_TOKEN)
    for length in (len(ids) - 1, begin + 3, begin + 1, begin, begin - 1):
        loop.trim(length)
        found = loop.append([ids[length:]])[0].copy()
        wanted = qwen2_5_vl.logits(made[1], as_reference(ids), [first])[-1]
        assert relative_error(found, wanted.numpy()) < 1e-5
    found = loop.append([more])[0]
    wanted = qwen2_5_vl.logits(made[1], as_reference(ids + more), [first, second])[-1]
    assert relative_error(found, wanted.numpy()) < 1e-5


def test_a_saved_prompt_needs_no_image(lm: ortlm.LanguageModel, tmp_path: Path) -> None:
    """Its ids say how large its images are."""
    image = noise(140, 60)
    ids = lm.encode(question(image))
    generator = lm.generator()
    generator.append(ids)
    generator.save(tmp_path / "saved")
    other = ortlm.load(lm.artifact.path, threads=1)
    again = other.generator()
    again.restore(tmp_path / "saved")
    text = lm.tokenizer.encode("And now?", add_special_tokens=False)
    generator.append(text)
    again.append(text)
    np.testing.assert_allclose(generator.logits, again.logits, rtol=1e-5, atol=1e-5)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(st.integers(1, 6), st.tuples(st.integers(1, 5), st.integers(1, 7))), min_size=1, max_size=6
    )
)
def test_positions_are_those_of_transformers(made_grid: Any, parts: list[int | tuple[int, int]]) -> None:
    """Between two images there is a word: transformers takes images that touch for one."""
    ids: list[int] = []
    types: list[int] = []
    grids = []
    for number, part in enumerate(parts):
        if isinstance(part, tuple):
            rows, columns = part
            first = FIRST_IMAGE_TOKEN | (number << 11 | columns) << 14
            ids += [5, *range(first, first + rows * columns)]
            types += [0, *[1] * (rows * columns)]
            grids.append([1, 2 * rows, 2 * columns])
        else:
            ids += [7] * part
            types += [0] * part
    wanted, _ = made_grid.get_rope_index(
        torch.zeros(1, len(ids), dtype=torch.long),
        mm_token_type_ids=torch.tensor([types]),
        image_grid_thw=torch.tensor(grids) if grids else None,
    )
    found, after = grid_positions(np.array(ids))
    np.testing.assert_array_equal(found, wanted[:, 0].numpy())
    assert after == int(wanted.max()) + 1
    # Of every beginning of a text, too.
    for length in range(1, len(ids)):
        np.testing.assert_array_equal(grid_positions(np.array(ids[:length]))[0], found[:, :length])


@pytest.fixture(scope="module")
def made_grid(made: tuple[Path, Any]) -> Any:
    """Return what computes positions in transformers."""
    return made[1].model


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized(made: tuple[Path, Any], tmp_path: Path, precision: str) -> None:
    options = BuildOptions(recipe="fast") if precision == "int4" else None
    ortlm.build(made[0], tmp_path / "out", precision=precision, options=options)
    lm = ortlm.load(tmp_path / "out", threads=1)
    image = noise(140, 60)
    ids = lm.encode(question(image))
    loop = lm.loop()
    loop.start()
    wanted = qwen2_5_vl.logits(made[1], as_reference(ids), [image])[-1]
    assert relative_error(loop.append([ids])[0], wanted.numpy()) < (0.1 if precision == "int8" else 0.9)


def test_fast_prompts_and_calibration(made: tuple[Path, Any], tmp_path: Path) -> None:
    options = BuildOptions(recipe="balanced", calibration_tokens=512, fast_prompts=True)
    ortlm.build(made[0], tmp_path / "out", options=options)
    lm = ortlm.load(tmp_path / "out", threads=1)
    assert lm.generate(question(noise(140, 60)), max_new_tokens=2).token_ids


def test_names_of_the_hub(made: tuple[Path, Any], lm: ortlm.LanguageModel, tmp_path: Path) -> None:
    qwen2_5_vl.save(tmp_path / "hub", hub_names=True)
    ortlm.build(tmp_path / "hub", tmp_path / "out", precision="fp32")
    other = ortlm.load(tmp_path / "out", threads=1)
    assert other.manifest.images == lm.manifest.images
    prompt = question(noise(140, 60))
    assert (
        other.generate(prompt, max_new_tokens=8).token_ids == lm.generate(prompt, max_new_tokens=8).token_ids
    )


@pytest.mark.parametrize("target", ["cuda", "dml", "webgpu", "mobile"])
def test_targets(made: tuple[Path, Any], tmp_path: Path, target: str) -> None:
    ortlm.build(made[0], tmp_path / "out", target=target, options=BuildOptions(recipe="fast"))
    for name in ("model", "vision", "embedding"):
        onnx.checker.check_model(tmp_path / "out" / f"{name}.onnx", full_check=True)


@pytest.mark.parametrize(
    ("place", "key", "value", "error"),
    [
        ("vision_config", "in_channels", 1, BadCheckpoint),
        ("vision_config", "window_size", 27, BadCheckpoint),
        ("vision_config", "out_hidden_size", 64, BadCheckpoint),
        ("vision_config", "num_heads", 3, BadCheckpoint),
        ("vision_config", "hidden_act", "strange", UnsupportedModel),
        ("vision_config", "qkv_bias", True, UnsupportedModel),
        ("text_config", "rope_parameters", {"rope_type": "default", "mrope_section": [4, 6]}, BadCheckpoint),
    ],
)
def test_keys_of_the_parts_are_refused_by_name(
    made: tuple[Path, Any], place: str, key: str, value: object, error: type[Exception]
) -> None:
    config = json.loads((made[0] / "config.json").read_text())
    config[place][key] = value
    with pytest.raises(error, match="mrope_section" if key == "rope_parameters" else key):
        architectures.describe(config)


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("do_resize", False, UnsupportedModel),
        ("patch_size", 16, UnsupportedModel),
        ("merge_size", 1, UnsupportedModel),
        ("resample", 2, UnsupportedModel),
        ("min_pixels", 0, BadCheckpoint),
        ("max_pixels", "many", BadCheckpoint),
        ("min_pixels", 1 << 30, BadCheckpoint),
    ],
)
def test_settings_of_the_processor(
    made: tuple[Path, Any], tmp_path: Path, key: str, value: object, error: type[Exception]
) -> None:
    shutil.copytree(made[0], tmp_path / "tiny")
    path = tmp_path / "tiny" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(error, match=key):
        ortlm.build(tmp_path / "tiny", tmp_path / "out", precision="fp32")


def test_what_cannot_be_read(lm: ortlm.LanguageModel) -> None:
    with pytest.raises(BadImage, match="at most 200 times"):
        lm.encode(question(noise(201, 1)))
    with pytest.raises(BadOption, match="num_crops does not apply"):
        lm.encode(question(noise(9, 9)), num_crops=4)
    with pytest.raises(BadOption, match=r"1 image tags, but 0 images"):
        lm.encode("<|image_pad|>")


def test_an_image_that_fits_into_no_prompt(made: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copytree(made[0], tmp_path / "tiny")
    path = tmp_path / "tiny" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_pixels": 1 << 30, "size": None}))
    ortlm.build(tmp_path / "tiny", tmp_path / "out", precision="fp32")
    lm = ortlm.load(tmp_path / "out", threads=1)
    with pytest.raises(ContextFull, match="Make the image smaller"):
        lm.encode(question(noise(1000, 1000)))


def test_a_published_config() -> None:
    """The configuration of the 3 B checkpoint, with the keys of the decoder next to the others."""
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11008,
        "max_position_embeddings": 128000, "max_window_layers": 70, "model_type": "qwen2_5_vl",
        "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
        "vision_config": {
            "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2,
            "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2, "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    arch = architectures.describe(config)
    assert not arch.notes
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(Qwen2_5_VLConfig(**json.loads(json.dumps(config))))
    assert sum(p.size for p in arch.parameters) == sum(p.numel() for p in model.parameters())


def test_served(lm: ortlm.LanguageModel) -> None:
    """Images in chats, through the server and all at once, give the answers that they give alone."""
    pytest.importorskip("fastapi")
    from tests.server.conftest import running

    images = [noise(140, 60, 1), noise(20, 150, 2), noise(40, 30, 3)]
    answers: dict[int, str] = {}

    def ask(url: str, number: int) -> None:
        buffer = io.BytesIO()
        images[number].save(buffer, "PNG")
        data = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": "What is this?"}]
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 12, "temperature": 0}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            answers[number] = json.load(answer)["choices"][0]["message"]["content"]

    with running(lm) as live:
        threads = [threading.Thread(target=ask, args=(live.url, number)) for number in range(len(images))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, image in enumerate(images):
        assert answers[number] == lm.generate(question(image), max_new_tokens=12, do_sample=False).text


@pytest.mark.parametrize("sizes", [[], [(140, 60)], [(140, 60), (20, 150)], [(57, 141), (300, 200), (9, 9)]])
def test_the_official_runtime(lm: ortlm.LanguageModel, tmp_path: Path, sizes: list[tuple[int, int]]) -> None:
    """It reads images by its own code, and gives the same tokens."""
    og = pytest.importorskip("onnxruntime_genai")
    images = [noise(*size, seed) for seed, size in enumerate(sizes)]
    files = []
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
        files.append(str(tmp_path / f"{number}.png"))
    model = og.Model(str(lm.artifact.path))
    assert model.type == "qwen2_5_vl"
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=200, min_length=200, do_sample=False)
    generator = og.Generator(model, params)
    ids = lm.encode(question(*images))
    if images:
        text = lm.render([{"role": "user", "content": [*[{"type": "image"}] * len(images), *_words()]}])
        generator.set_inputs(model.create_multimodal_processor()(text, images=og.Images.open(*files)))
    else:
        generator.append_tokens(np.array(ids, np.int32))
    found = []
    for _ in range(24):
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    loop = lm.loop()
    loop.start()
    logits, wanted = loop.append([ids]), []
    for _ in range(24):
        logits[:, list(lm.manifest.stop_token_ids)] = -np.inf
        wanted.append(int(logits[0].argmax()))
        logits = loop.step(wanted[-1:])
    assert found == wanted


def test_the_genai_layer_says_that_it_has_no_processor(lm: ortlm.LanguageModel) -> None:
    import ortlm.genai as og

    with pytest.raises(og.GenaiError, match="images in crops only, and a qwen2_5_vl model"):
        og.Model(str(lm.artifact.path)).create_multimodal_processor()


def _words() -> list[dict[str, str]]:
    return [{"type": "text", "text": "What is this?"}]
