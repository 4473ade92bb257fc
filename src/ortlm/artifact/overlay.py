"""``genai_config.json`` as a program changes it before it loads the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ortlm.artifact.genai import from_genai, read_genai_config
from ortlm.artifact.opening import check_files, read_manifest
from ortlm.artifact.parts import GENAI_FILE, MANIFEST_FILE, Artifact, graph_named
from ortlm.artifact.values import WRONG, integer, mapping, read_json
from ortlm.errors import BadArtifact, BadOption, nearest

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
    check_files(folder)
    return read_genai_config(folder / GENAI_FILE)


def overlay_genai(found: Mapping[str, Any], changes: Any) -> dict[str, Any]:
    """Return a configuration with ``changes`` of the same form: values replace, items of lists are added.

    Raises BadOption for keys that are not known and for values of another kind than the known one.
    """
    return _overlaid(found, changes, _GENAI_KEYS, "")


def genai_facts(found: dict[str, Any], path: Path) -> GenaiFacts:
    """Read the facts out of the contents of the file ``path``. Raises BadArtifact for values of a wrong type."""
    try:
        model = mapping(found["model"])
        marks = ("bot_token_id", "eot_token_id", "bor_token_id", "eor_token_id")
        return GenaiFacts(
            model_type=str(model.get("type", "")),
            search=_filled(GENAI_SEARCH, mapping(found.get("search"))),
            speculative=_filled(GENAI_SPECULATIVE, mapping(found.get("speculative"))),
            marks={name: integer(model[name]) for name in marks if model.get(name) is not None},
            providers=tuple(_genai_providers(found).items()),
        )
    except WRONG as error:
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
    theirs, options = manifest.graphs["decoder"], manifest.session_options
    if (folder / MANIFEST_FILE).is_file():
        own = read_manifest(read_json(folder / MANIFEST_FILE), folder / MANIFEST_FILE)
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
    decoder = mapping(mapping(found.get("model")).get("decoder"))
    listed = mapping(decoder.get("session_options")).get("provider_options") or []
    out: dict[str, dict[str, str]] = {}
    for entry in listed:
        for name, values in mapping(entry).items():
            out.setdefault(name, {}).update({key: str(value) for key, value in mapping(values).items()})
    return out
