"""``genai_config.json``, by which onnxruntime-genai knows a model: read, and written."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ortlm._utils.checked_json import shown
from ortlm._utils.formatting import printable
from ortlm.artifact.fields import check_stops
from ortlm.artifact.genai_keys import checked_genai
from ortlm.artifact.json_values import WRONG, inside, mapping, read_json
from ortlm.artifact.manifest import TOKENIZER_FILES, Graph, Images, Manifest, State
from ortlm.artifact.session_options import genai_session_options
from ortlm.errors import BadArtifact

_log = logging.getLogger(__name__)

_GENAI_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
_GENAI_OUTPUTS = ("logits", "hidden_states")
# What the official runtime feeds under these names, whether a configuration names them or not.
_GENAI_DEFAULTS = ("input_ids", "attention_mask", "position_ids")
_KEEP = "num_logits_to_keep"
# genai rewinds at these lengths for these model types; the numbers are fixed in its C++ source.
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
# An input of the vision encoder that the official runtime does not know, and so refuses to find here.
_PADDING = "image_patches"
# How images are read by model types of several graphs; the configuration does not say.
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


def from_genai(found: Mapping[str, Any], path: Path, *, own: bool = False) -> Manifest:
    """Read a manifest out of the ``genai_config.json`` that lies at ``path``.

    ``own``: ortlm wrote the folder, whose ``ortlm.json`` says more.
    Raises BadArtifact, with the key's name, for what is not supported, for missing keys and for wrong values.
    """
    try:
        return _from_genai(checked_genai(found, path, own=own), path, own=own)
    except WRONG as error:
        raise BadArtifact(f"{path} is damaged: {type(error).__name__}: {error}") from error


def tokenizer_folder(found: Mapping[str, Any], path: Path) -> str:
    """Return where in the folder of the configuration ``found`` the tokenizer's files lie, "" next to the graphs.

    Raises BadArtifact for a folder that is not there, and for files that lie outside.
    """
    name = mapping(found.get("model")).get("tokenizer_dir") or ""
    try:
        there = (path.parent / name).is_dir()
    except (OSError, ValueError):
        there = False
    if not there:
        raise BadArtifact(f"{path}: model.tokenizer_dir is {shown(name)}, no folder within {path.parent}.")
    for file in TOKENIZER_FILES if name else ():
        inside(f"{name}/{file}", path)
    return str(name)


def settled(graph: Graph, inputs: Collection[str], outputs: Collection[str]) -> Graph:
    """Return ``graph`` with those of the ONNX graph's tensors that a configuration need not name.

    ``inputs`` and ``outputs`` are the names of the tensors that there are.
    """
    # Configurations name a mask and positions for graphs that need neither.
    kept = {
        role: name
        for role, name in graph.inputs.items()
        if name in inputs or role not in ("attention_mask", "position_ids")
    }
    named = {*kept.values(), *graph.optional.values()}
    return replace(
        graph,
        inputs={**{role: role for role in _GENAI_DEFAULTS if role in inputs and role not in named}, **kept},
        outputs={**{role: role for role in _GENAI_OUTPUTS if role in outputs}, **graph.outputs},
        optional={
            **({"columns_to_keep": _KEEP} if _KEEP in inputs and _KEEP not in named else {}),
            **graph.optional,
        },
    )


def read_genai_config(path: Path) -> dict[str, Any]:
    """Return the contents of the ``genai_config.json`` at ``path``, without what an artifact does not decide.

    Raises BadArtifact if it cannot be read, or sets options of ONNX Runtime that no artifact sets.
    """
    found = read_json(path)
    parts = found.get("model")
    for name, part in parts.items() if isinstance(parts, dict) else ():
        if isinstance(part, dict) and part.get("session_options") is not None:
            part["session_options"] = genai_session_options(
                part["session_options"], path, f"model.{printable(name)}.session_options"
            )
    return found


def _from_genai(found: Mapping[str, Any], path: Path, *, own: bool) -> Manifest:
    model, decoder = found["model"], found["model"]["decoder"]
    search = found.get("search", {})
    shared = bool(search.get("past_present_share_buffer"))
    kind = str(model.get("type", ""))
    images = _GENAI_IMAGES.get(kind)
    parts = [name for name in _GENAI_PARTS if model.get(name)]
    if parts and images is None and not own:
        raise BadArtifact(
            f"{path} has model.{parts[0]}: a model of type {kind!r} that reads images or embeddings. Of those "
            f"that others built, {', '.join(_GENAI_IMAGES)} is supported; build the model with ortlm instead."
        )
    device, options = next(iter(named_providers(found).items()), ("cpu", {}))
    names_in, names_out = decoder.get("inputs", {}), decoder.get("outputs", {})
    inputs = {role: names_in[role] for role in _GENAI_INPUTS if role in names_in}
    outputs = {role: names_out[role] for role in _GENAI_OUTPUTS if role in names_out}
    graphs = {
        "decoder": Graph(
            file=inside(decoder.get("filename", "model.onnx"), path),
            inputs=inputs or {"input_ids": "input_ids", "attention_mask": "attention_mask"},
            outputs=outputs or {"logits": "logits"},
            states=_genai_states(decoder, shared=shared) if decoder.get("num_hidden_layers") else (),
        )
    }
    for name in parts if images is not None else ():
        part = model[name]
        graphs[name] = Graph(
            file=inside(part["filename"], path),
            inputs={**_GENAI_PARTS[name][0], **part.get("inputs", {})},
            outputs={**_GENAI_PARTS[name][1], **part.get("outputs", {})},
            states=(),
        )
    reach = _genai_reach(decoder, int(model["context_length"]), shared=shared)
    switch = _GENAI_ROPE_SWITCH.get(kind)
    pad = _token(model.get("pad_token_id"))
    # As in the official runtime, a text ends with the padding token if nothing else is named.
    stop = model.get("eos_token_id") or ([] if pad is None else pad)
    stop_ids, vocabulary = stop if isinstance(stop, list) else [stop], int(model.get("vocab_size", 0))
    check_stops(stop_ids, vocabulary, path, "model.eos_token_id")
    return Manifest(
        graphs=graphs,
        images=images if "vision" in graphs else None,
        context_tokens=reach,
        vocab_size=vocabulary,
        stop_token_ids=tuple(stop_ids),
        pad_token_id=pad,
        bos_token_id=_token(model.get("bos_token_id")),
        rope_switch_tokens=switch if switch and reach > switch else None,
        generation={
            key: search[key]
            for key in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
            if key in search
        },
        session_options=_genai_session_options(decoder, path),
        info={"model_type": kind or None},
        device=device,
        device_options=options,
    )


def _genai_session_options(decoder: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the options that the file's door has let in, or that a program sets itself."""
    options = dict(mapping(decoder.get("session_options")))
    if options.pop("custom_ops_library", None):
        raise BadArtifact(f"{path} asks for a library of custom operators, which is not supported.")
    # Providers are chosen elsewhere, and the id only labels the lines of a log.
    return {key: value for key, value in options.items() if key not in ("provider_options", "log_id")}


