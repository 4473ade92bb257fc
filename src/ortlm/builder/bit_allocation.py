"""Bit allocation: which matrix gets how many bits, for a wanted quality or a wanted size."""

from __future__ import annotations

import itertools
import math
import re
import shutil
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from ortlm.builder.tokenizer_files import read_tokenizer
from ortlm.dtypes import Floats
from ortlm.errors import BadOption
from ortlm.evaluation.chunks import make_chunks, read_text
from ortlm.evaluation.compare import log_softmax
from ortlm.graph.weight_plan import Quantized
from ortlm.layerwise.reference import Reference
from ortlm.quant.algorithms import CALIBRATED
from ortlm.quant.recipe import Rule
from ortlm.runtime.language_model import LanguageModel
from ortlm.runtime.text.tokenizer import Tokenizer

# What models are measured on: chunks, and tokens in each, of which the second half counts. Sensitivities of large
# models are measured on fewer chunks, since there are many models: on all up to so many parameters.
_CHUNKS, _CHUNK_TOKENS = 6, 256
_FEWEST_CHUNKS, _PARAMETERS_FOR_ALL = 2, 70e6
# Of a chunk for sensitivities, these tokens do not count: they have little before them.
_UNCOUNTED_TOKENS = 32
# If there are more matrices, those of layers next to each other are measured together.
_MOST_MEASURED = 32
# How many points of the frontier are measured, in addition to its ends.
_POINTS = 3
# Sensitivities are measured at this many bits. Up to as many, codes are calibrated; fewer are built when the
# search comes to them.
_USUAL, _MOST = 4, 8
# What is calibrated for measuring only reads the first number of tokens, up to the second where matrices have as
# many inputs.
_TOKENS, _MOST_TOKENS = 4096, 8192
# Of the median of all matrices, per weight: what a matrix is taken to lose at least, whatever was measured.
_LEAST_LOSS = 0.1
_FLAGS = "--target-kld, --target-size and --target-bits"


@dataclass(frozen=True, slots=True)
class Point:
    """A model on the frontier: how many ``bits`` its matrices have, size, and mean KL divergence in nats."""

    bits: Mapping[str, int]
    bytes: int
    kld: float

    @property
    def name(self) -> str:
        """How many matrices have how many bits, such as "3 at 8 bits, 12 at 6"."""
        counts = Counter(self.bits.values())
        first, *rest = [f"{counts[bits]} at {bits}" for bits in sorted(counts, reverse=True)]
        return ", ".join([f"{first} bits", *rest])

    def to_dict(self) -> dict[str, Any]:
        """Return the point as reports show it."""
        return {"name": self.name, "bytes": self.bytes, "kld": self.kld}


