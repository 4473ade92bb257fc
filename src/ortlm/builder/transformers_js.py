"""The folder that transformers.js loads (--layout transformers.js): its dtypes, its files, and what cannot be.

transformers.js finds everything by name: settings and tokenizer at the top, a graph for each of its dtypes in
``onnx/``, weights next to the graph. Read in version 4.3.1, and run with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ortlm._utils.formatting import readable_bytes
from ortlm.artifact import Graph, Manifest, read_templates
from ortlm.builder.options import BuildOptions, without_quantization
from ortlm.builder.request import BuildRequest
from ortlm.builder.tokenizer_files import TokenizerFiles
from ortlm.checkpoint.reader import Checkpoint
from ortlm.errors import BadCheckpoint, BadOption, UnsupportedModel, nearest
from ortlm.graph.weight_plan import Plan
from ortlm.spec import Architecture, Attention, Decoder, Experts, mixer_states
from ortlm.target import BROWSER, PRECISIONS, Target
from ortlm.weights.writer import Layout

GENAI_LAYOUT, LAYOUT = "onnxruntime-genai", "transformers.js"
FOLDER = "onnx"
CONFIG_FILE, GENERATION_FILE, TOKENIZER_CONFIG_FILE = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
)
# The types of models of text in its list that were run with it.
TYPES = frozenset(
    {
        "apertus",
        "arcee",
        "cohere",
        "cohere2",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "granite",
        "helium",
        "hunyuan_v1_dense",
        "llama",
        "ministral",
        "ministral3",
        "mistral",
        "olmo2",
        "olmo3",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)
# transformers.js reads a file of weights into one array, and browsers bound those: Chromium at 0x7fe00000 bytes.
MOST_FILE_BYTES = 2_000_000_000
_MOST_FILES = 100


@dataclass(frozen=True, slots=True)
class Dtype:
    """What a dtype of transformers.js is: a precision, the element type of activations, the end of file names."""

    precision: str
    activations: str
    suffix: str


DTYPES: Mapping[str, Dtype] = {
    "q4": Dtype("int4", "fp32", "_q4"),
    "q4f16": Dtype("int4", "fp16", "_q4f16"),
    "q8": Dtype("int8", "fp32", "_quantized"),
    "fp16": Dtype("fp16", "fp16", "_fp16"),
    "fp32": Dtype("fp32", "fp32", ""),
}
_INSTEAD = {"int4": "q4 (or q4f16, which computes in fp16)", "int8": "q8", "bf16": "fp16"}


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of weights next to its graph: its name, and where it starts in the weights as a whole, in bytes."""

    name: str
    start: int


def laid_out(
    request: BuildRequest, layout: str | None, precision: str | None, target: str | None
) -> list[BuildRequest]:
    """Return ``request`` with ``precision`` and ``target`` for the folder of ``layout``, once for each dtype.

    None means int4 for the processor, in a folder for ortlm and onnxruntime-genai; with the layout of
    transformers.js it means q4. Raises BadOption for a layout that is not known, and for dtypes of another one.
    """
    if layout in (None, GENAI_LAYOUT):
        precision = precision or request.precision
        if precision not in PRECISIONS and set(precision.split(",")) & set(DTYPES):
            raise BadOption(
                f"-p {precision} names dtypes of transformers.js. Add --layout {LAYOUT}, or choose one of "
                f"{', '.join(PRECISIONS)}."
            )
        return [replace(request, precision=precision, target=target or request.target)]
    if layout != LAYOUT:
        raise BadOption(
            f"there is no layout {layout!r}; there are {GENAI_LAYOUT} and {LAYOUT}."
            + nearest(str(layout), (GENAI_LAYOUT, LAYOUT))
        )
    if target is not None:
        raise BadOption(
            f"--layout {LAYOUT} takes no -e {target}: each graph runs on WebAssembly and on WebGPU. Leave -e out."
        )
    names = [name.strip() for name in ("q4" if precision is None else precision).split(",")]
    for name in names:
        if name not in DTYPES:
            hint = f" Nearest: -p {_INSTEAD[name]}." if name in _INSTEAD else nearest(name.lower(), DTYPES)
            raise BadOption(
                f"there is no dtype {name!r} with --layout {LAYOUT}; -p takes {', '.join(DTYPES)}, or several of "
                f"them separated by commas.{hint}"
            )
    if len(set(names)) < len(names):
        raise BadOption(f"-p {precision} names a dtype twice.")
    return [
        replace(request, dtype=name, precision=DTYPES[name].precision, target=BROWSER.name) for name in names
    ]


