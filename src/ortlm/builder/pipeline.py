"""From checkpoint to artifact: what was prepared is written and put in place."""

from __future__ import annotations

import bisect
import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ortlm._utils.cpu import fast_integer_matmul, physical_cores
from ortlm._utils.formatting import readable_bytes
from ortlm._utils.hashing import sha256_of
from ortlm._utils.progress import NullProgress, Progress
from ortlm._version import __version__
from ortlm.artifact import MANIFEST_FILE, Artifact, Manifest, open_artifact, portable
from ortlm.artifact.provenance import remember
from ortlm.builder import transformers_js
from ortlm.builder.adapter_export import adapter_arrays, write_adapter
from ortlm.builder.graphs import decoder_graph, graph_file, ragged_file
from ortlm.builder.model_card import model_card
from ortlm.builder.options import BuildOptions, preset_of
from ortlm.builder.output_dir import check_output, put_in_place, recover, resumable, unfinished
from ortlm.builder.planning import Prepared, files_along, installed_onnxruntime, prepare, weights_of
from ortlm.builder.request import BuildRequest, MergeAdapter
from ortlm.builder.transformers_js import DataFile, laid_out, with_options
from ortlm.calibration.writing import draft_in_8_bits
from ortlm.checkpoint.files import copy_file
from ortlm.errors import BadOption, NotEnoughSpace
from ortlm.graph.decoder import Emitted
from ortlm.graph.weight_plan import Columns
from ortlm.quant.recipe import Calibration
from ortlm.target import HERE
from ortlm.weights.reader import Weights
from ortlm.weights.writer import write_weights

if TYPE_CHECKING:
    from ortlm.calibration.progress_state import CalibrationProgress


_log = logging.getLogger(__name__)


