"""GPTQ: rounding one input after the other, each compensating for the errors of those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ortlm.dtypes import Floats
from ortlm.errors import BadCheckpoint
from ortlm.quant.pack import pack
from ortlm.quant.rtn import Packed, stored
from ortlm.quant.scheme import Scheme

# Inputs that are rounded, and unknowns that are solved for, between two large products. What the inputs of a large
# step owe to each other is added up in small steps.
_STEP, _SMALL_STEP, _SOLVED = 256, 32, 256
# Up to this condition number, factors in float32 are right to a few thousandths.
_WELL_CONDITIONED = 1 << 17


@dataclass(frozen=True, slots=True)
class Moments:
    """What calibration saw of a matrix's inputs x: ``second`` float32 [K, K] is the mean of x xᵀ over tokens.

    ``drift`` [K, K] is the mean of (f - x) xᵀ, if the inputs f of the float model at the same tokens are known.
    """

    second: Floats
    drift: Floats | None = None

    @classmethod
    def checked(cls, second: Floats, drift: Floats | None) -> Moments:
        """Return them if they are finite; raises BadCheckpoint if they are not."""
        if not (np.isfinite(second).all() and (drift is None or np.isfinite(drift).all())):
            raise BadCheckpoint(
                "calibration computes inputs of a matrix that are NaN or infinite. Usual causes: weights that "
                "are, or a BLAS of numpy that is wrong on this processor. Try --recipe fast, which does not "
                "calibrate."
            )
        return cls(second, drift)

    @property
    def importance(self) -> Floats:
        """How much an error of each input's weights counts: its mean square, [K], at least a trace of it."""
        diagonal = np.diagonal(self.second)
        least = np.float32(1e-6) * max(float(diagonal.mean()), 1e-30)
        squares: Floats = np.maximum(diagonal, least).astype(np.float32)
        return squares


def moments(inputs: Sequence[Floats], floats: Sequence[Floats] | None = None) -> Moments:
    """Return the moments of ``inputs`` [..., K]; ``floats`` are the same of the float model.

    Raises BadCheckpoint if they are not finite.
    """
    width = inputs[0].shape[-1]
    second = np.zeros((width, width), np.float32)
    drift = None if floats is None else np.zeros((width, width), np.float32)
    count = 0
    for i, x in enumerate(inputs):
        flat = x.reshape(-1, width)
        second += flat.T @ flat
        count += len(flat)
        if drift is not None and floats is not None:
            drift += (floats[i].reshape(-1, width) - flat).T @ flat
    second /= np.float32(count)
    if drift is not None:
        drift /= np.float32(count)
    return Moments.checked(second, drift)


@dataclass(frozen=True, slots=True)
class Feedback:
    """In which ``order`` inputs are rounded, int64 [K], and how errors carry over.

    The moments in that order, damped, are A D Aᵀ: A, ``carried`` float32 [K, K], is unit upper triangular and D,
    ``spread`` [K], diagonal. What is added to input k before rounding is the sum over earlier j of error j times
    ``carried[j, k]``. ``second`` [K, K] is that of ``Moments``, to whose diagonal ``damped`` is added. ``drift``
    [K, K] is too; where many rows share it, ``gain`` [K, K] is there in its place: what a row has to be multiplied
    by to be corrected.
    """

    order: NDArray[np.int64]
    carried: Floats
    spread: Floats
    second: Floats
    damped: np.float32
    drift: Floats | None = None
    gain: Floats | None = None

    @property
    def importance(self) -> Floats:
        """How much the rounding of each input counts, [K]: what no later one can compensate for."""
        spread = np.empty_like(self.spread)
        spread[self.order] = self.spread
        return spread