def with_options(requests: Sequence[BuildRequest], options: BuildOptions) -> list[BuildRequest]:
    """Return ``requests`` with ``options``; what shapes quantized weights goes to quantized dtypes, if any is."""

    def quantized(request: BuildRequest) -> bool:
        return request.precision in ("int4", "int8")

    any_is = any(map(quantized, requests))
    plain = without_quantization(options) if any_is else options
    return [replace(one, options=options if quantized(one) else plain) for one in requests]


def choices(request: BuildRequest) -> tuple[str, Target, BuildOptions]:
    """Return precision, target and options of the graph for ``request.dtype``.

    Raises BadOption for options that mean nothing here, by name.
    """
    assert request.dtype is not None
    dtype, options = DTYPES[request.dtype], request.options
    usual = BuildOptions()
    for name, given, why in (
        (
            "use_webgpu_fp32",
            options.fp32_activations,
            "q4, q8 and fp32 compute in fp32, q4f16 and fp16 in fp16",
        ),
        ("filename", options.filename != usual.filename, "transformers.js finds files by their dtype"),
        ("config_only", options.config_only, "the settings name the files of the weights"),
        ("prune_lm_head=false", options.all_logits, "transformers.js says how many logits it wants"),
        ("include_hidden_states", options.hidden_states, "transformers.js reads logits only"),
        ("max_length", options.max_length is not None, "it is a setting of onnxruntime-genai"),
        ("session_options", bool(options.session_options), "the page sets them"),
        (
            "adapter",
            bool(request.adapters),
            "transformers.js switches none; --merge-adapter adds one to the weights",
        ),
    ):
        if given:
            raise BadOption(f"{name} does not apply with --layout {LAYOUT}: {why}. Leave it out.")
    target = replace(BROWSER, precisions={dtype.precision: dtype.activations})
    return dtype.precision, target, replace(options, filename=f"{FOLDER}/model{dtype.suffix}.onnx")


def for_browsers(architecture: Architecture, config: Mapping[str, Any]) -> Architecture:
    """Return ``architecture``, of a checkpoint with ``config``, as transformers.js can run it.

    Raises UnsupportedModel for models that it does not know, and for those with images.
    """
    if architecture.vision is not None:
        raise UnsupportedModel(
            f"--layout {LAYOUT} is for models of text: transformers.js cuts models with images into other graphs. "
            "Leave --layout out, and run the folder with ortlm."
        )
    spec = architecture.decoder
    if any(not state.grows for layer in spec.layers for state in mixer_states(layer.mixer)):
        raise UnsupportedModel(
            f"--layout {LAYOUT} is for models of attention alone: this one has layers with states of one size, "
            "for which transformers.js has other graphs. Leave --layout out, and run the folder with ortlm."
        )
    kind = config.get("model_type")
    # Mixtures of experts are refused for what computes them, whatever their type.
    if kind not in TYPES and not any(isinstance(layer.ffn, Experts) for layer in spec.layers):
        raise UnsupportedModel(
            f"--layout {LAYOUT}: transformers.js 4.3.1 has no text model of the type {kind!r}. "
            "Leave --layout out, and run the folder with ortlm."
        )
    switches = [
        mixer.rope.switch_tokens
        for mixer in spec.attentions
        if mixer.rope is not None and mixer.rope.switch_tokens is not None
    ]
    if not switches:
        return architecture
    # Beyond it every key in the cache would have to be rotated again, of which transformers.js knows nothing.
    switch = min(switches)
    note = (
        f"the context ends at {switch:,} tokens ({spec.max_tokens:,} before): beyond them longrope rotates all "
        "positions by other frequencies, and transformers.js does not compute its cache again for that."
    )
    return replace(architecture, decoder=_short(spec, switch), notes=(*architecture.notes, note))


def _short(spec: Decoder, switch: int) -> Decoder:
    """Return ``spec`` with a context that ends where its rotation would change."""
    layers = []
    for layer in spec.layers:
        mixer = layer.mixer
        if isinstance(mixer, Attention) and mixer.rope is not None:
            mixer = replace(mixer, rope=replace(mixer.rope, long_inv_freq=None, switch_tokens=None))
        layers.append(replace(layer, mixer=mixer))
    return replace(spec, layers=tuple(layers), max_tokens=min(switch, spec.max_tokens))


