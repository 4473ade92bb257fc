"""Model types that are known, and why they cannot be built."""

from __future__ import annotations

from collections.abc import Mapping

REFUSED: Mapping[str, str] = {
    "phi3small": (
        'Phi-3-small has block-sparse attention ("blocksparse_block_size"), and transformers, which every family '
        "is compared with, does not have this model: nothing would show that its graph is right. Use Phi-3-mini, "
        "Phi-3-medium or Phi-4 instead."
    ),
}
