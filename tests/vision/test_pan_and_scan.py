"""Gemma 3 with long images, which are cut into crops that are images of their own."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

import ortlm
from ortlm.errors import BadCheckpoint, BadOption, ContextFull
from ortlm.runtime.engine.token_ids import FIRST_IMAGE_TOKEN
from tests.architectures.oracle import relative_error
from tests.vision import gemma3
from tests.vision.conftest import noise, question

SETTINGS = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 40,
    "pan_and_scan_max_num_crops": 3,
    "pan_and_scan_min_ratio_to_activate": 1.3,
}
# Width, height and how many crops there are; the third is not long, and the fourth not large enough.
SIZES = [(300, 100, 3), (80, 200, 3), (100, 90, 0), (200, 39, 0), (140, 80, 2)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return the checkpoint's folder and the torch model."""
    folder = tmp_path_factory.mktemp("gemma3") / "tiny"
    model = gemma3.save(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    return folder, model


@pytest.fixture(scope="module")
def processor(made: tuple[Path, Any]) -> Any:
    """Return transformers' processor, which must be asked for pan and scan at each call."""
    names = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tokenizer = PreTrainedTokenizerFast.from_pretrained(made[0], extra_special_tokens=names)
    images = Gemma3ImageProcessorPil(size={"height": gemma3.SIDE, "width": gemma3.SIDE})
    return Gemma3Processor(images, tokenizer, image_seq_length=gemma3.TOKENS)


@pytest.fixture(scope="module")
def lm(made: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> ortlm.LanguageModel:
    """Return it built in fp32."""
    out = tmp_path_factory.mktemp("built") / "fp32"
    ortlm.build(made[0], out, precision="fp32")
    return ortlm.load(out, threads=1)


def as_reference(ids: list[int]) -> list[int]:
    return [gemma3.PLACE if token >= FIRST_IMAGE_TOKEN else token for token in ids]


@pytest.mark.parametrize("sizes", [SIZES[:1], SIZES[1:2], SIZES[2:4], SIZES[:3], SIZES[3:]])
def test_prompt_and_logits(
    made: tuple[Path, Any], processor: Any, lm: ortlm.LanguageModel, sizes: list[tuple[int, int, int]]
) -> None:
    images = [noise(width, height, seed) for seed, (width, height, _) in enumerate(sizes)]
    text = "See <start_of_image>" * len(images) + "What is this?"
    ids = lm.encode(text, images=images)
    wanted = processor(text=text, images=[images], return_tensors="pt", **SETTINGS)
    assert as_reference(ids) == wanted["input_ids"][0].tolist()
    assert ids.count(gemma3.PLACE) == 0
    seen = len(images) + sum(count for *_, count in sizes)
    assert sum(token >= FIRST_IMAGE_TOKEN for token in ids) == seen * gemma3.TOKENS
    assert len(wanted["pixel_values"]) == seen
    loop = lm.loop()
    loop.start()
    found = loop.append([ids], keep=len(ids))[0]
    logits = gemma3.logits(made[1], as_reference(ids), wanted["pixel_values"].numpy())
    assert relative_error(found, logits.numpy()) < 1e-4


def test_greedy(made: tuple[Path, Any], processor: Any, lm: ortlm.LanguageModel) -> None:
    image = noise(300, 100)
    text = "<start_of_image>What is this?"
    inputs = processor(text=text, images=[image], return_tensors="pt", **SETTINGS)
    made[1].generation_config.eos_token_id = None
    with torch.no_grad():
        wanted = made[1].generate(**inputs, max_new_tokens=64, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
    found = lm.generate(text, images=[image], max_new_tokens=64, ignore_eos=True)
    assert list(found.token_ids) == wanted.tolist()
    assert len(found.token_ids) == 64


def test_how_many_crops(made: tuple[Path, Any], lm: ortlm.LanguageModel, tmp_path: Path) -> None:
    """Callers say how many, or none; without the publisher's word there are none unless somebody asks."""
    image = noise(300, 100)
    by_number = {n: lm.encode(question(image), num_crops=n) for n in (0, 1, 2, 3, 4)}
    assert [sum(t >= FIRST_IMAGE_TOKEN for t in ids) // gemma3.TOKENS for ids in by_number.values()] == [
        1, 2, 3, 4, 4
    ]  # fmt: skip
    assert lm.encode(question(image)) == by_number[3]
    for wrong in (-1, 257):
        with pytest.raises(BadOption, match="num_crops must be 0 to 256"):
            lm.encode(question(image), num_crops=wrong)
    shutil.copytree(made[0], tmp_path / "tiny")
    nulls = dict.fromkeys(SETTINGS)
    (tmp_path / "tiny" / "preprocessor_config.json").write_text(json.dumps(nulls))
    ortlm.build(tmp_path / "tiny", tmp_path / "out", precision="fp32")
    other = ortlm.load(tmp_path / "out", threads=1)
    assert other.manifest.images is not None
    assert other.manifest.images.crops == 0
    assert other.encode(question(image)) == by_number[0]
    large = noise(900, 300)
    assert len(other.encode(question(large), num_crops=4)) == len(by_number[3])
    assert len(other.encode(question(noise(500, 250)), num_crops=4)) == len(by_number[0])


def test_one_that_fits_into_no_prompt(lm: ortlm.LanguageModel) -> None:
    with pytest.raises(ContextFull, match=r"with its 100 crops.*fewer than 512.*num_crops"):
        lm.encode(question(noise(5000, 50)), num_crops=256)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_pan_and_scan", "yes"),
        ("pan_and_scan_min_crop_size", 0),
        ("pan_and_scan_min_crop_size", 1.5),
        ("pan_and_scan_max_num_crops", 0),
        ("pan_and_scan_max_num_crops", True),
        ("pan_and_scan_min_ratio_to_activate", "1.2"),
        ("pan_and_scan_min_ratio_to_activate", -1),
    ],
)
def test_settings_that_cannot_be(made: tuple[Path, Any], tmp_path: Path, key: str, value: object) -> None:
    shutil.copytree(made[0], tmp_path / "tiny")
    (tmp_path / "tiny" / "preprocessor_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(BadCheckpoint, match=f'"{key}" is .*, expected'):
        ortlm.build(tmp_path / "tiny", tmp_path / "out", precision="fp32")


def test_command_and_server(lm: ortlm.LanguageModel, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("fastapi")
    openai = pytest.importorskip("openai")
    from ortlm.cli import main
    from tests.server.conftest import running

    image = noise(300, 100)
    image.save(tmp_path / "long.png")
    wanted = lm.generate(question(image), max_new_tokens=8)
    whole = lm.generate(question(image), num_crops=0, max_new_tokens=8)
    given = [
        "What is this?",
        "--image",
        str(tmp_path / "long.png"),
        "-n",
        "8",
        "--temperature",
        "0",
        "--json",
    ]
    for more, answer in (([], wanted), (["--num-crops", "0"], whole)):
        assert main(["generate", str(lm.artifact.path), *given, *more]) == 0
        assert json.loads(capsys.readouterr().out)["text"] == answer.text
    data = io.BytesIO()
    image.save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    with running(lm) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        made = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": content}], max_tokens=8, temperature=0
        )
    assert made.choices[0].message.content == wanted.text
    assert made.usage.prompt_tokens == len(lm.encode(question(image)))


def test_what_is_fed_again(lm: ortlm.LanguageModel) -> None:
    """A second question finds image and crops in the cache; the first crop is no other image's."""
    image = noise(300, 100)
    first = question(image)
    answer = lm.generate(first, max_new_tokens=4)
    second = [*first, {"role": "assistant", "content": answer.text}, *question(text="And now?")]
    wanted = lm.generate(second, max_new_tokens=6, reuse_cache=False)
    assert lm.generate(second, max_new_tokens=6).token_ids == wanted.token_ids
    ids = np.array(lm.encode(first))
    starts = ids[(ids >= FIRST_IMAGE_TOKEN) & (ids % (1 << 14) == 0)]
    assert len(set(starts.tolist())) == 4
