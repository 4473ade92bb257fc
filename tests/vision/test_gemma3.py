"""Gemma 3 with images: a second family, whose images' tokens attend to each other both ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import ortlm
from ortlm import architectures
from ortlm.builder.options import BuildOptions
from ortlm.errors import BadCheckpoint, BadOption, UnsupportedModel
from ortlm.runtime.engine.decode_loop import Loop
from ortlm.runtime.engine.token_ids import FIRST_IMAGE_TOKEN
from ortlm.runtime.multimodal.image_processor import whole_pixels
from tests.architectures.oracle import relative_error
from tests.vision import gemma3
from tests.vision.conftest import noise, question


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return the checkpoint's folder and the torch model."""
    folder = tmp_path_factory.mktemp("gemma3") / "tiny"
    return folder, gemma3.save(folder)


@pytest.fixture(scope="module")
def lm(made: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> ortlm.LanguageModel:
    """Return it built in fp32."""
    out = tmp_path_factory.mktemp("built") / "fp32"
    ortlm.build(made[0], out, precision="fp32")
    return ortlm.load(out, threads=1)


def pixels(*images: Any) -> Any:
    half = (0.5, 0.5, 0.5)
    return np.concatenate([whole_pixels(image, side=gemma3.SIDE, mean=half, std=half) for image in images])


def as_reference(ids: list[int]) -> list[int]:
    return [gemma3.PLACE if token >= FIRST_IMAGE_TOKEN else token for token in ids]


def test_features(made: tuple[Path, Any], lm: ortlm.LanguageModel) -> None:
    image = noise(40, 30)
    with torch.no_grad():
        wanted = made[1].get_image_features(torch.from_numpy(pixels(image))).pooler_output[0]
    assert lm.vision_encoder is not None
    assert relative_error(lm.vision_encoder.read(image)[0].features, wanted.numpy()) < 1e-5


def test_epsilon_of_the_vision_encoder_is_the_projectors_too(made: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copytree(made[0], tmp_path / "tiny")
    path = tmp_path / "tiny" / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["layer_norm_eps"] = 0.25
    path.write_text(json.dumps(config))
    model = type(made[1]).from_pretrained(tmp_path / "tiny", attn_implementation="eager").eval()
    ortlm.build(tmp_path / "tiny", tmp_path / "out", precision="fp32")
    lm = ortlm.load(tmp_path / "out", threads=1)
    image = noise(40, 30)
    with torch.no_grad():
        wanted = model.get_image_features(torch.from_numpy(pixels(image))).pooler_output[0]
    assert lm.vision_encoder is not None
    assert relative_error(lm.vision_encoder.read(image)[0].features, wanted.numpy()) < 1e-5


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ("text_config", "final_logit_softcapping", 30.0),
        ("text_config", "sliding_window", None),
        ("text_config", "attn_logit_softcapping", 30.0),
        ("text_config", "no_rope_layers", [1]),
        ("text_config", "use_bidirectional_attention", True),
        ("vision_config", "num_channels", 1),
        ("vision_config", "qkv_bias", True),
        ("text_config", "quantization_config", {"quant_method": "awq"}),
        ("vision_config", "window_size", 7),
    ],
)
def test_keys_of_the_parts_are_refused_by_name(
    made: tuple[Path, Any], place: str, key: str, value: object
) -> None:
    config = json.loads((made[0] / "config.json").read_text())
    config[place][key] = value
    with pytest.raises((UnsupportedModel, BadCheckpoint), match=key):
        architectures.describe(config)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_logits(made: tuple[Path, Any], lm: ortlm.LanguageModel, count: int) -> None:
    """Also of words before and after an image, and of the same image twice."""
    images = [noise(40, 30, 1), noise(20, 50, 2), noise(40, 30, 1)][:count]
    ids = lm.encode(question(*images))
    loop = lm.loop()
    loop.start()
    found = loop.append([ids], keep=len(ids))[0]
    wanted = gemma3.logits(made[1], as_reference(ids), pixels(*images) if images else [])
    assert relative_error(found, wanted.numpy()) < 1e-5


