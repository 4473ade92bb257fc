"""Opens an artifact, ours by ``ortlm.json`` and others by ``genai_config.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ortlm.artifact.genai import from_genai
from ortlm.artifact.parts import (
    FORMAT,
    GENAI_FILE,
    MANIFEST_FILE,
    MOST_CROPS,
    Artifact,
    Graph,
    Images,
    Manifest,
    State,
)
from ortlm.artifact.values import WRONG, inside, integer, integer_or_none, mapping, names, read_json
from ortlm.errors import BadArtifact


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
        manifest = read_manifest(read_json(folder / MANIFEST_FILE), folder / MANIFEST_FILE)
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


def read_manifest(found: dict[str, Any], path: Path) -> Manifest:
    """Return what the contents of the ``ortlm.json`` at ``path`` say. Raises BadArtifact if they are damaged."""
    if found.get("format") != FORMAT:
        raise BadArtifact(
            f"{path} has format {found.get('format')!r}; this ortlm reads format {FORMAT}. "
            "Build the model again, or use the ortlm version that built it."
        )
    try:
        graphs = {
            name: Graph(
                file=inside(g["file"], path),
                inputs=names(g["inputs"]),
                outputs=names(g["outputs"]),
                states=tuple(_state(s) for s in g["states"]),
                optional=names(g.get("optional") or {}),
            )
            for name, g in found["graphs"].items()
        }
        return Manifest(
            graphs=graphs,
            context_tokens=int(found["context_tokens"]),
            vocab_size=int(found["vocab_size"]),
            stop_token_ids=tuple(int(t) for t in found["stop_token_ids"]),
            pad_token_id=integer_or_none(found.get("pad_token_id")),
            bos_token_id=integer_or_none(found.get("bos_token_id")),
            rope_switch_tokens=integer_or_none(found.get("rope_switch_tokens")),
            generation=mapping(found.get("generation")),
            session_options=mapping(found.get("session_options")),
            adapters={name: inside(file, path) for name, file in mapping(found.get("adapters")).items()},
            info=mapping(found.get("info")),
            images=_images(found.get("images")),
            prompt_tokens=integer_or_none(found.get("prompt_tokens")),
        )
    except WRONG as error:
        raise BadArtifact(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _images(found: Any) -> Images | None:
    if found is None:
        return None
    values = dict(mapping(found))
    for key in ("mean", "std"):
        values[key] = tuple(float(v) for v in values[key])
        if len(values[key]) != 3:
            raise ValueError(f"images.{key} must have three numbers")
    for key in ("side", "crops", "merged", "tokens"):
        integer(values.get(key, 0))
    images = Images(**values)
    if not 0 <= images.crops <= MOST_CROPS or images.side < 1 or not (images.crops or images.tokens):
        raise ValueError(f"images is {found!r}")
    return images


def _state(found: dict[str, Any]) -> State:
    state = State(**found)
    if state.kind == "window" and integer(state.window) < 1:
        raise ValueError(f"the window of {state.past} must be at least 1, found {state.window}")
    return state
