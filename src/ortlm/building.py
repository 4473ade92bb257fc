"""From checkpoint to artifact, top to bottom: open, describe, emit, estimate, write, put in place."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ortlm._version import __version__
from ortlm.architectures import describe
from ortlm.artifact import (
    GENAI_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILES,
    Artifact,
    Graph,
    Manifest,
    State,
    genai_config,
    open_artifact,
)
from ortlm.card import model_card, public_name
from ortlm.checkpoint.hub import find_checkpoint
from ortlm.checkpoint.open import Checkpoint, check_weights, read_json
from ortlm.checkpoint.stack import Part, Stack, stack
from ortlm.cores import physical_cores
from ortlm.dtypes import dtype
from ortlm.errors import BadCheckpoint, BadOption, NotEnoughSpace, nearest
from ortlm.graph.decoder import CACHE_NAMES, Emitted, emit_decoder
from ortlm.graph.storage import Plain, Quantized
from ortlm.options import BuildOptions, make_recipe
from ortlm.quant.recipe import Excluding
from ortlm.spec import Architecture, Decoder, Parameter, parameters
from ortlm.target import Target, check_precision, find_target
from ortlm.write import Layout, Progress, lay_out, write_weights

# Tokens that end an assistant's turn in common chat templates. A template that writes one of them means it as
# a stop, whether or not config.json says so (several published ones do not).
_TURN_ENDS = ("<|end|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end_of_text|>", "<|end_of_turn|>")
_TAKEN_ALONG = ("LICENSE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True, slots=True)
class Outline:
    """What a build would give, known before any weight is read.

    Sizes in bytes; ``bits_per_weight`` counts scales and zero points; ``seconds`` is an estimate from a short
    measurement on this machine, None where nothing was measured.
    """

    source: str
    model_type: str
    target: str
    precision: str
    recipe: str
    parameters: int
    layers: int
    context_tokens: int
    checkpoint_bytes: int
    output_bytes: int
    bits_per_weight: float
    peak_memory_bytes: int
    cache_bytes_per_token: int
    seconds: float | None = None


class Silent:
    """Progress that nobody watches."""

    def start(self, *, bytes_total: int, tensors_total: int) -> None:
        """Do nothing."""

    def advance(self, *, bytes_done: int, tensors_done: int) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A build that is ready to write: everything is checked, no weight is read."""

    checkpoint: Checkpoint
    architecture: Architecture
    target: Target
    emitted: Emitted
    layout: Layout
    outline: Outline
    options: BuildOptions

    @property
    def spec(self) -> Decoder:
        """What the model is."""
        return self.architecture.decoder


