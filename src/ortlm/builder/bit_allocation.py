"""Bit allocation: which matrices get 8 bits, for a wanted quality or a wanted size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ortlm._utils.formatting import readable_bytes
from ortlm._utils.progress import NullProgress, Progress
from ortlm._version import __version__
from ortlm.artifact import Artifact, portable
from ortlm.builder.options import preset_of
from ortlm.builder.output_dir import unfinished
from ortlm.builder.pipeline import write
from ortlm.builder.planning import Prepared, prepare, weights_of
from ortlm.builder.request import BuildRequest
from ortlm.errors import BadOption
from ortlm.evaluation.chunks import make_chunks, read_text
from ortlm.evaluation.compare import log_softmax
from ortlm.graph.weight_plan import Quantized
from ortlm.layerwise.reference import Reference
from ortlm.quant.algorithms import CALIBRATED
from ortlm.quant.recipe import Rule
from ortlm.quant.scheme import Scheme
from ortlm.runtime.language_model import LanguageModel
from ortlm.runtime.text.tokenizer import Tokenizer

# What sensitivities are measured on: chunks, and tokens in each, of which the second half counts.
_CHUNKS, _CHUNK_TOKENS = 6, 256
# How many points of the frontier are measured, in addition to its ends.
_POINTS = 5
_NARROW, _WIDE = "narrow", "wide"


@dataclass(frozen=True, slots=True)
class Point:
    """A model on the frontier: the ``nodes`` that have 8 bits, its size and its mean KL divergence in nats."""

    nodes: tuple[str, ...]
    bytes: int
    kld: float

    def to_dict(self) -> dict[str, Any]:
        """Return the point as reports show it."""
        return {"name": f"{len(self.nodes)} at 8 bits", "bytes": self.bytes, "kld": self.kld}


@dataclass(frozen=True, slots=True)
class Allocation:
    """Which matrices get 8 bits: what to build, the point that it stands for, and the frontier by size."""

    request: BuildRequest
    chosen: Point
    frontier: tuple[Point, ...] = field(default=())


def search(
    request: BuildRequest,
    out: Path,
    *,
    target_kld: float | None = None,
    target_size: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Allocation:
    """Find the smallest model with a KL divergence of at most ``target_kld``, or the best within ``target_size``.

    The model is built twice next to ``out``, once with 4 and once with 8 bits for every matrix; from both, models
    with any mixture are put together without writing weights again. The sensitivity of a matrix is how much the KL
    divergence from fp32 grows if it alone has 4 bits; those that save most for what they cost go first. The size
    is that of the whole folder. Raises BadOption if no mixture reaches what is wanted, saying what can be reached.
    """
    progress = progress or NullProgress()
    if request.precision != "int4":
        raise BadOption(f"--target-kld and --target-size shape int4; got -p {request.precision}.")
    if request.options.fast_prompts:
        raise BadOption(
            "--target-kld and --target-size say nothing of the copy for --fast-prompts. Search first, and build "
            "what was found (rules in a recipe) with it."
        )
    method = CALIBRATED.get(preset_of("int4", request.options).algorithm)
    if method is not None and method.equalizes:
        raise BadOption(
            "--target-kld and --target-size mix matrices of two builds, which AWQ scales differently. Choose "
            "another algorithm, gptq for example."
        )
    with unfinished(out) as folder:
        pair = _Pair(request, folder, threads, progress)
        nodes = pair.nodes()
        if target_size is not None and pair.bytes_of(()) > target_size:
            raise BadOption(
                f"--target-size {readable_bytes(target_size)} cannot be reached: with 4 bits everywhere the model "
                f"takes {readable_bytes(pair.bytes_of(()))}. Allowed: that or more."
            )
        best = pair.point(tuple(nodes))
        if target_kld is not None and best.kld > target_kld:
            raise BadOption(
                f"--target-kld {target_kld:g} cannot be reached: with 8 bits everywhere the mean KL divergence is "
                f"{best.kld:.5f}. Allowed: that or more."
            )
        progress.start("measuring sensitivity", len(nodes) + _POINTS + 2, "models")
        order = pair.by_sensitivity(nodes, best)
        # From all at 8 bits down to none: what matters least goes first.
        mixtures = [tuple(order[i:]) for i in range(len(order) + 1)]
        measured = {0: best}

        def at(i: int) -> Point:
            if i not in measured:
                measured[i] = pair.point(mixtures[i])
                progress.advance(1)
            return measured[i]

        last = len(mixtures) - 1
        for i in np.linspace(0, last, _POINTS + 2).round().astype(int):
            at(int(i))
        if target_size is not None:
            chosen = _largest_below(at, mixtures, pair.bytes_of, target_size)
        else:
            assert target_kld is not None
            chosen = _smallest_within(at, last, target_kld)
        frontier = tuple(sorted(measured.values(), key=lambda p: p.bytes))
        return Allocation(pair.request_for(chosen.nodes), chosen, frontier)


def _largest_below(
    at: Callable[[int], Point],
    mixtures: list[tuple[str, ...]],
    size_of: Callable[[tuple[str, ...]], int],
    limit: int,
) -> Point:
    """Return the first of ``mixtures``, the smallest of which is within the limit, that is."""
    return next(at(i) for i, mixture in enumerate(mixtures) if size_of(mixture) <= limit)


def _smallest_within(at: Callable[[int], Point], last: int, limit: float) -> Point:
    """Return the last model, number 0 being within the limit, that is so too."""
    low, high = 0, last + 1  # low is within the limit, high is not known to be
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle).kld <= limit else (low, middle)
    return at(low)


class _Pair:
    """The same model with 4 and with 8 bits everywhere, and mixtures of the two."""

    def __init__(self, request: BuildRequest, folder: Path, threads: int | None, progress: Progress) -> None:
        self._request, self._folder = request, folder
        self._threads, self._progress = threads, progress
        # The graph of a mixture names both files of weights, so each has its own name.
        self._built = {
            name: self._build(name, bits, fast)
            for name, bits, fast in ((_NARROW, 4, False), (_WIDE, 8, True))
        }
        self._schemes = {
            name: {
                item.tensors[0].name: _form(item)
                for item in prepared.emitted.builder.plan.items
                if isinstance(item, Quantized)
            }
            for name, prepared in self._built.items()
        }
        self._chunks, self._wanted = self._reference()

    def _build(self, name: str, bits: int, fast: bool) -> Prepared:
        request = self._everywhere(bits)
        options = replace(request.options, filename=f"{name}.onnx")
        if fast:
            # What 8 bits lose in rounding is far below what is asked about. The recipe stays: it says the blocks.
            options = replace(options, algorithm="rtn", calibration=None, calibration_tokens=None)
        prepared = prepare(replace(request, options=options))
        built = self._folder / name
        write(prepared, built, force=True, threads=self._threads, progress=self._progress)
        for file in built.iterdir():
            file.replace(self._folder / file.name)
        built.rmdir()
        return prepared

    def _everywhere(self, bits: int) -> BuildRequest:
        return _with_rule(
            self._request, Rule(roles=("qkv", "out", "gate_up", "down", "experts", "head"), bits=bits)
        )

    def request_for(self, nodes: tuple[str, ...]) -> BuildRequest:
        """Return the request for the model in which ``nodes`` have 8 bits and all others 4."""
        base = self._everywhere(4)
        return _with_rule(base, Rule(nodes=nodes, bits=8)) if nodes else base

    def nodes(self) -> list[str]:
        """Return every product whose weights have 4 bits in one model and 8 in the other."""
        found = (
            node
            for tensor, node in self._built[_NARROW].emitted.builder.stored_for.items()
            if self._schemes[_NARROW][tensor] != self._schemes[_WIDE].get(tensor)
        )
        # One of experts has two matrices.
        return list(dict.fromkeys(found))

    def bytes_of(self, nodes: tuple[str, ...]) -> int:
        """Return the size of the artifact of a mixture."""
        return self._prepare(nodes).outline.output_bytes

    def _prepare(self, nodes: tuple[str, ...]) -> Prepared:
        request = self.request_for(nodes)
        return prepare(replace(request, options=replace(request.options, filename="mixture.onnx")))

    def by_sensitivity(self, nodes: list[str], base: Point) -> list[str]:
        """Return ``nodes``, first those that save most bytes for what they cost at 4 bits.

        ``base`` is the model in which all have 8.
        """
        everything = tuple(nodes)
        costs = {}
        for node in nodes:
            point = self.point(tuple(n for n in everything if n != node))
            costs[node] = max(point.kld - base.kld, 0.0) / max(base.bytes - point.bytes, 1)
            self._progress.advance(1)
        return sorted(nodes, key=lambda node: costs[node])

    def point(self, nodes: tuple[str, ...]) -> Point:
        """Put the mixture together in which ``nodes`` have 8 bits, and measure it."""
        mixed = self._prepare(nodes)
        placed = {}
        for item in mixed.emitted.builder.plan.items:
            name, tensors = _NARROW, item.tensors
            if isinstance(item, Quantized):
                tensors = (*tensors, *item.views[1:])
                if self._schemes[_NARROW].get(tensors[0].name) not in (None, _form(item)):
                    name = _WIDE
                    assert self._schemes[name][tensors[0].name] == _form(item), tensors[0].name
            offsets = self._built[name].layout.offsets
            for tensor in tensors:
                placed[tensor.name] = (f"{name}.onnx.data", offsets[tensor.name])
        ir.save(mixed.emitted.builder.model(placed, __version__), self._folder / "mixture.onnx")
        mixture = Artifact(self._folder, portable(mixed.manifest))
        lm = LanguageModel(mixture, threads=self._threads, prefix_caches=0)
        divergences = []
        for chunk, wanted in zip(self._chunks, self._wanted, strict=True):
            measured = log_softmax(lm.logits(chunk.tolist())[len(chunk) // 2 :])
            divergences.append((np.exp(wanted) * (wanted - measured)).sum(axis=-1))
        return Point(nodes, mixed.outline.output_bytes, float(np.concatenate(divergences).mean()))

    def _reference(self) -> tuple[list[NDArray[np.int64]], list[NDArray[np.float32]]]:
        """Return the chunks that are read, and the float model's log-probabilities for the second half of each."""
        prepared = self._built[_NARROW]
        size = min(_CHUNK_TOKENS, prepared.spec.max_tokens)
        all_chunks = make_chunks(read_text(None), Tokenizer.open(self._folder), size=size).tokens
        apart = max(1, len(all_chunks) // _CHUNKS)
        chunks = list(all_chunks[::apart][:_CHUNKS])
        reference = Reference(weights_of(prepared, rotated=False), threads=self._threads)
        reference.open(chunks)
        wanted = [
            log_softmax(reference.logits(i)[len(chunk) // 2 :]).astype(np.float32)
            for i, chunk in enumerate(chunks)
        ]
        reference.close()
        return chunks, wanted


def _with_rule(request: BuildRequest, rule: Rule) -> BuildRequest:
    options = request.options
    return replace(request, options=replace(options, rules=(*options.rules, rule)))


def _form(item: Quantized) -> Scheme:
    """Return how ``item`` is stored, however its codes were found."""
    return replace(item.scheme, algorithm="rtn")