@dataclass(frozen=True, slots=True)
class Allocation:
    """How many bits each matrix gets: what to build, the point that it stands for, and the frontier by size."""

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
    weights again. The sensitivity of a matrix is the KL divergence from the model with 8 bits if it alone, or it
    and its neighbors of the same kind, have 4; each bit more leaves a quarter of that, each bit fewer makes it
    four times as much, and steps that save most for what they cost go first. Where that leads below 4 bits, the
    model is built with 3 and 2 as well. The recipe's own bits, and as many for all, are chosen if they are nearer.
    Raises BadOption if no mixture reaches what is wanted, saying what can be reached.
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
    method = CALIBRATED.get(preset_of("int4", request.options).algorithm)
    if method is not None and method.equalizes:
        raise BadOption(
            f"{_FLAGS} mix matrices of several builds, which AWQ scales differently. Choose another algorithm, "
            "gptq for example."
        )
    matrices = _Matrices(request)
    # Before anything is built, which takes long.
    least = matrices.prepare(matrices.nearest(0)).outline
    if target_bits is not None and least.bits_per_weight > target_bits:
        raise BadOption(
            f"--target-bits {target_bits:g} cannot be reached: with the fewest bits in every matrix the model has "
            f"{least.bits_per_weight:.2f} per weight, scales, embeddings and head included. Allowed: that or more."
        )
    if target_size is not None and least.output_bytes > target_size:
        raise BadOption(
            f"--target-size {readable_bytes(target_size)} cannot be reached: with the fewest bits in every matrix "
            f"the model takes {readable_bytes(least.output_bytes)}. Allowed: that or more."
        )
    with unfinished(out) as folder:
        builds = _Builds(matrices, folder, threads, progress)
        best = builds.point(matrices.nearest(_MOST))
        if target_kld is not None and best.kld > target_kld:
            raise BadOption(
                f"--target-kld {target_kld:g} cannot be reached: with 8 bits everywhere the mean KL divergence is "
                f"{best.kld:.5f}. Allowed: that or more."
            )
        plain = matrices.plain()
        progress.start("measuring sensitivity", len(matrices.groups) + _POINTS + len(plain) + 2, "models")
        mixtures = builds.mixtures(best)
        measured = {frozenset(best.bits.items()): best}

        def measure(bits: Mapping[str, int]) -> Point:
            key = frozenset(bits.items())
            if key not in measured:
                measured[key] = builds.point(bits)
                progress.advance(1)
            return measured[key]

        def frontier_to(last: int) -> None:
            for i in np.linspace(0, last, _POINTS + 2).round().astype(int):
                measure(mixtures[i])

        def fits(bits: Mapping[str, int]) -> bool:
            outline = matrices.prepare(bits).outline
            if target_bits is not None:
                return outline.bits_per_weight <= target_bits
            assert target_size is not None
            return outline.output_bytes <= target_size

        # Up to here nothing has to be built with fewer bits than usual.
        usual = bisect_right(mixtures, False, key=lambda bits: min(bits.values()) < _USUAL) - 1
        if target_kld is not None:
            frontier_to(usual)
            last = len(mixtures) - 1 if measure(mixtures[usual]).kld <= target_kld else usual
            smallest = _smallest_within(lambda i: measure(mixtures[i]), last, target_kld)
            for bits in plain:
                if matrices.prepare(bits).outline.output_bytes < smallest.bytes:
                    measure(bits)
            within = [point for point in measured.values() if point.kld <= target_kld]
            chosen = min(within, key=lambda point: (point.bytes, point.kld))
        else:
            # The first that fits; they come by size, the largest first.
            first = bisect_left(mixtures, True, hi=len(mixtures) - 1, key=fits)
            frontier_to(max(usual, first))
            measure(mixtures[first])
            for bits in filter(fits, plain):
                measure(bits)
            within = [point for point in measured.values() if fits(point.bits)]
            chosen = min(within, key=lambda point: (point.kld, point.bytes))
        return Allocation(matrices.request_for(chosen.bits), chosen, _frontier(measured.values()))


def _smallest_within(at: Callable[[int], Point], last: int, limit: float) -> Point:
    """Return the last model, number 0 being within the limit, that is so too."""
    low, high = 0, last + 1  # low is within the limit, high is not known to be
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle).kld <= limit else (low, middle)
    return at(low)


class _Matrices:
    """Which matrices there are, by the names of their operators, and the numbers of bits that each can have.

    ``levels`` has those, in ascending order; ``of`` names the operator that codes are stored for; ``groups`` are
    matrices that are measured together; ``widest`` is the number of inputs of the one that has most.
    """

    def __init__(self, request: BuildRequest) -> None:
        self._request, self.options = request, request.options
        prepared = prepare(request)
        self._checkpoint = prepared.checkpoint
        self._tokenizer = read_tokenizer(self._checkpoint.folder, self._checkpoint.config)
        usual = prepared.emitted.builder
        self.of = dict(usual.stored_for)
        known, oldest = usual.target.weight_bits, usual.onnxruntime
        items = {item.tensors[0].name: item for item in usual.plan.items if isinstance(item, Quantized)}
        nodes = list(dict.fromkeys(self.of[codes] for codes in self.of if codes in items))
        experts = {self.of[codes] for codes in self.of if codes in items and items[codes].experts > 1}
        lookups = {node for codes, node in self.of.items() if codes.startswith("embed_tokens.")}
        found: dict[str, list[int]] = {node: [] for node in nodes}
        # One after the other, since what one needs would rule out the others.
        for group, possible in (
            ([node for node in nodes if node not in experts | lookups], known),
            ([node for node in nodes if node in experts], usual.target.expert_bits),
            ([node for node in nodes if node in lookups], known),
        ):
            for bits in possible if group else ():
                builder = self.prepare(dict.fromkeys(group, bits)).emitted.builder
                if builder.onnxruntime > oldest:
                    # Not worth it: the folder would run in fewer places than without a search.
                    continue
                schemes = {
                    self.of.get(item.tensors[0].name): item.scheme
                    for item in builder.plan.items
                    if isinstance(item, Quantized)
                }
                for node in group:
                    if node in schemes and schemes[node].bits == bits:
                        found[node].append(bits)
        self.levels = {node: sorted(levels) for node, levels in found.items() if len(levels) > 1}
        if not self.levels:
            raise BadOption(
                f"{_FLAGS} choose between numbers of bits, of which {usual.target.name} has "
                f"{', '.join(map(str, known))}, for matrices that the recipe quantizes; there is no choice here."
            )

        self.groups = _groups(self.levels)
        self.widest = max(item.inputs for item in items.values())
        self._usual = {self.of[codes]: items[codes].scheme.bits for codes in self.of if codes in items}

    def nearest(self, bits: int) -> dict[str, int]:
        """Return for each node the number of bits that is nearest to ``bits``, or the larger of two."""
        return {node: min(levels, key=lambda n: (abs(n - bits), -n)) for node, levels in self.levels.items()}

    def plain(self) -> list[dict[str, int]]:
        """Return what a search has to be better than: the recipe's bits, and 4, 5 and 6 for all matrices."""
        recipe = {node: self._usual[node] for node in self.levels}
        found = [self.nearest(bits) for bits in range(_USUAL, 7)]
        if all(bits in self.levels[node] for node, bits in recipe.items()):
            found.append(recipe)
        return [bits for i, bits in enumerate(found) if bits not in found[:i]]

    def request_for(self, bits: Mapping[str, int], **options: Any) -> BuildRequest:
        """Return the request for the model in which nodes have these ``bits``, and other ``options``."""
        rules = tuple(
            Rule(nodes=tuple(node for node, its in bits.items() if its == count), bits=count)
            for count in sorted({*bits.values()})
        )
        usual = self._request.options
        return replace(self._request, options=replace(usual, rules=(*usual.rules, *rules), **options))

    def prepare(self, bits: Mapping[str, int], filename: str = "mixture.onnx", **options: Any) -> Prepared:
        """Return the model in which nodes have these ``bits``, for a graph ``filename``, with ``options``."""
        request = self.request_for(bits, filename=filename, **options)
        return prepare(request, checkpoint=self._checkpoint, tokenizer=self._tokenizer)


