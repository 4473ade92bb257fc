"""``genai_config.json`` as a program changes it before it loads the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ortlm._utils.checked_json import Field
from ortlm.artifact.genai_config import from_genai, named_providers, read_genai_config, tokenizer_folder
from ortlm.artifact.genai_keys import FIELDS, GENAI_SEARCH, GENAI_SPECULATIVE, checked_genai
from ortlm.artifact.json_values import WRONG, read_json
from ortlm.artifact.manifest import GENAI_FILE, MANIFEST_FILE, Artifact, graph_named
from ortlm.artifact.reader import check_files, read_manifest
from ortlm.errors import BadArtifact, BadOption, nearest


@dataclass(frozen=True, slots=True)
class GenaiFacts:
    """What only ``genai_config.json`` says.

    ``search`` and ``speculative`` have every key, defaults included. ``marks`` are the ids that begin and end
    tool calls and reasoning (bot_token_id, eot_token_id, bor_token_id, eor_token_id), those that are named.
    ``providers`` are execution providers with their options, in order of preference. ``context_tokens`` is how
    long texts may be; the graph may be right for less, see Manifest.
    """

    model_type: str
    search: Mapping[str, bool | int | float]
    speculative: Mapping[str, bool | int | float]
    marks: Mapping[str, int]
    providers: tuple[tuple[str, Mapping[str, str]], ...]
    context_tokens: int = 0


def read_genai(folder: Path) -> dict[str, Any]:
    """Return the contents of the ``genai_config.json`` in ``folder``. Raises BadArtifact if there is none."""
    if not (folder / GENAI_FILE).is_file():
        raise BadArtifact(
            f"{folder / GENAI_FILE} is missing. Give the folder of a model, as `ortlm build` (without --layout) "
            "or onnxruntime-genai's builder writes it."
        )
    check_files(folder)
    return read_genai_config(folder / GENAI_FILE)


def overlay_genai(found: Mapping[str, Any], changes: Any) -> dict[str, Any]:
    """Return a configuration with ``changes`` of the same form: values replace, items of lists are added.

    Raises BadOption for keys that are not known and for values of another kind than the known one.
    """
    return _overlaid(found, changes, FIELDS, "")


def genai_facts(found: Mapping[str, Any], path: Path) -> GenaiFacts:
    """Read the facts out of the contents of the file ``path``.

    Raises BadArtifact, with the key's name, for what is not known, not supported or of another kind.
    """
    checked = checked_genai(found, path, own=(path.parent / MANIFEST_FILE).is_file())
    model = checked["model"]
    marks = ("bot_token_id", "eot_token_id", "bor_token_id", "eor_token_id")
    try:
        return GenaiFacts(
            model_type=model.get("type", ""),
            search=_filled(GENAI_SEARCH, checked.get("search", {})),
            speculative=_filled(GENAI_SPECULATIVE, checked.get("speculative", {})),
            marks={name: model[name] for name in marks if name in model},
            providers=tuple(named_providers(found).items()),
            context_tokens=int(model["context_length"]),
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
    own = (folder / MANIFEST_FILE).is_file()
    manifest = from_genai(found, path, own=own)
    theirs, options = manifest.graphs["decoder"], manifest.session_options
    if own:
        ours = read_manifest(read_json(folder / MANIFEST_FILE), folder / MANIFEST_FILE)
        before = graph_named(ours, "decoder")
        decoder = replace(
            before, file=theirs.file, inputs=theirs.inputs, outputs={**before.outputs, **theirs.outputs}
        )
        if decoder != before:
            # Its variants are of another graph.
            decoder = replace(decoder, variants=())
        manifest = replace(
            ours,
            graphs={**ours.graphs, "decoder": decoder},
            context_tokens=manifest.context_tokens,
            stop_token_ids=manifest.stop_token_ids,
            pad_token_id=manifest.pad_token_id,
            bos_token_id=manifest.bos_token_id,
            device=manifest.device,
            device_options=manifest.device_options,
        )
    if not (folder / theirs.file).is_file():
        raise BadArtifact(f"{folder / theirs.file} is missing, but {path} names it.")
    options = {**manifest.session_options, **options}
    texts = "" if own else tokenizer_folder(found, path)
    return Artifact(folder, replace(manifest, session_options=options, generation={}), texts)


def _overlaid(
    old: Mapping[str, Any], new: Any, known: Mapping[str, Field] | None, place: str
) -> dict[str, Any]:
    """Return ``old`` with the changes ``new``; ``known`` are the keys that there are, None for any."""
    if not isinstance(new, dict):
        raise BadOption(f"the overlay must hold an object{place and f' at {place}'}, found {new!r}.")
    out = dict(old)
    for key, value in new.items():
        where = f"{place}.{key}".lstrip(".")
        if known is not None and key not in known:
            raise BadOption(f"an overlay knows no key {where!r}." + nearest(key, known))
        inner = None if known is None else known[key].table
        before = old.get(key)
        if inner is not None or isinstance(before, dict) or (isinstance(value, dict) and before is None):
            out[key] = _overlaid(before or {}, value, inner, where)
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


def _filled(
    defaults: Mapping[str, bool | int | float], found: Mapping[str, Any]
) -> dict[str, bool | int | float]:
    """Return ``defaults`` with the values of ``found``, each of the kind of its default."""
    return {**defaults, **{key: type(defaults[key])(value) for key, value in found.items()}}