def _token(found: int | None) -> int | None:
    """Return a token id; -1 stands for none."""
    return None if found is None or found < 0 else found


def _genai_states(decoder: Mapping[str, Any], *, shared: bool) -> tuple[State, ...]:
    layers, names_in, names_out = (
        int(decoder["num_hidden_layers"]),
        decoder.get("inputs", {}),
        decoder.get("outputs", {}),
    )
    heads, width = (_size(decoder.get(key)) for key in ("num_key_value_heads", "head_size"))
    if "past_names" in names_in:
        pasts = _numbered(names_in["past_names"], layers)
        presents = _numbered(names_out.get("present_names", "present_%d"), layers)
        return tuple(
            State(past, present, "append", axis=3, heads=heads, head_dim=width)
            for past, present in zip(pasts, presents, strict=True)
        )
    # Only graphs with buffers that are updated in place evict.
    windows = _genai_windows(decoder) if shared else {}
    states = []
    for part in ("key", "value"):
        past = _numbered(names_in.get(f"past_{part}_names", f"past_key_values.%d.{part}"), layers)
        present = _numbered(names_out.get(f"present_{part}_names", f"present.%d.{part}"), layers)
        states += [
            State(
                past[layer],
                present[layer],
                "window" if layer in windows else "grow" if shared else "append",
                heads=heads,
                head_dim=width,
                window=windows.get(layer),
            )
            for layer in range(layers)
        ]
    return tuple(states)


