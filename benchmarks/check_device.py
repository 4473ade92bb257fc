"""Is a device right, and how fast is it? Parity of tiny models, and speed of a model of 3.8 B parameters.

    python benchmarks/check_device.py cuda --json out.json
    python benchmarks/check_device.py cuda --make FOLDER      (on a machine with torch and transformers)
    python benchmarks/check_device.py cuda --from FOLDER      (on the device's machine: ortlm and numpy are enough)

Parity: checkpoints of ten families with random weights are built for the device in each of its precisions. Logits
after a prompt and after 8 further tokens are compared with transformers in float32 and with the same folder on the
CPU, and so are 40 greedy tokens; with the CPU beams too, and logits after 200 tokens at once. Rows of different
lengths, rewinding and a growing cache are compared with single runs on the device itself. Speed: prefill of 512
tokens, decoding of 128, batches of 1, 4 and 16, first token, load time and memory, each against onnxruntime-genai
on the same folder where that is installed.

Every part runs in a process of its own, so what crashes is a row that says so. Rows are printed and written at
once. Exit code 1: something failed, or is further off than the precision explains.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = (
    "phi3",
    "phi4-mini",
    "llama3",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "granite",
    "olmo2",
)
PRECISIONS = {
    "cpu": ("fp32", "int4", "int8"),
    "cuda": ("fp16", "bf16", "int4", "int8"),
    "dml": ("fp16", "int4"),
    "webgpu": ("fp16", "int4", "int8", "int4-exact", "int8-exact"),
}
# With --fp32. "exact" leaves activations as they are, where int4 and int8 of the target round them to 8 bits.
WITHOUT_FP16 = {"webgpu": ("fp32", "int4", "int8", "int4-exact", "int8-exact")}
# How far rounding may take logits; what is compared with transformers is rounded in its weights too.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1, "int4": 2e-2, "int8": 2e-2}
# Device and CPU each round activations to 8 bits in their own way, which "exact" leaves out.
ROUNDED = 1e-1
PROMPT, FURTHER, GREEDY, LONG = 24, 8, 40, 200
PREFILL, DECODE, BATCHES = 512, 128, (1, 4, 16)

Logits = NDArray[np.float32]


def main() -> int:
    """Make or check what is asked for; print and write each row as it comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("device", help="cpu, cuda, dml, webgpu, or another that ortlm knows")
    parser.add_argument("--families", default=",".join(FAMILIES), help="by default ten of them")
    parser.add_argument("--precisions", help="by default all that the device's target has")
    parser.add_argument("--fp32", action="store_true", help="webgpu: activations in fp32")
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="only build the tiny models, and end")
    parser.add_argument("--from", type=Path, metavar="FOLDER", dest="given", help="check what --make built")
    parser.add_argument("--skip-parity", action="store_true")
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument("--layers", type=int, default=32, help="of the large model")
    parser.add_argument("--folder", type=Path, help="a built model to measure instead of the large one")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--minutes", type=float, default=6.0, help="begin nothing more after so long")
    parser.add_argument("--gpu", help="what to call the device, where nvidia-smi does not know it")
    parser.add_argument("--json", type=Path, help="file to write all results to")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fp32 and target_of(args.device) not in WITHOUT_FP16:
        parser.error(f"--fp32 is for {', '.join(WITHOUT_FP16)}, found {args.device}")
    if importlib.util.find_spec("ortlm") is None:
        sys.path.insert(0, str(ROOT / "src"))
    if args.child:
        return child(args)
    return Check(args).run()


