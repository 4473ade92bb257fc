"""What runtimes are asked to run: the shipped model for every target, tiny random ones of every family."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.graph.delta_net import LINEAR_ATTENTION
from ortlm.target import TARGETS
from tests.architectures import families
from tests.runtimes.environments import ROOT, Case
from tests.vision import checkpoint as phi3_vision
from tests.vision import gemma3 as gemma3_vision
from tests.vision import qwen2_5_vl

SHIPPED = ROOT / "models" / "tiny-phi3"
TEXT = "def read_lines(path):\n    with open(path) as file:\n        return file."
# Longrope switches its table after 64 tokens in these families, and only ortlm computes the past again then.
STEPS, MOST = 32, 60


@dataclass(frozen=True)
class Model:
    """A folder to build: of what, for what, and how.

    ``needs`` is the first ONNX Runtime that has to load it; ``plain`` as in Case. ``exact``: activations stay
    float, so that runtimes agree up to the order of sums; else they are rounded to 8 bits on the way, and a value
    in the middle may go either way.
    """

    name: str
    source: str
    precision: str
    target: str = "cpu"
    options: BuildOptions = field(default_factory=BuildOptions)
    needs: tuple[int, int] = (1, 24)
    plain: bool = True
    exact: bool = False


def _fast(precision: str, **options: object) -> BuildOptions:
    # Calibration finds other codes of the same kind, and takes its time.
    return BuildOptions(recipe="fast" if precision.startswith("int") else None, **options)  # type: ignore[arg-type]


def _targets() -> Iterable[Model]:
    for target in TARGETS.values():
        for precision in target.precisions:
            yield Model(
                f"{target.name} {precision}",
                "shipped",
                precision,
                target.name,
                _fast(precision),
                exact=precision == "fp32",
            )
        for precision in target.without_fp16:
            if precision.startswith("int"):
                options = _fast(precision, fp32_activations=True)
                yield Model(
                    f"{target.name} {precision}, use_webgpu_fp32", "shipped", precision, target.name, options
                )


def _variations() -> Iterable[Model]:
    for cache in ("int8_per_channel", "int8_per_tensor"):
        options = _fast("int4", kv_cache=cache)
        yield Model(f"cpu int4, cache {cache}", "shipped", "int4", options=options, needs=(1, 28))
    yield Model("cpu int4, fast_prompts", "shipped", "int4", options=_fast("int4", fast_prompts=True))
    for bits in (3, 5, 6):
        options = _fast("int4", bits=bits, embed_bits=bits, head_bits=bits, accuracy_level=1)
        yield Model(f"cpu int4, {bits} bits", "shipped", "int4", options=options)
    options = _fast("int4", all_logits=True, hidden_states=True)
    yield Model("cpu int4, all logits and hidden states", "shipped", "int4", options=options)
    options = _fast("fp32", window_cache=True)
    yield Model(
        "gemma3 fp32, windowed_kv_cache",
        "gemma3",
        "fp32",
        options=options,
        needs=(1, 29),
        plain=False,
        exact=True,
    )


# With 4 bits and activations as they are: families of each kind. All run in fp32, and nearly all in int4.
_EXACT = (
    "phi3", "phi-2", "llama3", "gemma2", "gemma3n", "qwen3", "granite", "cohere2", "gpt-oss", "mixtral", "lfm2",
    "qwen3.5",
)  # fmt: skip


def _families() -> Iterable[Model]:
    for name in families.FAMILIES:
        if not name.endswith("-old"):
            # LFM2 has convolutions alone.
            linear = name in families.RECURRENT and not name.startswith("lfm2")
            needs = LINEAR_ATTENTION if linear else (1, 24)
            yield Model(f"{name} fp32", name, "fp32", needs=needs, exact=True)
            if name == "gemma3n":
                needs = (1, 27)  # an odd number of blocks in a row of its per-layer embeddings
            if name in _EXACT:
                options = _fast("int4", accuracy_level=1)
                yield Model(
                    f"{name} int4, accuracy_level=1", name, "int4", options=options, needs=needs, exact=True
                )
            if name not in families.MIXTURES:
                # With activations in 8 bits, near ties choose other experts from one kernel to the next.
                yield Model(f"{name} int4", name, "int4", options=_fast("int4"), needs=needs)


def _vision() -> Iterable[Model]:
    for name in ("phi3-vision", "gemma3-vision", "qwen2.5-vision"):
        yield Model(f"{name} fp32", name, "fp32", exact=True)
        yield Model(f"{name} int4", name, "int4", options=_fast("int4"))


GROUPS = {
    "targets": tuple(_targets()),
    "variations": tuple(_variations()),
    "families": tuple(_families()),
    "vision": tuple(_vision()),
}
MODELS = tuple(model for group in GROUPS.values() for model in group)


def make_cases(models: Iterable[Model], folder: Path) -> list[Case]:
    """Build ``models`` in ``folder`` and return what runtimes are asked."""
    cases = []
    for model in models:
        source = _source(model.source, folder)
        out = folder / "built" / model.name.replace(" ", "-").replace(",", "")
        if not out.exists():
            ortlm.build(source, out, precision=model.precision, target=model.target, options=model.options)
        image = None
        if model.source.endswith("-vision"):
            image = str(folder / "image.png")
            Image.effect_mandelbrot((400, 300), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(image)
        plain = model.plain and image is None
        # onnxruntime-genai never chooses what would end an answer before its least length.
        never = json.loads((out / "ortlm.json").read_text())["stop_token_ids"]
        case = Case(model.name, str(out), _prompt(model.source), STEPS, tuple(never), image, plain)
        cases.append(case)
    return cases


def _source(name: str, folder: Path) -> Path:
    if name == "shipped":
        return SHIPPED
    path = folder / "checkpoints" / name
    if not path.exists():
        if name == "phi3-vision":
            phi3_vision.save(path)
        elif name == "gemma3-vision":
            gemma3_vision.save(path)
        elif name == "qwen2.5-vision":
            qwen2_5_vl.save(path)
        else:
            families.save(name, path)
    return path


def _prompt(name: str) -> tuple[int, ...]:
    if name == "shipped":
        ids = Tokenizer.from_file(str(SHIPPED / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
        return tuple(ids[: MOST - STEPS])
    dice = random.Random(0)
    return tuple(dice.randrange(len(families.SPECIAL), 270) for _ in range(MOST - STEPS))
