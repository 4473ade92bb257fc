"""Bit allocation: which matrices get how many bits, for a wanted quality or a wanted size."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Mapping
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
from ortlm.builder.estimate import Outline
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
from ortlm.target import find_target

# What sensitivities are measured on: chunks, and tokens in each, of which the second half counts.
_CHUNKS, _CHUNK_TOKENS = 6, 256
# How many points of the frontier are measured, in addition to its ends.
_POINTS = 5
_FEWEST, _MOST = 4, 8
_FLAGS = "--target-kld, --target-size and --target-bits"
_ROLES = ("qkv", "out", "gate_up", "down", "head")


@dataclass(frozen=True, slots=True)
class Point:
    """A model on the frontier: ``bits`` of nodes that have more than 4, size, and mean KL divergence in nats."""

    bits: Mapping[str, int]
    bytes: int
    kld: float

    @property
    def name(self) -> str:
        """How many matrices have how many bits, such as "3 at 8 bits, 12 at 6"."""
        counts = {
            bits: list(self.bits.values()).count(bits) for bits in sorted({*self.bits.values()}, reverse=True)
        }
        first, *rest = [f"{count} at {bits}" for bits, count in counts.items()] or ["0 at 8"]
        return ", ".join([f"{first} bits", *rest])

    def to_dict(self) -> dict[str, Any]:
        """Return the point as reports show it."""
        return {"name": self.name, "bytes": self.bytes, "kld": self.kld}


@dataclass(frozen=True, slots=True)
class Allocation:
    """Which matrices get more bits: what to build, the point that it stands for, and the frontier by size."""

    request: BuildRequest
    chosen: Point
    frontier: tuple[Point, ...] = field(default=())


def search(
    request: BuildRequest,
    out: Path,
    *,
    target_kld: float | None = None,
    target_size: int | None = None,
    target_bits: float | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Allocation:
    """Find the smallest model with a KL divergence of at most ``target_kld``, or the best within ``target_size``.

    ``target_size`` is that of the whole folder in bytes, ``target_bits`` what a build reports as bits per weight.
    The model is built next to ``out`` with 4 bits for every matrix, and by round-to-nearest with each number of
    bits up to 8 that the target stores; from these, models with any mixture are put together without writing
    weights again. The sensitivity of a matrix is how much the KL divergence from fp32 grows if it alone has 4
    bits, and each bit more leaves a quarter of that; steps that save most for what they cost go first. Raises
    BadOption if no mixture reaches what is wanted, saying what can be reached.
    """
    progress = progress or NullProgress()
    if request.precision != "int4":
        raise BadOption(f"{_FLAGS} shape int4; got -p {request.precision}.")
    if request.options.integer_only:
        raise BadOption(f"{_FLAGS} choose the bits of matrices, which integer_only has 8 of; leave it out.")
    if request.options.fast_prompts:
        raise BadOption(
            f"{_FLAGS} say nothing of the copy for --fast-prompts. Search first, and build what was found (rules "
            "in a recipe) with it."
        )
    preset = preset_of("int4", request.options)
    method = CALIBRATED.get(preset.algorithm)
    if method is not None and method.equalizes:
        raise BadOption(
            f"{_FLAGS} mix matrices of several builds, which AWQ scales differently. Choose another algorithm, "
            "gptq for example."
        )
    if (request.options.embed_bits, preset.embed_bits) == (None, None):
        # Nothing is chosen for embeddings, and fewer bits than usual would be in the way of a good model.
        usual = find_target(request.target).embed_bits
        request = replace(request, options=replace(request.options, embed_bits=usual))
    # Before anything is built, which takes long.
    least = prepare(_everywhere(request, _FEWEST, (*_ROLES, "experts"))).outline
    if target_bits is not None and least.bits_per_weight > target_bits:
        raise BadOption(
            f"--target-bits {target_bits:g} cannot be reached: with 4 bits in every matrix the model has "
            f"{least.bits_per_weight:.2f} per weight, scales, embeddings and head included. Allowed: that or more."
        )
    if target_size is not None and least.output_bytes > target_size:
        raise BadOption(
            f"--target-size {readable_bytes(target_size)} cannot be reached: with 4 bits everywhere the model "
            f"takes {readable_bytes(least.output_bytes)}. Allowed: that or more."
        )
    with unfinished(out) as folder:
        builds = _Builds(request, folder, threads, progress)
        nodes = builds.nodes()
        best = builds.point(dict.fromkeys(nodes, _MOST))
        if target_kld is not None and best.kld > target_kld:
            raise BadOption(
                f"--target-kld {target_kld:g} cannot be reached: with 8 bits everywhere the mean KL divergence is "
                f"{best.kld:.5f}. Allowed: that or more."
            )
        progress.start("measuring sensitivity", len(nodes) + _POINTS + 2, "models")
        mixtures = builds.mixtures(nodes, best)
        measured = {0: best}

        def at(i: int) -> Point:
            if i not in measured:
                measured[i] = builds.point(mixtures[i])
                progress.advance(1)
            return measured[i]

        last = len(mixtures) - 1
        for i in np.linspace(0, last, _POINTS + 2).round().astype(int):
            at(int(i))
        if target_kld is not None:
            chosen = _smallest_within(at, last, target_kld)
        else:

            def fits(i: int) -> bool:
                outline = builds.outline(mixtures[i])
                if target_bits is not None:
                    return outline.bits_per_weight <= target_bits
                assert target_size is not None
                return outline.output_bytes <= target_size

            # The first that fits; they come by size, the largest first.
            chosen = at(bisect_left(range(last), True, key=fits))
        frontier = tuple(sorted(measured.values(), key=lambda p: p.bytes))
        return Allocation(builds.request_for(chosen.bits), chosen, frontier)


def _smallest_within(at: Callable[[int], Point], last: int, limit: float) -> Point:
    """Return the last model, number 0 being within the limit, that is so too."""
    low, high = 0, last + 1  # low is within the limit, high is not known to be
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle).kld <= limit else (low, middle)
    return at(low)


class _Builds:
    """The same model with one number of bits everywhere, for each number that there is, and mixtures of them."""

    def __init__(self, request: BuildRequest, folder: Path, threads: int | None, progress: Progress) -> None:
        self._request, self._folder = request, folder
        self._threads, self._progress = threads, progress
        # The graph of a mixture names all files of weights, so each has its own name.
        self._built = {_FEWEST: self._build(_FEWEST)}
        for bits in self._built[_FEWEST].emitted.builder.target.weight_bits:
            if _FEWEST < bits <= _MOST:
                self._built[bits] = self._build(bits)
        self._schemes = {
            bits: {
                item.tensors[0].name: _form(item)
                for item in prepared.emitted.builder.plan.items
                if isinstance(item, Quantized)
            }
            for bits, prepared in self._built.items()
        }
        self._chunks, self._wanted = self._reference()

    def _build(self, bits: int) -> Prepared:
        request = self._everywhere(bits)
        options = replace(request.options, filename=_file(bits))
        if bits > _FEWEST:
            # What is lost in rounding is below what is asked about. The recipe stays: it says the blocks.
            options = replace(options, algorithm="rtn", calibration=None, calibration_tokens=None)
        prepared = prepare(replace(request, options=options))
        built = self._folder / str(bits)
        write(prepared, built, force=True, threads=self._threads, progress=self._progress)
        for file in built.iterdir():
            file.replace(self._folder / file.name)
        built.rmdir()
        return prepared

    def _everywhere(self, bits: int) -> BuildRequest:
        known = (_FEWEST,) if bits == _FEWEST else self._built[_FEWEST].emitted.builder.target.expert_bits
        return _everywhere(self._request, bits, (*_ROLES, "experts") if bits in known else _ROLES)

    def request_for(self, bits: Mapping[str, int]) -> BuildRequest:
        """Return the request for the model in which nodes have these ``bits``, and all others 4."""
        rules = [
            Rule(nodes=tuple(node for node, its in bits.items() if its == count), bits=count)
            for count in sorted({*bits.values()})
        ]
        return _with_rules(self._everywhere(_FEWEST), *rules)

    def nodes(self) -> list[str]:
        """Return every product whose weights have 4 bits in one model and 8 in another."""
        found = (
            node
            for tensor, node in self._built[_FEWEST].emitted.builder.stored_for.items()
            if self._bits_of(tensor)[-1] > _FEWEST
        )
        # One of experts has two matrices.
        return list(dict.fromkeys(found))

    def _bits_of(self, tensor: str) -> list[int]:
        """Return the numbers of bits that there are of the matrix whose codes are ``tensor``."""
        forms = {bits: schemes.get(tensor) for bits, schemes in self._schemes.items()}
        return [bits for bits, form in forms.items() if form is not None and form.bits == bits] or [_FEWEST]

    def outline(self, bits: Mapping[str, int]) -> Outline:
        """Return the sizes of a mixture."""
        return self._prepare(bits).outline

    def _prepare(self, bits: Mapping[str, int]) -> Prepared:
        request = self.request_for(bits)
        return prepare(replace(request, options=replace(request.options, filename="mixture.onnx")))

    def mixtures(self, nodes: list[str], best: Point) -> list[dict[str, int]]:
        """Return mixtures from all ``nodes`` at 8 bits, which ``best`` is, down to none that has more than 4.

        Each has fewer bits than the one before in one matrix: where that saves most for what it costs.
        """
        tensors = {node: tensor for tensor, node in self._built[_FEWEST].emitted.builder.stored_for.items()}
        steps: list[tuple[float, int, str]] = []
        for node in nodes:
            point = self.point({other: _MOST for other in nodes if other != node})
            cost = max(point.kld - best.kld, 0.0) / max(best.bytes - point.bytes, 1)
            levels = self._bits_of(tensors[node])
            for fewer, more in itertools.pairwise(levels):
                # Of what 4 bits cost, a quarter is left for each bit more.
                left = 4.0 ** (_FEWEST - fewer) - 4.0 ** (_FEWEST - more)
                steps.append((cost * left / (more - fewer), -fewer, node))
            self._progress.advance(1)
        mixture = dict.fromkeys(nodes, _MOST)
        found = [dict(mixture)]
        for _, fewer, node in sorted(steps):
            if -fewer > _FEWEST:
                mixture[node] = -fewer
            else:
                del mixture[node]
            found.append(dict(mixture))
        return found

    def point(self, bits: Mapping[str, int]) -> Point:
        """Put the mixture together in which nodes have these ``bits``, and measure it."""
        mixed = self._prepare(bits)
        placed = {}
        for item in mixed.emitted.builder.plan.items:
            source, tensors = _FEWEST, item.tensors
            if isinstance(item, Quantized):
                tensors = (*tensors, *item.views[1:])
                form = _form(item)
                source = next(
                    b for b, schemes in self._schemes.items() if schemes.get(tensors[0].name) == form
                )
            offsets = self._built[source].layout.offsets
            for tensor in tensors:
                placed[tensor.name] = (f"{_file(source)}.data", offsets[tensor.name])
        ir.save(mixed.emitted.builder.model(placed, __version__), self._folder / "mixture.onnx")
        mixture = Artifact(self._folder, portable(mixed.manifest))
        lm = LanguageModel(mixture, threads=self._threads, prefix_caches=0)
        divergences = []
        for chunk, wanted in zip(self._chunks, self._wanted, strict=True):
            measured = log_softmax(lm.logits(chunk.tolist())[len(chunk) // 2 :])
            divergences.append((np.exp(wanted) * (wanted - measured)).sum(axis=-1))
        return Point(dict(bits), mixed.outline.output_bytes, float(np.concatenate(divergences).mean()))

    def _reference(self) -> tuple[list[NDArray[np.int64]], list[NDArray[np.float32]]]:
        """Return the chunks that are read, and the float model's log-probabilities for the second half of each."""
        prepared = self._built[_FEWEST]
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


def _file(bits: int) -> str:
    return f"all-{bits}.onnx"


def _everywhere(request: BuildRequest, bits: int, roles: tuple[str, ...]) -> BuildRequest:
    return _with_rules(request, Rule(roles=roles, bits=bits))


def _with_rules(request: BuildRequest, *rules: Rule) -> BuildRequest:
    options = request.options
    return replace(request, options=replace(options, rules=(*options.rules, *rules)))


def _form(item: Quantized) -> Scheme:
    """Return how ``item`` is stored, however its codes were found."""
    return replace(item.scheme, algorithm="rtn")
