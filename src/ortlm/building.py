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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ortlm._version import __version__
from ortlm.adapters import Adapter, adapter_arrays, adapter_bytes, open_adapter, write_adapter
from ortlm.artifact import (
    GENAI_FILE,
    MANIFEST_FILE,
    PROCESSOR_FILE,
    TOKENIZER_FILES,
    Artifact,
    Manifest,
    genai_config,
    open_artifact,
    processor_config,
)
from ortlm.card import model_card
from ortlm.checkpoint.hub import find_checkpoint
from ortlm.checkpoint.open import Checkpoint, read_json
from ortlm.cores import physical_cores
from ortlm.errors import BadCheckpoint, BadOption, NotEnoughSpace, nearest
from ortlm.graph.attention import CacheScales
from ortlm.graph.decoder import Emitted, emit_decoder
from ortlm.graph.storage import Plan, joined
from ortlm.manifest import make_manifest, plain_tokenizer_config
from ortlm.options import BuildOptions, cache_scheme, check_adapter_names, make_recipe, preset_of
from ortlm.origin import remember
from ortlm.outline import OWN_TEXT, CalibrationPlan, Outline, make_outline
from ortlm.place import check_output, put_in_place, resumable, unfinished
from ortlm.quant.methods import CALIBRATED
from ortlm.quant.recipe import Calibration, Preset
from ortlm.quant.rotation import Rotation
from ortlm.spec import Architecture, Decoder, parameters
from ortlm.target import HERE, Target, check_precision, find_target
from ortlm.units import readable_bytes
from ortlm.weights import Weights, check_rotatable, stored_architecture, untied
from ortlm.write import Layout, Progress, lay_out, write_weights

# Files beside the weights that an artifact takes along.
_TAKEN_ALONG = ("LICENSE*", "NOTICE*", "USE_POLICY*")


