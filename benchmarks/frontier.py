"""Size against KL divergence for a trained model: ortlm's recipes, and what other tools make of it.

    python benchmarks/frontier.py noise SmolLM2-135M-Instruct.Q4_1.gguf smollm2.gguf
    python benchmarks/frontier.py run smollm2.gguf --name SmolLM2-135M --work FOLDER \
        --llama ENV/bin/python --openvino ENV/bin/python --auto-round ENV/bin/python

``noise`` writes a GGUF file as float32 and adds uniform noise of half a step of 4 bits in blocks of 32, so that
no grid fits the weights by chance. ``run`` builds that file (or a Hugging Face folder) by ortlm's recipes, by
onnxruntime-genai's builder, by llama.cpp with an importance matrix, by NNCF and by AutoRound, runs each in its own
runtime on the same tokens, and compares with the float32 model. All that calibrate do so on the same rows, which a
``fast`` build of the model writes. The environments are such as ``peers.py`` makes; what is not given is left out.

Each result is kept in FOLDER/cells, so a run that was interrupted resumes, and one with more names adds to it;
the quick ones come first. ``benchmarks/results/frontier-NAME.json`` is written after each, and names what is
missing and why. ``python benchmarks/tabulate_frontier.py`` writes tables and plots into docs.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ortlm
from ortlm.artifact.reader import open_artifact
from ortlm.builder.bit_allocation import search
from ortlm.builder.options import BuildOptions
from ortlm.builder.request import BuildRequest
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
from ortlm.spec import parameters
from ortlm.weights.reader import Weights
from ortlm.weights.resolution import stored_architecture

_LENGTH = 512
_SCRIPTS = Path(__file__).parent / "peers"
_RESULTS = Path(__file__).parent / "results"
_LLAMA = ("Q2_K", "Q3_K_M", "Q4_0", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
_OFFICIAL = ("default", "k_quant", "k_quant_mixed")
_OPENVINO = ("int4_64", "int4_32", "int8", "int4_64_awq")
_BODY = ("qkv", "out", "gate_up", "down")
_TARGET_BITS = (3.5, 4, 4.5, 5, 5.5, 6, 6.5)
# What llama.cpp calls the matrices of a layer; some families have several in one.
_TENSORS = {
    "q": ("attn_q", "attn_qkv"), "k": ("attn_k",), "v": ("attn_v",), "o": ("attn_output",),
    "gate": ("ffn_gate",), "up": ("ffn_up",), "down": ("ffn_down",),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recipe:
    """What ortlm is asked for; ``calibrated`` says whether text has an influence.

    With ``target_bits`` the search finds which matrix gets how many bits (``--target-bits``).
    """

    precision: str
    options: BuildOptions
    calibrated: bool = True
    target_bits: float | None = None


def recipes() -> dict[str, Recipe]:
    """Return ortlm's rows by name, the quick ones first."""

    def body(bits: int, block: int, **more: int) -> Recipe:
        rule = Rule(roles=_BODY, bits=bits, block=block)
        return Recipe("int4", BuildOptions(recipe="balanced", bits=4, rules=(rule,), **more))

    return {
        "fast": Recipe("int4", BuildOptions(recipe="fast"), calibrated=False),
        "int8": Recipe("int8", BuildOptions(), calibrated=False),
        "int8, embeddings and head 6": Recipe(
            "int8", BuildOptions(embed_bits=6, head_bits=6), calibrated=False
        ),
        "balanced (default)": Recipe("int4", BuildOptions(recipe="balanced")),
        "balanced, 4 bits": Recipe("int4", BuildOptions(recipe="balanced", bits=4)),
        "balanced, 4 bits, block 32": body(4, 32),
        "balanced, 3 bits, block 32": body(3, 32),
        "balanced, 3 bits, block 64": body(3, 64),
        "quality": Recipe("int4", BuildOptions(recipe="quality")),
        "balanced, 5 bits": body(5, 64),
        "balanced, 6 bits": body(6, 64),
        "balanced, 2 bits, block 32": body(2, 32),
        "balanced, 4 bits, embeddings 4, head 6": body(4, 32, embed_bits=4, head_bits=6),
        "balanced, 5 bits, embeddings 5, head 6": body(5, 64, embed_bits=5, head_bits=6),
        **{
            f"--target-bits {bits:g}": Recipe("int4", BuildOptions(recipe="balanced"), target_bits=bits)
            for bits in _TARGET_BITS
        },
    }


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
            for tensor in _TENSORS[part]:
                squares[f"blk.{layer}.{tensor}.weight"] = mean
        return weight

    states = model.embed(rows)
    for index in range(len(model.spec.layers)):
        states, _ = model.layer(index, states, watch)
    model.close()
    np.savez(out, **squares)


