"""What a build will write, before it writes: the checkpoint opened and checked, graphs, layout, figures."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ortlm.artifact import (
    GENAI_FILE,
    PROCESSOR_FILE,
    TEMPLATE_FOLDER,
    TOKENIZER_FILES,
    Manifest,
    processor_config,
    read_templates,
    to_genai,
)
from ortlm.builder.adapter_export import adapter_bytes
from ortlm.builder.estimate import OWN_TEXT, CalibrationPlan, Outline, make_outline
from ortlm.builder.manifest import generation_notes, make_manifest, plain_tokenizer_config
from ortlm.builder.model_card import model_card
from ortlm.builder.options import (
    BuildOptions,
    cache_scheme,
    check_adapter_names,
    make_recipe,
    preset_of,
    with_activations,
)
from ortlm.builder.tokenizer_files import TokenizerFiles
from ortlm.builder.tokenizer_trial import tried_tokenizer
from ortlm.checkpoint import files
from ortlm.checkpoint.hub import find_checkpoint
from ortlm.checkpoint.reader import Checkpoint
from ortlm.errors import BadCheckpoint, BadOption, nearest
from ortlm.graph.attention import INT8_CACHE, CacheScales
from ortlm.graph.decoder import Emitted, emit_decoder
from ortlm.graph.weight_plan import Plan, joined
from ortlm.quant.algorithms import CALIBRATED
from ortlm.quant.recipe import Preset
from ortlm.quant.rotation import Rotation
from ortlm.spec import Architecture, Decoder, parameters
from ortlm.target import Target, check_precision, find_target
from ortlm.weights.lora import Adapter, open_adapter
from ortlm.weights.reader import Weights, check_rotatable
from ortlm.weights.resolution import stored_architecture, untied
from ortlm.weights.writer import Layout, lay_out

# Files beside the weights that an artifact takes along.
_TAKEN_ALONG = ("LICENSE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A build that is ready to write: everything that can be known before the weights are read is checked.

    ``emitted`` is the decoder, ``ragged`` the same with lengths per row, which new ONNX Runtimes load instead,
    ``others`` are the graphs beside it by name; all their weights, in ``plan``, go
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
    ragged: Emitted | None = None

    @property
    def spec(self) -> Decoder:
        """What the model is."""
        return self.architecture.decoder


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
    where = with_activations(where, precision, options)
    make_recipe(precision, where, options)
    options = replace(options, kv_cache=cache_scheme(options.kv_cache, where))
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}\.onnx", options.filename):
        raise BadOption(
            "filename must be a plain name that ends in .onnx, of letters, digits, '.', '_' and '-'; "
            f"got {options.filename!r}."
        )
    checkpoint = find_checkpoint(source, name=name, cache=Path(cache) if cache else None, token=options.token)
    architecture = stored_architecture(checkpoint)
    tokenizer = tried_tokenizer(checkpoint.folder, checkpoint.config, architecture.decoder.vocab)
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
    if options.max_length is not None and not 1 <= options.max_length <= architecture.decoder.max_tokens:
        raise BadOption(
            f"max_length must be 1 to {architecture.decoder.max_tokens:,}, the model's context in tokens; got "
            f"{options.max_length:,}."
        )
    if options.fast_prompts and not where.integer_products:
        raise BadOption(f"fast_prompts does not apply: products of integers are not faster on {where.name}.")
    if options.ragged_append and not where.query_lengths:
        raise BadOption(f"ragged_append does not apply: attention on {where.name} takes no lengths per row.")
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
    # Old ONNX Runtimes refuse to load attention with a length per row, so that has a graph of its own.
    lengths = where.query_lengths if options.ragged_append is None else options.ragged_append
    where = replace(where, query_lengths=False)
    where = _with_fusion(where, options)
    if options.window_cache:
        _check_window_cache(where, architecture.decoder)
    else:
        where = replace(where, window_cache=False)
    preset = preset_of(precision, options) if precision in ("int4", "int8") else None
    if preset is not None:
        architecture = _rotatable(architecture, preset, options, switched)
    emitted = decoder_graph(architecture, where, precision, options, switched.values())
    ragged = None
    if lengths:
        ragged = decoder_graph(architecture, with_lengths(where), precision, options, switched.values())
    if options.kv_cache != "none":
        # Its scales are measured when all else is written; what it needs is known now.
        for graph in (emitted, ragged):
            if graph is not None:
                graph.builder.need(INT8_CACHE)
    others = _emit_others(architecture, where, precision, options)
    if options.filename in map(graph_file, others):
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
        decoders=1 if ragged is None else 2,
        data_bytes=layout.bytes,
        other_bytes=sum(files.size_of(checkpoint.folder, name) for name in files_along(checkpoint.folder)),
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
        notes=generation_notes(checkpoint),
    )
    manifest = make_manifest(
        checkpoint,
        architecture,
        {options.filename: ("decoder", emitted), **{graph_file(n): (n, e) for n, e in others.items()}},
        outline,
        tokenizer,
        adapters=switched,
        ragged=(ragged_file(options.filename), ragged) if ragged is not None else None,
    )
    manifest = replace(manifest, session_options=dict(options.session_options))
    texts = _texts(checkpoint, architecture, where, outline, manifest, tokenizer, options.max_length)
    return Prepared(
        checkpoint, architecture, where, emitted, others, plan, layout, outline, manifest, texts, options,
        switched, merged, ragged,
    )  # fmt: skip


def _with_fusion(target: Target, options: BuildOptions) -> Target:
    """Return ``target`` with separate products where ``options`` ask for them."""
    packed = target.packed_projections
    return replace(
        target,
        packed_projections=packed and options.fuse_qkv is not False,
        packed_mlp=packed and options.fuse_gate_up is not False,
    )


def weights_of(prepared: Prepared, *, turned: bool = True) -> Weights:
    """Return the weights that a build stores; unless ``turned``, as they were before their rotation."""
    deltas = prepared.merged.deltas if prepared.merged else None
    rotation = Rotation(prepared.spec.hidden) if turned and prepared.outline.rotated else None
    return Weights(prepared.checkpoint, prepared.architecture, deltas, rotation)


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


def decoder_graph(
    architecture: Architecture,
    target: Target,
    precision: str,
    options: BuildOptions,
    adapters: Iterable[Adapter],
    cache_scales: Sequence[CacheScales] | None = None,
) -> Emitted:
    """Return the decoder's graph; its cache is int8 with ``cache_scales``, of each layer."""
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


