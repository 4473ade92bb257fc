"""One tiny checkpoint, its torch twin, and what is built of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.runtime.engine.token_ids import FIRST_IMAGE_TOKEN
from ortlm.runtime.multimodal.image_processor import hd_crops

if TYPE_CHECKING:
    import torch

    from tests.vision import checkpoint


@dataclass
class Seen:
    """A checkpoint on disk, and the same in torch."""

    folder: Path
    reference: checkpoint.Reference

    def features(self, images: list[Any], *, most: int = 4) -> torch.Tensor:
        """Return what torch makes of images, [tokens, H]."""
        import torch

        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        found = [hd_crops(image, most=most, mean=mean, std=std) for image in images]
        return self.reference.features([torch.from_numpy(p) for p, _ in found], [size for _, size in found])


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Return the tiny checkpoint."""
    from tests.vision import checkpoint

    folder = tmp_path_factory.mktemp("vision") / "tiny-vision"
    return Seen(folder, checkpoint.save(folder))


@pytest.fixture(scope="session")
def artifact(seen: Seen, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that builds the checkpoint, once for each precision and options."""
    made: dict[Any, Path] = {}

    def get(precision: str = "fp32", **options: Any) -> Path:
        key = (precision, tuple(sorted(options.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("built") / precision
            ortlm.build(seen.folder, made[key], precision=precision, options=BuildOptions(**options))
        return made[key]

    return get


@pytest.fixture(scope="session")
def sighted(artifact: Callable[..., Path]) -> Iterator[Callable[..., ortlm.LanguageModel]]:
    """Return a function that loads what ``artifact`` builds, once."""
    made: dict[str, ortlm.LanguageModel] = {}

    def get(precision: str = "fp32") -> ortlm.LanguageModel:
        if precision not in made:
            made[precision] = ortlm.load(artifact(precision), threads=1)
        return made[precision]

    yield get
    made.clear()


def noise(width: int, height: int, seed: int = 0) -> Any:
    """Return an image of coarse noise, which looks different from any other."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def question(*images: Any, text: str = "What is this?") -> list[dict[str, Any]]:
    """Return a user's message with images before a text."""
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def as_reference(ids: list[int]) -> list[int]:
    """Return ids with -1 for the tokens of images."""
    return [-1 if token >= FIRST_IMAGE_TOKEN else token for token in ids]