class Check:
    """The whole check, in the parent's process: what runs, until when, and what was found."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._began = time.perf_counter()
        self._found: dict[str, Any] = {"device": args.device, "machine": machine(), "parity": [], "speed": []}
        self._found["machine"]["gpu"] = args.gpu or self._found["machine"]["gpu"]

    def run(self) -> int:
        """Return the exit code."""
        args = self._args
        print(json.dumps(self._found["machine"]), flush=True)
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            if not args.skip_parity or args.make:
                folder = args.given or args.make or work / "tiny"
                if args.given is None:
                    self._make(folder)
                if args.make:
                    return 0
                self._parity(folder)
            if not args.skip_speed:
                self._speed(work)
        self._found["seconds"] = round(time.perf_counter() - self._began, 1)
        self._write()
        rows = [*self._found["parity"], *self._found["speed"]]
        bad = [row for row in rows if row.get("error") or row.get("ok") is False]
        print(f"\n{len(rows)} rows, {len(bad)} bad, {self._found['seconds']} s")
        return 1 if bad or not rows else 0

    def _late(self) -> bool:
        return time.perf_counter() - self._began > 60 * self._args.minutes

    def _write(self) -> None:
        if self._args.json:
            self._args.json.write_text(json.dumps(self._found, indent=1) + "\n", encoding="utf-8")

    def _precisions(self) -> list[str]:
        if self._args.precisions:
            return list(self._args.precisions.split(","))
        target = target_of(self._args.device)
        return list(WITHOUT_FP16[target] if self._args.fp32 else PRECISIONS[target])

    def _child(self, *what: str, seconds: float) -> Iterator[dict[str, Any]]:
        """Yield the rows that a child prints, and one with an error if it ends badly."""
        args = self._args
        command = [sys.executable, __file__, args.device, "--runs", str(args.runs), "--batches", args.batches]
        command += ["--layers", str(args.layers), *(["--fp32"] if args.fp32 else []), "--child", *what]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            timer = threading.Timer(seconds, process.kill)
            timer.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.startswith("{"):
                        yield json.loads(line)
                process.wait()
            finally:
                late = not timer.is_alive()
                timer.cancel()
                process.kill()
            if process.returncode != 0:
                errors.seek(0)
                ended = f"stopped after {seconds:.0f} s" if late else f"ended with code {process.returncode}"
                yield {"error": f"{ended}: {errors.read().strip()[-300:]}"}

    def _make(self, folder: Path) -> None:
        for family in self._args.families.split(","):
            for row in self._child("make", str(folder), family, *self._precisions(), seconds=600):
                if row.get("error"):
                    print(f"make {family}: {row['error']}", flush=True)

    def _parity(self, folder: Path) -> None:
        print("\n" + " | ".join(COLUMNS), flush=True)
        for family in self._args.families.split(","):
            wanted = [p for p in self._precisions() if (folder / family / p).is_dir()]
            for precision in self._precisions():
                refused = folder / family / f"{precision}.refused"
                if refused.is_file():
                    text = refused.read_text(encoding="utf-8")
                    self._add({"family": family, "precision": precision, "refused": text})
                elif precision not in wanted:
                    self._add({"family": family, "precision": precision, "error": "not built"})
            # In one process; after a crash each of the rest alone.
            for part in ([wanted], [[p] for p in wanted]):
                for precisions in part:
                    left = [p for p in precisions if not self._has(family, p)]
                    if not left:
                        continue
                    if self._late():
                        for p in left:
                            self._add({"family": family, "precision": p, "error": "no time left"})
                        continue
                    for row in self._child("parity", str(folder / family), *left, seconds=120 * len(left)):
                        row = {"family": family, **row}
                        if "precision" in row or len(left) == 1:
                            self._add({"precision": left[0], **row})

    def _has(self, family: str, precision: str) -> bool:
        return any(r["family"] == family and r["precision"] == precision for r in self._found["parity"])

    def _add(self, row: dict[str, Any]) -> None:
        if self._has(row["family"], row["precision"]):
            return
        self._found["parity"].append(row)
        print(parity_line(row), flush=True)
        self._write()

    def _speed(self, work: Path) -> None:
        folder = self._args.folder
        if folder is None:
            folder = work / "large"
            for row in self._child("large", str(work), str(folder), seconds=420):
                print(json.dumps(row), flush=True)
                self._found["large"] = row
            shutil.rmtree(work / "checkpoint", ignore_errors=True)
        for engine in ("ortlm", "genai"):
            if self._late():
                self._found["speed"].append({"engine": engine, "error": "no time left"})
                continue
            for row in self._child("speed", engine, str(folder), seconds=240):
                row = {"engine": engine, **row}
                self._found["speed"].append(row)
                print(json.dumps(row), flush=True)
                self._write()
        for line in comparison(self._found["speed"]):
            print(line, flush=True)


# --- in processes of their own ------------------------------------------------------------------------------


def child(args: argparse.Namespace) -> int:
    """Do one part and print a JSON object for each row."""
    what, *rest = args.child
    if what == "make":
        make(Path(rest[0]), rest[1], rest[2:], args)
    elif what == "parity":
        for precision in rest[1:]:
            say(
                guarded(
                    lambda p=precision: parity(Path(rest[0]), p, args.device, fp32=args.fp32),
                    precision=precision,
                )
            )
    elif what == "large":
        say(guarded(lambda: large(Path(rest[0]), Path(rest[1]), args)))
    else:
        measure = {"ortlm": ortlm_speed, "genai": genai_speed}[rest[0]]
        for row in measure(Path(rest[1]), args):
            say(row)
    return 0


def say(row: dict[str, Any]) -> None:
    """Print a row for the parent."""
    print(json.dumps(row), flush=True)


def guarded(work: Callable[[], dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Return what ``work`` does, or a row that says what went wrong."""
    try:
        return {**more, **work()}
    except Exception as error:
        traceback.print_exc()
        return {**more, "error": f"{type(error).__name__}: {error}"[:400]}