def graph_file(graph: str) -> str:
    """Return the file of a graph beside the decoder."""
    return f"{graph}.onnx"


def ragged_file(filename: str) -> str:
    """Return the file of the decoder that takes lengths per row, beside the one in ``filename``."""
    return f"{filename.removesuffix('.onnx')}_ragged.onnx"


def with_lengths(target: Target) -> Target:
    """Return ``target`` for the decoder that takes lengths per row."""
    return replace(target, query_lengths=True)


def files_along(folder: Path) -> list[str]:
    """Return the files of a checkpoint that an artifact takes along: tokenizer, templates, defaults, licence."""
    found = [name for name in TOKENIZER_FILES if files.present(folder, name)]
    found += files.listed(folder, f"{TEMPLATE_FOLDER}/*.jinja")
    for pattern in _TAKEN_ALONG:
        found += files.listed(folder, pattern)
    return found


def _texts(
    checkpoint: Checkpoint,
    architecture: Architecture,
    target: Target,
    outline: Outline,
    manifest: Manifest,
    tokenizer: TokenizerFiles,
    max_length: int | None,
) -> dict[str, str]:
    """Return the small files of an artifact: configuration, model card, and tokenizer files made plain."""
    spec = architecture.decoder
    first = spec.layers[0].mixer
    texts = {
        GENAI_FILE: to_genai(
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
            max_length=max_length,
        ),
        "README.md": model_card(asdict(outline), checkpoint.folder),
    }
    if manifest.images is not None and manifest.images.crops:
        texts[PROCESSOR_FILE] = processor_config(manifest.images)
    texts |= tokenizer.texts
    # What is no template is told now, and not when the artifact is used.
    read_templates(checkpoint.folder, BadCheckpoint)
    plain = plain_tokenizer_config(tokenizer.settings)
    if plain != checkpoint.json("tokenizer_config.json"):
        texts["tokenizer_config.json"] = json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
    return texts


# --- checks -------------------------------------------------------------------------------------------------


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


def installed_onnxruntime() -> tuple[int, int]:
    """Return major and minor version of the ONNX Runtime here; of one that is not known, very high ones."""
    for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml"):
        with contextlib.suppress(PackageNotFoundError):
            major, minor = version(name).split(".")[:2]
            return int(major), int(minor)
    return 999, 0