def build(
    source: str | Path,
    output: str | Path,
    *,
    precision: str = "int4",
    target: str = "cpu",
    cache: str | Path | None = None,
    options: BuildOptions | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Turn the checkpoint ``source`` into an artifact in the folder ``output``, and open it.

    ``source`` is a folder or a model's name on the Hugging Face hub; downloads go to ``cache``. ``precision`` is
    int4, int8, fp16, bf16 or fp32, ``target`` cpu, cuda, dml, webgpu or mobile. ``force`` replaces an artifact
    that is in ``output`` already. ``threads`` quantize, by default one for each physical core.

    The folder appears whole at the end: after an error or an interruption there is the old one, or none.
    Raises BadOption, UnsupportedModel, BadCheckpoint and NotEnoughSpace; nothing is left behind.
    """
    out = Path(output)
    check_output(out, force=force)
    prepared = prepare(source, precision=precision, target=target, cache=cache, options=options)
    return write(prepared, out, force=force, threads=threads, progress=progress or Silent())


def check_output(out: Path, *, force: bool) -> None:
    """Raise BadOption if ``out`` cannot take an artifact."""
    if out.is_file():
        raise BadOption(f"{out} is a file; -o takes the folder to create.")
    if out.is_dir() and any(out.iterdir()):
        if not any((out / name).is_file() for name in (MANIFEST_FILE, GENAI_FILE)):
            raise BadOption(
                f"{out} is a folder with other files in it, which a build would replace. Choose a new folder."
            )
        if not force:
            raise BadOption(
                f"{out} holds an artifact already. Add --force to replace it, or choose a new folder."
            )
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadOption(f"{out} cannot be created: {parent} is not a folder that may be written to.")


def prepare(
    source: str | Path,
    *,
    precision: str = "int4",
    target: str = "cpu",
    name: str | None = None,
    cache: str | Path | None = None,
    options: BuildOptions | None = None,
) -> Prepared:
    """Open and check ``source`` and lay out the artifact, as ``build`` does before it writes.

    ``name`` is what a folder's model is called on the hub, if it is there.
    """
    options = options or BuildOptions()
    where = find_target(target)
    check_precision(precision, where)
    recipe = make_recipe(precision, where, options)
    if Path(options.filename).name != options.filename or not options.filename.endswith(".onnx"):
        raise BadOption(f"filename must be a plain name that ends in .onnx; got {options.filename!r}.")
    checkpoint = find_checkpoint(source, name=name, cache=Path(cache) if cache else None, token=options.token)
    architecture = describe(checkpoint.config)
    _check_tensors(checkpoint, architecture)
    _check_tokenizer(checkpoint)
    if options.layers is not None:
        architecture = _first_layers(architecture, options.layers)
    if options.ragged_append and not where.query_lengths:
        raise BadOption(f"ragged_append does not apply: attention on {where.name} takes no lengths per row.")
    if not (_knows_query_lengths() if options.ragged_append is None else options.ragged_append):
        where = replace(where, query_lengths=False)
    emitted = emit_decoder(
        architecture.decoder,
        target=where,
        dtype=where.precisions[precision],
        recipe=recipe,
        all_logits=options.all_logits,
        hidden_states=options.hidden_states,
    )
    if isinstance(recipe, Excluding):
        _check_excluded(recipe, emitted)
    layout = lay_out(emitted.builder.plan)
    outline = _outline(checkpoint, architecture, where, precision, emitted, layout, options)
    return Prepared(checkpoint, architecture, where, emitted, layout, outline, options)


def write(prepared: Prepared, out: Path, *, force: bool, threads: int | None, progress: Progress) -> Artifact:
    """Write the artifact that ``prepared`` describes to ``out``; see ``build``."""
    began = time.monotonic()
    needed = prepared.outline.output_bytes
    parent = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if not prepared.options.config_only and needed > free:
        raise NotEnoughSpace(
            f"{out} needs {needed / 1e9:.2f} GB, but {parent} has {free / 1e9:.2f} GB free. "
            "Free some space or choose another disk with -o."
        )
    with _unfinished(out) as folder:
        try:
            files = _write_files(
                prepared, folder, threads or physical_cores() or os.cpu_count() or 1, progress
            )
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NotEnoughSpace(
                    f"the disk of {parent} became full while {out} was written; about {needed / 1e9:.2f} GB are "
                    "needed. Nothing was left behind. Free some space or choose another disk with -o."
                ) from error
            raise
        manifest = _manifest(prepared, files, seconds=time.monotonic() - began)
        (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        _put_in_place(folder, out, force=force)
    return Artifact(out, manifest) if prepared.options.config_only else open_artifact(out)


# --- checks -------------------------------------------------------------------------------------------------


def _check_tensors(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Compare the checkpoint's tensors, names and shapes, with what the spec implies."""
    tall: dict[str, int] = {}
    wide: dict[str, tuple[int, ...]] = {}
    for parameter in parameters(architecture.decoder):
        source = architecture.sources[parameter.name]
        stop = source.rows[1] if source.rows else parameter.shape[0]
        tall[source.tensor] = max(tall.get(source.tensor, 0), stop)
        wide[source.tensor] = parameter.shape[1:]
    expected = {name: (tall[name], *wide[name]) for name in tall}
    check_weights(checkpoint, expected, architecture.ignored)


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    if not (checkpoint.folder / "tokenizer.json").is_file():
        others = [
            n for n in ("tokenizer.model", "vocab.json", "tekken.json") if (checkpoint.folder / n).is_file()
        ]
        way = (
            f"It has {others[0]}: convert it once with transformers, AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER)."
            if others
            else "Copy tokenizer.json and tokenizer_config.json of the base model into the folder."
        )
        raise BadCheckpoint(
            f"{checkpoint.folder} has no tokenizer.json, without which text cannot be read. {way}"
        )
    read_json(checkpoint.folder / "tokenizer.json")


def _check_excluded(recipe: Excluding, emitted: Emitted) -> None:
    there = emitted.builder.asked
    for node in sorted(recipe.nodes - there):
        raise BadOption(
            f"nodes_to_exclude names {node!r}, which is not in the graph."
            + (nearest(node, there) or f" It has, for example, {', '.join(sorted(there)[:4])}.")
        )


def _first_layers(architecture: Architecture, count: int) -> Architecture:
    spec = architecture.decoder
    if not 1 <= count <= len(spec.layers):
        raise BadOption(
            f"num_hidden_layers must be 1 to {len(spec.layers)}, as many as the model has; got {count}."
        )
    short = replace(spec, layers=spec.layers[:count])
    return replace(architecture, decoder=short)


def _knows_query_lengths() -> bool:
    """Whether the ONNX Runtime here can load attention with a length per row; an older one refuses it."""
    for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml"):
        with contextlib.suppress(PackageNotFoundError):
            major, minor = version(name).split(".")[:2]
            return (int(major), int(minor)) >= (1, 31)
    return True


# --- the outline --------------------------------------------------------------------------------------------


def _outline(
    checkpoint: Checkpoint,
    architecture: Architecture,
    target: Target,
    precision: str,
    emitted: Emitted,
    layout: Layout,
    options: BuildOptions,
) -> Outline:
    spec, plan = architecture.decoder, emitted.builder.plan
    count = sum(p.size for p in parameters(spec))
    along = sum(f.stat().st_size for f in _files_along(checkpoint.folder))
    schemes: dict[str, int] = {}
    for item in plan.items:
        if isinstance(item, Quantized):
            kind = str(item.scheme)
            schemes[kind] = schemes.get(kind, 0) + item.rows * item.inputs
    parts = [
        f"{kind} ({n / count:.0%} of weights)" for kind, n in sorted(schemes.items(), key=lambda s: -s[1])
    ]
    return Outline(
        source=checkpoint.source,
        model_type=str(checkpoint.config["model_type"]),
        target=target.name,
        precision=precision,
        recipe="; ".join(parts) or f"{emitted.builder.dtype} weights",
        parameters=count,
        layers=len(spec.layers),
        context_tokens=spec.max_tokens,
        checkpoint_bytes=checkpoint.bytes,
        # Nodes and small constants take about as much as this for each layer.
        output_bytes=layout.bytes + along + 20_000 * len(spec.layers) + 100_000,
        bits_per_weight=8 * layout.bytes / count,
        # Python with its libraries, and a few copies of the rows that each core holds.
        peak_memory_bytes=100_000_000 + 20_000_000 * (physical_cores() or os.cpu_count() or 1),
        cache_bytes_per_token=sum(
            2 * layer.mixer.kv_heads * layer.mixer.head_dim * dtype(emitted.builder.dtype).bytes
            for layer in spec.layers
        ),
    )


def measure_seconds(prepared: Prepared) -> float:
    """Return how long writing would take in seconds, measured on about a hundredth of a second of the work."""
    import numpy as np

    from ortlm.quant.rounding import quantizer

    total, threads = 0.0, physical_cores() or 1
    sample = np.random.default_rng(0).standard_normal((256, 2048), dtype=np.float32)
    rates: dict[Any, float] = {}
    for item in prepared.emitted.builder.plan.items:
        if isinstance(item, Quantized):
            if item.scheme not in rates:
                run = quantizer(item.scheme.algorithm)
                run(sample, item.scheme)
                began = time.perf_counter()
                run(sample, item.scheme)
                rates[item.scheme] = (time.perf_counter() - began) / sample.size
            total += rates[item.scheme] * item.rows * item.inputs
    return (
        2.0
        + total / threads
        + prepared.outline.checkpoint_bytes / 1.5e9
        + prepared.outline.output_bytes / 1e9
    )


# --- writing ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """Give a folder beside ``out`` that is gone afterwards unless it was moved; remove dead builds' ones."""
    made = [p for p in (out.absolute(), *out.absolute().parents) if not p.exists()][1:]
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        for old in out.absolute().parent.glob(f".{out.name}.partial-*"):
            pid = old.name.rsplit("-", 1)[-1]
            if pid.isdigit() and not _alive(int(pid)):
                shutil.rmtree(old, ignore_errors=True)
        folder = out.absolute().parent / f".{out.name}.partial-{os.getpid()}"
        folder.mkdir()
    except OSError as error:
        raise BadOption(f"{out} cannot be created: {error.strerror or error}.") from error
    done = False
    try:
        yield folder
        done = True
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not done:
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()


def _alive(pid: int) -> bool:
    if sys.platform == "win32":
        return True  # signal 0 would end the process there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _put_in_place(folder: Path, out: Path, *, force: bool) -> None:
    check_output(out, force=force)
    if not out.exists():
        folder.rename(out)
        return
    aside = folder.with_name(folder.name.replace(".partial-", ".replaced-"))
    out.rename(aside)
    try:
        folder.rename(out)
    except OSError:
        aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _write_files(prepared: Prepared, folder: Path, threads: int, progress: Progress) -> dict[str, Any]:
    """Write everything but the manifest; returns each file's size and hash."""
    checkpoint, options, emitted = prepared.checkpoint, prepared.options, prepared.emitted
    for file in _files_along(checkpoint.folder):
        shutil.copyfile(file, folder / file.name)
    manifest = _manifest(prepared, {})
    spec = prepared.spec
    first = spec.layers[0].mixer
    text = genai_config(
        manifest,
        model_type=prepared.architecture.genai_type,
        sizes={
            "head_size": first.head_dim,
            "hidden_size": spec.hidden,
            "num_attention_heads": first.heads,
            "num_hidden_layers": len(spec.layers),
            "num_key_value_heads": first.kv_heads,
        },
        provider=prepared.target.provider,
    )
    (folder / GENAI_FILE).write_text(text, encoding="utf-8")
    if not options.config_only:
        data = f"{options.filename}.data"
        write_weights(
            folder / data,
            emitted.builder.plan,
            prepared.layout,
            _stacks(prepared),
            threads=threads,
            progress=progress,
        )
        placed = {name: (data, offset) for name, offset in prepared.layout.offsets.items()}
        ir.save(emitted.builder.model(placed, __version__), folder / options.filename)
    (folder / "README.md").write_text(
        model_card(asdict(prepared.outline), checkpoint.folder), encoding="utf-8"
    )
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }


def _stacks(prepared: Prepared) -> dict[str, Stack]:
    by_name: dict[str, Parameter] = {p.name: p for p in parameters(prepared.spec)}

    def part(name: str) -> Part:
        source = prepared.architecture.sources[name]
        start, stop = source.rows or (0, by_name[name].shape[0])
        return Part(prepared.checkpoint.weights[source.tensor], start, stop, source.add)

    items: list[Plain | Quantized] = prepared.emitted.builder.plan.items
    return {item.tensors[0].name: stack([part(n) for n in item.parameters]) for item in items}


def _files_along(folder: Path) -> list[Path]:
    """Return the files of a checkpoint that an artifact takes along: tokenizer, defaults, licence."""
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for pattern in _TAKEN_ALONG:
        found += [f for f in sorted(folder.glob(pattern)) if f.is_file()]
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# --- the manifest -------------------------------------------------------------------------------------------


def _manifest(prepared: Prepared, files: Mapping[str, Any], *, seconds: float | None = None) -> Manifest:
    checkpoint, spec, emitted = prepared.checkpoint, prepared.spec, prepared.emitted
    defaults = checkpoint.json("generation_config.json")
    states = tuple(
        State(past % i, present % i, "grow" if prepared.target.shared_cache else "append")
        for i in range(len(spec.layers))
        for past, present in ((CACHE_NAMES[0], CACHE_NAMES[2]), (CACHE_NAMES[1], CACHE_NAMES[3]))
    )
    stop = stop_tokens(checkpoint)
    switches = {
        layer.mixer.rope.switch_tokens
        for layer in spec.layers
        if layer.mixer.rope is not None and layer.mixer.rope.switch_tokens is not None
    }
    pad = checkpoint.config.get("pad_token_id", defaults.get("pad_token_id"))
    bos = checkpoint.config.get("bos_token_id", defaults.get("bos_token_id"))
    return Manifest(
        graphs={
            "decoder": Graph(
                file=prepared.options.filename,
                inputs=emitted.inputs,
                outputs=emitted.outputs,
                states=states,
                optional=emitted.optional,
            )
        },
        context_tokens=spec.max_tokens,
        vocab_size=spec.vocab,
        stop_token_ids=stop,
        pad_token_id=pad if isinstance(pad, int) and pad >= 0 else stop[0],
        bos_token_id=bos if isinstance(bos, int) else None,
        rope_switch_tokens=min(switches) if switches else None,
        generation={
            key: defaults[key]
            for key in (
                "do_sample",
                "temperature",
                "top_k",
                "top_p",
                "min_p",
                "typical_p",
                "repetition_penalty",
            )
            if defaults.get(key) is not None
        },
        info={
            "built_with": f"ortlm {__version__}",
            **asdict(prepared.outline),
            # A path on the builder's machine says nothing to others.
            "source": public_name(checkpoint.source),
            "seconds": None if seconds is None else round(seconds, 2),
            "revision": checkpoint.revision,
            "activations": emitted.builder.dtype,
            "files": dict(files),
        },
    )