def data_files(graph: str, layout: Layout, plan: Plan) -> tuple[DataFile, ...]:
    """Return the files for the weights of the graph in the file ``graph``, none longer than browsers hold.

    Raises BadOption for a tensor that is too long for one file.
    """
    starts = [0]
    tensors = [tensor for item in plan.items for tensor in item.tensors]
    for tensor in sorted(tensors, key=lambda t: layout.offsets[t.name]):
        at = layout.offsets[tensor.name]
        if tensor.bytes > MOST_FILE_BYTES:
            raise BadOption(
                f"{tensor.name} takes {readable_bytes(tensor.bytes)}, and browsers hold at most "
                f"{readable_bytes(MOST_FILE_BYTES)} in one piece. Choose a dtype with fewer bits: -p q4 or q4f16."
            )
        if at + tensor.bytes - starts[-1] > MOST_FILE_BYTES:
            starts.append(at)
    if len(starts) > _MOST_FILES:
        raise BadOption(
            f"the weights take {readable_bytes(layout.bytes)}, more than the {_MOST_FILES} files that "
            "transformers.js reads hold. Choose a dtype with fewer bits: -p q4 or q4f16."
        )
    name = graph.rsplit("/", 1)[-1]
    return tuple(DataFile(f"{name}_data" + (f"_{i}" if i else ""), start) for i, start in enumerate(starts))


def texts(
    checkpoint: Checkpoint, tokenizer: TokenizerFiles, settings: Mapping[str, Any], manifest: Manifest
) -> dict[str, str]:
    """Return generation settings and tokenizer settings as transformers.js reads them.

    ``settings`` is what tokenizer_config.json says elsewhere.
    """
    generation = {
        **checkpoint.json(GENERATION_FILE),
        "bos_token_id": manifest.bos_token_id,
        # Every token that ends an answer, whichever file of the checkpoint names it.
        "eos_token_id": list(manifest.stop_token_ids),
        "pad_token_id": manifest.pad_token_id,
    }
    plain = dict(settings)
    if "chat_template" not in plain:
        # Files with templates are not read.
        named = read_templates(checkpoint.folder, BadCheckpoint)
        if named:
            plain["chat_template"] = named.get("default", next(iter(named.values())))
    # A pipeline leaves special tokens out of plain text unless one of these says that the tokenizer adds some.
    # They change nothing else: which tokens are added is written in tokenizer.json.
    inner = tokenizer.opened.inner
    bare, full = inner.encode("a", add_special_tokens=False).ids, inner.encode("a").ids
    plain["add_bos_token"] = len(full) > len(bare) and full[: len(bare)] != bare
    plain["add_eos_token"] = len(full) > len(bare) and full[-len(bare) :] != bare
    return {GENERATION_FILE: _json(generation), TOKENIZER_CONFIG_FILE: _json(plain)}


def config_text(checkpoint: Checkpoint, spec: Decoder, files: Mapping[str, Sequence[DataFile]]) -> str:
    """Return config.json: the checkpoint's, as far as the model was built, and which files there are.

    ``files`` are those of each graph, the default one first.
    """
    first = next(iter(files)).rsplit("/", 1)[-1]
    default = next(name for name, dtype in DTYPES.items() if first == f"model{dtype.suffix}.onnx")
    return _json(
        {
            **checkpoint.config,
            "num_hidden_layers": len(spec.layers),
            "max_position_embeddings": spec.max_tokens,
            "transformers.js_config": {
                "dtype": default,
                "use_external_data_format": {
                    graph.rsplit("/", 1)[-1]: len(parts) for graph, parts in files.items()
                },
            },
        }
    )


def together(manifests: Mapping[str, Manifest]) -> Manifest:
    """Return the manifest of a folder with the graphs of several dtypes, of which ortlm runs the first."""
    first = next(iter(manifests.values()))
    graphs: dict[str, Graph] = {}
    for name, manifest in manifests.items():
        graphs["decoder" if manifest is first else f"decoder_{name}"] = manifest.graphs["decoder"]
    facts = {name: manifest.info for name, manifest in manifests.items()}
    shown = ("precision", "activations", "recipe", "recipe_name", "bits_per_weight", "calibration", "check")
    dtypes = {name: {key: info[key] for key in shown if key in info} for name, info in facts.items()}
    return replace(first, graphs=graphs, info={**first.info, "layout": LAYOUT, "dtypes": dtypes})


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
