"""Writes docs/models.md: which families are built, and what tests run of each, as code and tests say.

python -m tests.docs.models
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from types import ModuleType

from ortlm import architectures
from ortlm.architectures._find import _modules
from ortlm.architectures._refused import REFUSED
from tests.architectures import families, test_text_parts
from tests.docs.checkpoints import filled, rows
from tests.docs.pages import ROOT
from tests.graph.test_parity import PROMPT, STEPS, TOLERANCE

OUT = ROOT / "docs" / "models.md"
ROWS = {**families.FAMILIES, **test_text_parts.MODELS}

PAGE = """\
# Models

Written by `python -m tests.docs.models` from the code and the tests. A checkpoint belongs to the family that the
`model_type` of its `config.json` names. A key of that file that changes what a model computes is followed or
refused by its name.

{families}

**tiny models** is how many checkpoints with random weights the tests build of a family, each with what is special
about it. For each, fp32 logits are within {tolerance:g} (relative) of transformers' for a prompt of 120 tokens,
single steps, rows of different lengths, past windows and changes of the rotation; {steps} greedily decoded tokens
are the same; int8 and int4 run, int4 with calibration too. Families with images have [tests of their
own](vision.md).

**onnxruntime-genai** is the model type that the folder names there; the tests load it in version 0.18 and compare
{steps} tokens after a prompt of {prompt}. `llama` stands for any decoder with a plain KV cache.

**GGUF** is the name in such files, see [Checkpoints](checkpoints.md#gguf). LoRA adapters go with the matrices
of any family, see [LoRA adapters](adapters.md).

The distills of DeepSeek-R1 are `qwen2` and `llama` checkpoints. Of `gemma3n`, `gemma4`, `mistral3` and
`qwen3_vl` the text decoder is built, and the build says that it leaves out the rest; of `phi4_multimodal` and
`phi4mm` too, unless it gets the [adapter for images](vision.md#phi-4-multimodal).

## Refused

{refused}
"""


def tested() -> dict[str, list[str]]:
    """Return the rows of the parity tests by model type."""
    found = defaultdict(list)
    for name, make in ROWS.items():
        found[make().model_type].append(name)
    return found


def row(module: ModuleType, names: dict[str, list[str]]) -> Sequence[str]:
    """Return what the table says of one family file."""
    about, _, special = str(module.__doc__).split("\n", 1)[0].removesuffix(".").partition(": ")
    mine = [name for kind in module.MODEL_TYPES for name in names.get(kind, ())]
    forms = getattr(module, "GGUF", ())
    known = [form.name for form in (forms if isinstance(forms, tuple) else (forms,))]
    hosts = {
        architectures.describe(json.loads(ROWS[name]().to_json_string())).genai_type
        for name in mine
        if name not in families.NOT_OFFICIAL
    }
    if not mine:
        tests, runs = "see vision", "yes"
    else:
        tests, runs = str(len(mine)), ", ".join(f"`{host}`" for host in sorted(hosts)) or "no"
    return (
        ", ".join(f"`{kind}`" for kind in module.MODEL_TYPES),
        about,
        special,
        tests,
        runs,
        ", ".join(f"`{name}`" for name in known),
    )


def page() -> str:
    """Return the page."""
    names = tested()
    head = ("`model_type`", "models", "what is special", "tiny models", "onnxruntime-genai", "GGUF")
    body = [row(module, names) for module in _modules()]
    text = PAGE.format(
        families=rows([head, ("---",) * len(head), *body]),
        tolerance=TOLERANCE,
        steps=STEPS,
        prompt=PROMPT,
        refused=rows([("`model_type`", "why"), ("---",) * 2, *((f"`{k}`", v) for k, v in REFUSED.items())]),
    )
    return "\n\n".join(filled(part) for part in text.split("\n\n"))


if __name__ == "__main__":
    OUT.write_text(page(), encoding="utf-8")
