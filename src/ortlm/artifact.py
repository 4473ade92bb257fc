"""The artifact: a folder that onnxruntime-genai loads as it is, plus ``ortlm.json``.

This file alone knows the keys of ``genai_config.json`` and ``ortlm.json``; both halves of ortlm meet here.
It imports nothing heavy: reading an artifact must be quick.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ortlm.errors import BadArtifact, BadOption, nearest

_log = logging.getLogger(__name__)

MANIFEST_FILE = "ortlm.json"
GENAI_FILE = "genai_config.json"
PROCESSOR_FILE = "processor_config.json"
ADAPTER_FOLDER = "adapters"
FORMAT = 1

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True, slots=True)
class State:
    """One tensor that a graph carries from step to step.

    ``kind`` says how it changes: ``"grow"`` gains one position per token along ``axis`` and may be one
    buffer that the graph updates in place; ``"append"`` gains positions too, but must be handed over as a
    new tensor each step; ``"window"`` is one buffer of at least ``window`` positions, however long the text is, in
    which the graph keeps the last ones. Its shape is [batch, heads, length, head_dim]; None where the graph itself
    says.
    """

    past: str
    present: str
    kind: str = "grow"
    axis: int = 2
    heads: int | None = None
    head_dim: int | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Graph:
    """One ONNX graph: its file and what each of its tensors is for.

    ``inputs`` and ``outputs`` map a role (``input_ids``, ``attention_mask``, ``position_ids``, ``logits``)
    to the tensor's name. ``optional`` does the same for inputs with a default value
    (``logits_to_keep``, ``query_lengths``).
    """

    file: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    states: tuple[State, ...]
    optional: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Images:
    """How pictures become input of the graph ``vision``, and tokens of a text.

    A view has ``side`` by ``side`` pixels; ``mean`` and ``std`` normalise its colours, which are 0 to 1. A
    picture is cut into at most ``crops`` crops besides the view of the whole, unless a caller wants another
    number; 0: it is not cut, and has ``tokens`` tokens. ``merged`` is how many tokens of a view make a row.
    ``tag`` stands for it in a text, with its number from 1 in place of ``{}``; ``before`` and ``after`` are
    put around its tokens, for which ``token`` is written once. With ``separate`` the texts between pictures
    are tokenized one by one instead, each with the tokenizer's special tokens.
    """

    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tag: str
    crops: int = 0
    merged: int = 12
    tokens: int = 0
    before: str = ""
    after: str = ""
    token: str | None = None
    separate: bool = False

    def tokens_of(self, high: int, wide: int) -> int:
        """Return how many tokens a picture has that was cut into crops, ``high`` by ``wide`` pixels together."""
        rows, columns, side = high // self.side, wide // self.side, self.merged
        return rows * side * (columns * side + 1) + 1 + side * (side + 1)


# What a picture may be cut into; more are a mistake.
MOST_CROPS = 256


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a runtime must know about an artifact; no model family is named on the way.

    ``rope_switch_tokens`` is the total length above which every position is rotated by another table, so
    that a cache filled below it has to be computed anew once (Phi-3's longrope); None if there is none.
    ``adapters`` are files of LoRA adapters within the folder, by name. ``images`` is None for models of text.
    ``prompt_tokens``: so many new tokens of a row, or more, are computed with other weights than single ones;
    None if there is one kind.
    ``generation`` holds the publisher's sampling defaults under Hugging Face's names.
    ``info`` is for people: source, recipe, sizes, target, provenance. A runtime ignores it.
    """

    graphs: Mapping[str, Graph]
    context_tokens: int
    vocab_size: int
    stop_token_ids: tuple[int, ...]
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    rope_switch_tokens: int | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    session_options: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    images: Images | None = None
    prompt_tokens: int | None = None

    def to_json(self) -> str:
        """Return the text of ``ortlm.json``."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model folder on disk."""

    path: Path
    manifest: Manifest

    def graph_path(self, name: str = "decoder") -> Path:
        """Return where the ONNX file of graph ``name`` lies."""
        return self.path / self.manifest.graphs[name].file


