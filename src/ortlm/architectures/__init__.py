"""From ``config.json`` to a spec: one file per family, found by the model types that it names.

A family file has ``MODEL_TYPES`` and ``describe(config)``; to add a family, add a file. ``GGUF`` in it says how
GGUF files hold the family's models.
"""

from __future__ import annotations

from ortlm.architectures._find import describe, find, find_gguf, gguf_forms, model_types

__all__ = ["describe", "find", "find_gguf", "gguf_forms", "model_types"]