def target_of(device: str) -> str:
    """Return the target that models for ``device`` are built for."""
    name = device.partition(":")[0]
    return name if name in PRECISIONS else "cpu"


def load(folder: Path, device: str) -> Any:
    """Load a built model on ``device``."""
    import ortlm

    return ortlm.load(folder, device=device)


def machine() -> dict[str, Any]:
    """Say what everything runs on."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    for name in ("numpy", "onnxruntime", "onnxruntime_genai", "transformers", "torch"):
        code = f"import {name}; print(getattr({name}, '__version__', ''))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        found[name] = done.stdout.strip().splitlines()[-1] if done.returncode == 0 else None
    found["gpu"] = nvidia("name,driver_version,memory.total")
    return found


def nvidia(query: str) -> str | None:
    """Return what nvidia-smi says, None where there is none."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def used_mib() -> int | None:
    """Return how much of the GPU's memory is taken, by everybody."""
    found = nvidia("memory.used")
    return int(found) if found and found.isdigit() else None


# --- parity -------------------------------------------------------------------------------------------------


def make(folder: Path, family: str, precisions: Sequence[str], args: argparse.Namespace) -> None:
    """Build ``family`` in ``precisions``, and write what transformers and the CPU compute."""
    sys.path.insert(0, str(ROOT))
    import ortlm
    from ortlm import BuildOptions
    from ortlm.errors import BadOption
    from tests.architectures import families, oracle

    out = folder / family
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = Path(temporary) / family
        model = families.save(family, checkpoint)
        text = oracle.random_tokens(PROMPT + FURTHER, seed=3)
        logits = oracle.decode_logits(model, text, prompt=PROMPT)
        greedy = oracle.greedy(model, text[:PROMPT], steps=GREEDY)
        np.savez(
            out / "oracle.npz",
            text=text,
            prefill=logits[PROMPT - 1],
            further=logits[PROMPT:],
            greedy=greedy,
        )
        for precision in precisions:

            def build(precision: str = precision) -> dict[str, Any]:
                quick = {"recipe": "fast"} if precision.startswith("int") else {}
                kind, _, exact = precision.partition("-")
                level = 0 if exact else None
                options = BuildOptions(**quick, fp32_activations=args.fp32, accuracy_level=level)
                try:
                    ortlm.build(
                        checkpoint,
                        out / precision,
                        precision=kind,
                        target=target_of(args.device),
                        options=options,
                    )
                except BadOption as error:
                    (out / f"{precision}.refused").write_text(str(error), encoding="utf-8")
                return {}

            say(guarded(build, precision=precision))
    for precision in precisions:
        # ONNX Runtime's CPU provider does not know everything that devices do.
        command = [sys.executable, __file__, "cpu", "--child", "parity", str(out), precision]
        subprocess.run(command, capture_output=True, check=False)


