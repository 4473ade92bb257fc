"""How images become input: by the architecture, and the publisher's settings where they say more."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ortlm import spec
from ortlm.artifact import GRID, MOST_CROPS, TEXT, Images, PanAndScan, Patches
from ortlm.checkpoint.reader import Checkpoint
from ortlm.errors import BadCheckpoint, UnsupportedModel
from ortlm.spec import Architecture, Decoder, Pooled, Tiles, Vision, WindowedEncoder

# What transformers 4 and 5 call the file; the newer one has the settings of all processors.
_FILE, _NEW_FILE, _NEW_KEY = "preprocessor_config.json", "processor_config.json", "image_processor"
# More pixels than any image has.
_MOST_PIXELS = 1 << 40
_MOST_SIDE = 65_535
_BILINEAR, _BICUBIC = 2, 3
# What is done to every image, and what to none.
_STEPS = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
}


def image_settings(checkpoint: Checkpoint, architecture: Architecture) -> Images | None:
    """Return how the runtime reads images; None for a text model.

    Raises BadCheckpoint for settings that cannot be, UnsupportedModel for steps that are done in another way.
    """
    vision = architecture.vision
    if vision is None:
        return None
    path, settings = _settings(checkpoint)
    _expect(settings, path, _STEPS)
    encoder, projector, prompt = vision.encoder, vision.projector, vision.prompt
    mean, std = (
        _three(settings.get(key, usual), f'{path}: "{key}"')
        for key, usual in (("image_mean", vision.mean), ("image_std", vision.std))
    )
    if min(std) <= 0:
        raise BadCheckpoint(f'{path}: "image_std" is {list(std)}, expected numbers above 0.')
    if vision.pan_and_scan is None:
        _expect(settings, path, {"do_pan_and_scan": False})
    # The setting has another name in newer models.
    key = "dynamic_hd" if "dynamic_hd" in settings else "num_crops"
    crops = settings.get(key, vision.crops) if vision.crops else 0
    if not isinstance(crops, int) or isinstance(crops, bool) or not bool(vision.crops) <= crops <= MOST_CROPS:
        raise BadCheckpoint(f'{path}: "{key}" is {crops!r}, expected a number from 1 to {MOST_CROPS}.')
    images = Images(
        side=1,
        mean=mean,
        std=std,
        tag=prompt.tag,
        crops=crops,
        before=prompt.before,
        after=prompt.after,
        token=prompt.token,
        separate=prompt.separate,
        tag_end=prompt.tag_end,
        adapter=vision.adapter,
        positions=GRID if _by_grid(architecture.decoder) else TEXT,
    )
    if isinstance(encoder, WindowedEncoder):
        patches = _patches(vision, encoder, settings, path)
        return replace(images, side=patches.size * patches.merge, patches=patches)
    if isinstance(projector, Pooled):
        side = {"height": encoder.side, "width": encoder.side}
        _expect(settings, path, {"resample": _BILINEAR, "size": side})
    if encoder.padded:
        side = {"height": encoder.side, "width": encoder.side}
        _expect(settings, path, {"resample": _BICUBIC, "size": side, "patch_size": encoder.patch})
        images = replace(images, patch=encoder.patch)
    merge = projector.merge if isinstance(projector, Tiles) else 1
    tokens = projector.tokens**2 if isinstance(projector, Pooled) else 0
    if vision.pan_and_scan is not None:
        images = _pan_and_scan(images, vision.pan_and_scan, settings, path)
    return replace(images, side=encoder.side, merged=encoder.grid // merge, tokens=tokens)


def _settings(checkpoint: Checkpoint) -> tuple[Path, Mapping[str, Any]]:
    """Return the publisher's settings of images, and where they stand."""
    settings = checkpoint.json(_FILE)
    if settings:
        return checkpoint.folder / _FILE, settings
    path = checkpoint.folder / _NEW_FILE
    inner = checkpoint.json(_NEW_FILE).get(_NEW_KEY, {})
    if not isinstance(inner, Mapping):
        raise BadCheckpoint(f'{path}: "{_NEW_KEY}" is {inner!r}, expected an object.')
    return path, inner


