"""The manifest of a build, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, TypeGuard

from ortlm._version import __version__
from ortlm.artifact import (
    ADAPTER_FOLDER,
    NAMED_TEMPLATES,
    Graph,
    Manifest,
    State,
    Variant,
    named_templates,
)
from ortlm.artifact.generation_config import not_obeyed, read_generation
from ortlm.artifact.provenance import public_name
from ortlm.builder.estimate import Outline
from ortlm.builder.image_settings import image_settings
from ortlm.builder.tokenizer_files import TokenizerFiles
from ortlm.builder.turn_ends import turn_ends
from ortlm.checkpoint.reader import Checkpoint
from ortlm.errors import BadCheckpoint
from ortlm.graph.decoder import Emitted
from ortlm.graph.states import past_name, present_name
from ortlm.graph.step import MANY
from ortlm.spec import Architecture, Attention, Mixer, MixerState, mixer_states

# The execution providers whose attention takes lengths per row.
RAGGED_PROVIDERS = ("cpu", "cuda")


def make_manifest(
    checkpoint: Checkpoint,
    architecture: Architecture,
    graphs: Mapping[str, tuple[str, Emitted]],
    outline: Outline,
    tokenizer: TokenizerFiles,
    *,
    adapters: Iterable[str] = (),
    ragged: tuple[str, Emitted] | None = None,
) -> Manifest:
    """Return the manifest of what is about to be written: ``graphs`` are names and graphs by file.

    ``ragged`` are file and graph of the decoder that takes lengths per row, for ONNX Runtimes that know them.
    """
    spec = architecture.decoder
    emitted = next(graph for name, graph in graphs.values() if name == "decoder")
    defaults = checkpoint.json("generation_config.json")
    evicts = emitted.builder.target.window_cache
    states = tuple(
        _state(i, layer.mixer, state, evicts=evicts)
        for i, layer in enumerate(spec.layers)
        for state in mixer_states(layer.mixer)
    )
    stop = stop_tokens(checkpoint, spec.vocab, tokenizer)
    switches = {
        mixer.rope.switch_tokens
        for mixer in spec.attentions
        if mixer.rope is not None and mixer.rope.switch_tokens is not None
    }
    pad = checkpoint.config.get("pad_token_id", defaults.get("pad_token_id"))
    bos = checkpoint.config.get("bos_token_id", defaults.get("bos_token_id"))
    variants = tuple(
        Variant(
            file=file,
            optional={role: name for role, name in graph.optional.items() if role not in emitted.optional},
            onnxruntime=_version(graph),
            providers=RAGGED_PROVIDERS,
        )
        for file, graph in ([ragged] if ragged is not None else [])
    )
    return Manifest(
        graphs={
            name: Graph(
                file=file,
                inputs=graph.inputs,
                outputs=graph.outputs,
                states=states if graph is emitted else (),
                optional=graph.optional,
                onnxruntime=_version(graph),
                variants=variants if graph is emitted else (),
            )
            for file, (name, graph) in graphs.items()
        },
        images=image_settings(checkpoint, architecture),
        prompt_tokens=MANY if emitted.builder.many is not None else None,
        context_tokens=spec.max_tokens,
        vocab_size=spec.vocab,
        stop_token_ids=stop,
        pad_token_id=pad if _is_token(pad, spec.vocab) else stop[0],
        bos_token_id=_token_or_none(bos, spec.vocab),
        rope_switch_tokens=min(switches) if switches else None,
        generation=_generation_defaults(checkpoint, spec.vocab),
        adapters={name: f"{ADAPTER_FOLDER}/{name}.onnx_adapter" for name in adapters},
        device=emitted.builder.target.provider or "cpu",
        info={
            "built_with": f"ortlm {__version__}",
            **asdict(outline),
            # A path on the builder's machine says nothing to others.
            "source": public_name(checkpoint.source),
            "revision": checkpoint.revision,
            "activations": emitted.builder.dtype,
        },
    )


def _state(layer: int, mixer: Mixer, state: MixerState, *, evicts: bool) -> State:
    past, present = past_name(layer, state), present_name(layer, state)
    if not state.grows:
        return State(past, present, state.name)
    window = mixer.window if evicts and isinstance(mixer, Attention) else None
    return State(past, present, "window", window=window) if window else State(past, present)


def _version(graph: Emitted) -> str:
    major, minor = graph.builder.onnxruntime
    return f"{major}.{minor}"


def stop_tokens(checkpoint: Checkpoint, vocab: int, tokenizer: TokenizerFiles) -> tuple[int, ...]:
    """Return every token that ends an answer: of config, generation defaults, tokenizer and chat template.

    Whether or not config.json says so, what a chat template writes after an assistant's words ends a turn:
    several published configurations leave it out.
    Raises BadCheckpoint if there is none, or one that is not a token of the ``vocab``.
    """
    tokens: list[int] = []
    # A model of several parts may say it of its text part alone.
    inner = checkpoint.config.get("text_config")
    holders: list[tuple[str, Mapping[str, Any]]] = [
        ("generation_config.json", checkpoint.json("generation_config.json")),
        ("config.json", checkpoint.config),
        ("config.json", inner if isinstance(inner, Mapping) else {}),
    ]
    for name, holder in holders:
        ids = holder.get("eos_token_id")
        for token in ids if isinstance(ids, list) else [ids]:
            if token is None or token == -1:
                continue  # both are common ways to say none
            if not _is_token(token, vocab):
                raise BadCheckpoint(
                    f'{checkpoint.path / name}: "eos_token_id" has {token!r}, '
                    f"expected numbers from 0 to {vocab - 1}."
                )
            tokens.append(token)
    eos = tokenizer.ids.get(tokenizer.opened.special.names.get("eos_token", ""))
    tokens += [
        token
        for token in (eos, *turn_ends(checkpoint.folder, tokenizer))
        if token is not None and _is_token(token, vocab)
    ]
    unique = tuple(dict.fromkeys(tokens))
    if not unique:
        raise BadCheckpoint(
            f"{checkpoint.path}: neither config.json nor generation_config.json nor the tokenizer names a "
            'token that ends an answer. Set "eos_token_id" in config.json.'
        )
    return unique


def plain_tokenizer_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``tokenizer_config.json`` as every runtime reads it.

    onnxruntime-genai wants the file to be there, and takes neither null for a chat template nor several under
    names: of those the default one is kept under the usual key, and all of them under ``named_chat_templates``.
    """
    plain = dict(settings) or {"tokenizer_class": "PreTrainedTokenizerFast"}
    template = plain.get("chat_template")
    if "chat_template" in plain and template is None:
        del plain["chat_template"]
    elif template is not None and not isinstance(template, str):
        named = named_templates(template, 'tokenizer_config.json: "chat_template"', BadCheckpoint)
        plain[NAMED_TEMPLATES] = template
        plain["chat_template"] = named.get("default", next(iter(named.values()), ""))
    return plain


