"""GPTQ against a slow reference, and what calibrated rounding promises."""

from __future__ import annotations

import numpy as np
import pytest

from ortlm.errors import BadCheckpoint
from ortlm.quant.awq import channel_scales
from ortlm.quant.gptq import corrected, feedback, gptq, moments
from ortlm.quant.pack import unpack
from ortlm.quant.rtn import clip_search, clipped_range, dequantize, rtn
from ortlm.quant.scheme import Scheme
from tests.architectures.oracle import relative_error


def inputs(count: int = 600, width: int = 96, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    # Correlated, and some of them large.
    mixed = random.standard_normal((count, width)) @ random.standard_normal((width, width))
    mixed[:, ::17] *= 8
    return mixed.astype(np.float32)


def weight(rows: int = 24, width: int = 96) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((rows, width)).astype(np.float32)


def loss(w: np.ndarray, other: np.ndarray, x: np.ndarray) -> float:
    return float(np.square(x @ (w - other).T).sum())


def plain_gptq(
    w: np.ndarray, scheme: Scheme, h: np.ndarray, order: np.ndarray, s: np.ndarray, z: np.ndarray
) -> np.ndarray:
    """Frantar et al. 2022, algorithm 1, one column at a time, through the inverse."""
    w = w[:, order].astype(np.float64).copy()
    inverse = np.linalg.inv(h[np.ix_(order, order)].astype(np.float64))
    upper = np.linalg.cholesky(inverse).T
    found = np.zeros_like(w)
    for i, k in enumerate(order):
        scale, zero = s[:, k // scheme.block], z[:, k // scheme.block]
        code = np.clip(np.rint(w[:, i] / scale + zero), 0, 2**scheme.bits - 1)
        found[:, i] = (code - zero) * scale
        error = (w[:, i] - found[:, i]) / upper[i, i]
        w[:, i:] -= np.outer(error, upper[i, i:])
    back = np.empty_like(found)
    back[:, order] = found
    return back


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [16, 64])
def test_equals_the_plain_algorithm(bits: int, block: int, symmetric: bool) -> None:
    scheme = Scheme(bits=bits, block=block, symmetric=symmetric)
    w, found = weight(), moments([inputs()])
    carry = feedback(found, damping=0.05)
    scales, zeros = clipped_range(w, scheme, carry.importance)
    h = found.second + 0.05 * np.diagonal(found.second).mean() * np.eye(96)
    want = plain_gptq(w, scheme, h, carry.order, scales, zeros)
    got = dequantize(gptq(w, scheme, carry, scales, zeros), scheme, 96)
    # Ties may fall either way in float32.
    assert np.mean(np.abs(got - want) > 1e-4) < 0.02


def test_each_step_loses_less() -> None:
    scheme, w, x = Scheme(bits=4, block=32), weight(), inputs()
    found = moments([x])
    carry = feedback(found)
    losses = [
        loss(w, dequantize(packed, scheme, 96), x)
        for packed in (
            rtn(w, scheme),
            clip_search(w, scheme, found.importance),
            *(
                gptq(w, scheme, carry, *clipped_range(w, scheme, carry.importance), sweeps=n)
                for n in (0, 1, 4)
            ),
        )
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[4] < 0.97 * losses[2]


@pytest.mark.parametrize("symmetric", [False, True])
def test_after_many_sweeps_no_code_is_better(symmetric: bool) -> None:
    """Any code one up or down, and any scale a little off, makes what is minimized larger."""
    scheme = Scheme(bits=4, block=32, symmetric=symmetric)
    w, found = weight(width=80), moments([inputs()[:, :80]])
    carry = feedback(found, damping=0.1)
    packed = gptq(w, scheme, carry, *clipped_range(w, scheme, carry.importance), sweeps=60)
    got = dequantize(packed, scheme, 80).astype(np.float64)
    h = found.second + 0.1 * np.diagonal(found.second).mean() * np.eye(80)
    slope, curve = (w - got) @ h, np.diagonal(h)
    scales = packed.scales.repeat(32, axis=1)[:, :80]
    zeros = 8 if packed.zeros is None else unpack(packed.zeros, 4, 3).repeat(32, axis=1)[:, :80].astype(int)
    codes = np.rint(got / scales) + zeros
    for step in (1, -1):
        change = step * scales
        gain = 2 * slope * change - curve * change**2
        possible = (codes + step >= 0) & (codes + step <= 15)
        assert gain[possible].max() < 1e-4 * np.square(w @ np.linalg.cholesky(h)).sum(axis=1).mean()
    for factor in (0.99, 1.01):
        for a in range(0, 80, 32):
            change = np.zeros_like(got)
            change[:, a : a + 32] = got[:, a : a + 32] * (factor - 1)
            gain = 2 * (slope * change).sum(axis=1) - ((change @ h) * change).sum(axis=1)
            assert (gain < 1e-4).all()


def test_widths_that_no_block_divides() -> None:
    scheme = Scheme(bits=4, block=64)
    w, found = weight(width=96), moments([inputs()])
    packed = gptq(w, scheme, feedback(found), *clipped_range(w, scheme, None))
    assert packed.values.shape == (24, scheme.row_bytes(96))
    # What is after the last input decodes to 0.
    assert not dequantize(packed, scheme, 128)[:, 96:].any()


def test_silent_inputs() -> None:
    x = inputs()
    x[:, 10:40] = 0
    scheme, w = Scheme(bits=4, block=32), weight()
    packed = gptq(w, scheme, feedback(moments([x])), *clipped_range(w, scheme, None))
    assert np.isfinite(packed.scales).all()
    # They are rounded as if nothing were known of them.
    assert np.abs(dequantize(packed, scheme, 96) - w)[:, 10:40].max() < 0.5


def test_correction_is_least_squares() -> None:
    x, w = inputs(), weight()
    f = x + 0.1 * inputs(seed=1)
    carry = feedback(moments([x[:300], x[300:]], [f[:300], f[300:]]), damping=1e-6)
    wanted = f.astype(np.float64) @ w.T
    best = np.linalg.lstsq(x.astype(np.float64), wanted, rcond=None)[0].T

    def off(other: np.ndarray) -> float:
        return float(np.square(wanted - x @ other.T).sum())

    assert off(corrected(w, carry)) < 1.01 * off(best) < off(w)
    assert corrected(w, feedback(moments([x]))) is w


@pytest.mark.parametrize("damping", [0.2, 1e-3])
def test_many_inputs(damping: float) -> None:
    """More than are rounded and solved for between two large products; factors in float32 and in float64."""
    width, scheme = 600, Scheme(bits=4, block=32)
    x = inputs(1200, width)
    f = x + 0.1 * inputs(1200, width, seed=1)
    found, w = moments([x], [f]), weight(16, width)
    carry, shared = feedback(found, damping=damping), feedback(found, damping=damping, rows=width)
    added = damping * np.diagonal(found.second).mean() * np.eye(width)
    h = found.second.astype(np.float64) + added
    ordered = h[np.ix_(carry.order, carry.order)]
    upper = carry.carried.astype(np.float64)
    assert relative_error(upper @ np.diag(carry.spread) @ upper.T, ordered) < 1e-5
    assert (np.tril(carry.carried, -1) == 0).all()
    assert found.drift is not None
    want = w + w @ found.drift @ np.linalg.inv(h)
    for known in (carry, shared):
        assert relative_error(corrected(w, known) - w, want - w) < 2e-3
    assert shared.drift is None
    scales, zeros = clipped_range(w, scheme, carry.importance)
    codes = dequantize(gptq(w, scheme, carry, scales, zeros), scheme, width)
    plain = plain_gptq(w, scheme, h, carry.order, scales, zeros)
    # A near tie in one code changes those after it.
    assert (np.abs(codes - plain) < 1e-4).mean() > 0.98
    assert abs(loss(w, codes, x) / loss(w, plain, x) - 1) < 0.01


def test_awq_scales_help_rounding() -> None:
    scheme, w, x = Scheme(bits=4, block=32), weight(), inputs()
    scales = channel_scales(w, scheme, moments([x]))
    scaled = dequantize(rtn(w * scales, scheme), scheme, 96) / scales
    assert loss(w, scaled, x) < loss(w, dequantize(rtn(w, scheme), scheme, 96), x)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_refused(value: float) -> None:
    x = inputs(40)
    x[3, 5] = value
    with pytest.raises(BadCheckpoint, match="NaN or infinite"), np.errstate(invalid="ignore"):
        moments([x])
