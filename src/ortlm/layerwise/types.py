"""Types of what watches a model while it is computed layer by layer."""

from __future__ import annotations

from collections.abc import Callable

from ortlm.dtypes import Floats

# Is given layer, chunk, and the normalized states [S, H] that the layer's attention projections multiply; the
# head's input comes as the layer after the last one.
Observe = Callable[[int, int, Floats], None]