def feedback(seen: Moments, *, damping: float = 0.2, rows: int = 0) -> Feedback:
    """Return how errors carry over, given the second moments of the inputs.

    ``damping`` times the mean of the diagonal is added to it, so that inputs that calibration hardly saw keep
    close to their weights. The most important inputs come first: later ones compensate for their errors. ``rows``
    is how many rows will be corrected.

    With H = A D Aᵀ, A unit upper triangular, rounding w + (w - ŵ) (A - I) one input after the other minimizes each
    term of (w - ŵ) H (w - ŵ)ᵀ in turn.
    Source: Frantar et al. 2022 (GPTQ), in the form of Chee et al. 2023 (QuIP, LDLQ), which needs no inverse.
    """
    order = np.argsort(-seen.importance, kind="stable")
    backwards = order[::-1]
    # The largest eigenvalue is at most the diagonal's sum, and the smallest at least what is added. Where those
    # are farther apart float32 says too little: the inputs of a trained model are nearly dependent.
    enough = len(order) <= damping * _WELL_CONDITIONED
    h: NDArray[np.floating] = seen.second[np.ix_(backwards, backwards)]
    if not enough:
        h = h.astype(np.float64)
    diagonal = np.einsum("ii->i", h)
    damped = damping * max(float(diagonal.mean()), 1e-30)
    diagonal += damped
    # The Cholesky factor of the reversed matrix, reversed, is the upper triangular one of the matrix itself.
    _factorize(h)
    spread = np.diagonal(h).copy()
    h /= spread
    carried = np.ascontiguousarray(h[::-1, ::-1], dtype=np.float32)
    squares: Floats = (spread[::-1] ** 2).astype(np.float32)
    found = Feedback(order, carried, squares, seen.second, np.float32(damped), seen.drift)
    if seen.drift is None or rows < len(order):
        return found
    return replace(found, drift=None, gain=_divided(seen.drift, found))


def _factorize(h: NDArray[np.floating]) -> None:
    """Make L of the symmetric ``h`` [K, K], L Lᵀ = h, L lower triangular.

    numpy's own takes five times the memory of h, and four times as long.
    """
    size = len(h)
    for a in range(0, size, _SOLVED):
        b = min(a + _SOLVED, size)
        if a:
            h[a:, a:b] -= h[a:, :a] @ h[a:b, :a].T
        h[a:b, a:b] = np.linalg.cholesky(h[a:b, a:b])
        h[b:, a:b] = h[b:, a:b] @ np.linalg.inv(h[a:b, a:b]).T
        h[a:b, b:] = 0


def corrected(weight: Floats, carry: Feedback) -> Floats:
    """Return the matrix [rows, K] whose products with the inputs come nearest to those of the float model.

    Errors of earlier layers change what a matrix is multiplied by, from f to x. The least squares solution of
    w' x = w f is w + w E[(f - x) xᵀ] E[x xᵀ]⁻¹, the last factor damped as in ``feedback``.
    Source: the asymmetric objective of Li et al. 2025 (GPTAQ), solved before rounding.
    """
    if carry.gain is not None:
        change = weight @ carry.gain
    elif carry.drift is not None:
        change = _divided(weight @ carry.drift, carry)
    else:
        return weight
    change += weight
    return change


def _divided(right: Floats, carry: Feedback) -> Floats:
    """Return ``right`` [rows, K] times the inverse of the damped moments."""
    solved = right.take(carry.order, axis=1)
    _solve_lower(solved, carry.carried)
    solved /= carry.spread
    _solve_upper(solved, carry.carried)
    return solved.take(np.argsort(carry.order), axis=1)


def _solve_lower(right: Floats, upper: Floats) -> None:
    """Make z of ``right`` [rows, K], where z Aᵀ = ``right``, A unit upper triangular."""
    size = len(upper)
    for a in reversed(range(0, size, _SOLVED)):
        b = min(a + _SOLVED, size)
        if b < size:
            right[:, a:b] -= right[:, b:] @ upper[a:b, b:].T
        right[:, a:b] = right[:, a:b] @ np.linalg.inv(upper[a:b, a:b]).T


def _solve_upper(right: Floats, upper: Floats) -> None:
    """Make z of ``right`` [rows, K], where z A = ``right``, A unit upper triangular."""
    size = len(upper)
    for a in range(0, size, _SOLVED):
        b = min(a + _SOLVED, size)
        if a:
            right[:, a:b] -= right[:, :a] @ upper[:a, a:b]
        right[:, a:b] = right[:, a:b] @ np.linalg.inv(upper[a:b, a:b])