def _size(found: float | None) -> int | None:
    return int(found) if found else None


def _numbered(pattern: str, layers: int) -> list[str]:
    """Return the names of the tensors of all layers, whose numbers stand for %d."""
    if pattern.count("%") != 1 or "%d" not in pattern:
        raise ValueError(f"the name of a cache tensor must hold one %d, found {pattern!r}")
    return [pattern % layer for layer in range(layers)]


def _genai_windows(decoder: Mapping[str, Any]) -> dict[int, int]:
    """Return the windows, by layer, of the layers whose graph evicts from buffers by itself.

    onnxruntime-genai's builder writes ``cache_slack`` since it makes such graphs (0.18), for CPU and CUDA. Graphs
    for TensorRT say the same and evict elsewhere; those keep full buffers, and so do older ones.
    """
    window = decoder.get("sliding_window", {})
    if window.get("slide_key_value_cache") is not False or "cache_slack" not in window:
        return {}
    options = mapping(decoder.get("session_options")).get("provider_options") or []
    if not {short_provider(name) for entry in options for name in mapping(entry)} <= {"cpu", "cuda"}:
        return {}
    size = int(window["window_size"])
    return dict.fromkeys(map(int, window.get("layers", ())), size) if size > 0 else {}


def named_providers(found: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the execution providers that a configuration names, with their options, in order of preference.

    The CPU, which takes what others do not, is left out unless it is alone.
    """
    decoder = mapping(mapping(found.get("model")).get("decoder"))
    listed = mapping(decoder.get("session_options")).get("provider_options") or []
    out: dict[str, dict[str, str]] = {}
    for entry in listed:
        for name, values in mapping(entry).items():
            texts = {
                key: str(int(value)) if isinstance(value, bool) else str(value)
                for key, value in mapping(values).items()
            }
            out.setdefault(name, {}).update(texts)
    others = {name: values for name, values in out.items() if short_provider(name) != "cpu"}
    return others or out


def short_provider(name: str) -> str:
    """Return "cuda" for "cuda", "CUDA" or "CUDAExecutionProvider"."""
    return name.lower().removesuffix("executionprovider")


def _genai_reach(decoder: Mapping[str, Any], context: int, *, shared: bool) -> int:
    """Return how many tokens the graph is right for.

    Of onnxruntime-genai's builder (0.18), only graphs with buffers that are updated in place apply windows, and
    only those of single layers, which the configuration lists. A window that holds for all layers, or in a graph
    of the other kind, is in the configuration alone: such a graph attends to everything. Up to the window that
    is the same; beyond it, it would be another model.
    """
    window = decoder.get("sliding_window", {})
    if not window or (shared and window.get("layers")):
        return context
    reach = min(context, int(window.get("window_size", context)))
    if 0 < reach < context:
        _log.warning(
            "the graph does not apply the model's sliding window of %d tokens, so its context ends there; "
            "a build by ortlm has no such limit",
            reach,
        )
        return reach
    return context


def to_genai(
    manifest: Manifest,
    *,
    model_type: str,
    sizes: Mapping[str, int],
    provider: str | None,
    layer_types: Sequence[str] = (),
    max_length: int | None = None,
    image_token: int = -1,
    image_start: int = -1,
) -> str:
    """Return the text of ``genai_config.json``, which describes the same model to onnxruntime-genai.

    ``sizes`` has head_size, hidden_size, num_attention_heads, num_key_value_heads and num_hidden_layers;
    ``provider`` is the execution provider to name, None for the CPU. ``layer_types`` says what each layer is, if
    they are not all attention. ``max_length`` is how many tokens a text may have unless a caller says more, by
    default the context, and 4096 at most. ``image_token`` and ``image_start`` are the tokens of an image and the
    one before them, where images have patches.
    """
    decoder = manifest.graphs["decoder"]
    stop = list(manifest.stop_token_ids)
    first = manifest.generation
    inputs = dict(decoder.inputs)
    outputs = dict(decoder.outputs)
    for part in ("key", "value"):
        inputs[f"past_{part}_names"] = f"past_key_values.%d.{part}"
        outputs[f"present_{part}_names"] = f"present.%d.{part}"
    for part in ("conv", "recurrent"):
        if any(state.kind == part for state in decoder.states):
            inputs[f"past_{part}_names"] = f"past_key_values.%d.{part}_state"
            outputs[f"present_{part}_names"] = f"present.%d.{part}_state"
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
    # would take more memory than most machines have. A caller who needs more says so; of a host that takes this
    # number for the context, the builder of the model has to.
    length = min(manifest.context_tokens, 4096) if max_length is None else max_length
    config: dict[str, Any] = {
        "model": {
            **({} if manifest.bos_token_id is None else {"bos_token_id": manifest.bos_token_id}),
            "context_length": manifest.context_tokens,
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    **manifest.session_options,
                    "provider_options": [{provider: {}}] if provider else [],
                },
                "filename": decoder.file,
                **sizes,
                "inputs": inputs,
                "outputs": outputs,
                **({"sliding_window": windows} if layers else {}),
                **({"layer_types": list(layer_types)} if layer_types else {}),
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
            "min_length": int(first.get("min_length", 0)),
            "no_repeat_ngram_size": int(first.get("no_repeat_ngram_size", 0)),
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
                "inputs": {role: name for role, name in graph.inputs.items() if role != _PADDING},
                "outputs": dict(graph.outputs),
            }
        if manifest.images.patches is not None:
            # By these it finds where each image begins, and what positions its tokens have.
            config["model"] |= {"image_token_id": image_token, "vision_start_token_id": image_start}
            config["model"]["vision"] |= {
                "patch_size": manifest.images.patches.size,
                "spatial_merge_size": manifest.images.patches.merge,
            }
    return json.dumps(config, indent=4) + "\n"


def processor_config(images: Images) -> str:
    """Return the text of ``processor_config.json``, by which onnxruntime-genai reads images in crops or patches.

    Of those in crops it takes the publisher's mean and deviation, and cuts every image into 16 crops at most,
    whatever stands here.
    """

    def step(name: str, kind: str, **attributes: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"name": name, "domain": "com.microsoft.extensions", "type": kind}
        return {"operation": {**found, **({"attrs": attributes} if attributes else {})}}

    if images.patches is not None:
        patches = images.patches
        sizes = {"patch_size": patches.size, "merge_size": patches.merge}
        pixels = {"min_pixels": patches.least, "max_pixels": patches.most}
        transforms = [
            step("decode_image", "DecodeImage", color_space="RGB"),
            step("convert_to_rgb", "ConvertRGB"),
            step("resize", "Resize", smart_resize=1, **pixels, **sizes),
            step("rescale", "Rescale", rescale_factor=1 / 255),
            step("normalize", "Normalize", mean=list(images.mean), std=list(images.std), qwen2_5_vl=1),
            step("patch_image", "PatchImage", temporal_patch_size=patches.frames, **sizes),
        ]
    else:
        transforms = [
            step("decode_image", "DecodeImage", color_space="BGR"),
            step("convert_to_rgb", "ConvertRGB"),
            step("phi3_image_transform", "Phi3ImageTransform", num_crops=images.crops, num_img_tokens=144),
        ]
    config = {"processor": {"name": "image_processing", "transforms": transforms}}
    return json.dumps(config, indent=4) + "\n"
