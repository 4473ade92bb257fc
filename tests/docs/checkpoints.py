"""Writes docs/checkpoints.md: what is read, and what becomes of it, as the code says.

python -m tests.docs.checkpoints
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

from ortlm.architectures import gguf_forms, model_types
from ortlm.architectures._pre_tokenizers import PRE_TOKENIZERS
from ortlm.checkpoint.gguf_weights import READ, WHOLE, block_of
from ortlm.checkpoint.quantized import METHODS
from ortlm.checkpoint.safetensors import FLOATS
from tests.docs.pages import ROOT

OUT = ROOT / "docs" / "checkpoints.md"

HEAD = """\
# Checkpoints

Written by `python -m tests.docs.checkpoints` from the code. `ortlm build` reads:

| format | given as | what happens | lossless |
|---|---|---|---|
| safetensors in {floats} | `-i FOLDER`, `-m NAME` | read row by row | yes |
| GGUF, one file or parts | `-i FILE.gguf` | dequantized row by row, see [below](#gguf) | llama.cpp's values |
| peft LoRA adapters | `--adapter`, `--merge-adapter` | see [LoRA adapters](adapters.md) | |
| GPTQ, AWQ, FP8 and others, quantized already | as these | see [below](#quantized-already) | bit for bit |
| `pytorch_model.bin`, sharded too | as these | tensors only, by torch 2.6 or later if it is installed | yes |
| other pickles | | refused: opening one may run any code | |

Families by `model_type`: {families}. What is not known and may change what a model computes is refused by its
name.
"""
QUANTIZED = """\
## Quantized already

A checkpoint whose `config.json` has a `quantization_config` (or that comes with `quantize_config.json`,
`quant_config.json` or `hf_quant_config.json`) is read as its tool reads it: values are bit for bit those of the
tool's own dequantization, computed in float32. Activations are not quantized, whatever the checkpoint says of
them.

| `quant_method` | read | in a build |
|---|---|---|
{methods}

What is carried over keeps its codes, scales and zero points in MatMulNBits: 2, 4 or 8 bits, in blocks of 16 to
128 inputs. A larger group, or a whole row, becomes several blocks with the same scale. Scales that fp16 does not
hold exactly stay in fp32, which needs fp32 activations. Where queries, keys and values are one product, it gets
what holds all three: the smallest blocks, and zero points if one of them has any. In AutoRound's and
compressed-tensors' files act-order is treated as in GPTQ's: where the inputs of a group do not lie together,
MatMulNBits has no form for it, and the matrix is dequantized.

**Carried over by default**: with `-p int4` what has up to 4 bits, with `-p int8` up to 8, because these codes were
found by calibration, and finding others would lose what that gained. Everything else (embeddings and head, as a
rule) is quantized by the [recipe](quantization.md), and so is what is dequantized. `--keep-quantization` carries
over more bits, too, and is an error where nothing can be; `--no-keep-quantization` quantizes everything again, and
so do options that say how matrices are stored, such as `block_size=` and `bits=`. The build's summary,
`ortlm.json` and the model card say how much was carried over. `-p fp16` and `-p fp32` store the values.

Methods other than these (HQQ, AQLM, VPTQ, HIGGS, EETQ, quanto, torchao, BitNet, SpQR) are refused by name.

"""
GGUF = """\
## GGUF

```sh
ortlm build -i model.gguf -o model-onnx
```

Of a split model give any part; all parts have to be in one folder. Architecture, sizes, rotation, tokenizer,
chat template, sampling defaults and license come from the file's metadata, so that nothing else is needed.
Weights are read a few rows at a time with plain reads: memory does not grow with the file, and one that
shrinks gives an error.

| `general.architecture` | `model_type` here | |
|---|---|---|
{forms}

Vision encoders (`mmproj`), adapters, and experts in tensors of their own, as llama.cpp wrote them until April
2024, are refused in GGUF.

Of mixtures of experts some things are stated in no file, and are taken as llama.cpp has them: whether the weights
of the chosen experts sum to one (`qwen3moe` yes, `qwen2moe` and `olmoe` no), and what GPT-OSS clamps its experts
to (7). `phimoe` is refused because the scale of its rotation is not in the file; llama.cpp computes such files
with another one, and with another router, than the model was trained with.

Files of `olmo2` with a window are OLMo 3. No file states the window of StarCoder2 (4,096 tokens): as in
llama.cpp every token sees all before it. Files of StableLM 2 and Hunyuan name ways to split texts that are not
known here, and are refused for that. Files of tiny models of each family, as llama.cpp's conversion writes
them, give the logits that transformers and llama.cpp compute, to 2e-6 (StarCoder2 to 9e-5: llama.cpp's GELU is
a table in fp16).

### Types

Whatever the type, the values are bit for bit those of the gguf package. By default they are then quantized
again by the [recipe](quantization.md), which loses a little more. `--keep-quantization` carries over what
ONNX Runtime has the same form for: codes and scales stay as they are, in MatMulNBits with blocks of 32. The
build says how much of the model that was.

| type | bits per weight | read | `--keep-quantization` |
|---|---|---|---|
{types}

Types other than these (IQ1 to IQ3, TQ1, TQ2, NVFP4, integers) are refused by name. K-quants and Q4_1 have
zero points that are no whole numbers, which MatMulNBits knows in a form only that is unpacked at every call;
`-p int8` loses
little of them. Models whose name says that they were trained for Q4_0 (QAT), such as
those of Gemma 3, are carried over without being asked; `--no-keep-quantization` quantizes them again.

### Tokenizers

A `tokenizer.json` is made of the metadata: of `llama` (SentencePiece's BPE, pieces merged by score, bytes for
what is no piece) and of `gpt2` (byte-level BPE). Ids are compared with llama.cpp's on texts that are made to
be hard. For byte-level BPE `tokenizer.ggml.pre` says how texts are split before; an unknown name is refused,
because a way to split that comes close gives ids that the model has not learned. Known: {pre}.

Two differences from llama.cpp are meant: Qwen's texts become NFC first, and letters are told by case in all
scripts (`gpt-4o`, `tekken`), both as the tokenizers of the original checkpoints do. A third is in the rotation of
GPT-OSS: llama.cpp rounds the two ends of YaRN's ramp to whole channels, the model was trained without that.

### What llama.cpp has and ortlm has not

`tokenizer.ggml.model` other than the two, a rotation other than none, linear, YaRN and LongRoPE, and keys
below the architecture's name that are not known: each is an error that names it. Two real models are tested
with `make test-real`; `make demo-real` builds one and asks it a question.
"""


def rows(cells: Iterable[Sequence[str]]) -> str:
    """Return the rows of a table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def kinds() -> list[Sequence[str]]:
    """Return a row for each type of GGUF."""
    found = []
    for kind in READ:
        elements, size = block_of(kind)
        kept = f"carried over, {WHOLE[kind]} bits" if kind in WHOLE else "dequantized"
        if kind in ("F32", "F16", "BF16"):
            kept = "not quantized"
        found.append((kind, f"{8 * size / elements:g}", "exact", kept))
    return found


def page() -> str:
    """Return the page."""
    dense = {form.name for form in gguf_forms() if not form.mixture}
    forms = [
        (
            f"`{form.name}`" + (", with experts" if form.mixture and form.name in dense else ""),
            f"`{form.model_type}`",
            "refused" if form.refused else
            "q and k put back into the checkpoint's order" if form.interleaved else
            "1 taken off norms" if form.norm_add else "",
        )
        for form in sorted(gguf_forms(), key=lambda form: (form.name, form.mixture))
    ]  # fmt: skip
    head = HEAD.format(floats=", ".join(FLOATS), families=", ".join(f"`{name}`" for name in model_types()))
    body = GGUF.format(
        forms=rows(forms), types=rows(kinds()), pre=", ".join(f"`{name}`" for name in sorted(PRE_TOKENIZERS))
    )
    methods = QUANTIZED.format(
        methods=rows((f"`{name}`", method.reads, method.kept) for name, method in METHODS.items())
    )
    return "\n\n".join(filled(part) for part in f"{head}\n{methods}{body}".split("\n\n"))


def filled(paragraph: str) -> str:
    """Return a paragraph in lines of the width that pages have; tables and blocks stay."""
    if paragraph.startswith(("#", "|", "```")):
        return paragraph
    end = "\n" if paragraph.endswith("\n") else ""
    # What is code stays on one line.
    text = re.sub("`[^`]*`", lambda code: code[0].replace(" ", "\0"), " ".join(paragraph.split()))
    lines = textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ") + end


if __name__ == "__main__":
    OUT.write_text(page(), encoding="utf-8")
