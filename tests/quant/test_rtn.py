"""Quantizers against ONNX Runtime's own, and what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi import _pybind_state as ort

from ortlm.errors import BadOption
from ortlm.quant.algorithms import quantizer
from ortlm.quant.pack import pack, unpack
from ortlm.quant.rtn import clip_search, dequantize, rtn
from ortlm.quant.scheme import BITS, BLOCKS, Scheme


def weights(rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, inputs)).astype(np.float32)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bits", BITS)
def test_rtn_equals_onnxruntime(bits: int, block: int, symmetric: bool) -> None:
    rows, inputs = 24, 512
    w = weights(rows, inputs)
    blocks = inputs // block
    codes = np.zeros((rows, blocks, block * bits // 8), np.uint8)
    scales = np.zeros(rows * blocks, np.float32)
    zeros = np.zeros(rows * -(-blocks * bits // 8), np.uint8)
    quantize = getattr(ort, f"quantize_matmul_{bits}bits", None)
    if quantize is None:
        pytest.skip(f"this onnxruntime does not quantize to {bits} bits")
    quantize(codes, np.ascontiguousarray(w.T), scales, zeros, block, rows, inputs, symmetric)
    ours = rtn(w, Scheme(bits=bits, block=block, symmetric=symmetric))
    np.testing.assert_array_equal(ours.values, codes.reshape(rows, -1))
    np.testing.assert_array_equal(ours.scales, scales.reshape(rows, -1))
    if ours.zeros is not None:
        # Bits after the last zero point of a row mean nothing, and ONNX Runtime does not clear them.
        theirs = unpack(zeros.reshape(rows, -1), bits, blocks)
        np.testing.assert_array_equal(unpack(ours.zeros, bits, blocks), theirs)


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from(BITS),
    block=st.sampled_from(BLOCKS),
    symmetric=st.booleans(),
    algorithm=st.sampled_from(["rtn", "clip_search"]),
    rows=st.integers(1, 5),
    inputs=st.integers(1, 300),
    seed=st.integers(0, 99),
)
def test_shapes_and_error(
    bits: int, block: int, symmetric: bool, algorithm: str, rows: int, inputs: int, seed: int
) -> None:
    scheme = Scheme(bits=bits, block=block, symmetric=symmetric, algorithm=algorithm)
    w = weights(rows, inputs, seed)
    packed = quantizer(algorithm)(w, scheme)
    assert packed.values.shape == (rows, scheme.row_bytes(inputs))
    assert packed.scales.shape == (rows, scheme.blocks(inputs))
    assert symmetric == (packed.zeros is None)
    if packed.zeros is not None:
        assert packed.zeros.shape == (rows, scheme.zero_row_bytes(inputs))
    back = dequantize(packed, scheme, inputs)
    assert back.shape == w.shape
    if algorithm == "rtn":
        # A rounded zero point may clip an end of the range by up to one more half step.
        steps = np.abs(packed.scales).repeat(block, axis=-1)[:, :inputs]
        assert (np.abs(back - w) <= steps * 1.001 + 1e-7).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_clip_search_loses_less(bits: int, symmetric: bool) -> None:
    w = np.random.default_rng(1).standard_t(4, (64, 512)).astype(np.float32)
    scheme = Scheme(bits=bits, block=128, symmetric=symmetric)

    def loss(packed: object) -> float:
        weight = np.abs(w) + np.sqrt(np.mean(w**2))
        return float((weight * (dequantize(packed, scheme, 512) - w) ** 2).sum())  # type: ignore[arg-type]

    assert loss(clip_search(w, scheme)) < loss(rtn(w, scheme))


def test_zero_blocks_stay_zero() -> None:
    w = np.zeros((2, 64), np.float32)
    for symmetric in (True, False):
        scheme = Scheme(bits=4, block=32, symmetric=symmetric)
        for algorithm in ("rtn", "clip_search"):
            packed = quantizer(algorithm)(w, scheme)
            assert np.isfinite(packed.scales).all()
            assert not dequantize(packed, scheme, 64).any()


@given(bits=st.sampled_from(BITS), count=st.integers(1, 50), seed=st.integers(0, 9))
def test_pack_and_back(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (3, count)).astype(np.uint8)
    np.testing.assert_array_equal(unpack(pack(codes, bits), bits, count), codes)


def test_wrong_schemes() -> None:
    with pytest.raises(BadOption, match=r"block_size must be one of 16, 32.*got 48"):
        Scheme(bits=4, block=48)
    with pytest.raises(BadOption, match="bits must be one of 2, 3, 4, 5, 6, 8; got 7"):
        Scheme(bits=7, block=32)
    with pytest.raises(BadOption, match="accuracy_level"):
        Scheme(bits=4, block=32, accuracy_level=5)
    with pytest.raises(BadOption, match=r"Did you mean: clip_search"):
        quantizer("clip_serch")