def open_artifact(path: str | Path) -> Artifact:
    """Open the model folder ``path``, ours or one made for onnxruntime-genai by anybody.

    Raises BadArtifact if it is no such folder, or one that is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BadArtifact(
            f"{folder} is not a folder. An artifact is what `ortlm build -o {folder}` writes, "
            f"or any folder that holds {GENAI_FILE}."
        )
    if (folder / MANIFEST_FILE).is_file():
        manifest = _manifest(read_json(folder / MANIFEST_FILE), folder / MANIFEST_FILE)
    elif (folder / GENAI_FILE).is_file():
        manifest = from_genai(read_json(folder / GENAI_FILE), folder / GENAI_FILE)
    elif (folder / "config.json").is_file():
        raise BadArtifact(
            f"{folder} is a Hugging Face checkpoint, not an artifact. Build it first: "
            f"ortlm build -i {folder} -o OUT -p int4 -e cpu"
        )
    else:
        raise BadArtifact(f"{folder} holds neither {MANIFEST_FILE} nor {GENAI_FILE}.")
    for file in (*(graph.file for graph in manifest.graphs.values()), *manifest.adapters.values()):
        if not (folder / file).is_file():
            raise BadArtifact(f"{folder / file} is missing, but the artifact's configuration names it.")
    return Artifact(folder, manifest)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``, a file of an artifact. Raises BadArtifact if it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise BadArtifact(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadArtifact(f"{path} must hold a JSON object, found {type(found).__name__}.")
    return found


def _manifest(found: dict[str, Any], path: Path) -> Manifest:
    if found.get("format") != FORMAT:
        raise BadArtifact(
            f"{path} has format {found.get('format')!r}; this ortlm reads format {FORMAT}. "
            "Build the model again, or use the ortlm version that built it."
        )
    try:
        graphs = {
            name: Graph(
                file=_inside(g["file"], path),
                inputs=_names(g["inputs"]),
                outputs=_names(g["outputs"]),
                states=tuple(_state(s) for s in g["states"]),
                optional=_names(g.get("optional") or {}),
            )
            for name, g in found["graphs"].items()
        }
        return Manifest(
            graphs=graphs,
            context_tokens=int(found["context_tokens"]),
            vocab_size=int(found["vocab_size"]),
            stop_token_ids=tuple(int(t) for t in found["stop_token_ids"]),
            pad_token_id=_integer_or_none(found.get("pad_token_id")),
            bos_token_id=_integer_or_none(found.get("bos_token_id")),
            rope_switch_tokens=_integer_or_none(found.get("rope_switch_tokens")),
            generation=_mapping(found.get("generation")),
            session_options=_mapping(found.get("session_options")),
            adapters={name: _inside(file, path) for name, file in _mapping(found.get("adapters")).items()},
            info=_mapping(found.get("info")),
            images=_images(found.get("images")),
            prompt_tokens=_integer_or_none(found.get("prompt_tokens")),
        )
    except _WRONG as error:
        raise BadArtifact(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _images(found: Any) -> Images | None:
    if found is None:
        return None
    values = dict(_mapping(found))
    for key in ("mean", "std"):
        values[key] = tuple(float(v) for v in values[key])
        if len(values[key]) != 3:
            raise ValueError(f"images.{key} must have three numbers")
    for key in ("side", "crops", "merged", "tokens"):
        _integer(values.get(key, 0))
    images = Images(**values)
    if not 0 <= images.crops <= MOST_CROPS or images.side < 1 or not (images.crops or images.tokens):
        raise ValueError(f"images is {found!r}")
    return images


def _state(found: dict[str, Any]) -> State:
    state = State(**found)
    if state.kind == "window" and _integer(state.window) < 1:
        raise ValueError(f"the window of {state.past} must be at least 1, found {state.window}")
    return state


# What reading a value of another type than expected may raise.
_WRONG = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


def _mapping(found: Any) -> dict[str, Any]:
    """Return an object of JSON, empty for null; ``TypeError`` for anything else."""
    if found is not None and not isinstance(found, dict):
        raise TypeError(f"expected an object, found {found!r}")
    return found or {}


def _names(found: Any) -> dict[str, str]:
    names = _mapping(found)
    for role, name in names.items():
        if not isinstance(name, str):
            raise TypeError(f"expected the name of a tensor for {role!r}, found {name!r}")
    return names


def _integer(found: Any) -> int:
    if isinstance(found, bool) or not isinstance(found, int):
        raise TypeError(f"expected a whole number, found {found!r}")
    return found


def _integer_or_none(found: Any) -> int | None:
    return None if found is None else _integer(found)


def _inside(name: str, config: Path) -> str:
    """Return ``name`` if it stays within the artifact's folder."""
    if not isinstance(name, str):
        raise TypeError(f"expected the name of a file, found {name!r}")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BadArtifact(f"{config} names the file {name!r}, which lies outside the artifact's folder.")
    return name