def gptq(
    weight: Floats, scheme: Scheme, carry: Feedback, scales: Floats, zeros: Floats, *, sweeps: int = 0
) -> Packed:
    """Round ``weight`` float32 [rows, K] so that its products with the inputs of ``carry`` change least.

    ``scales`` and ``zeros`` [rows, blocks] are fixed before (static groups), for example by ``clipped_range``.
    Then ``sweeps`` times each code and each scale is chosen again, given all others.
    """
    rows, inputs = weight.shape
    top = np.float32((1 << scheme.bits) - 1)
    order, carried = carry.order, carry.carried
    # Inputs are rows here: each is read and written as one contiguous stretch.
    w = np.ascontiguousarray(weight.T[order])
    error = np.empty_like(w)
    codes = np.zeros((scheme.blocks(inputs) * scheme.block, rows), np.uint8)
    scale_of, zero_of = np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T)
    block_of = order // scheme.block
    for start in range(0, inputs, _SMALL_STEP):
        a, b = start - start % _STEP, min(start + _SMALL_STEP, inputs)
        if start == a:
            end = min(a + _STEP, inputs)
            aims = w[a:end] + carried[:a, a:end].T @ error[:a] if a else w[a:end].copy()
        else:
            aims[start - a : b - a] += carried[a:start, start:b].T @ error[a:start]
        for k in range(start, b):
            code = aims[k - a]
            if k > start:
                code += carried[start:k, k] @ error[start:k]
            scale, zero = scale_of[block_of[k]], zero_of[block_of[k]]
            code /= scale
            code += zero
            np.rint(code, out=code)
            np.clip(code, 0, top, out=code)
            codes[order[k]] = code
            code -= zero
            code *= scale
            np.subtract(w[k], code, out=error[k])
    if sweeps:
        scale_of = scale_of.copy()
        _sweep(codes, scale_of, zero_of, np.ascontiguousarray(weight.T), carry, scheme, sweeps)
        scales = np.ascontiguousarray(scale_of.T)
    # What comes after the last input is never multiplied by anything but 0; it decodes to 0 as well.
    codes[inputs:] = zero_of[-1].astype(np.uint8)
    return Packed(
        values=pack(np.ascontiguousarray(codes.T), scheme.bits),
        scales=scales,
        zeros=None if scheme.symmetric else pack(zeros.astype(np.uint8), scheme.kernel_bits),
    )


def _sweep(
    codes: NDArray[np.uint8],
    scales: Floats,
    zeros: Floats,
    weight: Floats,
    carry: Feedback,
    scheme: Scheme,
    count: int,
) -> None:
    """Choose ``codes`` [K, rows] and ``scales`` [blocks, rows] again in place, ``weight`` [K, rows] being the aim.

    A code's best value, all others fixed, is where (w - ŵ) H (w - ŵ)ᵀ is least along it; after the codes of a
    block its scale is chosen in the same way. Rounding one input after the other never returns to the first ones.
    Source: cyclic coordinate descent, as in Behdin et al. 2023 (QuantEase), which leaves scales as they are.
    """
    inputs, top = len(weight), np.float32((1 << scheme.bits) - 1)
    blocks = [(a, min(a + scheme.block, inputs)) for a in range(0, inputs, scheme.block)]
    error = np.empty_like(weight)
    for block, (a, b) in enumerate(blocks):
        error[a:b] = weight[a:b] - (codes[a:b] - zeros[block]) * scales[block]
    for _ in range(count):
        for block, (a, b) in enumerate(blocks):
            scale, zero = scales[block], zeros[block]
            near = carry.second[a:b, a:b].copy()
            np.einsum("ii->i", near)[...] += carry.damped
            slope = carry.second[a:b] @ error + carry.damped * error[a:b]
            levels = codes[a:b] - zero
            moved = np.empty_like(levels)
            for k in range(b - a):
                found = weight[a + k] - error[a + k]
                found += (slope[k] - near[k, :k] @ moved[:k]) / near[k, k]
                found /= scale
                found += zero
                np.rint(found, out=found)
                np.clip(found, 0, top, out=found)
                found -= zero
                np.multiply(found - levels[k], scale, out=moved[k])
                levels[k] = found
            slope -= near @ moved
            weighed = near @ levels
            # All levels are 0 where all codes are the zero point.
            bend = np.maximum(np.einsum("kr,kr->r", levels, weighed), np.float32(1e-30))
            better = stored(scale + np.einsum("kr,kr->r", levels, slope) / bend, scheme)
            better = np.where(np.abs(better / scale - 1) < 0.5, better, scale)
            scales[block] = better
            codes[a:b] = levels + zero
            error[a:b] = weight[a:b] - levels * better