def tolerance(precision: str, device: str, *, fp32: bool) -> float:
    """Return how far logits may be off."""
    kind, _, exact = precision.partition("-")
    if exact:
        return TOLERANCE["fp32" if fp32 else "fp16"]
    return ROUNDED if f"{kind}-exact" in PRECISIONS[target_of(device)] else TOLERANCE[kind]


def parity(folder: Path, precision: str, device: str, *, fp32: bool = False) -> dict[str, Any]:
    """Return a row of the parity table; on the CPU, also keep the results for other devices."""
    began = time.perf_counter()
    truth = dict(np.load(folder / "oracle.npz"))
    lm = load(folder / precision, device)
    text: list[int] = truth["text"].tolist()
    found = run_model(lm, text)
    row: dict[str, Any] = {
        "prefill": error_of(found["prefill"], truth["prefill"]),
        "further": error_of(found["further"], truth["further"]),
        "greedy": agreeing(found["greedy"], truth["greedy"]),
    }
    kept = folder / f"cpu-{precision}.npz"
    if device == "cpu":
        np.savez(kept, **found)
    elif kept.is_file():
        cpu = dict(np.load(kept))
        row["cpu_prefill"] = error_of(found["prefill"], cpu["prefill"])
        row["cpu_further"] = error_of(found["further"], cpu["further"])
        row["cpu_greedy"] = agreeing(found["greedy"], cpu["greedy"])
        row["cpu_long"] = error_of(found["long"], cpu["long"])
        row["cpu_beams"] = bool(np.array_equal(found["beams"], cpu["beams"]))
    row |= itself(lm, text)
    row["seconds"] = round(time.perf_counter() - began, 1)
    limit = tolerance(precision, device, fp32=fp32)
    keys = ["ragged", "rewind", "grown", "reordered", "restored", "cpu_prefill", "cpu_further", "cpu_long"]
    keys += ["prefill", "further"] if precision.startswith(("fp", "bf")) else []
    row["off"] = [key for key in keys if key in row and not row[key] <= limit]
    row["ok"] = not row["off"]
    return row


def run_model(lm: Any, text: list[int]) -> dict[str, Any]:
    """Return logits of the prompt, of what follows it and of a long prompt, greedy tokens, and beams."""
    loop = lm.loop()
    loop.start()
    prefill = loop.append([text[:PROMPT]])[0].copy()
    further = np.stack([loop.step([token])[0].copy() for token in text[PROMPT:]])
    loop.start()
    logits, greedy = loop.append([text[:PROMPT]])[0], []
    for _ in range(GREEDY):
        greedy.append(int(logits.argmax()))
        logits = loop.step([greedy[-1]])[0]
    beams = lm.generator(num_beams=3, max_new_tokens=12, ignore_eos=True)
    beams.append(text[:PROMPT])
    while not beams.done:
        beams.step()
    loop.start()
    # Some kernels take another way from so many tokens on.
    long = loop.append([(text * LONG)[: min(LONG, loop.context_tokens)]])[0].copy()
    return {
        "prefill": prefill,
        "further": further,
        "long": long,
        "greedy": greedy,
        "beams": beams.sequence(),
    }


