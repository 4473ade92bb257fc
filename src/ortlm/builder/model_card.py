"""The model card of an artifact: where it comes from, what was done to it, what it may be used for."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
# {name}, {made_for}

Built by ortlm from `{source}` ({outline.model_type}). Runs in ortlm and, unchanged, in {other}.

| | |
|---|---|
| Parameters | {outline.parameters:,} in {outline.layers} layers |
{weights}
| Model size | {size} (checkpoint size: {before}) |
| Context | {outline.context_tokens:,} tokens, {cache:.1f} kB of KV cache each |

## Use

{use}

## Limits

Quantization changes a model's output, a little everywhere and sometimes a lot: test this model on your own
task before you rely on it. All limits and biases of the base model remain.

## License

{terms}
"""


_USE = """\
```
ortlm generate FOLDER {example}
ortlm chat FOLDER
```"""

_BROWSER_USE = """\
```js
import {{ pipeline }} from '@huggingface/transformers';

const generate = await pipeline('text-generation', 'FOLDER', {{ device: 'webgpu', dtype: '{dtype}' }});
console.log(await generate({example}, {{ max_new_tokens: 50 }}));
```

`device` is `webgpu` or `wasm`. ortlm runs {dtype}: `ortlm generate FOLDER {example}`."""


def model_card(outlines: Sequence[Outline], checkpoint: Path) -> str:
    """Return the text of README.md: metadata for the hub, and the facts of ``outlines``, one for each dtype."""
    from huggingface_hub import ModelCardData

    outline, dtypes = outlines[0], [str(one.dtype) for one in outlines if one.dtype is not None]

    terms, source = license_of(checkpoint), public_name(outline.source)
    name, on_hub = source.rsplit("/", 1)[-1], "/" in source
    data = ModelCardData(
        license=terms,
        library_name="transformers.js" if dtypes else "ortlm",
        pipeline_tag="image-text-to-text" if outline.images else "text-generation",
        base_model=source if on_hub else None,
        base_model_relation="quantized" if on_hub else None,
        tags=["onnx", "onnxruntime", "transformers.js", *dtypes]
        if dtypes
        else ["onnx", "onnxruntime", "onnxruntime-genai", outline.precision, outline.target],
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
        made_for=f"ONNX for transformers.js in {', '.join(dtypes)}"
        if dtypes
        else f"{outline.precision} ONNX for {outline.target}",
        other="transformers.js 4 (WebAssembly and WebGPU)" if dtypes else "onnxruntime-genai",
        size=readable_bytes(sum(one.output_bytes for one in outlines)),
        before=readable_bytes(outline.checkpoint_bytes),
        weights="\n".join(_weights(one) for one in outlines),
        use=(_BROWSER_USE if dtypes else _USE).format(
            example='"What is shown?" --image FILE' if outline.images else '"Once upon a time"',
            dtype=outline.dtype,
        ),
        cache=outline.cache_bytes_per_token / 1e3,
        terms=words,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _weights(outline: Outline) -> str:
    """Return the rows of the table that say how the weights are stored."""
    of = "" if outline.dtype is None else f" of {outline.dtype}"
    before = f"| Types of the checkpoint | {outline.stored_before} |\n" if outline.stored_before else ""
    return (
        f"| Weights{of} | {outline.recipe} |\n{before}| Recipe{of} | {_recipe(outline)} |\n"
        f"| Bits per weight{of} | {outline.bits_per_weight:.2f} |"
    )


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
