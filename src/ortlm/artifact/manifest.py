"""What an artifact is: a folder, its graphs, and everything that a runtime must know of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ortlm.errors import BadArtifact, nearest

MANIFEST_FILE = "ortlm.json"
GENAI_FILE = "genai_config.json"
PROCESSOR_FILE = "processor_config.json"
# What an evaluation found.
REPORT_FILE = "report.json"
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
    which the graph keeps the last ones; ``"conv"`` and ``"recurrent"`` have one size, which the graph says, stand
    for all tokens so far, and cannot be cut. Others have shape [batch, heads, length, head_dim]; None where the
    graph itself says. With axis 3 it is [2, batch, heads, length, head_dim], for keys and values, of the kind
    "append".
    """

    past: str
    present: str
    kind: str = "grow"
    axis: int = 2
    heads: int | None = None
    head_dim: int | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """A graph that computes what another does with the same weights, and can do more.

    ``optional`` are inputs with a default value that the other has not, as in Graph. ``onnxruntime`` is the first
    ONNX Runtime that loads it, such as "1.32"; ``providers`` are the execution providers that may run it ("cpu").
    """

    file: str
    optional: Mapping[str, str]
    onnxruntime: str
    providers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Graph:
    """One ONNX graph: its file and what each of its tensors is for.

    ``inputs`` and ``outputs`` map a role (``input_ids``, ``attention_mask``, ``position_ids``, ``logits``)
    to the tensor's name. ``optional`` does the same for inputs with a default value
    (``logits_to_keep``: logits of so many of each row's last tokens; ``columns_to_keep``: of so many of the last
    columns, padding or not, for graphs that others made; ``query_lengths``).
    ``onnxruntime`` is the first ONNX Runtime that loads it, such as "1.32", None if that is not known.
    """

    file: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    states: tuple[State, ...]
    optional: Mapping[str, str] = field(default_factory=dict)
    onnxruntime: str | None = None
    variants: tuple[Variant, ...] = ()


@dataclass(frozen=True, slots=True)
class Patches:
    """How an image of any size becomes patches of ``size`` by ``size`` pixels, each ``frames`` times.

    It is resized to ``least`` to ``most`` pixels, so that its shape nearly stays and its sides are whole squares
    of ``merge`` by ``merge`` patches. A square is one token; they come row by row, and so do the patches of each.
    """

    size: int
    merge: int
    frames: int
    least: int
    most: int


@dataclass(frozen=True, slots=True)
class PanAndScan:
    """How a long image is cut along its longer side into crops, which are images of their own in the text.

    An image whose longer side is at least ``ratio`` times the shorter is cut, into crops of about a square each,
    unless a side of a crop had fewer than ``smallest`` pixels. ``before`` comes before the whole image,
    ``between`` after it, and ``separator`` between crops.
    """

    smallest: int
    ratio: float
    before: str
    between: str
    separator: str


# What a token's position is: how many tokens come before it; or, of an image's tokens, three: time, row and
# column, counted from where the image begins, after which the text goes on as if it had as many tokens as its
# longer side.
TEXT, GRID = "text", "grid"