def build(
    source: str | Path,
    output: str | Path,
    *,
    precision: str | None = None,
    target: str | None = None,
    layout: str | None = None,
    cache: str | Path | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    options: BuildOptions | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    merge_adapter: MergeAdapter = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Turn the checkpoint ``source`` into an artifact in the folder ``output``, and open it.

    ``source`` is a folder, a GGUF file or a model's name on the Hugging Face hub; downloads go to ``cache``.
    ``revision`` is a branch, a tag or a commit there, ``subfolder`` where in the repository the model lies.
    ``precision`` is int4 (the default), int8, fp16, bf16 or fp32, ``target`` cpu (the default), cuda, dml, webgpu
    or mobile; ``options`` say everything else, the recipe above all. With the ``layout`` "transformers.js" the
    folder is for browsers instead, and ``precision`` one dtype or several, such as "q4,q4f16": q4 (the default),
    q4f16, q8, fp16, fp32. A page gets the first unless it asks for another. ``adapters`` are folders of peft LoRA
    adapters by the name under which a runtime switches to them; the one in ``merge_adapter``, or several with a
    number each, ``[("french", 0.7), "code"]``, become part of the weights in their order. ``force`` replaces
    an artifact that is in ``output`` already. ``threads`` quantize, by default one for each physical core.
    ``progress`` is told how far the build is.

    The folder appears whole at the end: after an error or an interruption there is the old one, or none.
    Raises BadOption, UnsupportedModel, BadCheckpoint and NotEnoughSpace; nothing is left behind.
    """
    out = Path(output)
    recover(out)
    check_output(out, force=force, source=source)
    request = BuildRequest(
        source,
        cache=cache,
        revision=revision,
        subfolder=subfolder,
        adapters=adapters or {},
        merge_adapter=merge_adapter,
    )
    requests = with_options(laid_out(request, layout, precision, target), options or BuildOptions())
    prepared = [prepare(one) for one in requests]
    for note in prepared[0].outline.notes:
        _log.warning(note)
    return write_folder(prepared, out, force=force, threads=threads, progress=progress or NullProgress())


def write(prepared: Prepared, out: Path, *, force: bool, threads: int | None, progress: Progress) -> Artifact:
    """Write the artifact that ``prepared`` describes to ``out``; see ``build``."""
    return write_folder([prepared], out, force=force, threads=threads, progress=progress)


def write_folder(
    prepared: Sequence[Prepared],
    out: Path,
    *,
    force: bool,
    threads: int | None,
    progress: Progress,
    verify: Callable[[Prepared, Path], Mapping[str, Any]] | None = None,
) -> Artifact:
    """Write the artifact that ``prepared`` describes to ``out``; see ``build``. Several are dtypes of one model.

    ``verify`` is asked about each of them with the folder in which the whole artifact lies, before that takes
    the place of an older one; what it returns is added to what the manifest tells of the build. If it raises, the
    older one stays, and what was calibrated is kept for the next build.
    """
    began = time.monotonic()
    first = prepared[0]
    if first.options.config_only and out.is_dir() and any(out.iterdir()):
        raise BadOption(f"config_only would replace {out} by a folder without weights. Choose a new folder.")
    needed = sum(one.outline.output_bytes for one in prepared)
    parent = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if not first.options.config_only and needed > free:
        raise NotEnoughSpace(
            f"{out} needs {readable_bytes(needed)}, but {parent} has {readable_bytes(free)} free. "
            "Free some space or choose another disk with -o."
        )
    with unfinished(out) as folder, contextlib.ExitStack() as kept:
        try:
            cores = threads or physical_cores() or os.cpu_count() or 1
            states = [_write_files(one, folder, out, cores, progress, kept) for one in prepared]
            _write_summary(prepared, folder)
            made = {"seconds": round(time.monotonic() - began, 2), "files": _hashes(folder)}
            manifests = [
                replace(one.manifest, info={**one.manifest.info, **made, **_experts(state)})
                for one, state in zip(prepared, states, strict=True)
            ]
            if verify is not None:
                for at, one in enumerate(prepared):
                    # One at a time is what ortlm runs.
                    _write_manifest(folder, manifests[at])
                    facts = verify(one, folder)
                    manifests[at] = replace(manifests[at], info={**manifests[at].info, **facts})
            manifest = manifests[0]
            if first.dtype is not None:
                dtypes = (str(one.dtype) for one in prepared)
                manifest = transformers_js.together(dict(zip(dtypes, manifests, strict=True)))
            _write_manifest(folder, manifest)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NotEnoughSpace(
                    f"the disk of {parent} became full while {out} was written, which needs about "
                    f"{readable_bytes(needed)}. What was there before is as it was. Free some space or choose "
                    "another disk with -o."
                ) from error
            if error.filename is None:
                raise OSError(error.errno, error.strerror or str(error), str(out)) from error
            raise
        put_in_place(folder, out, force=force)
        for state in states:
            if state is not None:
                state.forget()
    remember(manifest, first.checkpoint.path, first.merged.adapters if first.merged else ())
    return Artifact(out, manifest) if first.options.config_only else open_artifact(out)


def _experts(state: CalibrationProgress | None) -> dict[str, Any]:
    """Return how many matrices of experts were calibrated, and which only rounded: part to numbers of experts."""
    if state is None or not state.experts:
        return {}
    rounded: dict[str, list[int]] = {}
    for name, calibrated in state.experts.items():
        if not calibrated:
            part, _, number = name.removesuffix(".weight").rpartition(".")
            rounded.setdefault(part, []).append(int(number))
    facts = {"calibrated": sum(state.experts.values()), "rounded": rounded}
    return {"experts": facts}


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")


def _write_summary(prepared: Sequence[Prepared], folder: Path) -> None:
    """Write the files that speak of all dtypes: the model card, and transformers.js's list of graphs."""
    first = prepared[0]
    card = model_card([one.outline for one in prepared], first.checkpoint.folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if first.dtype is not None:
        files = {one.options.filename: one.data_files for one in prepared}
        text = transformers_js.config_text(first.checkpoint, first.spec, files)
        (folder / transformers_js.CONFIG_FILE).write_text(text, encoding="utf-8")


def _write_files(
    prepared: Prepared,
    folder: Path,
    out: Path,
    threads: int,
    progress: Progress,
    kept: contextlib.ExitStack,
) -> CalibrationProgress | None:
    """Write everything but the manifest; returns what a calibration keeps as long as ``kept`` is open."""
    state = None
    checkpoint, options, emitted = prepared.checkpoint, prepared.options, prepared.emitted
    for name in files_along(checkpoint.folder):
        (folder / name).parent.mkdir(exist_ok=True)
        copy_file(checkpoint.folder, name, folder / name)
    for name, text in prepared.texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    if not options.config_only:
        place = (folder / options.filename).parent
        place.mkdir(exist_ok=True)
        data = place / prepared.data_files[0].name
        weights = weights_of(prepared)
        if prepared.outline.calibration is not None:
            state = _calibrate(prepared, weights, folder, out, threads, progress, kept)
            state.give(data)
        else:
            _write_all(prepared, weights, data, threads, progress)
        _split(data, prepared.data_files)
        for graph, filename in _decoders(prepared):
            _save_graph(graph, prepared, folder, filename)
        for name, other in prepared.others.items():
            _save_graph(other, prepared, folder, graph_file(name))
    for name, adapter in prepared.adapters.items():
        write_adapter(
            folder / prepared.manifest.adapters[name],
            adapter_arrays(adapter, prepared.plan.low_rank, prepared.architecture, emitted.builder.dtype),
        )
    if options.kv_cache != "none" and not options.config_only:
        _quantize_cache(prepared, folder, threads)
    return state


def _split(path: Path, files: Sequence[DataFile]) -> None:
    """Move what comes after the first of ``files`` out of ``path`` into the others, from the end on."""
    if len(files) > 1 and path.stat().st_nlink > 1:
        # A calibration keeps the whole of it under another name.
        own = path.with_name(f"own-{path.name}")
        shutil.copyfile(path, own)
        own.replace(path)
    for file in reversed(files[1:]):
        with path.open("rb+") as source, path.with_name(file.name).open("wb") as rest:
            source.seek(file.start)
            shutil.copyfileobj(source, rest, 1 << 24)
            source.truncate(file.start)


def _hashes(folder: Path) -> dict[str, Any]:
    """Return size and hash of each file in ``folder``."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _write_all(prepared: Prepared, weights: Weights, path: Path, threads: int, progress: Progress) -> None:
    plan = prepared.plan
    stacks = {
        item.tensors[0].name: weights.stack(
            item.parameters, interleaved=1 if isinstance(item, Columns) else item.interleaved
        )
        for item in plan.items
    }
    write_weights(path, plan, prepared.layout, stacks, threads=threads, progress=progress)


def _calibrate(
    prepared: Prepared,
    weights: Weights,
    folder: Path,
    out: Path,
    threads: int,
    progress: Progress,
    kept: contextlib.ExitStack,
) -> CalibrationProgress:
    """Write the weights' file, calibrated, of the artifact that grows in ``folder``; return where it is.

    What is finished is kept next to ``out`` until ``kept`` is closed, and longer unless it is forgotten; a build
    of the same, interrupted before, resumes from there.
    """
    # They load ONNX Runtime, which other builds do without.
    from ortlm.calibration.dataset import Reader, read_rows, write_rows
    from ortlm.calibration.progress_state import CalibrationProgress
    from ortlm.calibration.run import calibrate

    settings = preset_of(prepared.outline.precision, prepared.options).calibration
    shape = prepared.outline.calibration
    assert shape is not None
    place = kept.enter_context(resumable(out, prepared.dtype))
    state = CalibrationProgress.open(place, _fingerprint(prepared, settings, threads))
    if state.complete:
        return state
    rows = state.rows()
    if rows is None and prepared.options.calibration is not None:
        path = Path(prepared.options.calibration)
        reader = Reader.open(folder, prepared.spec.vocab)
        rows = read_rows(path, reader, count=shape.rows, length=shape.length)
    if rows is None:
        draft = _draft(prepared, place / "draft", threads)
        progress.start("writing text to calibrate on", shape.tokens, "tokens")
        rows = write_rows(
            draft,
            count=shape.rows,
            length=shape.length,
            seed=settings.seed,
            threads=threads,
            advance=progress.advance,
        )
        shutil.rmtree(place / "draft")
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
    state.finish_all()
    return state


def _draft(prepared: Prepared, out: Path, threads: int) -> Artifact:
    """Build the same model quickly, for the processor here: it writes the text that calibration reads."""
    quick = prepare(
        BuildRequest(
            prepared.checkpoint.path,
            target=HERE.name,
            # One graph runs in every ONNX Runtime.
            options=BuildOptions(
                recipe="fast",
                layers=prepared.options.layers,
                ragged_append=False,
                integer_only=draft_in_8_bits(prepared.outline.parameters),
            ),
            merge_adapter=prepared.merged.adapters if prepared.merged else None,
        ),
        checkpoint=prepared.checkpoint,
    )
    return write(quick, out, force=True, threads=threads, progress=NullProgress())


def _fingerprint(prepared: Prepared, settings: Calibration, threads: int) -> str:
    """Return what stands for everything that the codes depend on."""
    options, checkpoint = prepared.options, prepared.checkpoint
    files = {weight.file for weight in checkpoint.weights.values()}
    merged = prepared.merged
    if merged is not None:
        files |= {f for folder, _ in merged.adapters for f in folder.iterdir() if f.is_file()}
    text = Path(options.calibration) if options.calibration is not None else None
    facts = [
        __version__,
        [weight for _, weight in merged.adapters] if merged else [],
        checkpoint.config,
        sorted((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files),
        [(str(item), prepared.layout.offsets[item.tensors[0].name]) for item in prepared.plan.items],
        asdict(settings),
        sha256_of(text) if text is not None and text.is_file() else str(text),
        threads,
        fast_integer_matmul(),
        draft_in_8_bits(prepared.outline.parameters),
        [version(name) for name in ("numpy", "onnx-ir")],
        installed_onnxruntime(),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _save_graph(emitted: Emitted, prepared: Prepared, folder: Path, filename: str) -> None:
    files = prepared.data_files
    starts = [file.start for file in files]
    placed = {}
    for name, at in prepared.layout.offsets.items():
        file = files[bisect.bisect_right(starts, at) - 1]
        placed[name] = (file.name, at - file.start)
    ir.save(emitted.builder.model(placed, __version__), folder / filename)


def _quantize_cache(prepared: Prepared, folder: Path, threads: int) -> None:
    """Measure the float cache of the finished model in ``folder``, and write its graphs again with an int8 one.

    The scales lie in the graphs' own files, so the weights stay as they are.
    """
    # It loads ONNX Runtime, which other builds do without.
    from ortlm.calibration.kv_cache_scales import cache_scales

    scales = cache_scales(
        Artifact(folder, _float_manifest(prepared)),
        prepared.spec,
        per_channel=prepared.options.kv_cache == "int8_per_channel",
        threads=threads,
    )
    for graph, filename in _decoders(prepared):
        emitted = decoder_graph(
            prepared.architecture,
            graph.builder.target,
            prepared.outline.precision,
            prepared.options,
            prepared.adapters.values(),
            scales,
            kept=prepared.kept,
        )
        _save_graph(emitted, prepared, folder, filename)


def _decoders(prepared: Prepared) -> list[tuple[Emitted, str]]:
    """Return the graphs of the decoder with their files."""
    filename = prepared.options.filename
    graphs = [(prepared.emitted, filename)]
    if prepared.ragged is not None:
        graphs.append((prepared.ragged, ragged_file(filename)))
    return graphs


def _float_manifest(prepared: Prepared) -> Manifest:
    """Return the manifest of the model while its cache is float: of the decoder's graphs, one runs everywhere."""
    manifest = portable(prepared.manifest)
    decoder = replace(manifest.graphs["decoder"], onnxruntime=None)
    return replace(manifest, graphs={**manifest.graphs, "decoder": decoder})
