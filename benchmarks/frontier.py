"""Size against KL divergence for a trained model: ortlm's recipes, and llama.cpp with an importance matrix.

    python benchmarks/frontier.py noise SmolLM2-135M-Instruct.Q4_1.gguf smollm2.gguf
    python benchmarks/frontier.py run smollm2.gguf --work FOLDER --text prose.txt --llama ENV/bin/python

``noise`` writes a GGUF file as float32 and adds uniform noise of half a step of 4 bits in blocks of 32, so that
no grid fits the weights by chance. ``run`` builds that file by ortlm's recipes and by llama.cpp's types, runs
each in its own runtime on the same tokens, and compares with the float32 model. Both calibrate on the same
rows, which a ``fast`` build of the model writes. ``--llama`` is the Python of an environment with llama-cpp-
python, such as ``peers.py`` makes; without it ortlm stands alone. Without ``--text`` the corpus that ships with
ortlm is read.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ortlm
from ortlm.artifact.reader import open_artifact
from ortlm.builder.options import BuildOptions
from ortlm.calibration.dataset import write_rows
from ortlm.checkpoint.hub import find_checkpoint
from ortlm.dtypes import Floats
from ortlm.evaluation.chunks import read_text
from ortlm.evaluation.compare import log_softmax
from ortlm.graph.builder import Product
from ortlm.layerwise.model import LayerwiseModel
from ortlm.layerwise.reference import open_reference
from ortlm.quant.recipe import Rule
from ortlm.runtime.text.tokenizer import Tokenizer
from ortlm.weights.reader import Weights
from ortlm.weights.resolution import stored_architecture

_LENGTH = 512
_TYPES = "Q4_0,IQ4_XS,Q4_K_S,Q4_K_M,Q5_K_M,Q6_K,Q8_0"
# What llama.cpp calls the matrices of a layer.
_TENSORS = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


def recipes() -> dict[str, tuple[str, BuildOptions]]:
    """Return what ortlm is asked for, by the name in the table."""
    body = ("qkv", "out", "gate_up", "down")
    found = {
        "fast": ("int4", BuildOptions(recipe="fast")),
        "balanced, 4 bits": ("int4", BuildOptions(recipe="balanced", bits=4)),
        "balanced (default)": ("int4", BuildOptions(recipe="balanced")),
        "quality": ("int4", BuildOptions(recipe="quality")),
        "int8": ("int8", BuildOptions()),
    }
    for bits in (5, 6):
        rule = Rule(roles=body, bits=bits, block=64)
        found[f"balanced, {bits} bits"] = ("int4", BuildOptions(recipe="balanced", bits=4, rules=(rule,)))
    return found


def add_noise(source: Path, out: Path) -> None:
    """Write the GGUF file ``source`` as float32, with noise in its matrices, to ``out``."""
    import gguf
    from gguf.quants import dequantize

    reader = gguf.GGUFReader(str(source))
    fields = dict(reader.fields)
    writer = gguf.GGUFWriter(str(out), str(fields.pop("general.architecture").contents()))
    for key, field in fields.items():
        if key.startswith("GGUF.") or key in ("general.file_type", "general.quantization_version"):
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        else:
            writer.add_key_value(key, field.contents(), field.types[0])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    random = np.random.default_rng(0)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim == 2:
            blocks = values.reshape(len(values), -1, 32)
            step = np.ptp(blocks, axis=-1, keepdims=True) / 15
            values = (blocks + (random.random(blocks.shape, np.float32) - 0.5) * step).reshape(values.shape)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_rows(folder: Path, texts: Sequence[Path], count: int) -> NDArray[np.int64]:
    """Return ``count`` rows of tokens [count, 512], int64, from all over each text."""
    tokenizer = Tokenizer.open(folder)
    rows = []
    for path in texts or [None]:
        text = "\n\n".join(part for _, part in read_text(path).parts)
        ids = tokenizer.encode(text, add_special_tokens=False)
        starts = np.linspace(0, len(ids) - _LENGTH, count).astype(int)
        rows += [ids[a : a + _LENGTH] for a in starts]
    return np.array(rows, np.int64)


def importance(checkpoint: Path, rows: Sequence[NDArray[np.int64]], out: Path) -> None:
    """Write the mean squares of each matrix's inputs over ``rows``, as llama.cpp's tool does, to ``out``."""
    found = find_checkpoint(checkpoint, name=None, cache=None, token=None)
    model = LayerwiseModel(Weights(found, stored_architecture(found)))
    squares: dict[str, NDArray[np.float32]] = {}

    def watch(product: Product, inputs: list[Floats], floats: list[Floats] | None, weight: Floats) -> Floats:
        mean = np.mean(np.concatenate([x.reshape(-1, x.shape[-1]) for x in inputs]) ** 2, axis=0)
        for name in product.parameters:
            _, layer, part, _ = name.split(".")
            squares[f"blk.{layer}.{_TENSORS[part]}.weight"] = mean
        return weight

    states = model.embed(rows)
    for index in range(len(model.spec.layers)):
        states, _ = model.layer(index, states, watch)
    model.close()
    np.savez(out, **squares)


def measure(folder: Path, rows: NDArray[np.int64], reference: Floats) -> dict[str, Any]:
    """Return the size of the artifact in ``folder``, its mean KL divergence and its top-1 agreement."""
    lm = ortlm.load(folder)
    total, same = 0.0, 0
    for row, logits in zip(rows, reference, strict=True):
        got, want = log_softmax(lm.logits(row.tolist())), log_softmax(np.asarray(logits))
        total += float((np.exp(want) * (want - got)).sum())
        same += int((want.argmax(-1) == got.argmax(-1)).sum())
    size = sum(f.stat().st_size for f in folder.glob("model.onnx*"))
    return {"bytes": size, "kld": total / rows.size, "top1": same / rows.size}


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Build, measure and print everything; return the rows of the table."""
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    fast = work / "fast"
    ortlm.build(args.checkpoint, fast, precision="int4", options=BuildOptions(recipe="fast"), force=True)
    rows = read_rows(fast, args.text, args.rows)
    np.save(work / "rows.npy", rows)
    reference = open_reference(args.checkpoint)
    reference.open(list(rows))
    np.save(work / "logits.npy", np.stack([reference.logits(i) for i in range(len(rows))]))
    reference.close()
    logits = np.load(work / "logits.npy", mmap_mode="r")
    calibration = work / "calibration.npy"
    written = write_rows(
        open_artifact(fast),
        count=args.calibration,
        length=256,
        seed=args.seed,
        threads=None,
        advance=lambda _: None,
    )
    np.save(calibration, np.concatenate(written))
    table = []

    def add(row: dict[str, Any]) -> None:
        table.append(row)
        print(
            f"| {row['name']} | {row['bytes'] / 1e6:.1f} | {row['kld']:.4f} | {row['top1']:.1%} |", flush=True
        )

    print("| | MB | KL divergence | top-1 agreement |\n|---|---|---|---|", flush=True)
    for name, (precision, options) in recipes().items():
        if args.only and name not in args.only:
            continue
        out = work / "out"
        given = (
            options
            if precision == "int8" or options.recipe == "fast"
            else replace(options, calibration=str(calibration))
        )
        ortlm.build(args.checkpoint, out, precision=precision, options=given, force=True)
        add({"name": f"ortlm {name}", **measure(out, rows, logits)})
        shutil.rmtree(out)
    if args.llama:
        importance(args.checkpoint, written, work / "importance.npz")
        script = Path(__file__).parent / "peers" / "llama_quality.py"
        command = [args.llama, str(script), str(args.checkpoint), str(work), "--types", args.types]
        command += ["--rows", str(work / "rows.npy"), "--logits", str(work / "logits.npy")]
        command += ["--importance", str(work / "importance.npz")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as peer:
            assert peer.stdout is not None
            for line in peer.stdout:
                row = json.loads(line)
                add({**row, "name": f"llama.cpp {row['name']}, importance matrix"})
        if peer.returncode:
            raise SystemExit(f"llama.cpp ended with {peer.returncode}; run it by hand: {' '.join(command)}")
    return table


def main() -> int:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    noise = commands.add_parser("noise")
    noise.add_argument("source", type=Path)
    noise.add_argument("out", type=Path)
    main_ = commands.add_parser("run")
    main_.add_argument("checkpoint", type=Path)
    main_.add_argument("--work", type=Path, required=True)
    main_.add_argument("--text", type=Path, nargs="*", default=[])
    main_.add_argument("--rows", type=int, default=4, help="rows of 512 tokens from each text")
    main_.add_argument("--calibration", type=int, default=32, help="rows of 256 tokens to calibrate on")
    main_.add_argument("--seed", type=int, default=0)
    main_.add_argument("--only", nargs="*", default=[], help="names of ortlm's rows, such as 'fast'")
    main_.add_argument("--llama", help="Python of an environment with llama-cpp-python")
    main_.add_argument("--types", default=_TYPES)
    main_.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.command == "noise":
        add_noise(args.source, args.out)
        return 0
    table = run(args)
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