class Silent:
    """Progress that nobody watches."""

    def stage(self, name: str, total: int, unit: str, *, done: int = 0) -> None:
        """Do nothing."""

    def step(self, count: int) -> None:
        """Do nothing."""

    def start(self, *, bytes_total: int, tensors_total: int) -> None:
        """Do nothing."""

    def advance(self, *, bytes_done: int, tensors_done: int) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A build that is ready to write: everything that can be known before the weights are read is checked.

    ``emitted`` is the decoder, ``others`` are the graphs beside it by name; all their weights, in ``plan``, go
    into one file. The decoder's cache is always float: scales of an int8 cache are measured once the weights
    are written. ``texts`` are the small files that are written beside graph and weights, by name. ``adapters``
    become files, by name; ``merged`` is added to the weights.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    target: Target
    emitted: Emitted
    others: Mapping[str, Emitted]
    plan: Plan
    layout: Layout
    outline: Outline
    manifest: Manifest
    texts: Mapping[str, str]
    options: BuildOptions
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    merged: Adapter | None = None

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
    adapters: Mapping[str, str | Path] | None = None,
    merge_adapter: str | Path | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Turn the checkpoint ``source`` into an artifact in the folder ``output``, and open it.

    ``source`` is a folder or a model's name on the Hugging Face hub; downloads go to ``cache``. ``precision`` is
    int4, int8, fp16, bf16 or fp32, ``target`` cpu, cuda, dml, webgpu or mobile. ``adapters`` are folders of peft
    LoRA adapters by the name under which a runtime switches to them; the one in ``merge_adapter`` becomes part of
    the weights. ``force`` replaces an artifact
    that is in ``output`` already. ``threads`` quantize, by default one for each physical core.

    The folder appears whole at the end: after an error or an interruption there is the old one, or none.
    Raises BadOption, UnsupportedModel, BadCheckpoint and NotEnoughSpace; nothing is left behind.
    """
    out = Path(output)
    check_output(out, force=force, source=source)
    prepared = prepare(
        source,
        precision=precision,
        target=target,
        cache=cache,
        options=options,
        adapters=adapters,
        merge_adapter=merge_adapter,
    )
    return write(prepared, out, force=force, threads=threads, progress=progress or Silent())


def prepare(
    source: str | Path,
    *,
    precision: str = "int4",
    target: str = "cpu",
    name: str | None = None,
    cache: str | Path | None = None,
    options: BuildOptions | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    merge_adapter: str | Path | None = None,
) -> Prepared:
    """Open and check ``source`` and lay out the artifact, as ``build`` does before it writes.

    ``name`` is what a folder's model is called on the hub, if it is there.
    """
    options = options or BuildOptions()
    where = find_target(target)
    check_precision(precision, where)
    make_recipe(precision, where, options)
    options = replace(options, kv_cache=cache_scheme(options.kv_cache, where))
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}\.onnx", options.filename):
        raise BadOption(
            "filename must be a plain name that ends in .onnx, of letters, digits, '.', '_' and '-'; "
            f"got {options.filename!r}."
        )
    checkpoint = find_checkpoint(source, name=name, cache=Path(cache) if cache else None, token=options.token)
    architecture = stored_architecture(checkpoint)
    _check_tokenizer(checkpoint)
    check_adapter_names(adapters or {})
    switched = {name: open_adapter(path, checkpoint, architecture) for name, path in (adapters or {}).items()}
    merged = (
        open_adapter(merge_adapter, checkpoint, architecture, merging=True)
        if merge_adapter is not None
        else None
    )
    if merged is not None and architecture.decoder.tied_head and "head.weight" in merged.deltas:
        # It changes the head alone, so that head and embeddings are one no longer.
        architecture = untied(architecture, architecture.sources["embed.weight"])
    if options.layers is not None:
        architecture = _first_layers(architecture, options.layers)
    if options.fast_prompts and not where.integer_products:
        raise BadOption(f"fast_prompts does not apply: products of integers are not faster on {where.name}.")
    if options.ragged_append and not where.query_lengths:
        raise BadOption(f"ragged_append does not apply: attention on {where.name} takes no lengths per row.")
    if options.kv_cache != "none" and _onnxruntime() < (1, 27):
        raise BadOption(
            "an int8 key/value cache runs in ONNX Runtime 1.27 and later, and here is {}.{}. Update it (pip "
            "install -U onnxruntime), or build a cache that is not quantized "
            "(--kv-cache none).".format(*_onnxruntime())
        )
    if architecture.vision is not None and architecture.vision.mutual:
        for what, given in (
            ("kv_cache", options.kv_cache != "none"),
            ("windowed_kv_cache", options.window_cache),
        ):
            if given:
                raise BadOption(
                    f"{what} does not apply: pictures whose tokens attend to each other both ways need a cache of "
                    "all positions, in the element type of activations. Leave it out."
                )
    # An older one refuses to load attention with a length per row.
    if not (_onnxruntime() >= (1, 31) if options.ragged_append is None else options.ragged_append):
        where = replace(where, query_lengths=False)
    if options.window_cache:
        _check_window_cache(where, architecture.decoder)
    else:
        where = replace(where, window_cache=False)
    preset = preset_of(precision, options) if precision in ("int4", "int8") else None
    if preset is not None:
        architecture = _rotatable(architecture, preset, options, switched)
    emitted = _emit(architecture, where, precision, options, switched.values())
    others = _emit_others(architecture, where, precision, options)
    if options.filename in map(_file_of, others):
        raise BadOption(f"filename {options.filename!r} is what another of the model's graphs is called.")
    _check_excluded(options, (emitted, *others.values()))
    plan = joined(e.builder.plan for e in (emitted, *others.values()))
    layout = lay_out(plan)
    outline = make_outline(
        checkpoint,
        architecture,
        plan,
        target=where,
        precision=precision,
        data_bytes=layout.bytes,
        other_bytes=sum(f.stat().st_size for f in _files_along(checkpoint.folder)),
        adapter_bytes={
            name: adapter_bytes(adapter, plan.low_rank, emitted.builder.dtype)
            for name, adapter in switched.items()
        },
        merged_adapter=merged.folder.resolve().name if merged else None,
        kv_cache=options.kv_cache or "none",
        recipe_name=preset.name if preset is not None else None,
        rotated=preset is not None and preset.rotate,
        calibration=_calibration(options, preset, architecture.decoder)
        if preset and plan.calibrated
        else None,
    )
    manifest = make_manifest(
        checkpoint,
        architecture,
        {options.filename: ("decoder", emitted), **{_file_of(n): (n, e) for n, e in others.items()}},
        outline,
        adapters=switched,
    )
    texts = _texts(checkpoint, architecture, where, outline, manifest)
    return Prepared(
        checkpoint, architecture, where, emitted, others, plan, layout, outline, manifest, texts, options,
        switched, merged,
    )  # fmt: skip


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
                prepared, folder, out, threads or physical_cores() or os.cpu_count() or 1, progress
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
    remember(manifest, prepared.checkpoint.folder, prepared.merged.folder if prepared.merged else None)
    return Artifact(out, manifest) if prepared.options.config_only else open_artifact(out)


def _rotatable(
    architecture: Architecture, preset: Preset, options: BuildOptions, adapters: Mapping[str, Adapter]
) -> Architecture:
    """Return ``architecture`` as it has to be for what ``preset`` moves between weights.

    Raises BadOption if that cannot be, or would change what adapters or hidden states mean.
    """
    method = CALIBRATED.get(preset.algorithm)
    moved = "rotate" if preset.rotate else preset.algorithm if method and method.equalizes else None
    if moved and adapters:
        raise BadOption(
            f"{moved} changes what a product's inputs are, so adapters, trained on the old ones, would go wrong. "
            "Merge the adapter (--merge-adapter), or choose another recipe."
        )
    if moved == preset.algorithm and options.fast_prompts:
        raise BadOption(
            f"{moved} moves scales between weights, of which the copy for fast prompts knows nothing. Leave "
            "fast_prompts out, or choose another recipe, such as balanced."
        )
    if not preset.rotate:
        return architecture
    if options.hidden_states:
        raise BadOption("rotate changes what hidden states mean; leave rotate or include_hidden_states out.")
    if architecture.decoder.tied_head:
        # Embeddings and head take different factors, so that they are one no longer.
        architecture = untied(architecture, architecture.sources["embed.weight"])
    check_rotatable(architecture.decoder)
    return architecture


def _calibration(options: BuildOptions, preset: Preset, spec: Decoder) -> CalibrationPlan:
    settings = preset.calibration
    source = OWN_TEXT
    if options.calibration is not None:
        path = Path(options.calibration)
        if not path.is_file():
            raise BadOption(
                f"--calibration {path} is not a file; give text, JSONL or token ids (.npy), or leave it out."
            )
        source = f"the file {path.name}"
    rows, length = settings.of(sum(p.size for p in parameters(spec)), spec.max_tokens)
    return CalibrationPlan(source, rows, length)


def record(out: Path, **facts: Any) -> None:
    """Put ``facts`` into what the manifest of the artifact ``out`` tells of its build."""
    manifest = open_artifact(out).manifest
    new = out / f".{MANIFEST_FILE}.new"
    new.write_text(replace(manifest, info={**manifest.info, **facts}).to_json(), encoding="utf-8")
    new.replace(out / MANIFEST_FILE)


def _file_of(graph: str) -> str:
    return f"{graph}.onnx"


def _emit_others(
    architecture: Architecture, target: Target, precision: str, options: BuildOptions
) -> dict[str, Emitted]:
    """Return the graphs that a model has beside its decoder, by name."""
    vision = architecture.vision
    if vision is None:
        return {}
    # Text takes all of these modules to import; nothing but pictures takes this one.
    from ortlm.graph.embedding import emit_embedding
    from ortlm.graph.vision import emit_vision

    dtype, recipe = target.precisions[precision], make_recipe(precision, target, options)
    spec = architecture.decoder
    return {
        "vision": emit_vision(
            vision,
            hidden=spec.hidden,
            target=target,
            dtype=dtype,
            recipe=recipe,
            fast_prompts=options.fast_prompts,
        ),
        "embedding": emit_embedding(spec, token=vision.token, target=target, dtype=dtype, recipe=recipe),
    }


def _emit(
    architecture: Architecture,
    target: Target,
    precision: str,
    options: BuildOptions,
    adapters: Iterable[Adapter],
    cache_scales: Sequence[CacheScales] | None = None,
) -> Emitted:
    return emit_decoder(
        architecture.decoder,
        target=target,
        dtype=target.precisions[precision],
        recipe=make_recipe(precision, target, options),
        all_logits=options.all_logits,
        hidden_states=options.hidden_states,
        adapted=frozenset(weight for adapter in adapters for weight in adapter.deltas),
        cache_scales=cache_scales,
        embedded=architecture.vision is not None,
        mutual=architecture.vision is not None and architecture.vision.mutual,
        fast_prompts=options.fast_prompts,
    )


# --- checks -------------------------------------------------------------------------------------------------


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


def _check_excluded(options: BuildOptions, graphs: Iterable[Emitted]) -> None:
    there = {node for graph in graphs for node in graph.builder.asked}
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


def _check_window_cache(target: Target, spec: Decoder) -> None:
    windows = {layer.mixer.window for layer in spec.layers if layer.mixer.window is not None}
    if not target.window_cache:
        raise BadOption(f"windowed_kv_cache does not apply: attention on {target.name} keeps all positions.")
    if len(windows) != 1:
        found = "layers with windows of " + " and ".join(map(str, sorted(windows)))
        raise BadOption(
            "windowed_kv_cache does not apply: it needs layers with one sliding window, and the model has "
            f"{found if windows else 'none'}. Leave it out."
        )


def _onnxruntime() -> tuple[int, int]:
    """Return major and minor version of the ONNX Runtime here; of one that is not known, very high ones."""
    for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml"):
        with contextlib.suppress(PackageNotFoundError):
            major, minor = version(name).split(".")[:2]
            return int(major), int(minor)
    return 999, 0


# --- writing ------------------------------------------------------------------------------------------------


def _write_files(
    prepared: Prepared, folder: Path, out: Path, threads: int, progress: Progress
) -> dict[str, Any]:
    """Write everything but the manifest; returns each file's size and hash."""
    checkpoint, options, emitted = prepared.checkpoint, prepared.options, prepared.emitted
    for file in _files_along(checkpoint.folder):
        shutil.copyfile(file, folder / file.name)
    for name, text in prepared.texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    if not options.config_only:
        data = folder / f"{options.filename}.data"
        weights = weights_of(prepared)
        if prepared.outline.calibration is not None:
            _calibrate(prepared, weights, folder, data, out, threads, progress)
        else:
            _write_all(prepared, weights, data, threads, progress)
        _save_graph(emitted, prepared, folder, options.filename)
        for graph, other in prepared.others.items():
            _save_graph(other, prepared, folder, _file_of(graph))
    for name, adapter in prepared.adapters.items():
        write_adapter(
            folder / prepared.manifest.adapters[name],
            adapter_arrays(adapter, prepared.plan.low_rank, prepared.architecture, emitted.builder.dtype),
        )
    if options.kv_cache != "none" and not options.config_only:
        _quantize_cache(prepared, folder, threads)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _write_all(prepared: Prepared, weights: Weights, path: Path, threads: int, progress: Progress) -> None:
    plan = prepared.plan
    stacks = {item.tensors[0].name: weights.stack(item.parameters) for item in plan.items}
    write_weights(path, plan, prepared.layout, stacks, threads=threads, progress=progress)