def write_huggingface(source: Path, out: Path) -> None:
    """Write the GGUF file ``source`` as a folder of Hugging Face's, in float32, for tools that read no other."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind = {"gguf_file": source.name, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(str(source.parent), **kind)
    AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name).save_pretrained(out)
    model.config.__dict__.pop("quantization_config", None)
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    model.is_quantized = False
    model.save_pretrained(out)


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


class Run:
    """One model: what is shared between its results lies in ``work`` and is made when it is first asked for."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Keep the command line; nothing is made yet."""
        self.args = args
        self.work: Path = args.work.resolve()
        self.checkpoint: Path = args.checkpoint.resolve()
        (self.work / "cells").mkdir(parents=True, exist_ok=True)

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        """Return the file or folder ``name``, made under another name first, so that it is never half there."""
        path = self.work / name
        if not path.exists():
            unfinished = self.work / f"unfinished-{name}"
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.replace(path)
        return path

    def fast(self) -> Path:
        """Return the ``fast`` build, which has the tokenizer and writes the text to calibrate on."""

        def make(out: Path) -> None:
            ortlm.build(self.checkpoint, out, precision="int4", options=BuildOptions(recipe="fast"))

        return self._once("fast", make)

    def rows(self) -> Path:
        """Return the file of the tokens to measure on, int64 [N, 512]."""
        return self._once(
            "rows.npy", lambda out: np.save(out, read_rows(self.fast(), self.args.text, self.args.rows))
        )

    def logits(self) -> Path:
        """Return the file of what the float32 model says of the rows, float32 [N, 512, V]."""

        def make(out: Path) -> None:
            rows = np.load(self.rows())
            reference = open_reference(self.checkpoint)
            reference.open(list(rows))
            np.save(out, np.stack([reference.logits(i) for i in range(len(rows))]))
            reference.close()

        return self._once("logits.npy", make)

    def written(self, seed: int) -> Path:
        """Return the file of the text that the model wrote with ``seed``, int64 [N, 256]."""

        def make(out: Path) -> None:
            rows = write_rows(
                open_artifact(self.fast()), count=self.args.calibration, length=256, seed=seed, threads=None,
                advance=lambda _: None,
            )  # fmt: skip
            np.save(out, np.stack(rows))

        return self._once(f"written-{seed}.npy", make)

    def flat(self, seed: int) -> Path:
        """Return the same text as one row of tokens, as builds read it."""
        return self._once(
            f"flat-{seed}.npy", lambda out: np.save(out, np.load(self.written(seed)).reshape(-1))
        )

    def importance(self) -> Path:
        """Return llama.cpp's importance matrix."""
        return self._once(
            "importance.npz", lambda out: importance(self.checkpoint, list(np.load(self.written(0))), out)
        )

    def huggingface(self) -> Path:
        """Return the model as a folder of Hugging Face's."""
        if self.checkpoint.is_dir():
            return self.checkpoint
        return self._once("huggingface", lambda out: write_huggingface(self.checkpoint, out))

    def gguf(self) -> Path:
        """Return the model as a GGUF file. Raises RuntimeError if it is none and its kind cannot be written."""
        if self.checkpoint.is_file():
            return self.checkpoint

        def make(out: Path) -> None:
            script = "import sys; from pathlib import Path; import llama_peer as l; "
            script += "l.write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))"
            command = [self.args.llama, "-c", script, str(self.checkpoint), str(out)]
            done = subprocess.run(command, cwd=_SCRIPTS, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])

        return self._once("model.gguf", make)

    def cells(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """Return what gives each row of the table, by name, the quick ones first."""
        found: dict[str, Callable[[], dict[str, Any]]] = {}
        quick = {name: recipe for name, recipe in recipes().items() if not recipe.calibrated}
        slow = {name: recipe for name, recipe in recipes().items() if recipe.calibrated}
        for name, recipe in quick.items():
            found[f"ortlm {name}"] = lambda recipe=recipe: self._ours(recipe, 0)
        for name in _OFFICIAL:
            found[f"official {name}"] = lambda name=name: self._peer(
                sys.executable, "genai_quality.py", self.huggingface(), name
            )
        if self.args.llama:
            for name in _LLAMA:
                found[f"llama.cpp {name}, importance matrix"] = lambda name=name: self._peer(
                    self.args.llama, "llama_quality.py", self.gguf(), name,
                    "--importance", str(self.importance()),
                )  # fmt: skip
        if self.args.openvino:
            for name in _OPENVINO:
                bits, _, rest = name.partition("_")
                group, _, more = rest.partition("_")
                title = f"OpenVINO {bits}" + (f", group {group}" if group else "")
                found[title + (", AWQ and scale estimation" if more else "")] = lambda name=name: self._peer(
                    self.args.openvino, "openvino_quality.py", self.huggingface(), name,
                    "--calibration", str(self.written(0)),
                )  # fmt: skip
        for name, recipe in slow.items():
            found[f"ortlm {name}"] = lambda recipe=recipe: self._ours(recipe, 0)
        if self.args.auto_round:
            found["AutoRound, 4 bits, group 64, by ortlm"] = self._auto_round
        for seed in range(1, self.args.seeds):
            recipe = recipes()["balanced (default)"]
            found[f"ortlm balanced (default), seed {seed}"] = lambda seed=seed, recipe=recipe: self._ours(
                recipe, seed
            )
        return found

    def _ours(self, recipe: Recipe, seed: int, checkpoint: Path | None = None) -> dict[str, Any]:
        options = recipe.options
        if recipe.calibrated:
            options = replace(options, calibration=str(self.flat(seed)))
        out = self.work / "out"
        began = time.process_time()
        source = checkpoint or self.checkpoint
        if recipe.target_bits is not None:
            request = BuildRequest(source, precision=recipe.precision, options=options)
            options = search(request, out, target_bits=recipe.target_bits).request.options
        ortlm.build(source, out, precision=recipe.precision, options=options, force=True)
        seconds = time.process_time() - began
        found = measure(out, np.load(self.rows()), np.load(self.logits(), mmap_mode="r"))
        shutil.rmtree(out)
        return {**found, "build_cpu_seconds": round(seconds, 1)}

    def _auto_round(self) -> dict[str, Any]:
        """Let AutoRound tune and export, carry that over as it is, and measure it."""

        def make(out: Path) -> None:
            command = [self.args.auto_round, str(_SCRIPTS / "auto_round_export.py"), str(self.huggingface())]
            self._call([*command, str(out), str(self.written(0))])

        # Some versions write into a folder in it, named after model, bits and group.
        exported = next(self._once("auto-round", make).rglob("config.json")).parent
        return self._ours(Recipe("int4", BuildOptions(recipe="fast"), calibrated=False), 0, exported)

    def _peer(self, python: str, script: str, source: Path, name: str, *more: str) -> dict[str, Any]:
        command = [python, str(_SCRIPTS / script), str(source), str(self.work), "--types", name]
        command += ["--rows", str(self.rows()), "--logits", str(self.logits()), *more]
        return {k: v for k, v in json.loads(self._call(command).splitlines()[-1]).items() if k != "name"}

    def _call(self, command: list[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            (self.work / "failed.txt").write_text(
                f"{command}\n{done.stdout}\n{done.stderr}", encoding="utf-8"
            )
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            raise RuntimeError(lines[-1][:200] if lines else f"ended with {done.returncode}")
        return done.stdout

    def parameters(self) -> int:
        """Return how many weights the matrices have; tied ones count once."""
        found = find_checkpoint(self.checkpoint, name=None, cache=None, token=None)
        weights = Weights(found, stored_architecture(found))
        return sum(int(np.prod(p.shape)) for p in parameters(weights.spec) if len(p.shape) == 2)

    def run(self) -> None:
        """Make what is missing, and write the results after each."""
        cells = self.cells()
        missing: dict[str, str] = {}
        for name, make in cells.items():
            path = self.work / "cells" / f"{re.sub('[^A-Za-z0-9]+', '-', name)}.json"
            if not path.is_file() and (not self.args.only or any(part in name for part in self.args.only)):
                try:
                    row = {"name": name, **make()}
                except (ortlm.errors.Error, RuntimeError) as error:
                    missing[name] = str(error).splitlines()[0]
                    print(f"{name}: {missing[name]}", flush=True)
                else:
                    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
                    print(f"{name}: {row['bytes'] / 1e6:.1f} MB, {row['kld']:.4f}", flush=True)
            self.save(cells, missing)

    def save(self, cells: dict[str, Any], missing: dict[str, str]) -> None:
        """Write what there is."""
        files = {name: self.work / "cells" / f"{re.sub('[^A-Za-z0-9]+', '-', name)}.json" for name in cells}
        rows = [json.loads(path.read_text(encoding="utf-8")) for path in files.values() if path.is_file()]
        out: dict[str, Any] = {
            "model": self.args.name,
            "parameters": self.parameters(),
            "tokens": int(np.load(self.rows(), mmap_mode="r").size),
            "calibration_tokens": self.args.calibration * 256,
            "rows": rows,
            "missing": {n: missing.get(n, "not run") for n, path in files.items() if not path.is_file()},
        }
        target = self.args.json or _RESULTS / f"frontier-{self.args.name}.json"
        target.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    noise = commands.add_parser("noise")
    noise.add_argument("source", type=Path)
    noise.add_argument("out", type=Path)
    run = commands.add_parser("run")
    run.add_argument("checkpoint", type=Path, help="GGUF file in float32, or Hugging Face folder")
    run.add_argument("--name", required=True, help="of the model, in the results")
    run.add_argument("--work", type=Path, required=True, help="folder for what is made and what was found")
    run.add_argument("--text", type=Path, nargs="*", default=[], help="to measure on; default: ortlm's own")
    run.add_argument("--rows", type=int, default=8, help="rows of 512 tokens from each text")
    run.add_argument("--calibration", type=int, default=32, help="rows of 256 tokens to calibrate on")
    run.add_argument("--seeds", type=int, default=3, help="how many texts to write for the default")
    run.add_argument("--only", nargs="*", default=[], help="parts of names, such as 'ortlm' or 'Q4_K'")
    run.add_argument("--llama", help="Python of an environment with llama-cpp-python")
    run.add_argument("--openvino", help="Python of an environment with optimum-intel and nncf")
    run.add_argument("--auto-round", help="Python of an environment with auto-round")
    run.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    if args.command == "noise":
        add_noise(args.source, args.out)
        return 0
    Run(args).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
