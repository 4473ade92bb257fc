"""Build the trained models of tests/real by default, and say how they compare: docs/real-models.md.

    python tests/real/models.py FOLDER
    python benchmarks/measure_real.py FOLDER --work DIR

Each is built with all defaults (int4) and in fp32; folders that are in DIR already are taken as they are. Both are
compared with transformers' own reading of the same GGUF file in fp32, on the project's own corpus, which none of
the builds was calibrated on. fp32 is also compared with the tokens that llama.cpp wrote (tests/real/record.py).
Needs torch and transformers. Every part of a model is measured in a process of its own, so that memory suffices.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ortlm  # noqa: E402
from ortlm.evaluation.chunks import make_chunks, read_text  # noqa: E402
from ortlm.evaluation.compare import compare  # noqa: E402
from ortlm.evaluation.sources import ArtifactSource  # noqa: E402
from ortlm.evaluation.statistics import statistics  # noqa: E402
from tests.real.models import MODELS  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "real_models.json"
PAGE = ROOT / "docs" / "real-models.md"
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Write a short poem about the sea.",
)
CHUNK, TOKENS = 256, 8192
HEAD = """\
# Real models

Written by `benchmarks/measure_real.py`: two trained models that the package registry has as GGUF files, built with
`ortlm build -i FILE.gguf -o OUT` and nothing else, and in fp32. `make test-real` tests them, and `make demo-real`
builds the first one with `--recipe fast` and asks it a question.
"""
QUALITY = """\
## Quality

Against transformers' reading of the same file in fp32, on {tokens:,} tokens of the project's own corpus in chunks
of {chunk}, of which the second half is scored: perplexity, mean KL divergence in nats, and how often the most
likely token is the same. The files are quantized themselves (Q4_1, Q4_K_M); what the int4 builds lose comes on
top of that. Times are of two cores with AMX, without the check at the end.

| model | build | size | perplexity | of transformers | KL divergence | top-1 agreement | time to build |
|---|---|---|---|---|---|---|---|
"""
GREEDY = """\
## Tokens of llama.cpp

64 greedy tokens after each of three prompts: the fp32 build against llama.cpp with the same weights in F32. Where
they part, "behind" says by how much llama.cpp's token is below the most likely one, in logits.

| model | prompt | equal tokens | behind |
|---|---|---|---|
"""
ANSWERS = """\
## Answers

Of the int4 builds, greedy, at most 60 tokens. A model without a chat template is a base model, which continues the
question as text. Such answers turn on near ties, and say little about quantization: in fp32, SmolLM2 begins its
first one with "The" (a probability of 0.152, then the capital is Paris) or with "L" (0.140).
"""


class Transformers:
    """A GGUF file as transformers reads it in fp32, as a Source."""

    def __init__(self, path: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32
        ).eval()
        self.vocab_size = int(self._model.config.get_text_config().vocab_size)
        self._chunks: Sequence[Any] = ()

    def open(self, chunks: Sequence[Any], observe: Any = None) -> None:
        """Take the chunks."""
        self._chunks = chunks

    def logits(self, chunk: int) -> Any:
        """Return the logits of a chunk, float32 [S, V]."""
        ids = self._torch.from_numpy(np.asarray(self._chunks[chunk]))[None]
        with self._torch.no_grad():
            return self._model(ids).logits[0].float().numpy()


def quality(path: Path, folder: Path) -> dict[str, Any]:
    """Return how far the artifact in ``folder`` is from transformers' reading of ``path``."""
    source, base = ArtifactSource(folder, None, "cpu"), Transformers(path)
    chunks = make_chunks(read_text(None), source.lm.tokenizer, size=CHUNK, tokens=TOKENS)
    source.open(chunks.tokens)
    base.open(chunks.tokens)
    found = statistics(compare(source, base, chunks).scores)
    info = source.artifact.manifest.info
    return {
        "bytes": sum(f.stat().st_size for f in folder.glob("model*.onnx*")),
        "tokens": sum(len(ids) for ids in chunks.tokens),
        "ppl": found.ppl.value,
        "base_ppl": found.base_ppl.value,
        "kld": found.kld.value,
        "kld_error": found.kld.error,
        "same_top": found.same_top.value,
        "seconds": info.get("seconds"),
    }


