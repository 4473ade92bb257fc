"""From checkpoint to artifact, top to bottom: open, describe, emit, estimate, write, put in place."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
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
    Manifest,
    genai_config,
    open_artifact,
)
from ortlm.card import model_card
from ortlm.checkpoint.hub import find_checkpoint
from ortlm.checkpoint.open import Checkpoint, check_weights, read_json
from ortlm.checkpoint.stack import Part, Stack, same, stack
from ortlm.cores import physical_cores
from ortlm.errors import BadCheckpoint, BadOption, NotEnoughSpace, nearest
from ortlm.graph.decoder import Emitted, emit_decoder
from ortlm.graph.storage import Plain, Quantized
from ortlm.manifest import make_manifest, plain_tokenizer_config
from ortlm.options import BuildOptions, make_recipe
from ortlm.outline import Outline, make_outline
from ortlm.place import check_output, put_in_place, unfinished
from ortlm.spec import Architecture, Decoder, Parameter, Source, parameters
from ortlm.target import Target, check_precision, find_target
from ortlm.units import readable_bytes
from ortlm.write import Layout, Progress, lay_out, write_weights

# Files beside the weights that an artifact takes along.
_TAKEN_ALONG = ("LICENSE*", "NOTICE*", "USE_POLICY*")


class Silent:
    """Progress that nobody watches."""

    def start(self, *, bytes_total: int, tensors_total: int) -> None:
        """Do nothing."""

    def advance(self, *, bytes_done: int, tensors_done: int) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A build that is ready to write: everything that can be known before the weights are read is checked.

    ``texts`` are the small files that are written beside graph and weights, by name.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    target: Target
    emitted: Emitted
    layout: Layout
    outline: Outline
    manifest: Manifest
    texts: Mapping[str, str]
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
    check_output(out, force=force, source=source)
    prepared = prepare(source, precision=precision, target=target, cache=cache, options=options)
    return write(prepared, out, force=force, threads=threads, progress=progress or Silent())


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
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}\.onnx", options.filename):
        raise BadOption(
            "filename must be a plain name that ends in .onnx, of letters, digits, '.', '_' and '-'; "
            f"got {options.filename!r}."
        )
    checkpoint = find_checkpoint(source, name=name, cache=Path(cache) if cache else None, token=options.token)
    architecture = _own_head(checkpoint, describe(checkpoint.config))
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
    _check_excluded(options, emitted)
    layout = lay_out(emitted.builder.plan)
    outline = make_outline(
        checkpoint,
        architecture.decoder,
        emitted.builder.plan,
        target=where,
        precision=precision,
        data_bytes=layout.bytes,
        other_bytes=sum(f.stat().st_size for f in _files_along(checkpoint.folder)),
    )
    manifest = make_manifest(checkpoint, architecture.decoder, emitted, outline, filename=options.filename)
    texts = _texts(checkpoint, architecture, where, outline, manifest)
    return Prepared(checkpoint, architecture, where, emitted, layout, outline, manifest, texts, options)


def write(prepared: Prepared, out: Path, *, force: bool, threads: int | None, progress: Progress) -> Artifact:
    """Write the artifact that ``prepared`` describes to ``out``; see ``build``."""
    began = time.monotonic()
    if prepared.options.config_only and out.is_dir() and any(out.iterdir()):
        raise BadOption(f"config_only would replace {out} by a folder without weights. Choose a new folder.")
    needed = prepared.outline.output_bytes
    parent = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if not prepared.options.config_only and needed > free:
        raise NotEnoughSpace(
            f"{out} needs {readable_bytes(needed)}, but {parent} has {readable_bytes(free)} free. "
            "Free some space or choose another disk with -o."
        )
    with unfinished(out) as folder:
        try:
            files = _write_files(
                prepared, folder, threads or physical_cores() or os.cpu_count() or 1, progress
            )
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NotEnoughSpace(
                    f"the disk of {parent} became full while {out} was written, which needs about "
                    f"{readable_bytes(needed)}. Nothing was left behind. Free some space or choose another disk "
                    "with -o."
                ) from error
            raise
        made = {"seconds": round(time.monotonic() - began, 2), "files": files}
        manifest = replace(prepared.manifest, info={**prepared.manifest.info, **made})
        (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        put_in_place(folder, out, force=force)
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
    copies = (architecture.head_copy,) if architecture.decoder.tied_head else ()
    check_weights(checkpoint, expected, (*architecture.ignored, *copies))


def _own_head(checkpoint: Checkpoint, architecture: Architecture) -> Architecture:
    """Return ``architecture`` untied if the checkpoint, though tied by its configuration, holds another head.

    Fine-tunes leave such heads behind, and transformers uses them.
    """
    spec, weights = architecture.decoder, checkpoint.weights
    head, embed = (
        weights.get(architecture.head_copy),
        weights.get(architecture.sources["embed.weight"].tensor),
    )
    if not spec.tied_head or head is None or embed is None or same(head, embed):
        return architecture
    sources = {**architecture.sources, "head.weight": Source(architecture.head_copy)}
    return replace(architecture, decoder=replace(spec, tied_head=False), sources=sources)


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
    if not isinstance(read_json(checkpoint.folder / "tokenizer.json").get("model"), dict):
        raise BadCheckpoint(
            f'{checkpoint.folder / "tokenizer.json"} has no object "model", so it is no tokenizer. '
            "Copy the file of the base model into the folder."
        )


def _check_excluded(options: BuildOptions, emitted: Emitted) -> None:
    there = emitted.builder.asked
    for node in sorted(set(options.excluded_nodes) - there):
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


# --- writing ------------------------------------------------------------------------------------------------


def _write_files(prepared: Prepared, folder: Path, threads: int, progress: Progress) -> dict[str, Any]:
    """Write everything but the manifest; returns each file's size and hash."""
    checkpoint, options, emitted = prepared.checkpoint, prepared.options, prepared.emitted
    for file in _files_along(checkpoint.folder):
        shutil.copyfile(file, folder / file.name)
    for name, text in prepared.texts.items():
        (folder / name).write_text(text, encoding="utf-8")
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
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }


def _texts(
    checkpoint: Checkpoint, architecture: Architecture, target: Target, outline: Outline, manifest: Manifest
) -> dict[str, str]:
    """Return the small files of an artifact: configuration, model card, and a tokenizer file made plain."""
    spec = architecture.decoder
    first = spec.layers[0].mixer
    texts = {
        GENAI_FILE: genai_config(
            manifest,
            model_type=architecture.genai_type,
            sizes={
                "head_size": first.head_dim,
                "hidden_size": spec.hidden,
                "num_attention_heads": first.heads,
                "num_hidden_layers": len(spec.layers),
                "num_key_value_heads": first.kv_heads,
            },
            provider=target.provider,
        ),
        "README.md": model_card(asdict(outline), checkpoint.folder),
    }
    settings = checkpoint.json("tokenizer_config.json")
    plain = plain_tokenizer_config(settings)
    if plain != settings:
        texts["tokenizer_config.json"] = json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
    return texts


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
        # A name that is no text (broken bytes) could not be recorded in the manifest.
        found += [f for f in sorted(folder.glob(pattern)) if f.is_file() and f.name.isprintable()]
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