def test_it_matters(made: tuple[Path, Any], lm: ortlm.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without attention both ways it would be another model: the test above sees it."""
    from ortlm.runtime.engine import decode_loop as module

    image = noise(40, 30)
    ids = lm.encode(question(image))
    monkeypatch.setattr(module, "image_numbers", lambda ids, counts: np.zeros_like(ids))
    loop = lm.loop()
    loop.start()
    found = loop.append([ids], keep=len(ids))[0]
    assert relative_error(found, gemma3.logits(made[1], as_reference(ids), pixels(image)).numpy()) > 0.01


@pytest.mark.parametrize("chunk", [1, 5, 20])
def test_chunks_and_steps(made: tuple[Path, Any], lm: ortlm.LanguageModel, chunk: int) -> None:
    """An image is fed as a whole, wherever chunks end; words then come one by one."""
    images = [noise(40, 30, 1), noise(20, 50, 2)]
    ids = lm.encode(question(*images))
    plain = lm.loop()
    loop = Loop(
        lm.session,
        lm.manifest.graphs["decoder"],
        context_tokens=512,
        chunk_tokens=chunk,
        embedder=plain._embedder,
    )
    loop.start()
    loop.append([ids[:-2]])
    for token in ids[-2:]:
        found = loop.append([[token]])[0].copy()
    wanted = gemma3.logits(made[1], as_reference(ids), pixels(*images))[-1]
    assert relative_error(found, wanted.numpy()) < 1e-5


def test_cut_within_an_image(made: tuple[Path, Any], lm: ortlm.LanguageModel) -> None:
    """Fed in two parts, or gone back to: its beginning is computed again with the rest."""
    image = noise(40, 30)
    ids = lm.encode(question(image))
    wanted = gemma3.logits(made[1], as_reference(ids), pixels(image))[-1]
    first = next(i for i, token in enumerate(ids) if token >= FIRST_IMAGE_TOKEN)
    loop = lm.loop()
    loop.start()
    loop.append([ids[: first + 7]])
    assert relative_error(loop.append([ids[first + 7 :]])[0], wanted.numpy()) < 1e-5
    loop.trim(first + 3)
    assert relative_error(loop.append([ids[first + 3 :]])[0], wanted.numpy()) < 1e-5
    assert loop.history == [ids]


def test_greedy_and_batch(made: tuple[Path, Any], lm: ortlm.LanguageModel) -> None:
    image = noise(40, 30)
    ids = lm.encode(question(image))
    given = torch.tensor([as_reference(ids)])
    made[1].generation_config.eos_token_id = None
    with torch.no_grad():
        wanted = (
            made[1]
            .generate(
                input_ids=given,
                pixel_values=torch.from_numpy(pixels(image)),
                token_type_ids=(given == gemma3.PLACE).long(),
                max_new_tokens=12,
                do_sample=False,
            )[0, len(ids) :]
            .tolist()
        )
    one = lm.generate(question(image), max_new_tokens=12)
    assert list(one.token_ids) == wanted[: len(one.token_ids)]
    prompts = [question(image), [{"role": "user", "content": "Hello"}], question(noise(9, 9), noise(8, 8))]
    together = lm.generate_batch(prompts, max_new_tokens=6)
    for prompt, found in zip(prompts, together, strict=True):
        alone = lm.generate(prompt, max_new_tokens=6, reuse_cache=False)
        assert found.token_ids == alone.token_ids


def test_prompt_of_a_text(lm: ortlm.LanguageModel) -> None:
    encode = lm.tokenizer.encode
    image = noise(9, 9)
    ids = as_reference(lm.encode("<start_of_image>x", images=[image]))
    places = [gemma3.PLACE] * gemma3.TOKENS
    assert ids == [
        *encode("\n\n"),
        gemma3.BEGIN,
        *places,
        gemma3.END,
        *encode("\n\nx", add_special_tokens=False),
    ]
    with pytest.raises(BadOption, match="stands for images; leave it out"):
        lm.encode("<image_soft_token>")


def test_placeholder_that_stands_for_no_image(made: tuple[Path, Any], lm: ortlm.LanguageModel) -> None:
    """A model may write it, and then continues: it is a word like any other, as in transformers."""
    ids = [2, 20, gemma3.PLACE, 30, gemma3.PLACE]
    loop = lm.loop()
    loop.start()
    found = loop.append([ids], keep=len(ids))[0]
    assert relative_error(found, gemma3.logits(made[1], ids, []).numpy()) < 1e-5
    assert lm.vision_encoder is not None
    [image] = lm.vision_encoder.read(noise(40, 30))
    embedder = lm.loop()._embedder
    assert embedder is not None
    embedder.hold([image.ids])
    embedded = embedder.embed(np.array([[*ids, *image.ids, gemma3.PLACE]])).numpy()[0]
    np.testing.assert_array_equal(embedded[len(ids) : -1], image.features)
    np.testing.assert_array_equal(embedded[-1], embedded[2])


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized(made: tuple[Path, Any], tmp_path: Path, precision: str) -> None:
    options = BuildOptions(recipe="fast") if precision == "int4" else None
    ortlm.build(made[0], tmp_path / "out", precision=precision, options=options)
    lm = ortlm.load(tmp_path / "out", threads=1)
    image = noise(40, 30)
    ids = lm.encode(question(image))
    loop = lm.loop()
    loop.start()
    wanted = gemma3.logits(made[1], as_reference(ids), pixels(image))[-1]
    assert relative_error(loop.append([ids])[0], wanted.numpy()) < (0.1 if precision == "int8" else 0.9)
    # The tied table lies in the file once, for both graphs.
    assert _place(tmp_path / "out" / "model.onnx", ".codes") == _place(
        tmp_path / "out" / "embedding.onnx", ".rows"
    )


def _place(path: Path, ending: str) -> str:
    """Return where in the file the embedding table of a graph lies."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    table = next(t for t in tensors if t.name == f"embed_tokens{ending}")
    return next(entry.value for entry in table.external_data if entry.key == "offset")


def test_names_of_the_hub(made: tuple[Path, Any], lm: ortlm.LanguageModel, tmp_path: Path) -> None:
    gemma3.save(tmp_path / "hub", hub_names=True)
    ortlm.build(tmp_path / "hub", tmp_path / "out", precision="fp32")
    image = noise(40, 30)
    other = ortlm.load(tmp_path / "out", threads=1)
    assert other.generate(question(image), max_new_tokens=6).token_ids == (
        lm.generate(question(image), max_new_tokens=6).token_ids
    )


def test_calibrated(made: tuple[Path, Any], tmp_path: Path) -> None:
    options = BuildOptions(recipe="balanced", calibration_tokens=512)
    ortlm.build(made[0], tmp_path / "out", options=options)
    assert ortlm.load(tmp_path / "out", threads=1).generate(question(noise(9, 9)), max_new_tokens=2).token_ids


@pytest.mark.parametrize("target", ["cuda", "dml", "webgpu", "mobile"])
def test_targets(made: tuple[Path, Any], tmp_path: Path, target: str) -> None:
    ortlm.build(made[0], tmp_path / "out", target=target, options=BuildOptions(recipe="fast"))
    for name in ("model", "vision", "embedding"):
        onnx.checker.check_model(tmp_path / "out" / f"{name}.onnx", full_check=True)


def test_what_does_not_go_together(made: tuple[Path, Any], tmp_path: Path) -> None:
    for options in (
        BuildOptions(recipe="fast", kv_cache="int8"),
        BuildOptions(recipe="fast", window_cache=True),
    ):
        with pytest.raises(BadOption, match="attend to each other both ways"):
            ortlm.build(made[0], tmp_path / "out", options=options)


@pytest.mark.parametrize(
    ("key", "value"), [("resample", 3), ("size", {"height": 56, "width": 56}), ("do_normalize", False)]
)
def test_settings_that_would_be_passed_over(
    made: tuple[Path, Any], tmp_path: Path, key: str, value: object
) -> None:
    shutil.copytree(made[0], tmp_path / "tiny")
    (tmp_path / "tiny" / "preprocessor_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(UnsupportedModel, match=key):
        ortlm.build(tmp_path / "tiny", tmp_path / "out", precision="fp32")


def test_a_published_config() -> None:
    """The sparse configuration of the 4 B checkpoint: the rest is transformers' defaults."""
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "mm_tokens_per_image": 256,
        "image_token_index": 262144,
        "eos_token_id": [1, 106],
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }
    from transformers import AutoModelForImageTextToText, Gemma3Config

    arch = architectures.describe(config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(Gemma3Config(**json.loads(json.dumps(config))))
    assert sum(p.size for p in arch.parameters) == sum(p.numel() for p in model.parameters())


def test_the_official_runtime(lm: ortlm.LanguageModel) -> None:
    """Words give the same tokens there; it knows nothing of attention both ways, so images do not."""
    og = pytest.importorskip("onnxruntime_genai")
    ids = lm.encode([{"role": "user", "content": "Hello"}])
    model = og.Model(str(lm.artifact.path))
    assert model.type == "gemma3"
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=100, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array(ids, np.int32))
    found = []
    for _ in range(8):
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    wanted = lm.generate(ids, max_new_tokens=8).token_ids
    assert tuple(found)[: len(wanted)] == wanted
