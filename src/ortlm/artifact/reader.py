"""Opens an artifact, ours by ``ortlm.json`` and others by ``genai_config.json``."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

from ortlm.artifact.download import fetch, is_name
from ortlm.artifact.fields import check_manifest
from ortlm.artifact.genai_config import from_genai, read_genai_config, tokenizer_folder
from ortlm.artifact.json_values import WRONG, inside, read_json
from ortlm.artifact.manifest import (
    FORMAT,
    GENAI_FILE,
    MANIFEST_FILE,
    PROCESSOR_FILE,
    TOKENIZER_FILES,
    Artifact,
    Graph,
    Images,
    Manifest,
    PanAndScan,
    Patches,
    State,
    Variant,
)
from ortlm.artifact.session_options import check_device, device_options, session_options
from ortlm.errors import BadArtifact


def open_artifact(path: str | Path) -> Artifact:
    """Open the model folder ``path``, ours or one made for onnxruntime-genai by anybody.

    A name on the Hugging Face hub, ``user/name`` or ``user/name@revision``, stands for what `ortlm upload` put
    there: it is downloaded once and verified. Raises BadArtifact if it is no such folder, or one that is damaged.
    """
    folder = fetch(str(path)) if is_name(path) else Path(path)
    texts = ""
    if not folder.is_dir():
        raise BadArtifact(
            f"{folder} is not a folder. An artifact is what `ortlm build -o {folder}` writes, "
            f"or any folder that holds {GENAI_FILE}."
        )
    if (folder / MANIFEST_FILE).is_file():
        manifest = read_manifest(read_json(folder / MANIFEST_FILE), folder / MANIFEST_FILE)
    elif (folder / GENAI_FILE).is_file():
        found = read_genai_config(folder / GENAI_FILE)
        manifest = from_genai(found, folder / GENAI_FILE)
        texts = tokenizer_folder(found, folder / GENAI_FILE)
    elif (folder / "config.json").is_file():
        raise BadArtifact(
            f"{folder} is a Hugging Face checkpoint, not an artifact. Build it first: "
            f"ortlm build -i {folder} -o OUT -p int4 -e cpu"
        )
    else:
        raise BadArtifact(f"{folder} holds neither {MANIFEST_FILE} nor {GENAI_FILE}.")
    graphs = manifest.graphs.values()
    files = [graph.file for graph in graphs] + [v.file for graph in graphs for v in graph.variants]
    for file in (*files, *manifest.adapters.values()):
        if not (folder / file).is_file():
            raise BadArtifact(f"{folder / file} is missing, but the artifact's configuration names it.")
    check_files(folder)
    return Artifact(folder, manifest, texts)


def check_files(folder: Path) -> None:
    """Raise BadArtifact if what an artifact has next to its graphs is no regular file within ``folder``."""
    for name in (MANIFEST_FILE, GENAI_FILE, PROCESSOR_FILE, *TOKENIZER_FILES):
        inside(name, folder / name)


def read_manifest(found: dict[str, Any], path: Path) -> Manifest:
    """Return what the contents of the ``ortlm.json`` at ``path`` say. Raises BadArtifact if they are damaged."""
    if found.get("format") != FORMAT:
        raise BadArtifact(
            f"{path} has format {found.get('format')!r}; this ortlm reads format {FORMAT}. "
            "Build the model again, or use the ortlm version that built it."
        )
    found = check_manifest(found, path)
    device = check_device(found["device"] or _built_for(found["info"]), path, "device")
    try:
        graphs = {
            name: Graph(
                file=inside(g["file"], path),
                inputs=g["inputs"],
                outputs=g["outputs"],
                states=tuple(State(**s) for s in g["states"]),
                optional=g["optional"],
                onnxruntime=g["onnxruntime"],
                variants=tuple(
                    Variant(inside(v["file"], path), v["optional"], v["onnxruntime"], tuple(v["providers"]))
                    for v in g["variants"]
                ),
            )
            for name, g in found["graphs"].items()
        }
        return Manifest(
            graphs=graphs,
            context_tokens=found["context_tokens"],
            vocab_size=found["vocab_size"],
            stop_token_ids=tuple(found["stop_token_ids"]),
            pad_token_id=found["pad_token_id"],
            bos_token_id=found["bos_token_id"],
            rope_switch_tokens=found["rope_switch_tokens"],
            generation={k: v for k, v in found["generation"].items() if v is not None},
            session_options=session_options(found["session_options"], path),
            adapters={name: inside(file, path) for name, file in found["adapters"].items()},
            info=found["info"],
            images=_images(found["images"], found["adapters"]),
            prompt_tokens=found["prompt_tokens"],
            device=device,
            device_options=device_options(found["device_options"], device, path, "device_options"),
        )
    except WRONG as error:
        raise BadArtifact(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _built_for(info: dict[str, Any]) -> str:
    """Return the kind of device of a folder that was built before it said so: its target, or the processor."""
    target = info.get("target")
    return target if isinstance(target, str) and target in ("cuda", "dml", "webgpu") else "cpu"


def _images(found: dict[str, Any] | None, adapters: Container[str]) -> Images | None:
    if found is None:
        return None
    if found["adapter"] is not None and found["adapter"] not in adapters:
        raise ValueError(f"images.adapter is {found['adapter']!r}, which is none of the adapters")
    patches = None if found["patches"] is None else Patches(**found["patches"])
    if patches is not None and (
        patches.size * patches.merge != found["side"] or patches.least > patches.most
    ):
        raise ValueError("the numbers of images.patches do not agree with each other and with images.side")
    scan = None if found["pan_and_scan"] is None else PanAndScan(**found["pan_and_scan"])
    if scan is not None and not found["tokens"]:
        raise ValueError("images has pan_and_scan, but no tokens")
    if found["patch"] and found["side"] % found["patch"]:
        raise ValueError("images.side is not a multiple of images.patch")
    three = {key: tuple(found[key]) for key in ("mean", "std")}
    images = Images(**{**found, **three, "patches": patches, "pan_and_scan": scan})
    if not (images.crops or images.tokens or images.patches):
        raise ValueError("images has neither crops nor tokens nor patches")
    return images