def _is_token(value: object, vocab: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab


def _token_or_none(value: object, vocab: int) -> int | None:
    return value if _is_token(value, vocab) else None


def _generation_defaults(checkpoint: Checkpoint, vocab: int) -> dict[str, Any]:
    path = checkpoint.folder / "generation_config.json"
    kept = read_generation(checkpoint.json(path.name), file=path, error=BadCheckpoint)
    for key in ("suppress_tokens", "begin_suppress_tokens"):
        if key in kept:
            # What the model cannot write needs no suppressing.
            kept[key] = [token for token in kept[key] if token < vocab]
    for key in ("bad_words_ids", "sequence_bias"):
        for entry in kept.get(key, ()):
            for token in entry if key == "bad_words_ids" else entry[0]:
                if token >= vocab:
                    raise BadCheckpoint(
                        f'{path}: "{key}" names token {token}, expected numbers from 0 to {vocab - 1}.'
                    )
    return {key: value for key, value in kept.items() if value != []}


def generation_notes(checkpoint: Checkpoint) -> list[str]:
    """Return what to say of keys in ``generation_config.json`` that no runtime obeys, in one sentence or none."""
    keys = not_obeyed(checkpoint.json("generation_config.json"))
    if not keys:
        return []
    return [f"generation_config.json: not obeyed, and up to whoever generates: {', '.join(keys)}."]
