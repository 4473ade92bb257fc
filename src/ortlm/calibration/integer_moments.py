"""Second moments by integer matmul, on processors where that is several times as fast as fp32."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ortlm._utils.cpu import physical_cores
from ortlm.dtypes import Floats
from ortlm.graph.integer_matmul import outer_products
from ortlm.quant.gptq import Moments, moments
from ortlm.runtime.engine.session import Session

# Tokens from which on it is worth it: experts see few.
_ENOUGH = 2048
# Tokens that are rounded at once, and stay in the processor's cache.
_CACHED = 128
# So many pieces share their steps: fewer would be rounded more finely, but the results have to be added up. Sums
# of four times as many still fit into 32 bits.
_GROUP = 64
# The zero point of what is on the left.
_ZERO = np.uint8(128)
# Added to a float32 of at most 22 bits, it leaves the nearest integer in the lowest bits.
_MAGIC = np.float32(1.5 * 2**23)
# Inputs of some tokens, [n, K], and those of the float model.
_Piece = tuple[Floats, Floats | None]


class IntegerMoments:
    """Computes ``Moments`` by integer matmul: inputs are rounded to 8 bits, with a step for each channel.

    That changes each sum of products by the errors of many tokens, which cancel out: far less than other tokens
    would. In the sums of squares they do not, so those are computed in fp32.
    """

    def __init__(self, *, threads: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(threads or physical_cores())
        # Threads that wait for it would keep the processor from rounding.
        self._session = Session(
            Path("outer_products.onnx"),
            threads=threads,
            options={"session.intra_op.allow_spinning": "0"},
            model=ir.to_proto(outer_products()).SerializeToString(),
        )

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def __call__(self, inputs: Sequence[Floats], floats: Sequence[Floats] | None = None) -> Moments:
        """Return what ``quant.gptq.moments`` does, nearly.

        Raises BadCheckpoint if they are not finite.
        """
        width = inputs[0].shape[-1]
        count = sum(x.size for x in inputs) // width
        if count < _ENOUGH:
            return moments(inputs, floats)
        pieces = list(_pieces(inputs, floats))
        second = np.zeros((width, width), np.float32)
        drift = None if floats is None else np.zeros((width, width), np.float32)
        squares = np.zeros(width, np.float32)
        # What is not finite is found in the result.
        with np.errstate(invalid="ignore", over="ignore"):
            for a in range(0, len(pieces), _GROUP):
                self._add(pieces[a : a + _GROUP], second, drift)
            for x, _ in pieces:
                squares += np.einsum("tk,tk->k", x, x)
            # What stands on the left and on the right is rounded in the same way, but summed in another order.
            second += second.T
            second /= np.float32(2 * count)
            if drift is not None:
                drift /= np.float32(count)
        np.fill_diagonal(second, squares / np.float32(count))
        return Moments.checked(second, drift)

    def _add(self, pieces: Sequence[_Piece], second: Floats, drift: Floats | None) -> None:
        """Add the sum of x xᵀ over tokens to ``second`` [K, K], and that of (f - x) xᵀ to ``drift``."""
        width = len(second)
        starts = [0, *itertools.accumulate(len(x) for x, _ in pieces)]
        reach = np.max(list(self._pool.map(_reach, pieces)), axis=0)
        # A channel of zeros has any step.
        step = np.maximum(reach / np.float32(127), np.float32(1e-30))
        left = np.empty((1 if drift is None else 2, starts[-1], width), np.uint8)
        right = np.empty((starts[-1], width), np.int8)

        def rounded(piece: _Piece, a: int) -> None:
            x, f = piece
            at = slice(a, a + len(x))
            right[at] = _rounded(x, step[:width])
            np.bitwise_xor(right[at].view(np.uint8), _ZERO, out=left[0, at])
            if f is not None:
                with np.errstate(invalid="ignore"):
                    apart = f - x
                np.bitwise_xor(_rounded(apart, step[width:]).view(np.uint8), _ZERO, out=left[1, at])

        list(self._pool.map(rounded, pieces, starts[:-1]))
        for codes, sums, at in zip(left, (second, drift), step.reshape(-1, width), strict=False):
            assert sums is not None
            binding = self._session.binding()
            given = {"left": codes, "right": right, "left_step": at[:, None], "right_step": step[:width]}
            for name, array in given.items():
                binding.input_array(name, array)
            binding.output("result", None)
            self._session.run(binding)
            sums += binding.result("result").numpy()


def _pieces(inputs: Sequence[Floats], floats: Sequence[Floats] | None) -> Iterator[_Piece]:
    """Yield the inputs of a few tokens each, [n, K], and those of the float model."""
    for i, x in enumerate(inputs):
        width = x.shape[-1]
        flat = x.reshape(-1, width)
        other = None if floats is None else floats[i].reshape(-1, width)
        for a in range(0, len(flat), _CACHED):
            yield flat[a : a + _CACHED], None if other is None else other[a : a + _CACHED]


def _reach(piece: _Piece) -> Floats:
    """Return the largest magnitude of each channel of x, and after them of each of f - x."""
    x, f = piece
    parts = [x]
    if f is not None:
        with np.errstate(invalid="ignore"):
            parts.append(f - x)
    reach: Floats = np.concatenate([np.maximum(part.max(axis=0), -part.min(axis=0)) for part in parts])
    return reach


def _rounded(x: Floats, step: Floats) -> NDArray[np.int8]:
    """Return ``x`` [n, K] as multiples of ``step`` [K], which reach from -127 to 127."""
    with np.errstate(invalid="ignore", over="ignore"):
        raised = x * (1 / step)
        raised += _MAGIC
    return raised.view(np.int32).astype(np.int8)