def itself(lm: Any, text: list[int]) -> dict[str, float]:
    """Return how far a device is from itself when the same tokens come to it in other ways."""

    def fresh(row: Sequence[int]) -> Logits:
        loop = lm.loop()
        loop.start()
        found: Logits = loop.append([list(row)])[0].copy()
        return found

    found: dict[str, float] = {}
    rows = [text[:5], text[3:20], text[8:9]]
    loop = lm.loop()
    loop.start(3)
    loop.append(rows)
    for token in (9, 12):
        rows = [[*row, token] for row in rows]
        logits = loop.step([token] * 3).copy()
    found["ragged"] = max(error_of(got, fresh(row)) for got, row in zip(logits, rows, strict=True))
    order = [2, 0, 2, 1]
    loop.select(np.array(order))
    rows = [[*rows[at], 17] for at in order]
    logits = loop.step([17] * 4).copy()
    found["reordered"] = max(error_of(got, fresh(row)) for got, row in zip(logits, rows, strict=True))
    loop = lm.loop()
    loop.start()
    loop.append([text])
    loop.trim(11)
    found["rewind"] = error_of(loop.append([[30, 31, 32]])[0], fresh([*text[:11], 30, 31, 32]))
    history, states = [list(row) for row in loop.history], loop.filled()
    other = lm.loop()
    other.start()
    other.append([text[:3]])
    other.adopt(history, states)
    found["restored"] = error_of(other.step([40])[0], fresh([*history[0], 40]))
    # At the switch of longrope a cache is computed again at once, and some devices take only so many tokens.
    at_once = lm.manifest.rope_switch_tokens if lm.device.most_tokens is not None else None
    long = (text * 9)[: at_once or PROMPT + 250]
    loop = lm.loop()
    loop.start()
    loop.append([long[:PROMPT]])
    loop.append([long[PROMPT:-1]])
    found["grown"] = error_of(loop.step([long[-1]])[0], fresh(long))
    return found


def error_of(found: Logits, wanted: Logits) -> float:
    """Return |found - wanted| / |wanted|; not a number is infinity, so that no limit lets it pass."""
    wide = np.asarray(wanted, np.float64)
    error = float(np.linalg.norm(np.asarray(found, np.float64) - wide) / np.linalg.norm(wide))
    return float(f"{error:.3g}") if np.isfinite(error) else float("inf")


def agreeing(found: Sequence[int], wanted: Sequence[int]) -> int:
    """Return how many tokens agree before the first that does not."""
    differ = np.flatnonzero(np.asarray(found) != np.asarray(wanted))
    return int(differ[0]) if len(differ) else len(wanted)


COLUMNS = (
    "family    precision",
    "vs transformers: prefill further greedy/40",
    "vs CPU: prefill further long greedy beams",
    "vs itself: ragged reordered rewind restored grown",
    "s",
)


def parity_line(row: dict[str, Any]) -> str:
    """Return a row as a line of text."""
    head = f"{row['family']:<9} {row['precision']:<6}"
    if "refused" in row:
        return f"{head} refused: {row['refused']}"
    if row.get("error"):
        return f"{head} FAILED {row['error'][:200]!r}"

    def shown(*keys: str) -> str:
        return " ".join(
            f"{row[k]:.2g}" if isinstance(row.get(k), float) else str(row.get(k, "-")) for k in keys
        )

    parts = [
        shown("prefill", "further", "greedy"),
        shown("cpu_prefill", "cpu_further", "cpu_long", "cpu_greedy", "cpu_beams"),
        shown("ragged", "reordered", "rewind", "restored", "grown"),
        str(row["seconds"]),
    ]
    return " | ".join([head, *parts]) + ("" if row["ok"] else f"  OFF: {', '.join(row['off'])}")


# --- speed --------------------------------------------------------------------------------------------------


