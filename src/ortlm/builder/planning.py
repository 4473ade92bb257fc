"""What a build will write, before it writes: the checkpoint opened and checked, graphs, layout, figures."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ortlm._utils.cpu import INTEGERS_DO_NOT_OVERFLOW
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
from ortlm.builder import transformers_js
from ortlm.builder.adapter_export import adapter_bytes
from ortlm.builder.estimate import OWN_TEXT, CalibrationPlan, Outline, make_outline
from ortlm.builder.graphs import decoder_graph, graph_file, other_graphs, ragged_file, with_lengths
from ortlm.builder.kept_weights import KeptWeights, kept_weights, stored_before
from ortlm.builder.manifest import generation_notes, make_manifest, plain_tokenizer_config
from ortlm.builder.options import (
    BuildOptions,
    cache_scheme,
    check_adapter_names,
    make_recipe,
    preset_of,
    with_activations,
)
from ortlm.builder.request import BuildRequest
from ortlm.builder.tokenizer_files import TokenizerFiles
from ortlm.builder.tokenizer_trial import tried_tokenizer
from ortlm.builder.transformers_js import DataFile
from ortlm.checkpoint import files
from ortlm.checkpoint.hub import find_checkpoint
from ortlm.checkpoint.reader import Checkpoint
from ortlm.errors import BadCheckpoint, BadOption, nearest
from ortlm.graph.attention import INT8_CACHE
from ortlm.graph.decoder import Emitted
from ortlm.graph.weight_plan import Plan, joined
from ortlm.quant.algorithms import CALIBRATED
from ortlm.quant.recipe import Preset
from ortlm.quant.rotation import Rotation
from ortlm.spec import (
    Architecture,
    Attention,
    Decoder,
    DeltaNet,
    Experts,
    Mamba2,
    Mixer,
    ShortConv,
    mixer_states,
    parameters,
)
from ortlm.target import TARGETS, Target, check_precision, find_target
from ortlm.weights.lora import Adapter, MergedAdapters, merge, open_adapter
from ortlm.weights.reader import Weights, check_rotatable
from ortlm.weights.resolution import stored_architecture, untied
from ortlm.weights.writer import Layout, lay_out

# Files next to the weights that an artifact takes along.
_TAKEN_ALONG = ("LICENSE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A build that is ready to write: everything that can be known before the weights are read is checked.

    ``emitted`` is the decoder, ``ragged`` the same with lengths per row, which new ONNX Runtimes load instead,
    ``others`` are the other graphs by name; all their weights, in ``plan``, go
    into ``data_files``, next to the decoder's graph. The decoder's cache is always float: scales of an int8 cache
    are measured once the weights are written. ``texts`` are the small files that are written next to graph and
    weights, by name. ``adapters`` become files, by name; ``merged`` is added to the weights. ``kept`` are
    carried over from the checkpoint. ``dtype`` is what transformers.js calls it, None for other folders.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    target: Target
    emitted: Emitted
    others: Mapping[str, Emitted]
    plan: Plan
    layout: Layout
    data_files: tuple[DataFile, ...]
    outline: Outline
    manifest: Manifest
    texts: Mapping[str, str]
    options: BuildOptions
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    merged: MergedAdapters | None = None
    ragged: Emitted | None = None
    dtype: str | None = None
    kept: KeptWeights = field(default_factory=KeptWeights)

    @property
    def spec(self) -> Decoder:
        """What the model is."""
        return self.architecture.decoder

    @property
    def has_experts(self) -> bool:
        """Whether a layer is a mixture of experts."""
        return any(isinstance(layer.ffn, Experts) for layer in self.spec.layers)


@dataclass(frozen=True, slots=True)
class _Choices:
    """A request that contradicts neither itself nor its target.

    ``target`` is that of the decoder's graph which every ONNX Runtime loads; ``ragged``: it gets a second graph.
    ``preset`` is None if no weights are quantized.
    """

    precision: str
    target: Target
    options: BuildOptions
    preset: Preset | None
    ragged: bool
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class _Model:
    """What was loaded: ``adapters`` become files, by name; ``merged`` is added to the weights, ``kept`` stay."""

    checkpoint: Checkpoint
    architecture: Architecture
    tokenizer: TokenizerFiles
    adapters: Mapping[str, Adapter]
    merged: MergedAdapters | None
    kept: KeptWeights


@dataclass(frozen=True, slots=True)
class _Graphs:
    """Every graph of a model, and the one file in which their weights lie."""

    decoder: Emitted
    ragged: Emitted | None
    others: Mapping[str, Emitted]
    plan: Plan
    layout: Layout


def prepare(
    request: BuildRequest, *, checkpoint: Checkpoint | None = None, tokenizer: TokenizerFiles | None = None
) -> Prepared:
    """Open and check what is asked for and lay out the artifact, as ``build`` does before it writes.

    ``checkpoint`` is what the request's source is, if that is open already; so is its ``tokenizer``.
    Raises BadOption, UnsupportedModel and BadCheckpoint.
    """
    choices = _validate(request)
    model = _load(request, choices, checkpoint, tokenizer)
    graphs = _emit(model, choices)
    outline = _estimate(model, choices, graphs)
    manifest = _manifest(model, choices, graphs, outline)
    return Prepared(
        checkpoint=model.checkpoint,
        architecture=model.architecture,
        target=choices.target,
        emitted=graphs.decoder,
        ragged=graphs.ragged,
        others=graphs.others,
        plan=graphs.plan,
        layout=graphs.layout,
        data_files=_data_files(choices, graphs),
        outline=outline,
        manifest=manifest,
        texts=_texts(model, choices, outline, manifest),
        options=choices.options,
        adapters=model.adapters,
        merged=model.merged,
        dtype=choices.dtype,
        kept=model.kept,
    )


def _data_files(choices: _Choices, graphs: _Graphs) -> tuple[DataFile, ...]:
    filename = choices.options.filename
    if choices.dtype is None:
        return (DataFile(f"{filename}.data", 0),)
    return transformers_js.data_files(filename, graphs.layout, graphs.plan)


def _validate(request: BuildRequest) -> _Choices:
    """Check all that can be checked before the checkpoint is looked at."""
    precision, options = request.precision, request.options
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}\.onnx", options.filename):
        raise BadOption(
            "filename must be a plain name that ends in .onnx, of letters, digits, '.', '_' and '-'; "
            f"got {options.filename!r}."
        )
    if request.dtype is None:
        target = find_target(request.target)
        check_precision(precision, target)
        target = with_activations(target, precision, options)
    else:
        precision, target, options = transformers_js.choices(request)
    make_recipe(precision, target, options)
    options = replace(options, kv_cache=cache_scheme(options.kv_cache, target))
    if options.fast_prompts and not target.integer_products:
        raise BadOption(f"fast_prompts does not apply: integer matmul is not faster on {target.name}.")
    if options.integer_only:
        _check_integer_only(precision, target, options)
    if options.ragged_append and not target.query_lengths:
        raise BadOption(f"ragged_append does not apply: attention on {target.name} takes no lengths per row.")
    if options.window_cache and not target.window_cache:
        raise BadOption(f"windowed_kv_cache does not apply: attention on {target.name} keeps all positions.")
    check_adapter_names(request.adapters)
    return _Choices(
        precision=precision,
        target=_portable_target(target, options),
        options=options,
        preset=preset_of(precision, options) if precision in ("int4", "int8") else None,
        ragged=target.query_lengths if options.ragged_append is None else options.ragged_append,
        dtype=request.dtype,
    )


def _check_integer_only(precision: str, target: Target, options: BuildOptions) -> None:
    if not target.integer_products:
        raise BadOption(f"integer_only does not apply: integer matmul is not faster on {target.name}.")
    algorithm = preset_of(precision, options).algorithm
    if algorithm in CALIBRATED:
        raise BadOption(
            f"integer_only goes with round-to-nearest (RTN), and {algorithm} calibrates. Give recipe='fast' "
            "with it, or leave it out."
        )


def _portable_target(target: Target, options: BuildOptions) -> Target:
    """Return ``target`` for graphs that every ONNX Runtime loads, with separate products where asked for."""
    packed = target.packed_projections
    return replace(
        target,
        # Old ONNX Runtimes refuse to load attention with a length per row, so that has a graph of its own.
        query_lengths=False,
        window_cache=options.window_cache,
        packed_projections=packed and options.fuse_qkv is not False,
        packed_mlp=packed and options.fuse_gate_up is not False,
    )


def _load(
    request: BuildRequest, choices: _Choices, checkpoint: Checkpoint | None, tokenizer: TokenizerFiles | None
) -> _Model:
    """Open the checkpoint, if it is not open, and the adapters, and check that the options fit them."""
    options = choices.options
    checkpoint = checkpoint or find_checkpoint(
        request.source,
        name=request.name,
        cache=Path(request.cache) if request.cache else None,
        token=options.token,
        revision=request.revision,
        subfolder=request.subfolder,
    )
    architecture = stored_architecture(checkpoint, request.adapters)
    if choices.dtype is not None:
        architecture = transformers_js.for_browsers(architecture, checkpoint.config)
    tokenizer = tokenizer or tried_tokenizer(checkpoint.folder, checkpoint.config, architecture.decoder.vocab)
    adapters = {name: open_adapter(path, checkpoint, architecture) for name, path in request.adapters.items()}
    architecture, merged = merge(request.merged, checkpoint, architecture)
    if options.layers is not None:
        architecture = _first_layers(architecture, options.layers)
    if "window" in choices.target.attention_ignores:
        architecture = _within_window(architecture, choices.target)
    _check_model(architecture, options)
    _check_states(architecture.decoder, choices)
    if choices.preset is not None:
        architecture = _rotatable(architecture, choices.preset, options, adapters)
    kept = kept_weights(
        checkpoint,
        architecture,
        target=choices.target,
        precision=choices.precision,
        options=options,
        rotated=choices.preset is not None and choices.preset.rotate,
        changed=merged.changes if merged is not None else (),
    )
    return _Model(checkpoint, architecture, tokenizer, adapters, merged, kept)


def _within_window(architecture: Architecture, target: Target) -> Architecture:
    """Return ``architecture`` with a context that no window of its layers is shorter than, and say so."""
    spec = architecture.decoder
    window = min((mixer.window for mixer in spec.attentions if mixer.window), default=spec.max_tokens)
    if window >= spec.max_tokens:
        return architecture
    note = (
        f"attention on {target.name} ignores the model's window of {window:,} tokens, so that the context ends "
        f"there ({spec.max_tokens:,} before)."
    )
    return replace(architecture, decoder=replace(spec, max_tokens=window), notes=(*architecture.notes, note))


def _emit(model: _Model, choices: _Choices) -> _Graphs:
    """Emit every graph and give each weight its place."""
    architecture, options, adapters = model.architecture, choices.options, model.adapters.values()
    kept = model.kept
    decoder = decoder_graph(architecture, choices.target, choices.precision, options, adapters, kept=kept)
    ragged = None
    if choices.ragged:
        ragged = decoder_graph(
            architecture, with_lengths(choices.target), choices.precision, options, adapters, kept=kept
        )
    if options.kv_cache != "none":
        # Its scales are measured when all else is written; what it needs is known now.
        for graph in (decoder, ragged):
            if graph is not None:
                graph.builder.need(INT8_CACHE)
    others = other_graphs(architecture, choices.target, choices.precision, options)
    if options.filename in map(graph_file, others):
        raise BadOption(f"filename {options.filename!r} is what another of the model's graphs is called.")
    _check_excluded(options, (decoder, *others.values()))
    plan = joined(graph.builder.plan for graph in (decoder, *others.values()))
    return _Graphs(decoder, ragged, others, plan, lay_out(plan))


def _estimate(model: _Model, choices: _Choices, graphs: _Graphs) -> Outline:
    """Return what the build would give."""
    checkpoint, options, preset = model.checkpoint, choices.options, choices.preset
    calibrated = preset is not None and bool(graphs.plan.calibrated)
    return make_outline(
        checkpoint,
        model.architecture,
        graphs.plan,
        target=choices.target,
        precision=choices.precision,
        decoders=1 if graphs.ragged is None else 2,
        data_bytes=graphs.layout.bytes,
        other_bytes=sum(files.size_of(checkpoint.folder, name) for name in files_along(checkpoint.folder)),
        adapter_bytes={
            name: adapter_bytes(adapter, graphs.plan.low_rank, graphs.decoder.builder.dtype)
            for name, adapter in model.adapters.items()
        },
        merged_adapter=str(model.merged) if model.merged else None,
        kv_cache=options.kv_cache or "none",
        recipe_name=preset.name if preset is not None else None,
        rotated=preset is not None and preset.rotate,
        calibration=_calibration(options, preset, model.architecture.decoder)
        if preset and calibrated
        else None,
        stored_before=stored_before(checkpoint, model.architecture, graphs.plan),
        notes=generation_notes(checkpoint),
        dtype=choices.dtype,
    )


def _manifest(model: _Model, choices: _Choices, graphs: _Graphs, outline: Outline) -> Manifest:
    filename = choices.options.filename
    manifest = make_manifest(
        model.checkpoint,
        model.architecture,
        {
            filename: ("decoder", graphs.decoder),
            **{graph_file(name): (name, graph) for name, graph in graphs.others.items()},
        },
        outline,
        model.tokenizer,
        adapters=model.adapters,
        ragged=(ragged_file(filename), graphs.ragged) if graphs.ragged is not None else None,
    )
    options = dict(choices.options.session_options)
    if choices.options.fast_prompts or choices.options.integer_only:
        options = {INTEGERS_DO_NOT_OVERFLOW: "1", **options}
    return replace(manifest, session_options=options)


def weights_of(prepared: Prepared, *, rotated: bool = True) -> Weights:
    """Return the weights that a build stores; unless ``rotated``, as they were before their rotation."""
    changes = prepared.merged.changes if prepared.merged else None
    rotation = Rotation(prepared.spec.hidden) if rotated and prepared.outline.rotated else None
    return Weights(prepared.checkpoint, prepared.architecture, changes, rotation)


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


def files_along(folder: Path) -> list[str]:
    """Return the files of a checkpoint that an artifact takes along: tokenizer, templates, defaults, license."""
    names = [name for name in TOKENIZER_FILES if files.present(folder, name)]
    names += files.listed(folder, f"{TEMPLATE_FOLDER}/*.jinja")
    for pattern in _TAKEN_ALONG:
        names += files.listed(folder, pattern)
    return names


def _texts(model: _Model, choices: _Choices, outline: Outline, manifest: Manifest) -> dict[str, str]:
    """Return the small files of an artifact: configuration, model card, and tokenizer files made plain."""
    checkpoint, spec = model.checkpoint, model.architecture.decoder
    # What is no template is told now, and not when the artifact is used.
    read_templates(checkpoint.folder, BadCheckpoint)
    plain = plain_tokenizer_config(model.tokenizer.settings)
    if choices.dtype is not None:
        settings = transformers_js.texts(checkpoint, model.tokenizer, plain, manifest)
        return {**model.tokenizer.texts, **settings}
    first, vision = next(spec.attentions), model.architecture.vision
    # It counts the layers that have a cache, of which all come first.
    kinds = [_layer_type(layer.mixer) for layer in spec.layers if mixer_states(layer.mixer)]
    held = [layer.mixer.kernel - 1 for layer in spec.layers if isinstance(layer.mixer, ShortConv)]
    texts = {
        GENAI_FILE: to_genai(
            manifest,
            model_type=model.architecture.genai_type,
            sizes={
                "head_size": first.head_dim,
                "hidden_size": spec.hidden,
                "num_attention_heads": first.heads,
                "num_hidden_layers": len(kinds),
                "num_key_value_heads": first.kv_heads,
                **({"conv_cache_size": held[0]} if held else {}),
            },
            layer_types=kinds if len(set(kinds)) > 1 else (),
            provider=choices.target.provider,
            max_length=choices.options.max_length,
            image_token=-1 if vision is None else vision.token,
            image_start=-1 if vision is None else vision.start,
        ),
    }
    images = manifest.images
    if images is not None and ((images.tiled and not images.patch) or images.patches):
        texts[PROCESSOR_FILE] = processor_config(images)
    texts |= model.tokenizer.texts
    if plain != checkpoint.json("tokenizer_config.json"):
        texts["tokenizer_config.json"] = json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
    return texts


def _layer_type(mixer: Mixer) -> str:
    """Return what onnxruntime-genai calls a layer with ``mixer``."""
    kinds = {ShortConv: "conv", DeltaNet: "linear_attention", Mamba2: "linear_attention"}
    return kinds.get(type(mixer), "full_attention")


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
    if spec.per_layer_inputs is not None and count < len(spec.layers):
        raise BadOption(
            "num_hidden_layers does not apply: the rows of this model's per-layer embeddings are of all layers. "
            "Leave it out."
        )
    short = replace(spec, layers=spec.layers[:count])
    least = next(i for i, layer in enumerate(spec.layers) if isinstance(layer.mixer, Attention)) + 1
    if count < least:
        raise BadOption(
            f"num_hidden_layers must be {least} to {len(spec.layers)}: the layers before have no attention, and "
            f"other runtimes know how long a text is by its keys; got {count}."
        )
    return replace(architecture, decoder=short)


def _check_model(architecture: Architecture, options: BuildOptions) -> None:
    """Raise BadOption for options that do not fit the model."""
    spec, vision = architecture.decoder, architecture.vision
    if options.max_length is not None and not 1 <= options.max_length <= spec.max_tokens:
        raise BadOption(
            f"max_length must be 1 to {spec.max_tokens:,}, the model's context in tokens; got "
            f"{options.max_length:,}."
        )
    if vision is not None and vision.mutual:
        for name, given in (
            ("kv_cache", options.kv_cache != "none"),
            ("windowed_kv_cache", options.window_cache),
        ):
            if given:
                raise BadOption(
                    f"{name} does not apply: images whose tokens attend to each other both ways need a cache of "
                    "all positions, in the element type of activations. Leave it out."
                )
    if options.window_cache and any(mixer.shared is not None for mixer in spec.attentions):
        raise BadOption(
            "windowed_kv_cache does not apply: layers of this model share keys and values with earlier ones, of "
            "which nothing may be lost on the way. Leave it out."
        )
    windows = {mixer.window for mixer in spec.attentions if mixer.window is not None}
    if options.window_cache and len(windows) != 1:
        has = "layers with windows of " + " and ".join(map(str, sorted(windows))) if windows else "none"
        raise BadOption(
            "windowed_kv_cache does not apply: it needs layers with one sliding window, and the model has "
            f"{has}. Leave it out."
        )


def _check_states(spec: Decoder, choices: _Choices) -> None:
    """Raise BadOption if there are layers with states of one size, and the target or an option is not for them."""
    names = {state.name for layer in spec.layers for state in mixer_states(layer.mixer) if not state.grows}
    if not names:
        return
    target, options = choices.target, choices.options
    what = f"layers with states of one size ({', '.join(sorted(names))})"
    if not names <= target.fixed_states:
        others = [name for name, other in TARGETS.items() if names <= other.fixed_states]
        raise BadOption(
            f"this model has {what}, which have not been checked on {target.name} ({target.description}), and are "
            f"kept in main memory only. Build it with -e {' or '.join(others)}."
        )
    for name, given in (
        ("kv_cache", options.kv_cache != "none"),
        ("windowed_kv_cache", options.window_cache),
    ):
        if given:
            raise BadOption(f"{name} does not apply: this model has {what}. Leave it out.")


def installed_onnxruntime() -> tuple[int, int]:
    """Return major and minor version of the ONNX Runtime here; of one that is not known, very high ones."""
    for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml"):
        with contextlib.suppress(PackageNotFoundError):
            major, minor = version(name).split(".")[:2]
            return int(major), int(minor)
    return 999, 0
