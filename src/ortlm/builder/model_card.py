"""The model card of an artifact: where it comes from, what was done to it, what it may be used for."""

from __future__ import annotations

import re
from pathlib import Path

from ortlm._utils.formatting import printable, readable_bytes
from ortlm.artifact.provenance import public_name
from ortlm.builder.estimate import Outline
from ortlm.checkpoint import files

# How much of a checkpoint's own card is looked at, and of one entry of its front matter.
_CARD_BYTES, _STATEMENT = 256 << 10, 500
# The front matter, which may continue after what is looked at.
_FRONT = re.compile(r"\s*---[ \t]*\r?\n(.*?)(?:^---[ \t]*\r?$|\Z)", re.DOTALL | re.MULTILINE)
# The license and the lines that belong to it.
_STATED = re.compile(r"^(license|license_name)[ \t]*:((?:.*)(?:\r?\n(?:[ \t]+|-[ \t]).*)*)", re.MULTILINE)

_BODY = """\
# {name}, {outline.precision} ONNX for {outline.target}

Built by ortlm from `{source}` ({outline.model_type}). Runs in ortlm and, unchanged, in onnxruntime-genai.

| | |
|---|---|
| Parameters | {outline.parameters:,} in {outline.layers} layers |
| Weights | {outline.recipe} |
| Recipe | {recipe} |
| Bits per weight | {outline.bits_per_weight:.2f} |
| Model size | {size} (checkpoint size: {before}) |
| Context | {outline.context_tokens:,} tokens, {cache:.1f} kB of KV cache each |

## Use

```
ortlm generate FOLDER {example}
ortlm chat FOLDER
```

## Limits

Quantization changes a model's output, a little everywhere and sometimes a lot: test this model on your own
task before you rely on it. All limits and biases of the base model remain.

## License

{terms}
"""


def model_card(outline: Outline, checkpoint: Path) -> str:
    """Return the text of README.md: metadata for the hub, and the facts of ``outline``."""
    from huggingface_hub import ModelCardData

    terms, source = license_of(checkpoint), public_name(outline.source)
    name, on_hub = source.rsplit("/", 1)[-1], "/" in source
    data = ModelCardData(
        license=terms,
        library_name="ortlm",
        pipeline_tag="image-text-to-text" if outline.images else "text-generation",
        base_model=source if on_hub else None,
        base_model_relation="quantized" if on_hub else None,
        tags=["onnx", "onnxruntime", "onnxruntime-genai", outline.precision, outline.target],
        ignore_metadata_errors=True,
    )
    words = (
        f"The base model's license applies: {terms}."
        if terms
        else "The checkpoint does not state a license. Find the base model's before you share this."
    )
    body = _BODY.format(
        outline=outline,
        source=source,
        name=name,
        size=readable_bytes(outline.output_bytes),
        before=readable_bytes(outline.checkpoint_bytes),
        recipe=_recipe(outline),
        example='"What is shown?" --image FILE' if outline.images else '"Once upon a time"',
        cache=outline.cache_bytes_per_token / 1e3,
        terms=words,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _recipe(outline: Outline) -> str:
    """Return in words by which recipe weights were quantized, and on what they were calibrated."""
    name, calibration = outline.recipe_name, outline.calibration
    if name is None:
        return "not quantized"
    rotated = ", residual stream rotated" if outline.rotated else ""
    if calibration is None:
        return f"{name}{rotated}, not calibrated"
    return f"{name}{rotated}, calibrated on {calibration.tokens:,} tokens of {calibration.source}"


def license_of(checkpoint: Path) -> str | None:
    """Return the license that the checkpoint's own model card states, at most 200 characters, or None."""
    import yaml

    if not files.present(checkpoint, "README.md"):
        return None
    text = files.read_start(checkpoint, "README.md", _CARD_BYTES).decode(errors="replace")
    front = _FRONT.match(text.lstrip("\ufeff"))
    if front is None:
        return None
    stated: dict[str, str] = {}
    for key, value in _STATED.findall(front[1]):
        try:
            # Of this key alone: the whole of other people's front matter is often broken, and can be a trap.
            stated_here = yaml.safe_load(f"license: {value[:_STATEMENT]}")["license"]
        except (ValueError, TypeError, RecursionError, yaml.YAMLError):
            continue  # the card then says that no license is stated
        names = stated_here if isinstance(stated_here, list) else [stated_here]
        words = " ".join(" ".join(str(name) for name in names if isinstance(name, str | int | float)).split())
        stated[key] = printable(words)[:200]
    return stated.get("license_name") or stated.get("license") or None
