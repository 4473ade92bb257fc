"""From ``config.json`` to a spec: one file per family, found by the model types that it names.

A family file has ``MODEL_TYPES`` and ``describe(config)``; to add a family, add a file.
"""

from __future__ import annotations

from ortlm.architectures._find import describe, find, model_types

__all__ = ["describe", "find", "model_types"]