# --- genai_config.json ------------------------------------------------------------------------------------

_GENAI_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
_GENAI_OUTPUTS = ("logits", "hidden_states")
# genai rewinds at these lengths for these model types; the numbers are fixed in its C++ source.
_MOST_LAYERS = 10_000
_GENAI_ROPE_SWITCH = {"phi3": 4096, "phi3v": 4096, "phimoe": 4096, "phi3small": 8192}
# Names of tensors that a configuration may leave out.
_GENAI_PARTS = {
    "vision": (
        {"pixel_values": "pixel_values", "image_sizes": "image_sizes"},
        {"image_features": "image_features"},
    ),
    "embedding": (
        {"input_ids": "input_ids", "image_features": "image_features"},
        {"inputs_embeds": "inputs_embeds"},
    ),
}
# How pictures are read by model types of several graphs; the configuration does not say.
_GENAI_IMAGES = {
    "phi3v": Images(
        side=336,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        tag="<|image_{}|>",
        crops=16,
        separate=True,
    )
}


def from_genai(found: dict[str, Any], path: Path) -> Manifest:
    """Read a manifest out of the ``genai_config.json`` that lies at ``path``.

    Raises BadArtifact for models of several graphs that are not known, for missing keys and for values of a
    wrong type.
    """
    try:
        return _from_genai(found, path)
    except _WRONG as error:
        raise BadArtifact(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _from_genai(found: dict[str, Any], path: Path) -> Manifest:
    model = _mapping(found["model"])
    decoder = _mapping(model["decoder"])
    search = _mapping(found.get("search"))
    if "pipeline" in decoder:
        raise BadArtifact(f"{path} describes a model split into a pipeline, which is not supported.")
    context = _integer(model["context_length"])
    if context <= 0:
        raise BadArtifact(f"{path}: model.context_length must be a positive integer, found {context!r}.")
    stop = model.get("eos_token_id", model.get("pad_token_id", []))
    names_in, names_out = _names(decoder.get("inputs")), _names(decoder.get("outputs"))
    inputs = {role: names_in[role] for role in _GENAI_INPUTS if role in names_in}
    outputs = {role: names_out[role] for role in _GENAI_OUTPUTS if role in names_out}
    graph = Graph(
        file=_inside(decoder.get("filename", "model.onnx"), path),
        inputs=inputs or {"input_ids": "input_ids", "attention_mask": "attention_mask"},
        outputs=outputs or {"logits": "logits"},
        states=_genai_states(
            decoder, names_in, names_out, shared=bool(search.get("past_present_share_buffer"))
        ),
    )
    reach = _genai_reach(decoder, context, shared=bool(search.get("past_present_share_buffer")))
    switch = _GENAI_ROPE_SWITCH.get(str(model.get("type")))
    graphs = {"decoder": graph}
    images = _GENAI_IMAGES.get(str(model.get("type")))
    for name in _GENAI_PARTS if images is not None and "embedding" in model else ():
        part = _mapping(model[name])
        graphs[name] = Graph(
            file=_inside(part["filename"], path),
            inputs={**_GENAI_PARTS[name][0], **_names(part.get("inputs"))},
            outputs={**_GENAI_PARTS[name][1], **_names(part.get("outputs"))},
            states=(),
        )
    return Manifest(
        graphs=graphs,
        images=images if "vision" in graphs else None,
        context_tokens=reach,
        vocab_size=_integer(model.get("vocab_size", 0)),
        stop_token_ids=tuple(_integer(token) for token in (stop if isinstance(stop, list) else [stop])),
        pad_token_id=_integer_or_none(model.get("pad_token_id")),
        bos_token_id=_integer_or_none(model.get("bos_token_id")),
        rope_switch_tokens=switch if switch and reach > switch else None,
        generation={
            key: search[key]
            for key in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
            if key in search
        },
        info={"model_type": model.get("type")},
    )


def _genai_states(
    decoder: dict[str, Any], names_in: dict[str, str], names_out: dict[str, str], *, shared: bool
) -> tuple[State, ...]:
    layers = _integer(decoder["num_hidden_layers"])
    if not 0 < layers <= _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers must be 1 to {_MOST_LAYERS}, found {layers}")
    # Only graphs with buffers that are updated in place evict.
    windows = _genai_windows(decoder) if shared else {}
    states = []
    for part in ("key", "value"):
        past = names_in.get(f"past_{part}_names", f"past_key_values.%d.{part}")
        present = names_out.get(f"present_{part}_names", f"present.%d.{part}")
        for pattern in (past, present):
            if pattern.count("%") != 1 or "%d" not in pattern:
                raise ValueError(f"the name of a cache tensor must hold one %d, found {pattern!r}")
        states += [
            State(
                past % layer,
                present % layer,
                "window" if layer in windows else "grow" if shared else "append",
                heads=_integer_or_none(decoder.get("num_key_value_heads")),
                head_dim=_integer_or_none(decoder.get("head_size")),
                window=windows.get(layer),
            )
            for layer in range(layers)
        ]
    return tuple(states)


def _genai_windows(decoder: dict[str, Any]) -> dict[int, int]:
    """Return the windows, by layer, of the layers whose graph evicts from buffers by itself.

    onnxruntime-genai's builder writes ``cache_slack`` since it makes such graphs (0.18), for CPU and CUDA. Graphs
    for TensorRT say the same and evict elsewhere; those keep full buffers, and so do older ones.
    """
    window = _mapping(decoder.get("sliding_window"))
    if window.get("slide_key_value_cache") is not False or "cache_slack" not in window:
        return {}
    options = _mapping(decoder.get("session_options")).get("provider_options") or []
    if not {name.lower() for entry in options for name in _mapping(entry)} <= {"cpu", "cuda"}:
        return {}
    size = _integer(window["window_size"])
    return dict.fromkeys(map(_integer, window.get("layers") or ()), size) if size > 0 else {}


def _genai_reach(decoder: dict[str, Any], context: int, *, shared: bool) -> int:
    """Return how many tokens the graph is right for.

    Of onnxruntime-genai's builder (0.18), only graphs with buffers that are updated in place apply windows, and
    only those of single layers, which the configuration lists. A window that holds for all layers, or in a graph
    of the other kind, is in the configuration alone: such a graph attends to everything. Up to the window that
    is the same; beyond it, it would be another model.
    """
    window = _mapping(decoder.get("sliding_window"))
    if not window or (shared and window.get("layers")):
        return context
    reach = min(context, _integer(window.get("window_size", context)))
    if 0 < reach < context:
        _log.warning(
            "the graph does not apply the model's sliding window of %d tokens, so its context ends there; "
            "a build by ortlm has no such limit",
            reach,
        )
        return reach
    return context


def graph_named(manifest: Manifest, name: str) -> Graph:
    """Return the graph called ``name`` or raise BadArtifact with the names there are."""
    if name not in manifest.graphs:
        raise BadArtifact(
            f"the artifact has no graph {name!r}; it has {', '.join(manifest.graphs)}."
            + nearest(name, manifest.graphs)
        )
    return manifest.graphs[name]


def genai_config(
    manifest: Manifest, *, model_type: str, sizes: Mapping[str, int], provider: str | None
) -> str:
    """Return the text of ``genai_config.json``, which describes the same model to onnxruntime-genai.

    ``sizes`` has head_size, hidden_size, num_attention_heads, num_key_value_heads and num_hidden_layers;
    ``provider`` is the execution provider to name, None for the CPU.
    """
    decoder = manifest.graphs["decoder"]
    stop = list(manifest.stop_token_ids)
    first = manifest.generation
    inputs = dict(decoder.inputs)
    outputs = dict(decoder.outputs)
    for part in ("key", "value"):
        inputs[f"past_{part}_names"] = f"past_key_values.%d.{part}"
        outputs[f"present_{part}_names"] = f"present.%d.{part}"
    # States come layer by layer, key and value.
    layers = sorted({i // 2 for i, state in enumerate(decoder.states) if state.kind == "window"})
    windows = {
        "window_size": max((state.window or 0 for state in decoder.states), default=0),
        "slide_key_value_cache": False,
        "slide_inputs": False,
        "layers": layers,
        "cache_slack": 0,
    }
    # The official runtime allocates the cache for max_length at once; the whole context of a long model
    # would take more memory than most machines have. A caller who needs more says so.
    length = min(manifest.context_tokens, 4096)
    config: dict[str, Any] = {
        "model": {
            **({} if manifest.bos_token_id is None else {"bos_token_id": manifest.bos_token_id}),
            "context_length": manifest.context_tokens,
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "provider_options": [{provider: {}}] if provider else [],
                },
                "filename": decoder.file,
                **sizes,
                "inputs": inputs,
                "outputs": outputs,
                **({"sliding_window": windows} if layers else {}),
            },
            "eos_token_id": stop if len(stop) != 1 else stop[0],
            "pad_token_id": manifest.pad_token_id if manifest.pad_token_id is not None else stop[0],
            "type": model_type,
            "vocab_size": manifest.vocab_size,
        },
        "search": {
            "diversity_penalty": 0.0,
            "do_sample": bool(first.get("do_sample", False)),
            "early_stopping": True,
            "length_penalty": 1.0,
            "max_length": length,
            "min_length": 0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": float(first.get("repetition_penalty", 1.0)),
            "temperature": float(first.get("temperature", 1.0)),
            "top_k": int(first.get("top_k", 50)),
            "top_p": float(first.get("top_p", 1.0)),
        },
    }
    if manifest.images is not None:
        for name in _GENAI_PARTS:
            graph = manifest.graphs[name]
            config["model"][name] = {
                "filename": graph.file,
                "inputs": dict(graph.inputs),
                "outputs": dict(graph.outputs),
            }
    return json.dumps(config, indent=4) + "\n"


def processor_config(images: Images) -> str:
    """Return the text of ``processor_config.json``, by which onnxruntime-genai reads pictures in crops.

    It takes the publisher's mean and deviation, and cuts every picture into 16 crops at most, whatever stands
    here.
    """

    def step(name: str, kind: str, **attributes: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"name": name, "domain": "com.microsoft.extensions", "type": kind}
        return {"operation": {**found, **({"attrs": attributes} if attributes else {})}}

    transforms = [
        step("decode_image", "DecodeImage", color_space="BGR"),
        step("convert_to_rgb", "ConvertRGB"),
        step("phi3_image_transform", "Phi3ImageTransform", num_crops=images.crops, num_img_tokens=144),
    ]
    config = {"processor": {"name": "image_processing", "transforms": transforms}}
    return json.dumps(config, indent=4) + "\n"


# --- a configuration that a program changes before it loads the model -------------------------------------

# Every key with its default in onnxruntime-genai 0.18; 0 for max_length is the whole context.
GENAI_SEARCH: Mapping[str, bool | int | float] = {
    "batch_size": 1,
    "blank_penalty": 0.0,
    "chunk_size": 0,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": True,
    "length_penalty": 1.0,
    "max_length": 0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "past_present_share_buffer": False,
    "random_seed": -1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 0.0,
}
GENAI_SPECULATIVE: Mapping[str, bool | int | float] = {
    "max_draft_tokens": 4,
    "ngram_size": 0,
    "ngram_chained_lookup": False,
    "min_adaptive_k": 0,
    "cooldown": False,
}
_ANY = "any"
_DECODER_KEYS = (
    "filename hidden_size num_attention_heads num_key_value_heads num_hidden_layers head_size layer_types "
    "conv_cache_size shared_initializers pipeline state_groups state_update_capacity"
)
_MODEL_KEYS = (
    "type tokenizer_dir pad_token_id eos_token_id bos_token_id sep_token_id decoder_start_token_id "
    "image_token_id audio_token_id boa_token_id video_token_id vision_start_token_id bot_token_id eot_token_id "
    "bor_token_id eor_token_id vocab_size context_length"
)
_PART_KEYS = (
    "encoder draft embedding vision speech joiner vad mtp moonshine dflash2 dspark depthformer audio_output"
)
# None is a value or a list; ``_ANY`` an object whose keys nobody checks.
_GENAI_KEYS: Mapping[str, Any] = {
    "model": {
        **dict.fromkeys(_MODEL_KEYS.split()),
        **dict.fromkeys(_PART_KEYS.split(), _ANY),
        "decoder": {
            **dict.fromkeys(_DECODER_KEYS.split()),
            **dict.fromkeys(("session_options", "run_options", "sliding_window", "inputs", "outputs"), _ANY),
        },
    },
    "search": dict.fromkeys(GENAI_SEARCH),
    "speculative": dict.fromkeys(GENAI_SPECULATIVE),
    "engine": _ANY,
    "runtime_profiles": None,
}


@dataclass(frozen=True, slots=True)
class GenaiFacts:
    """What only ``genai_config.json`` says.

    ``search`` and ``speculative`` have every key, defaults included. ``marks`` are the ids that begin and end
    tool calls and reasoning (bot_token_id, eot_token_id, bor_token_id, eor_token_id), those that are named.
    ``providers`` are execution providers with their options, in order of preference.
    """

    model_type: str
    search: Mapping[str, bool | int | float]
    speculative: Mapping[str, bool | int | float]
    marks: Mapping[str, int]
    providers: tuple[tuple[str, Mapping[str, str]], ...]


def read_genai(folder: Path) -> dict[str, Any]:
    """Return the contents of the ``genai_config.json`` in ``folder``. Raises BadArtifact if there is none."""
    if not (folder / GENAI_FILE).is_file():
        raise BadArtifact(
            f"{folder / GENAI_FILE} is missing. Give the folder of a model, as `ortlm build` or "
            "onnxruntime-genai's builder writes it."
        )
    return read_json(folder / GENAI_FILE)


def overlay_genai(found: Mapping[str, Any], changes: Any) -> dict[str, Any]:
    """Return a configuration with ``changes`` of the same form: values replace, items of lists are added.

    Raises BadOption for keys that are not known and for values of another kind than the known one.
    """
    return _overlaid(found, changes, _GENAI_KEYS, "")


def genai_facts(found: dict[str, Any], path: Path) -> GenaiFacts:
    """Read the facts out of the contents of the file ``path``. Raises BadArtifact for values of a wrong type."""
    try:
        model = _mapping(found["model"])
        marks = ("bot_token_id", "eot_token_id", "bor_token_id", "eor_token_id")
        return GenaiFacts(
            model_type=str(model.get("type", "")),
            search=_filled(GENAI_SEARCH, _mapping(found.get("search"))),
            speculative=_filled(GENAI_SPECULATIVE, _mapping(found.get("speculative"))),
            marks={name: _integer(model[name]) for name in marks if model.get(name) is not None},
            providers=tuple(_genai_providers(found).items()),
        )
    except _WRONG as error:
        raise BadArtifact(f"{path} is damaged: {type(error).__name__}: {error}") from error


def with_genai_providers(
    found: Mapping[str, Any], providers: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Return a configuration that names these execution providers with their options, and no others."""
    model = dict(found.get("model") or {})
    decoder = dict(model.get("decoder") or {})
    options = dict(decoder.get("session_options") or {})
    options["provider_options"] = [{name: dict(values)} for name, values in providers.items()]
    return {**found, "model": {**model, "decoder": {**decoder, "session_options": options}}}


def genai_artifact(folder: Path, found: dict[str, Any]) -> Artifact:
    """Return the artifact in ``folder`` as the configuration ``found`` describes it.

    It decides whatever it names; what it cannot say, such as optional inputs, comes from ``ortlm.json``. The
    publisher's sampling defaults are left out: they are in the facts' ``search``.
    """
    path = folder / GENAI_FILE
    manifest = from_genai(found, path)
    theirs, options = manifest.graphs["decoder"], _genai_session_options(found, path)
    if (folder / MANIFEST_FILE).is_file():
        own = _manifest(read_json(folder / MANIFEST_FILE), folder / MANIFEST_FILE)
        decoder = replace(
            graph_named(own, "decoder"),
            file=theirs.file,
            inputs=theirs.inputs,
            outputs={**graph_named(own, "decoder").outputs, **theirs.outputs},
        )
        manifest = replace(
            own,
            graphs={**own.graphs, "decoder": decoder},
            context_tokens=manifest.context_tokens,
            stop_token_ids=manifest.stop_token_ids,
            pad_token_id=manifest.pad_token_id,
            bos_token_id=manifest.bos_token_id,
        )
    if not (folder / theirs.file).is_file():
        raise BadArtifact(f"{folder / theirs.file} is missing, but {path} names it.")
    options = {**manifest.session_options, **options}
    return Artifact(folder, replace(manifest, session_options=options, generation={}))


def _overlaid(old: Mapping[str, Any], new: Any, known: Any, place: str) -> dict[str, Any]:
    if not isinstance(new, dict):
        raise BadOption(f"the overlay must hold an object{place and f' at {place}'}, found {new!r}.")
    out = dict(old)
    for key, value in new.items():
        where = f"{place}.{key}".lstrip(".")
        if known != _ANY and key not in known and key not in old:
            raise BadOption(f"an overlay knows no key {where!r}." + nearest(key, {*known, *old}))
        inner, before = _ANY if known == _ANY else known.get(key), old.get(key)
        if isinstance(inner, dict) or isinstance(before, dict) or (inner == _ANY and isinstance(value, dict)):
            out[key] = _overlaid(before or {}, value, inner or _ANY, where)
        elif isinstance(value, list):
            out[key] = [*(before if isinstance(before, list) else [] if before is None else [before]), *value]
        else:
            out[key] = _checked(where, value, before)
    return out


def _checked(where: str, value: Any, before: Any) -> Any:
    """Return ``value`` if it is of the kind that the key ``where`` takes, else raise BadOption."""
    section, _, key = where.rpartition(".")
    known: Mapping[str, Any] = {"search": GENAI_SEARCH, "speculative": GENAI_SPECULATIVE}.get(section, {})
    model = known.get(key, before[0] if isinstance(before, list) and before else before)
    if model is None or isinstance(model, (list, dict)):
        return value
    wanted, fits = "text", isinstance(value, str)
    if isinstance(model, bool):
        wanted, fits = "true or false", isinstance(value, bool)
    elif isinstance(model, (int, float)):
        wanted, fits = "a number", isinstance(value, (int, float)) and not isinstance(value, bool)
        if isinstance(model, int) and key in known:
            wanted, fits = "a whole number", fits and float(value).is_integer()
    if not fits:
        raise BadOption(f"{where} must be {wanted}, found {value!r}.")
    return int(value) if wanted == "a whole number" else value


def _filled(defaults: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``defaults`` with the values of ``found``, which must be of the same kind. ``TypeError`` if not."""
    out = dict(defaults)
    for key, value in found.items():
        if key not in defaults or value is None:
            continue
        if isinstance(value, bool) != isinstance(defaults[key], bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{key} is {value!r}")
        out[key] = value
    return out


def _genai_providers(found: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    decoder = _mapping(_mapping(found.get("model")).get("decoder"))
    listed = _mapping(decoder.get("session_options")).get("provider_options") or []
    out: dict[str, dict[str, str]] = {}
    for entry in listed:
        for name, values in _mapping(entry).items():
            out.setdefault(name, {}).update({key: str(value) for key, value in _mapping(values).items()})
    return out


def _genai_session_options(found: Mapping[str, Any], path: Path) -> dict[str, Any]:
    decoder = _mapping(_mapping(found.get("model")).get("decoder"))
    options = dict(_mapping(decoder.get("session_options")))
    if options.pop("custom_ops_library", None):
        raise BadArtifact(f"{path} asks for a library of custom operators, which is not supported.")
    # Providers are chosen elsewhere, and the id only labels the lines of a log.
    return {key: value for key, value in options.items() if key not in ("provider_options", "log_id")}