def stop_tokens(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return every token that ends an answer: of config, generation defaults, tokenizer and chat template."""
    found: list[int] = []
    for holder in (checkpoint.json("generation_config.json"), checkpoint.config):
        ids = holder.get("eos_token_id")
        found += [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
    tokenizer = checkpoint.json("tokenizer.json")
    settings = checkpoint.json("tokenizer_config.json")
    ids_by_text = {
        t["content"]: t["id"]
        for t in tokenizer.get("added_tokens", [])
        if isinstance(t, dict) and "content" in t
    }
    template_file = checkpoint.folder / "chat_template.jinja"
    template = template_file.read_text(encoding="utf-8") if template_file.is_file() else ""
    template += str(settings.get("chat_template") or "")
    eos = settings.get("eos_token")
    words = [eos.get("content") if isinstance(eos, dict) else eos]
    words += [word for word in _TURN_ENDS if re.search(re.escape(word), template)]
    found += [ids_by_text[word] for word in words if word in ids_by_text]
    unique = tuple(dict.fromkeys(found))
    if not unique:
        raise BadCheckpoint(
            f"{checkpoint.folder}: neither config.json nor generation_config.json nor the tokenizer names a token "
            'that ends an answer. Set "eos_token_id" in config.json.'
        )
    return unique