def _calibrate(
    prepared: Prepared,
    weights: Weights,
    folder: Path,
    data: Path,
    out: Path,
    threads: int,
    progress: Progress,
) -> None:
    """Write the weights' file ``data`` of the artifact that grows in ``folder``, calibrated.

    What is finished is kept beside ``out``; a build of the same, interrupted before, goes on from there.
    """
    # They load ONNX Runtime, which other builds do without.
    from ortlm.calibration.rows import Reader, read_rows, write_rows
    from ortlm.calibration.run import calibrate
    from ortlm.calibration.state import State

    settings = preset_of(prepared.outline.precision, prepared.options).calibration
    shape = prepared.outline.calibration
    assert shape is not None
    with resumable(out) as kept:
        state = State.open(kept, _fingerprint(prepared, settings, threads))
        rows = state.rows()
        if rows is None and prepared.options.calibration is not None:
            path = Path(prepared.options.calibration)
            reader = Reader.open(folder, prepared.spec.vocab)
            rows = read_rows(path, reader, count=shape.rows, length=shape.length)
        if rows is None:
            draft = _draft(prepared, kept / "draft", threads)
            progress.stage("writing text to calibrate on", shape.tokens, "tokens")
            rows = write_rows(
                draft,
                count=shape.rows,
                length=shape.length,
                seed=settings.seed,
                threads=threads,
                advance=progress.step,
            )
            shutil.rmtree(kept / "draft")
        if not state.resumed:
            state.keep_rows(rows)
            _write_all(prepared, weights, state.data, threads, progress)
            state.begin()
        calibrate(
            state,
            prepared.emitted.builder.plan,
            prepared.layout,
            weights,
            rows,
            settings,
            threads=threads,
            progress=progress,
        )
        state.data.replace(data)
        state.forget()


