"""Compare what quantization loses: ortlm's recipes and onnxruntime-genai's builder, on the same text.

    python benchmarks/train_models.py --out FOLDER
    python benchmarks/compare_quality.py models/tiny-phi3 FOLDER/llama-384 FOLDER/qwen3-192 \
        --text FOLDER/held-out.txt --in-domain FOLDER/in-domain.txt

Every model is built by each recipe and run by ONNX Runtime as in use, int8 activations included. The reference is
the checkpoint in fp32. ``--text`` is text that neither training nor calibration saw; calibration is on what the
model writes itself, except where ``--in-domain`` is named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.evaluation.evaluate import evaluate
from ortlm.quant.recipe import WIDE


def official(checkpoint: Path, out: Path, *options: str) -> Path:
    """Build ``checkpoint`` with onnxruntime-genai's builder."""
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(checkpoint),
        "-o",
        str(out),
    ]
    command += ["-p", "int4", "-e", "cpu", "-c", str(out.parent / "cache"), *options]
    subprocess.run(command, check=True, capture_output=True)
    return out


def builds(checkpoint: Path, folder: Path, in_domain: Path | None) -> dict[str, Path]:
    """Return every build of ``checkpoint``, by name."""
    recipes = {
        "ortlm fast": ("int4", BuildOptions(recipe="fast")),
        "ortlm balanced (default)": ("int4", BuildOptions()),
        # WIDE[0] is what large matrices get, see ortlm.quant.recipe.
        "ortlm balanced, as in large models": (
            "int4",
            BuildOptions(bits=4, block_size=128, rules=WIDE[:1]),
        ),
        "ortlm balanced, 4 bits in all layers": ("int4", BuildOptions(bits=4)),
        "ortlm balanced, rotated": ("int4", BuildOptions(rotate=True)),
        "ortlm quality": ("int4", BuildOptions(recipe="quality")),
        "ortlm int8": ("int8", BuildOptions()),
    }
    if in_domain is not None:
        recipes["ortlm balanced, in-domain text"] = ("int4", BuildOptions(calibration=str(in_domain)))
    for name in ("clip_search", "importance", "awq", "gptq", "awq_gptq"):
        recipes[f"ortlm {name} alone"] = ("int4", BuildOptions(recipe="fast", algorithm=name))
    mixed = ("--extra_options", "algo_config=k_quant_mixed")
    made = {
        "official default": official(checkpoint, folder / "official"),
        "official k_quant_mixed": official(checkpoint, folder / "official-mixed", *mixed),
    }
    for number, (name, (precision, options)) in enumerate(recipes.items()):
        made[name] = folder / f"ours-{number}"
        ortlm.build(checkpoint, made[name], precision=precision, options=options)
    return made


def weights_bytes(folder: Path) -> int:
    """Return the size of graph and weights."""
    return sum(f.stat().st_size for f in folder.glob("model.onnx*"))


def main() -> int:
    """Build, measure and print a table for each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True, help="text to measure on")
    parser.add_argument("--in-domain", type=Path, help="text like that of training, to calibrate on")
    parser.add_argument(
        "--tokens", type=int, default=16000, help="of the text, at most; half of them are scored"
    )
    parser.add_argument("--chunk", type=int, default=400)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for checkpoint in args.checkpoints:
        with tempfile.TemporaryDirectory() as folder:
            rows = {}
            for name, built in builds(checkpoint, Path(folder), args.in_domain).items():
                report = evaluate(
                    built,
                    reference=checkpoint,
                    text=args.text,
                    chunk=args.chunk,
                    tokens=args.tokens,
                    speed=False,
                )
                rows[name] = {"bytes": weights_bytes(built), **report.data["statistics"]}
            found[checkpoint.name] = rows
        base = rows["official default"]["kld"]["value"]
        heads = f"{'':<38}{'MB':>7}{'KL divergence':>20}{'x default':>11}{'same top %':>12}{'PPL':>9}"
        print(f"\n{checkpoint.name}\n{heads}")
        for name, row in rows.items():
            kld = row["kld"]
            print(
                f"{name:<38}{row['bytes'] / 1e6:>7.2f}{kld['value']:>12.5f} ± {kld['standard_error']:.5f}"
                f"{kld['value'] / base:>11.3f}{row['same_top']['value']:>12.2f}{row['ppl']['value']:>9.3f}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
