"""A model in fp32, computed one layer at a time for many rows, so that its weights are never together."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ortlm._utils.cpu import physical_cores
from ortlm.dtypes import Floats
from ortlm.graph.builder import Product
from ortlm.graph.states import past_name
from ortlm.graph.subgraphs import (
    HIDDEN,
    MASK,
    PER_LAYER,
    RESULT,
    Piece,
    cache_layer,
    carried,
    head_pieces,
    layer_pieces,
)
from ortlm.layerwise.alignment import BATCH_TOKENS
from ortlm.layerwise.paired_products import PairedProducts
from ortlm.layerwise.per_layer_inputs import LookedUp, PerLayerRows
from ortlm.layerwise.streams import spread
from ortlm.runtime.engine.huge_pages import give_back_freed_memory
from ortlm.runtime.engine.session import Session
from ortlm.spec import Decoder, mixer_states
from ortlm.weights.reader import Weights

# Rows of the head that are in memory at once, and bytes that they may take.
_HEAD_ROWS, _HEAD_BYTES = 16384, 64 << 20


# Values of a graph by name, of any element type.
Values = dict[str, Any]


class Change(Protocol):
    """Looks at each product of a layer before it is computed."""

    def __call__(
        self, product: Product, inputs: list[Floats], floats: list[Floats] | None, weight: Floats
    ) -> Floats:
        """Return the matrix [out, in] to compute with: ``weight``, or another one in its place.

        ``inputs`` is what it will be multiplied by, [B, S, in] for each batch, and may be changed in place;
        ``floats`` is the same of the model that is not changed, if that is computed alongside.
        """


@dataclass(frozen=True, slots=True)
class _Ready:
    piece: Piece
    # None where nothing is between two products.
    session: Session | None


class LayerwiseModel:
    """A decoder in fp32 over ``weights``, one layer at a time.

    ``rows`` of tokens become hidden states (``embed``), go through ``layer`` after ``layer``, and give ``logits``.
    Only one product's matrix is in memory at a time, next to the states of all rows. With ``integer``, two models
    that go through a layer together are multiplied by integers, see ``PairedProducts``. After the channels of a
    state come those of keys and values that later layers share, see ``subgraphs.carried``.
    """

    def __init__(self, weights: Weights, *, threads: int | None = None, integer: bool = False) -> None:
        self.spec: Decoder = weights.spec
        self._weights, self._threads, self._integer = weights, threads, integer
        self._layers: dict[tuple[object, ...], tuple[int, list[_Ready]]] = {}
        # Of the states, and of those that go alongside.
        self._per_layer: dict[bool, PerLayerRows] = {}
        self._heads: dict[int, list[_Ready]] = {}
        self._pool = ThreadPoolExecutor(threads or physical_cores())
        # Where matrices lie one after the other: new memory for each would take as long as reading it.
        self._matrix: Floats = np.empty(0, np.float32)
        # Weights are inputs of these graphs, so the files are small.
        self._folder = Path(tempfile.mkdtemp(prefix="ortlm-"))
        self._cleaned = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def close(self) -> None:
        """Remove the graphs' files."""
        self._layers.clear()
        self._heads.clear()
        self._matrix = np.empty(0, np.float32)
        self._pool.shutdown()
        self._cleaned()

    def embed(
        self,
        rows: Sequence[NDArray[np.int64]],
        change: Mapping[str, LookedUp] | None = None,
        *,
        alongside: bool = False,
    ) -> list[Floats]:
        """Return the first hidden states [B, S, H] of ``rows``; neighbors of equal length become one batch.

        ``change`` has what becomes of the rows of weights that tokens look up, by name. ``alongside``: the states
        are those that go through layers alongside, of the same ``rows`` without the change.
        """
        change = change or {}
        tokens = np.unique(np.concatenate(list(rows)))
        stack = self._weights.stack(["embed.weight"])
        known = np.concatenate([stack.rows(int(t), int(t) + 1) for t in tokens])
        if "embed.weight" in change:
            known = change["embed.weight"](known)
        if self.spec.embed_scale != 1.0:
            known = known * np.float32(self.spec.embed_scale)
        places = [np.searchsorted(tokens, batch) for batch in batches(rows)]
        if self.spec.per_layer_inputs is not None:
            self._per_layer[alongside] = PerLayerRows(
                self._weights, self.spec.per_layer_inputs, tokens, known, places, change
            )
        known = spread(self._weights, self.spec, known, change)
        return [known[place] for place in places]

    def layer(
        self,
        index: int,
        states: list[Floats],
        change: Change | None = None,
        alongside: list[Floats] | None = None,
    ) -> tuple[list[Floats], list[Floats]]:
        """Return the residual stream after layer ``index``, of ``states`` and of ``alongside``.

        ``change`` changes what ``states`` are multiplied by; ``alongside``, if given, goes through the layer as it
        is. Both lists are emptied, to save memory.
        """
        spec = self.spec
        apart = self._integer and change is not None and bool(alongside)
        ends = spec.altup is not None and index == len(spec.layers) - 1
        kind = (spec.layers[index], carried(spec, index), carried(spec, index + 1), ends, apart)
        if kind not in self._layers:
            pieces = layer_pieces(spec, index, apart=apart)
            self._layers[kind] = index, [self._ready(piece, f"layer-{index}") for piece in pieces]
            give_back_freed_memory()
        first, ready = self._layers[kind]
        given = [
            self._inputs(states, index, first, alongside=False),
            self._inputs(alongside or [], index, first, alongside=True),
        ]
        for at, part in enumerate(ready):
            paired = None
            if part.piece.result is not None and change is not None:
                paired = self._pair(part.piece, index, first, given, change)
            changed, plain = self._fed(part, index, first, given, change)
            needed = {name for later in ready[at + 1 :] for name in _needed(later.piece)} | {RESULT}
            if paired is not None:
                # Products are wide: those of one batch at a time are in memory.
                for values, others in zip(*given, strict=True):
                    self._multiply(part.piece, paired, values, others)
                    for both, fed in ((values, changed), (others, plain)):
                        self._execute(part, both, fed)
                        _drop(both, needed)
                continue
            for batches, fed in ((given[0], changed), (given[1], plain)):
                for values in batches:
                    self._execute(part, values, fed)
                    _drop(values, needed)
        done, other = ([values[RESULT] for values in batches] for batches in given)
        return done, other

    def _inputs(self, states: list[Floats], index: int, first: int, *, alongside: bool) -> list[Values]:
        batches: list[Values] = []
        source, mixer = cache_layer(self.spec, first), self.spec.layers[cache_layer(self.spec, index)].mixer
        rows = self._per_layer.get(alongside) or self._per_layer.get(False)
        per_layer = rows.of(index) if states and rows is not None else None
        for i, x in enumerate(states):
            past = {
                past_name(source, state): np.zeros((len(x), *(n or 0 for n in state.shape)), np.float32)
                for state in mixer_states(mixer)
            }
            batches.append({HIDDEN: x, MASK: np.ones(x.shape[:2], np.int64), **past})
            if per_layer is not None:
                batches[-1][PER_LAYER] = per_layer[i]
        states.clear()
        return batches

    def _pair(
        self, piece: Piece, index: int, first: int, given: list[list[Values]], change: Change
    ) -> PairedProducts:
        """Return what computes the product before ``piece`` for both models."""
        product = piece.product
        assert product is not None
        real, weight = self._of(product, index, first)
        inputs, floats = ([values[product.value] for values in batches] for batches in given)
        return PairedProducts(change(real, inputs, floats, weight), weight, self._pool, threads=self._threads)

    @staticmethod
    def _multiply(piece: Piece, paired: PairedProducts, values: Values, others: Values) -> None:
        product, result = piece.product, piece.result
        assert product is not None
        assert result is not None
        values[result], others[result] = paired(values[product.value], others[product.value])

    def _of(self, product: Product, index: int, first: int) -> tuple[Product, Floats]:
        """Return the product of layer ``index`` that is like that of layer ``first``, and its matrix."""
        # Layers that are alike share a graph, which was made for the first of them.
        names = [name.replace(f"layers.{first}.", f"layers.{index}.", 1) for name in product.parameters]
        weight: Floats = self._weights.read(names)
        return replace(product, parameters=tuple(names)), weight

    def _fed(
        self, part: _Ready, index: int, first: int, given: list[list[Values]], change: Change | None
    ) -> tuple[dict[str, Floats], dict[str, Floats]]:
        """Return the weights of a piece as ``change`` makes them, and as they are."""
        changed: dict[str, Floats] = {}
        plain: dict[str, Floats] = {}
        product = part.piece.product
        for item in part.piece.weights:
            # Layers that are alike share a graph, which was made for the first of them.
            names = [name.replace(f"layers.{first}.", f"layers.{index}.", 1) for name in item.parameters]
            is_factor = product is not None and item.tensor.name == product.weight
            # What is given to somebody else must not be overwritten.
            if is_factor and change is None and not item.transposed:
                weight = self._read_matrix(names, item.tensor.shape)
            else:
                weight = self._weights.read(names)
            other = weight
            if product is not None and is_factor and change is not None:
                inputs, floats = ([values[product.value] for values in batches] for batches in given)
                real = Product(tuple(names), product.weight, product.value, product.node)
                other = change(real, inputs, floats or None, weight)
            changed[item.tensor.name] = np.ascontiguousarray(other.T) if item.transposed else other
            if given[1]:
                plain[item.tensor.name] = np.ascontiguousarray(weight.T) if item.transposed else weight
        return changed, plain

    def _read_matrix(self, names: Sequence[str], shape: tuple[int, ...], start: int = 0) -> Floats:
        """Return a matrix, the weights' rows from ``start`` on, in memory that the next one is read into."""
        size = math.prod(shape)
        if self._matrix.size < size:
            self._matrix = np.empty(0, np.float32)  # both at once would be twice the largest
            self._matrix = np.empty(size, np.float32)
        matrix: Floats = self._matrix[:size].reshape(shape)
        self._weights.read_into(matrix, names, self._pool, start)
        return matrix

    def head_inputs(self, states: Sequence[Floats]) -> list[Floats]:
        """Return the states after the final norm."""
        ready = self._head(1)
        normalized = []
        for x in states:
            values = {HIDDEN: x}
            norm, product = ready[0], ready[1].piece.product
            assert product is not None
            fed = {w.tensor.name: self._weights.read(w.parameters) for w in norm.piece.weights}
            self._execute(norm, values, fed)
            normalized.append(values[product.value])
        return normalized

    def logits(self, states: Floats) -> Floats:
        """Return the logits [B, S, V] of the last layer's states [B, S, H]."""
        spec = self.spec
        out = np.empty((*states.shape[:2], spec.vocab), np.float32)
        name = "embed.weight" if spec.tied_head else "head.weight"
        stack = self._weights.stack([name])
        step = max(1, min(_HEAD_ROWS, _HEAD_BYTES // (4 * spec.hidden)))
        for start in range(0, spec.vocab, step):
            stop = min(start + step, spec.vocab)
            values = {HIDDEN: states}
            for ready in self._head(stop - start):
                fed = {}
                for item in ready.piece.weights:
                    if item.parameters == ("head.weight",) and not item.transposed:
                        fed[item.tensor.name] = self._read_matrix([name], item.tensor.shape, start)
                    elif item.parameters == ("head.weight",):
                        fed[item.tensor.name] = np.ascontiguousarray(stack.rows(start, stop).T)
                    elif item.parameters == ("head.bias",):
                        fed[item.tensor.name] = self._weights.stack(["head.bias"]).rows(start, stop)
                    else:
                        fed[item.tensor.name] = self._weights.read(item.parameters)
                self._execute(ready, values, fed)
            out[..., start:stop] = values[RESULT]
        # Whoever asks for logits is done with the layers, and may need room for another model.
        self._matrix = np.empty(0, np.float32)
        return out

    def _head(self, rows: int) -> list[_Ready]:
        if rows not in self._heads:
            self._heads[rows] = [self._ready(piece, f"head-{rows}") for piece in head_pieces(self.spec, rows)]
        return self._heads[rows]

    def _ready(self, piece: Piece, name: str) -> _Ready:
        return _Ready(piece, self._session(piece.model, name) if piece.outputs else None)

    def _session(self, model: ir.Model, name: str) -> Session:
        path = self._folder / f"{name}-{len(list(self._folder.iterdir()))}.onnx"
        ir.save(model, path)
        # What each session kept for its next run would add up. Threads that wait for it would keep the processor
        # from reading weights.
        options = {"enable_cpu_mem_arena": False, "session.intra_op.allow_spinning": "0"}
        return Session(path, threads=self._threads, options=options)

    @staticmethod
    def _execute(part: _Ready, values: Values, fed: Mapping[str, Floats]) -> None:
        """Add the results of a piece to ``values``."""
        session = part.session
        if session is None:
            return
        binding = session.binding()
        for name in part.piece.inputs:
            binding.input(name, session.tensor(values[name]))
        for name, array in fed.items():
            binding.input(name, session.tensor(array))
        for name in part.piece.outputs:
            binding.output(name, None)
        session.run(binding)
        for name in part.piece.outputs:
            values[name] = binding.result(name).numpy()


def _drop(values: Values, needed: Collection[str]) -> None:
    """Remove what is not ``needed`` any longer."""
    for name in set(values).difference(needed):
        del values[name]


def _needed(piece: Piece) -> set[str]:
    """Return which values of earlier pieces have to be kept for ``piece``."""
    if piece.result is None or piece.product is None:
        return set(piece.inputs)
    return {*piece.inputs, piece.product.value}


def batches(rows: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Return ``rows`` as batches [B, S] of neighbors of equal length, as many as run well together."""
    groups: list[list[NDArray[np.int64]]] = []
    for row in rows:
        last = groups[-1] if groups else []
        if last and len(last[0]) == len(row) and (len(last) + 1) * len(row) <= BATCH_TOKENS:
            last.append(row)
        else:
            groups.append([row])
    return [np.stack(group) for group in groups]
