"""AWQ: scales that move the difficulty of important inputs from one matrix into the weights before it."""

from __future__ import annotations

import numpy as np

from ortlm.dtypes import Floats
from ortlm.quant.gptq import Moments
from ortlm.quant.rtn import dequantize, rtn
from ortlm.quant.scheme import Scheme

# Rows whose error is measured; the scales are for all rows alike.
_SAMPLE = 256
_EXPONENTS = 16


def channel_scales(weight: Floats, scheme: Scheme, seen: Moments) -> Floats:
    """Return factors [K] of the columns of ``weight`` [rows, K] with which rounding it loses least.

    They are powers of the inputs' root mean square, from 0 (all ones) to 1; the loss of each power is measured on
    some of the rows, with the inputs' full second moments.
    Source: Lin et al. 2023 (AWQ), section 3.2.
    """
    sample = weight[:: -(-len(weight) // _SAMPLE)]
    reach = np.sqrt(seen.importance)
    best, least = np.ones(len(reach), np.float32), np.inf
    for exponent in np.linspace(0, 1, _EXPONENTS, endpoint=False):
        scales = reach**exponent
        scales = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
        error = dequantize(rtn(sample * scales, scheme), scheme, sample.shape[1]) / scales - sample
        loss = float(np.einsum("ij,ij->", error @ seen.second, error))
        if loss < least:
            best, least = scales, loss
    return best