def _draft(prepared: Prepared, out: Path, threads: int) -> Artifact:
    """Build the same model quickly, for the processor here: it writes the text that calibration reads."""
    quick = prepare(
        prepared.checkpoint.folder,
        target=HERE.name,
        options=BuildOptions(recipe="fast", layers=prepared.options.layers),
        merge_adapter=prepared.merged.folder if prepared.merged else None,
    )
    return write(quick, out, force=True, threads=threads, progress=Silent())


def _fingerprint(prepared: Prepared, settings: Calibration, threads: int) -> str:
    """Return what stands for everything that the codes depend on."""
    options, checkpoint = prepared.options, prepared.checkpoint
    files = {weight.file for weight in checkpoint.weights.values()}
    merged = prepared.merged
    if merged is not None:
        files |= {f for f in merged.folder.iterdir() if f.is_file()}
    text = Path(options.calibration) if options.calibration is not None else None
    facts = [
        __version__,
        checkpoint.config,
        sorted((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files),
        [(str(item), prepared.layout.offsets[item.tensors[0].name]) for item in prepared.plan.items],
        asdict(settings),
        _sha256(text) if text is not None and text.is_file() else str(text),
        threads,
        [version(name) for name in ("numpy", "onnx-ir")],
        _onnxruntime(),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _save_graph(emitted: Emitted, prepared: Prepared, folder: Path, filename: str) -> None:
    data = f"{prepared.options.filename}.data"
    placed = {name: (data, at) for name, at in prepared.layout.offsets.items()}
    ir.save(emitted.builder.model(placed, __version__), folder / filename)


def _quantize_cache(prepared: Prepared, folder: Path, threads: int) -> None:
    """Measure the float cache of the finished model in ``folder``, and write its graph anew with an int8 one.

    The scales lie in the graph's own file, so the weights stay as they are.
    """
    # It loads ONNX Runtime, which other builds do without.
    from ortlm.calibration.cache import cache_scales

    scales = cache_scales(
        Artifact(folder, prepared.manifest),
        prepared.spec,
        per_channel=prepared.options.kv_cache == "int8_per_channel",
        threads=threads,
    )
    emitted = _emit(
        prepared.architecture,
        prepared.target,
        prepared.outline.precision,
        prepared.options,
        prepared.adapters.values(),
        scales,
    )
    _save_graph(emitted, prepared, folder, prepared.options.filename)


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
    if manifest.images is not None and manifest.images.crops:
        texts[PROCESSOR_FILE] = processor_config(manifest.images)
    settings = checkpoint.json("tokenizer_config.json")
    plain = plain_tokenizer_config(settings)
    if plain != settings:
        texts["tokenizer_config.json"] = json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
    return texts


def weights_of(prepared: Prepared, *, turned: bool = True) -> Weights:
    """Return the weights that a build stores; unless ``turned``, as they were before their rotation."""
    deltas = prepared.merged.deltas if prepared.merged else None
    rotation = Rotation(prepared.spec.hidden) if turned and prepared.outline.rotated else None
    return Weights(prepared.checkpoint, prepared.architecture, deltas, rotation)


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