def large(work: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Build a model of Phi-3.5-mini's shape in int4 from random weights."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import make_checkpoint

    import ortlm
    from ortlm import BuildOptions

    began = time.perf_counter()
    source = ROOT / "tests" / "architectures" / "configs" / "phi-3.5-mini.json"
    config = make_checkpoint.with_layers(json.loads(source.read_text(encoding="utf-8")), args.layers)
    checkpoint = work / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    noise = make_checkpoint.Noise(0.02, 0)
    shards = make_checkpoint.into_shards(phi3_shapes(config), 2e9)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        make_checkpoint.write_shard(checkpoint / name, shard, noise)
        where.update(dict.fromkeys(shard, name))
    index = {"metadata": {}, "weight_map": where}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    full_tokenizer(checkpoint, config["vocab_size"])
    made = time.perf_counter()
    ortlm.build(
        checkpoint,
        out,
        precision="int4",
        target=target_of(args.device),
        options=BuildOptions(recipe="fast", fp32_activations=args.fp32),
    )
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return {
        "layers": config["num_hidden_layers"],
        "checkpoint_s": round(made - began, 1),
        "build_s": round(time.perf_counter() - made, 1),
        "bytes": size,
    }


def phi3_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a Phi-3 checkpoint's tensors by name."""
    hidden, middle, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    width = hidden // config["num_attention_heads"]
    rows = width * (config["num_attention_heads"] + 2 * config["num_key_value_heads"])
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.self_attn.qkv_proj.weight": (rows, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, hidden),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.mlp.gate_up_proj.weight": (2 * middle, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, middle),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def full_tokenizer(folder: Path, size: int) -> None:
    """Copy the tokenizer of models/tiny-phi3 with a word for every id: what has none is never chosen."""
    source = ROOT / "models" / "tiny-phi3"
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(source / name, folder / name)
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    taken = {*vocab.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    vocab |= {f"<word {i}>": i for i in range(size) if i not in taken}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


def prompts(vocab: int, batch: int) -> list[list[int]]:
    """Return prompts of random ids, the same on every call."""
    random = np.random.default_rng(0)
    return [[int(i) for i in random.integers(3, min(vocab, 32000), PREFILL)] for _ in range(batch)]


def summary(runs: Sequence[dict[str, float]], batch: int) -> dict[str, Any]:
    """Return medians over ``runs``, the first of which was the cold one."""
    warm = runs[1:] or runs
    prefill = statistics.median(run["prefill"] for run in warm)
    step = statistics.median(run["step"] for run in warm)
    return {
        "batch": batch,
        "first_token_cold_ms": round(1e3 * runs[0]["first"], 1),
        "first_token_ms": round(1e3 * statistics.median(run["first"] for run in warm), 1),
        "prefill_ms": round(1e3 * prefill, 2),
        "prefill_tps": round(batch * PREFILL / prefill),
        "step_ms": round(1e3 * step, 3),
        "decode_tps": round(batch / step, 1),
        "memory_mib": used_mib(),
    }


def ortlm_speed(folder: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what ortlm does with ``folder``."""
    before = used_mib()
    began = time.perf_counter()
    lm = load(folder, args.device)
    yield {
        "load_s": round(time.perf_counter() - began, 2),
        "memory_before_mib": before,
        "memory_mib": used_mib(),
    }
    inner, spent = lm.session.run, [0.0]

    def timed(binding: Any, **options: Any) -> None:
        at = time.perf_counter()
        inner(binding, **options)
        spent[0] += time.perf_counter() - at

    for batch in map(int, args.batches.split(",")):
        rows = prompts(lm.vocab_size, batch)

        def once(rows: list[list[int]] = rows) -> dict[str, float]:
            began = time.perf_counter()
            generator = lm.generator(max_new_tokens=DECODE + 2, ignore_eos=True)
            made = time.perf_counter()
            generator.append(rows if len(rows) > 1 else rows[0])
            generator.step()
            first = time.perf_counter()
            steps, runs = [], []
            for _ in range(DECODE):
                spent[0], at = 0.0, time.perf_counter()
                generator.step()
                steps.append(time.perf_counter() - at)
                runs.append(spent[0])
            return {
                "first": first - began,
                "prefill": first - made,
                "step": statistics.median(steps),
                "run": statistics.median(runs),
            }

        def row(batch: int = batch, once: Callable[[], dict[str, float]] = once) -> dict[str, Any]:
            runs = [once() for _ in range(args.runs + 1)]
            lm.session.run = timed
            try:
                inside = once()
            finally:
                lm.session.run = inner
            outside = 1e3 * (inside["step"] - inside["run"])
            return {**summary(runs, batch), "outside_run_ms": round(outside, 3), **cache_times(lm, batch)}

        yield guarded(row, batch=batch)


def cache_times(lm: Any, batch: int) -> dict[str, Any]:
    """Return how long it takes to make the cache for a prompt, and to bind it; the better of two."""
    found: list[tuple[float, float]] = []
    for _ in range(2):
        loop = lm.loop()
        loop.start(batch)
        began = time.perf_counter()
        loop.cache.bind(lm.session.binding(), [PREFILL] * batch, PREFILL)
        made = time.perf_counter()
        loop.cache.bind(lm.session.binding(), [PREFILL] * batch, PREFILL)
        found.append((time.perf_counter() - made, made - began))
    bound, both = min(found)
    return {"cache_made_ms": round(1e3 * (both - bound), 3), "cache_bound_ms": round(1e3 * bound, 3)}


def genai_speed(folder: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what onnxruntime-genai does with ``folder``."""
    try:
        import onnxruntime_genai as og
    except ImportError as error:
        yield {"skipped": f"onnxruntime_genai does not import: {error}"}
        return
    before = used_mib()
    began = time.perf_counter()
    config = og.Config(str(folder))
    config.clear_providers()
    if args.device != "cpu":
        config.append_provider(args.device.partition(":")[0])
    model = og.Model(config)
    yield {
        "load_s": round(time.perf_counter() - began, 2),
        "memory_before_mib": before,
        "memory_mib": used_mib(),
        "runs_on": model.device_type,
    }
    for batch in map(int, args.batches.split(",")):
        rows = np.array(prompts(1 << 20, batch), dtype=np.int32)

        def once(rows: NDArray[np.int32] = rows, batch: int = batch) -> dict[str, float]:
            began = time.perf_counter()
            params = og.GeneratorParams(model)
            total = PREFILL + DECODE + 2
            # A minimum as high as the maximum bars stop tokens.
            params.set_search_options(do_sample=False, max_length=total, min_length=total, batch_size=batch)
            generator = og.Generator(model, params)
            made = time.perf_counter()
            generator.append_tokens(rows if batch > 1 else rows[0])
            generator.generate_next_token()
            generator.get_next_tokens()
            first = time.perf_counter()
            steps = []
            for _ in range(DECODE):
                at = time.perf_counter()
                generator.generate_next_token()
                generator.get_next_tokens()
                steps.append(time.perf_counter() - at)
            return {"first": first - began, "prefill": first - made, "step": statistics.median(steps)}

        def row(batch: int = batch, once: Callable[[], dict[str, float]] = once) -> dict[str, Any]:
            return summary([once() for _ in range(args.runs + 1)], batch)

        yield guarded(row, batch=batch)


def comparison(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield one line for each batch that both engines ran."""
    for batch in sorted({row["batch"] for row in rows if "batch" in row}):
        both = {row["engine"]: row for row in rows if row.get("batch") == batch and not row.get("error")}
        if len(both) == 2:
            ours, theirs = both["ortlm"], both["genai"]
            yield (
                f"batch {batch}: prefill {ours['prefill_tps'] / theirs['prefill_tps']:.3f} of genai's, decode "
                f"{ours['decode_tps'] / theirs['decode_tps']:.3f}, first token {ours['first_token_ms']} ms "
                f"against {theirs['first_token_ms']} ms"
            )


if __name__ == "__main__":
    sys.exit(main())