def greedy(path: Path, folder: Path) -> list[dict[str, Any]]:
    """Return how many of llama.cpp's 64 tokens the fp32 build writes, and by how much it parts from them."""
    recorded = json.loads((ROOT / "tests" / "real" / "llama_cpp.json").read_text(encoding="utf-8"))
    lm = ortlm.load(folder)
    found = []
    for case in recorded[path.name]["written"]:
        ids, new = list(case["ids"]), list(case["new"])
        logits = np.asarray(lm.logits([*ids, *new]))[len(ids) - 1 : -1]
        differ = np.flatnonzero(logits.argmax(axis=1) != np.array(new))
        equal = int(differ[0]) if differ.size else len(new)
        behind = float(logits[equal].max() - logits[equal, new[equal]]) if differ.size else None
        found.append({"prompt": case["prompt"], "equal": equal, "steps": len(new), "behind": behind})
    return found


def answers(path: Path, folder: Path) -> list[str]:
    """Return what the artifact in ``folder`` answers to the questions."""
    command = [
        sys.executable,
        "-m",
        "ortlm",
        "generate",
        str(folder),
        "-n",
        "60",
        "--temperature",
        "0",
    ]
    if "chat_template" in (folder / "tokenizer_config.json").read_text(encoding="utf-8"):
        command.append("--chat")
    return [
        subprocess.run([*command, question], check=True, capture_output=True, text=True).stdout.strip()
        for question in QUESTIONS
    ]


PARTS = {"quality": quality, "greedy": greedy, "answers": answers}


def measured(part: str, path: Path, folder: Path) -> Any:
    """Return what ``part`` finds, in a new process."""
    command = [sys.executable, __file__, "--part", part, str(path), "--work", str(folder)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def page(results: dict[str, Any]) -> str:
    """Return the page that tells ``results``."""
    tokens = next(iter(results.values()))["int4"]["tokens"]
    text = f"{HEAD}\n{QUALITY.format(tokens=tokens, chunk=CHUNK)}"
    for name, found in results.items():
        # What was not measured is left out.
        for build in sorted({"int4", "fp32"} & found.keys(), reverse=True):
            one = found[build]
            text += (
                f"| {name} | {build} | {one['bytes'] / 1e6:.0f} MB | {one['ppl']:.2f} | {one['base_ppl']:.2f} "
                f"| {one['kld']:.1e} | {one['same_top']:.1f} % | {one['seconds']:.0f} s |\n"
            )
    missing = [name for name, found in results.items() if "int4" not in found]
    if missing:
        text += f"\nNot measured yet: {', '.join(missing)}.\n"
    text += f"\n{GREEDY}"
    for name, found in results.items():
        for case in found["greedy"]:
            prompt = json.dumps(case["prompt"], ensure_ascii=False)
            behind = "" if case["behind"] is None else f"{case['behind']:.4f}"
            text += f"| {name} | `{prompt}` | {case['equal']} of {case['steps']} | {behind} |\n"
    text += f"\n{ANSWERS}"
    for name, found in results.items():
        for question, answer in zip(QUESTIONS, found.get("answers", ()), strict=False):
            lines = "\n".join(f"> {line}".rstrip() for line in answer.splitlines())
            text += f"\n**{name}: {question}**\n\n{lines}\n"
    return text


def main() -> int:
    """Build, measure and write the page; or measure one part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, help="where tests/real/models.py put the models")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is built")
    parser.add_argument("--only", choices=MODELS, action="append", help="measure this model only")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](args.models, args.work)))
        return 0
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for name in args.only or MODELS:
        path = args.models / MODELS[name].file
        folders = {build: args.work / f"{name}-{build}" for build in ("int4", "fp32")}
        for build, folder in folders.items():
            if not folder.exists():
                ortlm.build(path, folder, precision=build)
        results[path.stem] = {build: measured("quality", path, folder) for build, folder in folders.items()}
        results[path.stem]["greedy"] = measured("greedy", path, folders["fp32"])
        results[path.stem]["answers"] = measured("answers", path, folders["int4"])
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