@dataclass(frozen=True, slots=True)
class Images:
    """How images become input of the graph ``vision``, and tokens of a text.

    A view has ``side`` by ``side`` pixels; ``mean`` and ``std`` normalize its colors, which are 0 to 1. A
    image is cut into at most ``crops`` crops besides the view of the whole, unless a caller wants another
    number; 0: it is not cut, and has ``tokens`` tokens. ``merged`` is how many tokens of a view make a row.
    ``tag`` stands for it in a text, with its number from 1 in place of ``{}``; ``before`` and ``after`` are
    put around its tokens, for which ``token`` is written once. With ``separate`` the texts between images
    are tokenized one by one instead, each with the tokenizer's special tokens. With ``patches`` an image is of any
    size, and its sides are multiples of ``side``. ``positions`` is "text" or "grid", see ``GRID``. With
    ``pan_and_scan`` every view has ``tokens`` tokens, and crops come after the whole image as images of their own.
    With ``patch`` images that are cut have their padding to the right and below, of which patches of so many
    pixels are left out. ``tag_end`` follows the tag in a message, where tags have numbers. ``adapter`` is the LoRA
    adapter that is on for prompts with images, and for no others.
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
    patches: Patches | None = None
    positions: str = TEXT
    pan_and_scan: PanAndScan | None = None
    patch: int = 0
    tag_end: str = "\n"
    adapter: str | None = None

    @property
    def tiled(self) -> bool:
        """Whether the view of an image and its crops become one sequence of tokens, see ``tokens_of``."""
        return self.crops > 0 and self.pan_and_scan is None

    def tokens_of(self, high: int, wide: int) -> int:
        """Return how many tokens an image has that was cut into crops, ``high`` by ``wide`` pixels together."""
        rows, columns, side = high // self.side, wide // self.side, self.merged
        return rows * side * (columns * side + 1) + 1 + side * (side + 1)


# What an image may be cut into; more are a mistake.
MOST_CROPS = 256


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a runtime must know about an artifact; no model family is named on the way.

    ``rope_switch_tokens`` is the total length above which every position is rotated by another table, so
    that a cache filled below it has to be computed again once (Phi-3's longrope); None if there is none.
    ``adapters`` are files of LoRA adapters within the folder, by name. ``images`` is None for models of text.
    ``prompt_tokens``: so many new tokens of a row, or more, are computed with other weights than single ones;
    None if there is one kind. ``device`` is the kind of device that the graphs were made for ("cpu", "cuda"), and
    ``device_options`` are the options that its execution provider is to get.
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
    info: Mapping[str, object] = field(default_factory=dict)
    images: Images | None = None
    prompt_tokens: int | None = None
    device: str = "cpu"
    device_options: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the text of ``ortlm.json``."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model folder on disk: ``path``, and in ``manifest`` what its configuration says, checked.

    ``tokenizer_folder`` is where in it the tokenizer's files lie, "" for the top.
    """

    path: Path
    manifest: Manifest
    tokenizer_folder: str = ""

    @property
    def tokenizer_path(self) -> Path:
        """Where the files of the tokenizer and the chat template lie."""
        return self.path / self.tokenizer_folder

    def graph_path(self, name: str = "decoder") -> Path:
        """Return where the ONNX file of graph ``name`` lies."""
        return self.path / self.manifest.graphs[name].file


def portable(manifest: Manifest) -> Manifest:
    """Return ``manifest`` without variants of graphs: what every ONNX Runtime and every provider gets."""
    return replace(manifest, graphs={n: replace(g, variants=()) for n, g in manifest.graphs.items()})


def runnable(manifest: Manifest, *, onnxruntime: str, provider: str) -> Manifest:
    """Return ``manifest`` with the graphs that the ONNX Runtime of this version runs with ``provider``.

    A variant takes the place of its graph where it loads and may run. Raises BadArtifact, naming the ONNX Runtime
    that is needed, if a graph does not load.
    """
    there = _release(onnxruntime)
    wanted = provider.lower().removesuffix("executionprovider")
    graphs = {}
    for name, graph in manifest.graphs.items():
        if graph.onnxruntime is not None and there < _release(graph.onnxruntime):
            raise BadArtifact(
                f"{graph.file} needs ONNX Runtime {graph.onnxruntime} or later, found {onnxruntime}. Update "
                "it: pip install -U onnxruntime, with Python 3.11 or later."
            )
        graphs[name] = replace(graph, variants=())
        for variant in graph.variants:
            if there >= _release(variant.onnxruntime) and wanted in variant.providers:
                graphs[name] = replace(
                    graph,
                    file=variant.file,
                    optional={**graph.optional, **variant.optional},
                    onnxruntime=variant.onnxruntime,
                    variants=(),
                )
    return replace(manifest, graphs=graphs)


def _release(version: str) -> tuple[int, int]:
    """Return major and minor number of a version. ``ValueError`` if it does not begin with two numbers."""
    found = re.match(r"(\d{1,6})\.(\d{1,6})(?!\d)", version)
    if found is None:
        raise ValueError(f"expected a version such as 1.32, found {version!r}")
    return int(found[1]), int(found[2])


def graph_named(manifest: Manifest, name: str) -> Graph:
    """Return the graph called ``name`` or raise BadArtifact with the names there are."""
    if name not in manifest.graphs:
        raise BadArtifact(
            f"the artifact has no graph {name!r}; it has {', '.join(manifest.graphs)}."
            + nearest(name, manifest.graphs)
        )
    return manifest.graphs[name]
