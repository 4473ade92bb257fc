"""A fixed rotation of the residual stream, after which no channel stands out."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from ortlm.dtypes import Array, Floats


class Rotation:
    """An orthogonal matrix Q [size, size] that mixes all channels alike: random signs, then Hadamard matrices.

    What of ``size`` is no power of two is mixed by a random rotation of its own. The same ``seed`` gives the
    same Q. Source: Ashkboos et al. 2024 (QuaRot), section 4, the rotation that is folded into weights.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        self._power = size & -size

    @cached_property
    def _signs(self) -> Floats:
        return np.random.default_rng([self.seed, 0]).choice(np.array([-1, 1], np.float32), self.size)

    @cached_property
    def _odd(self) -> Floats:
        odd = self.size // self._power
        q, r = np.linalg.qr(np.random.default_rng([self.seed, 1]).standard_normal((odd, odd)))
        return np.asarray(q * np.sign(np.diagonal(r)), np.float32)

    def rows(self, x: Array) -> Array:
        """Return ``x`` Q for ``x`` float32 [..., size]."""
        mixed = np.ascontiguousarray(x * self._signs).reshape(-1, self.size // self._power, self._power)
        if mixed.shape[1] > 1:
            mixed = np.einsum("rop,on->rnp", mixed, self._odd)
        step = 1
        while step < self._power:
            pairs = mixed.reshape(len(mixed), -1, 2, step)
            mixed = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
            step *= 2
        mixed = mixed.reshape(x.shape) * np.float32(self._power**-0.5)
        return np.asarray(mixed, np.float32)

    def outputs(self, x: Array) -> Array:
        """Return Qᵀ ``x`` for ``x`` float32 [size, ...]."""
        flat = x.reshape(self.size, -1)
        return np.ascontiguousarray(self.rows(np.ascontiguousarray(flat.T)).T).reshape(x.shape)
