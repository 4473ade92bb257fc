"""What ``Generator.append_tokens`` is given: padded arrays to rows of their own lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ortlm.genai.errors import GenaiError, GenaiTypeError
from ortlm.genai.grid import Int32Ids
from ortlm.genai.tensors import Tensor


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids int32 [B, S] and which of them are no padding; ``fed`` is what the model gets if that differs."""

    tokens: Int32Ids
    real: NDArray[np.bool_]
    fed: list[list[int]] | None = None

    @property
    def width(self) -> int:
        """Tokens of each row, padding included."""
        return len(self.tokens[0])

    @property
    def rows(self) -> list[list[int]]:
        """The tokens of each row without padding."""
        return [row[: int(real.sum())].tolist() for row, real in zip(self.tokens, self.real, strict=True)]


def as_prompts(given: Tensor | ArrayLike, batch: int, pad: int | None) -> Prompts:
    """Return ``given`` as ``batch`` rows, of which trailing ``pad`` is cut off where lengths are not known.

    A single row is taken as it is. Raises GenaiError for other shapes and for what is no token id.
    """
    array = given.as_numpy() if isinstance(given, Tensor) else np.asarray(given)
    if not array.size:
        raise GenaiError("input_ids is empty: append one token at least.")
    if array.dtype.kind in "OUS":
        raise GenaiTypeError(f"append_tokens takes token ids or a Tensor, found {type(given).__name__}.")
    if array.dtype.kind not in "iub":
        raise GenaiError(f"append_tokens takes whole numbers, found {array.dtype.name}.")
    if array.ndim < 2:
        if array.size % batch:
            raise GenaiError(f"{array.size} tokens cannot be {batch} rows of equal length (batch_size).")
        array = array.reshape(batch, -1)
    if array.ndim != 2 or len(array) != batch:
        raise GenaiError(
            f"append_tokens takes shape [{batch}, S], because batch_size is {batch}; found {list(array.shape)}. "
            f"Set the search option batch_size to the number of prompts."
        )
    lengths = given.lengths if isinstance(given, Tensor) else None
    if lengths is None:
        lengths = tuple(len(row) if batch == 1 else _without(row, pad) for row in array)
    real = np.arange(array.shape[1]) < np.array(lengths)[:, None]
    return Prompts(array.astype(np.int32), real)


def _without(row: NDArray[Any], pad: int | None) -> int:
    """Return the length of ``row`` without trailing ``pad``, at least 1."""
    kept = np.flatnonzero(row != pad) if pad is not None else np.arange(len(row))
    return int(kept[-1]) + 1 if len(kept) else 1