class _Builds:
    """The same model with one number of bits everywhere, each built when it is asked for, and mixtures of them."""

    def __init__(self, matrices: _Matrices, folder: Path, threads: int | None, progress: Progress) -> None:
        self._matrices, self._folder = matrices, folder
        self._threads, self._progress = threads, progress
        self._built: dict[int, Prepared] = {}
        levels = {bits for levels in matrices.levels.values() for bits in levels}
        for bits in sorted({_USUAL, *(bits for bits in levels if bits > _USUAL)}):
            self._build(bits)
        self._chunks, self._wanted = self._reference()

    def _build(self, bits: int) -> Prepared:
        if bits in self._built:
            return self._built[bits]
        usual = preset_of("int4", self._matrices.options)
        options: dict[str, Any] = {}
        if bits > _USUAL:
            # What is lost in rounding is below what is asked about. The recipe stays: it says the blocks.
            options = {"algorithm": "rtn", "calibration": None, "calibration_tokens": None}
        elif usual.algorithm in CALIBRATED:
            most = min(max(_TOKENS, self._matrices.widest), _MOST_TOKENS)
            options = {"calibration_tokens": min(usual.calibration.tokens or most, most)}
        # The graph of a mixture names all files of weights, so each has its own name.
        prepared = self._matrices.prepare(self._matrices.nearest(bits), _file(bits), **options)
        built = self._folder / str(bits)
        write(prepared, built, force=True, threads=self._threads, progress=self._progress)
        for file in built.iterdir():
            # What all have, such as a graph of embeddings, is that with the most bits.
            if bits >= _USUAL or not (self._folder / file.name).exists():
                file.replace(self._folder / file.name)
        shutil.rmtree(built)
        self._built[bits] = prepared
        return prepared

    def mixtures(self, best: Point) -> list[dict[str, int]]:
        """Return mixtures from all matrices at 8 bits, which ``best`` is, down to the fewest that they can have.

        Each has fewer bits than the one before in one matrix: where that saves most for what it costs.
        """
        share = _PARAMETERS_FOR_ALL / self._built[_USUAL].outline.parameters
        chunks = self._chunks[: max(_FEWEST_CHUNKS, min(_CHUNKS, round(_CHUNKS * share)))]
        skipped = min(_UNCOUNTED_TOKENS, len(chunks[0]) // 2)

        def read(bits: Mapping[str, int]) -> tuple[Prepared, Iterator[Floats]]:
            # One graph is enough, and takes half the time.
            mixed = self._matrices.prepare(bits, ragged_append=False)
            return mixed, self._read(mixed, chunks, skipped)

        # Against the model with 8 bits: next to fp32, what both models lose would hide the difference.
        whole, log_probabilities = read(best.bits)
        wanted = list(log_probabilities)
        losses: dict[str, float] = {}
        for group in self._matrices.groups:
            levels = self._matrices.levels[group[0]]
            # Few matrices cannot have the usual number, and tell as much at another.
            tried = min((n for n in levels if n >= _USUAL), default=levels[-1])
            mixed, found = read({**best.bits, **dict.fromkeys(group, tried)})
            saved = whole.outline.output_bytes - mixed.outline.output_bytes
            bit = max(saved, 1) / max(best.bits[group[0]] - tried, 1)
            lost = _divergence(wanted, found) * 4.0 ** (tried - _USUAL) / bit
            losses |= dict.fromkeys(group, lost)
            self._progress.advance(1)
        # What is measured of a matrix that loses next to nothing may be chance, and below 4 bits it is multiplied.
        least = float(np.median([*losses.values()])) * _LEAST_LOSS
        steps: list[tuple[float, int, str]] = []
        for node, levels in self._matrices.levels.items():
            for fewer, more in itertools.pairwise(levels):
                left = 4.0 ** (_USUAL - fewer) - 4.0 ** (_USUAL - more)
                steps.append((max(losses[node], least) * left / (more - fewer), -fewer, node))
        mixture = dict(best.bits)
        mixtures = [dict(mixture)]
        for _, fewer, node in sorted(steps):
            mixture[node] = -fewer
            mixtures.append(dict(mixture))
        return mixtures

    def point(self, bits: Mapping[str, int]) -> Point:
        """Measure the mixture in which nodes have these ``bits``."""
        mixed = self._matrices.prepare(bits)
        kld = _divergence(self._wanted, self._read(mixed, self._chunks, len(self._chunks[0]) // 2))
        return Point(dict(bits), mixed.outline.output_bytes, kld)

    def _read(self, mixed: Prepared, chunks: Sequence[NDArray[np.int64]], skipped: int) -> Iterator[Floats]:
        """Put ``mixed`` together of what was built; yield log-probabilities of chunks without their beginnings."""
        placed = {}
        for item in mixed.emitted.builder.plan.items:
            source, tensors = _USUAL, item.tensors
            if isinstance(item, Quantized):
                tensors = (*tensors, *item.views[1:])
                if self._matrices.of.get(tensors[0].name) in self._matrices.levels:
                    source = item.scheme.bits
            offsets = self._build(source).layout.offsets
            for tensor in tensors:
                placed[tensor.name] = (f"{_file(source)}.data", offsets[tensor.name])
        ir.save(mixed.emitted.builder.model(placed, __version__), self._folder / "mixture.onnx")
        mixture = Artifact(self._folder, portable(mixed.manifest))
        # On the processor whatever it is for, as the check at the end of a build.
        lm = LanguageModel(mixture, threads=self._threads, device="cpu", prefix_caches=0)
        for chunk in chunks:
            yield log_softmax(lm.logits(chunk.tolist())[skipped:]).astype(np.float32)

    def _reference(self) -> tuple[list[NDArray[np.int64]], list[Floats]]:
        """Return the chunks that are read, and the float model's log-probabilities for the second half of each."""
        prepared = self._built[_USUAL]
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


def _frontier(points: Iterable[Point]) -> tuple[Point, ...]:
    """Return the points that none of the others is both smaller and nearer than, by size."""
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bytes, point.kld)):
        if not found or point.kld < found[-1].kld:
            found.append(point)
    return tuple(found)


def _groups(levels: Mapping[str, Sequence[int]]) -> list[tuple[str, ...]]:
    """Return the matrices by those that are measured together: of a kind, and in layers next to each other.

    There are so few groups that about ``_MOST_MEASURED`` models are measured. The first and the last layer, which
    differ most from those next to them, are apart, and so is what is in no layer.
    """
    kinds: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for node, its in levels.items():
        kinds.setdefault((re.sub(r"\d+", "", node), tuple(its)), []).append(node)
    most = math.ceil(len(levels) / _MOST_MEASURED)
    groups = []
    for nodes in kinds.values():
        inner = nodes[1:-1]
        groups += [tuple(nodes[:1]), *(tuple(inner[i : i + most]) for i in range(0, len(inner), most))]
        groups += [tuple(nodes[1:][-1:])] if len(nodes) > 1 else []
    return groups


def _divergence(wanted: Iterable[Floats], found: Iterable[Floats]) -> float:
    """Return the mean KL divergence of log-probabilities, in nats, from those that are ``wanted``."""
    each = [(np.exp(p) * (p - q)).sum(axis=-1) for p, q in zip(wanted, found, strict=True)]
    return float(np.concatenate(each).mean())


def _file(bits: int) -> str:
    return f"all-{bits}.onnx"
