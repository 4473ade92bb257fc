"""Turn Hugging Face language models into quantized ONNX models and run them with ONNX Runtime.

    import ortlm

    ortlm.build("Phi-3.5-mini-instruct", output="phi", precision="int4", target="cpu")
    lm = ortlm.load("phi")
    print(lm.generate("The capital of France is", max_new_tokens=16))

Nothing is imported before it is used: running a model never loads what builds one.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from ortlm import errors
from ortlm._version import __version__

# ONNX Runtime's wheels send telemetry unless this is set before their library is loaded; the hub's library adds it
# to its requests. Processes that are started from here inherit both. What a user has set stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from ortlm.artifact import Artifact, open_artifact
    from ortlm.builder.pipeline import build
    from ortlm.runtime.generation.generator import Generator
    from ortlm.runtime.generation.stream import Generation
    from ortlm.runtime.language_model import LanguageModel, load
    from ortlm.runtime.multimodal.addresses import public_address
    from ortlm.runtime.sampling.settings import Settings
    from ortlm.runtime.structured_output.guidance import Guidance

_LAZY = {
    "build": "ortlm.builder.pipeline",
    "load": "ortlm.runtime.language_model",
    "LanguageModel": "ortlm.runtime.language_model",
    "Generation": "ortlm.runtime.generation.stream",
    "Generator": "ortlm.runtime.generation.generator",
    "Guidance": "ortlm.runtime.structured_output.guidance",
    "Settings": "ortlm.runtime.sampling.settings",
    "Artifact": "ortlm.artifact",
    "open_artifact": "ortlm.artifact",
    "public_address": "ortlm.runtime.multimodal.addresses",
}

__all__ = [
    "Artifact",
    "Generation",
    "Generator",
    "Guidance",
    "LanguageModel",
    "Settings",
    "__version__",
    "build",
    "errors",
    "load",
    "open_artifact",
    "public_address",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ortlm' has no attribute {name!r}")
    found = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