def _expect(settings: Mapping[str, Any], path: Path, wanted: Mapping[str, object]) -> None:
    """Raise UnsupportedModel for a setting that is there and not what is ``wanted``."""
    for key, value in wanted.items():
        found = settings.get(key)
        if found is not None and found != value:
            raise UnsupportedModel(
                f'{path}: "{key}" is {found!r}: only {value!r} can be built for this model. Compare the file '
                "with the original of the model."
            )


def _by_grid(decoder: Decoder) -> bool:
    return any(mixer.rope is not None and mixer.rope.axes is not None for mixer in decoder.attentions)


def _patches(vision: Vision, encoder: WindowedEncoder, settings: Mapping[str, Any], path: Path) -> Patches:
    """Return how an image of any size becomes patches."""
    sizes = {"patch_size": encoder.patch, "merge_size": encoder.merge, "temporal_patch_size": encoder.frames}
    _expect(settings, path, {**sizes, "resample": _BICUBIC})
    size = settings.get("size") or {}
    if not isinstance(size, Mapping):
        raise BadCheckpoint(f'{path}: "size" is {size!r}, expected an object.')
    assert vision.pixels is not None
    pixels = []
    for key, inner, usual in zip(
        ("min_pixels", "max_pixels"), ("shortest_edge", "longest_edge"), vision.pixels, strict=True
    ):
        found = settings.get(key)
        found = size.get(inner, usual) if found is None else found
        if not isinstance(found, int) or isinstance(found, bool) or not 1 <= found <= _MOST_PIXELS:
            raise BadCheckpoint(f'{path}: "{key}" is {found!r}, expected a number of pixels.')
        pixels.append(found)
    least, most = pixels
    if least > most:
        raise BadCheckpoint(f'{path}: "min_pixels" is {least}, more than "max_pixels" ({most}).')
    return Patches(encoder.patch, encoder.merge, encoder.frames, least, most)


def _pan_and_scan(images: Images, usual: spec.PanAndScan, settings: Mapping[str, Any], path: Path) -> Images:
    """Return ``images`` that are cut as the settings say, or as is usual where they leave it open."""

    def setting(key: str, usual: float, wanted: str, fits: Callable[[float], bool]) -> Any:
        found = settings.get(key)
        found = usual if found is None else found
        if not isinstance(found, int | float) or isinstance(found, bool) or not fits(found):
            raise BadCheckpoint(f'{path}: "{key}" is {found!r}, expected {wanted}.')
        return found

    on = settings.get("do_pan_and_scan")
    if on is not None and not isinstance(on, bool):
        raise BadCheckpoint(f'{path}: "do_pan_and_scan" is {on!r}, expected true or false.')
    at = "pan_and_scan_"
    smallest = setting(
        f"{at}min_crop_size", usual.smallest, f"a number of pixels from 1 to {_MOST_SIDE}", _whole(_MOST_SIDE)
    )
    crops = setting(f"{at}max_num_crops", usual.crops, f"a number from 1 to {MOST_CROPS}", _whole(MOST_CROPS))
    ratio = setting(
        f"{at}min_ratio_to_activate", usual.ratio, "a ratio from 0 to a million", lambda r: 0 <= r <= 1e6
    )
    scan = PanAndScan(smallest, float(ratio), usual.before, usual.between, usual.separator)
    return replace(images, crops=crops if on else 0, pan_and_scan=scan)


def _whole(most: int) -> Callable[[float], bool]:
    """Return what tells whole numbers from 1 to ``most``."""
    return lambda number: isinstance(number, int) and 1 <= number <= most


def _three(value: object, what: str) -> tuple[float, float, float]:
    if isinstance(value, Sequence) and len(value) == 3:
        numbers = [
            v for v in value if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
        ]
        if len(numbers) == 3:
            return float(numbers[0]), float(numbers[1]), float(numbers[2])
    raise BadCheckpoint(f"{what} is {value!r}, expected three numbers.")
